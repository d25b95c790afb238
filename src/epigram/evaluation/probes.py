"""Experiments that a score must pass to be believed. Each treats model and scorer together as a black box.

A probe is given functions of a stream of tokens and says what it found; it knows nothing of how a score is made, so a
model that peeks, a cache that carries too much, and a scorer that counts twice are caught alike. Source: the conditions
of parameter-golf #1017, and the probes of #1240 and #1642.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from epigram.byte_tables import ByteTables
from epigram.evaluation.bpb import Score, count_bytes

Tokens = NDArray[np.uint16]

TokenScores = Callable[[Tokens], NDArray[np.float32]]
"""(n + 1,) tokens to the nats (n,) of all but the first."""

Alternatives = Callable[[Tokens], NDArray[np.float64]]
"""(n,) tokens to the nats (V,) that each token of the vocabulary would cost as the next one."""


@dataclass(frozen=True)
class Finding:
    """What a probe found. detail: a sentence with the number that decided."""

    name: str
    passed: bool
    detail: str


def causality(score: TokenScores, tokens: Tokens, changed: Sequence[int], vocab_size: int) -> Finding:
    """Changing token t changes the score of no token before it; to the last bit, since the shapes are the same.

    changed: places t, from 1 on. At least one of the changes must show at t itself: a score that ignores the text
    would pass otherwise.
    """
    before = score(tokens)
    for place in changed:
        other = tokens.copy()
        other[place] = (int(other[place]) + 1) % vocab_size
        after = score(other)
        wrong = np.flatnonzero(after[: place - 1] != before[: place - 1])
        if len(wrong):
            first = int(wrong[0]) + 1
            difference = float(np.abs(after[wrong] - before[wrong]).max())
            words = f"changing token {place} changes the score of token {first}, by up to {difference:.2e} nats"
            return Finding("causality", False, words)
        if after[place - 1] == before[place - 1]:
            return Finding("causality", False, f"token {place} costs the same whatever it is: it is not scored")
    return Finding("causality", True, f"{len(changed)} changed tokens of {len(tokens):,} change nothing before them")


def normalisation(alternatives: Alternatives, contexts: Sequence[Tokens], tolerance: float) -> Finding:
    """The probabilities of all tokens of the vocabulary as the next one add up to 1.

    Each is asked for as if it were the target, so a model that looks at the target fails as well.
    """
    worst = 0.0
    for context in contexts:
        total = float(np.exp(-alternatives(context)).sum())
        worst = max(worst, abs(total - 1)) if math.isfinite(total) else math.inf
    words = f"the probabilities of {len(contexts)} predictions add up to 1 within {worst:.1e}"
    return Finding("normalisation", worst <= tolerance, f"{words} (allowed {tolerance:.0e})")


def once(score: Callable[[Tokens], Score], count: Callable[[Tokens], NDArray[np.int64]], tokens: Tokens) -> Finding:
    """Every token but the first is scored once.

    count: how often each was. score: the whole score, whose number of tokens must agree.
    """
    times, total = count(tokens), score(tokens).tokens
    wrong = np.flatnonzero(times != 1)
    if len(times) != len(tokens) - 1 or len(wrong):
        words = (
            f"token {int(wrong[0]) + 1} is scored {int(times[wrong[0]])} times" if len(wrong) else "tokens are missing"
        )
        return Finding("each token once", False, words)
    if total != len(times):
        return Finding("each token once", False, f"{total:,} tokens are counted in the score of {len(times):,}")
    return Finding("each token once", True, f"{total:,} tokens")


def text_bytes(
    tokens: Tokens, tables: ByteTables, decode: Callable[[Tokens], bytes], bos_id: int, most: int = 1 << 20
) -> Finding:
    """The bytes that a score divides by are those of the decoded text, document by document."""
    tokens = tokens[: most + 1]
    starts = [0, *(np.flatnonzero(tokens[1:] == bos_id) + 1).tolist(), len(tokens)]
    # The first token is never scored, and stands for text where a stream does not begin with a document.
    skipped = 0 if tokens[0] == bos_id else len(decode(tokens[:1]))
    decoded = sum(len(decode(tokens[a:b])) for a, b in pairwise(starts) if b > a) - skipped
    counted = count_bytes(tokens, tables)
    words = f"{counted:,} bytes are counted, the text of {len(tokens):,} tokens has {decoded:,}"
    return Finding("bytes of the text", counted == decoded, words)


def sameness(scores: dict[str, float], tolerance: float) -> Finding:
    """Batches of any size and processes of any number give the same bits per byte, up to rounding.

    scores: bits per byte by what was done.
    """
    low, high = min(scores, key=lambda k: scores[k]), max(scores, key=lambda k: scores[k])
    spread = scores[high] - scores[low]
    passed = spread <= tolerance  # False for a NaN
    words = f"{len(scores)} ways differ by {spread:.1e} bpb (allowed {tolerance:.0e})"
    return Finding("same for any batch and processes", passed, words if passed else f"{words}: {low} and {high}")
