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

_OTHERS = 4  # tokens tried at a place before its score is said not to depend on it: two may cost the same by chance

Tokens = NDArray[np.uint16]

TokenScores = Callable[[Tokens], NDArray[np.float32]]
"""(n + 1,) tokens to the nats (n,) of all but the first."""

Misread = Callable[[Tokens, int, int], NDArray[np.float32]]
"""(n + 1,) tokens as they are read, a token that is among them once, and another: the nats (n,) where that other one is
what is scored in its place."""

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

    changed: places t, from 1 on. One of several changes must show at t itself: a score that ignores the text would pass
    otherwise.
    """
    before = score(tokens)
    for place in changed:
        shows = False
        for number in range(_OTHERS):
            other = tokens.copy()
            other[place] = (int(other[place]) + 1 + number * vocab_size // _OTHERS) % vocab_size
            after = score(other)
            wrong = np.flatnonzero(after[: place - 1] != before[: place - 1])
            if len(wrong):
                words = f"changing token {place} changes {_worst(before, after, wrong)}"
                return Finding("causality", False, words)
            if shows := bool(after[place - 1] != before[place - 1]):
                break
        if not shows:
            return Finding("causality", False, f"token {place} costs the same whatever it is: it is not scored")
    return Finding("causality", True, f"{len(changed)} changed tokens of {len(tokens):,} change nothing before them")


def own_token(
    score: TokenScores,
    misread: Misread,
    tokens: Tokens,
    places: Sequence[int],
    vocab_size: int,
    allowed: float = 0.0,
) -> Finding:
    """Reading another token at t than the one that is scored there changes no score up to t's own; to the last bit, or
    by `allowed` nats where a model learns and sums come in any order.

    What `causality` cannot see: a model that sees one position too far, and no further, sees just what it is to
    foretell, and changing that token may change its score.
    """
    text, absent = _without_one(tokens, vocab_size)
    before = score(text)
    for place in places:
        read = text.copy()
        read[place] = absent
        after = misread(read, absent, int(text[place]))
        if len(wrong := np.flatnonzero(~(np.abs(after[:place] - before[:place]) <= allowed))):
            words = f"reading another token {place} than is scored there changes {_worst(before, after, wrong)}"
            return Finding("own token unseen", False, words)
    return Finding("own token unseen", True, f"{len(places)} tokens cost what they cost when others are read there")


def _without_one(tokens: Tokens, vocab_size: int) -> tuple[Tokens, int]:
    """The tokens with one of the vocabulary replaced by another, and that one, which they now lack.

    It is the rarest of the upper half: the lower has the ids that mean more than text.
    """
    half = vocab_size // 2
    absent = half + int(np.argmin(np.bincount(tokens, minlength=vocab_size)[half:]))
    return np.where(tokens == absent, absent - 1, tokens).astype(tokens.dtype), absent


def isolation(score: TokenScores, tokens: Tokens, bos_id: int, vocab_size: int, most: int) -> Finding:
    """Changing a document changes no score of another; to the last bit, since the shapes are the same.

    All tokens of a document but its BOS are changed, for `most` of the documents. What may change are their own scores
    and that of the BOS after them, which is foretold by this document and begins the next.
    """
    starts = np.unique([0, *np.flatnonzero(tokens == bos_id).tolist(), len(tokens)])
    # What is changed needs a token that can be, and another document beside it.
    spans = [(a, b) for a, b in pairwise(starts.tolist()) if b - a > 1]
    if len(starts) < 3 or not spans:
        return Finding("isolation", False, "there are no two documents in the text that was probed")
    before = score(tokens)
    for first, end in (spans[i] for i in np.unique(np.linspace(0, len(spans) - 1, most).astype(int))):
        other = tokens.copy()
        inside = slice(first + int(tokens[first] == bos_id), end)  # the text may begin in the middle of one
        changed = (other[inside].astype(np.int64) + 1) % vocab_size
        other[inside] = np.where(changed == bos_id, (changed + 1) % vocab_size, changed)
        after, own = score(other), np.zeros(len(before), bool)
        differs = after != before
        own[first:end] = True  # the scores of the tokens first + 1..end
        if len(wrong := np.flatnonzero(differs & ~own)):
            words = f"changing the document of tokens {first} to {end - 1} changes {_worst(before, after, wrong)}"
            return Finding("isolation", False, f"{words}, which is in another")
        if not differs[own].any():
            words = f"the document of tokens {first} to {end - 1} costs the same whatever it is: it is not scored"
            return Finding("isolation", False, words)
    return Finding("isolation", True, f"changed documents of {len(starts) - 1} change no score of another")


def _worst(before: NDArray[np.float32], after: NDArray[np.float32], wrong: NDArray[np.int64]) -> str:
    difference = float(np.abs(after[wrong] - before[wrong]).max())
    return f"the score of token {int(wrong[0]) + 1}, by up to {difference:.2e} nats"


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
    times = count(tokens)
    wrong = np.flatnonzero(times != 1)
    if len(times) != len(tokens) - 1 or len(wrong):
        words = (
            f"token {int(wrong[0]) + 1} is scored {int(times[wrong[0]])} times" if len(wrong) else "tokens are missing"
        )
        return Finding("each token once", False, words)
    if (total := score(tokens).tokens) != len(times):
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
