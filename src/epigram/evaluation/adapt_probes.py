"""Experiments that the score of a model which learns meanwhile must pass: whatever is not scored yet has no say.

Model, scorer and adapter are one black box, a function of the text: an adapter that got hold of more than it was handed
is caught by what it does. Source: the third condition of parameter-golf #1017.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epigram.evaluation.probes import Finding, Tokens, TokenScores

_MARGIN = 4.0  # times the difference between two scores of the same text, where a device adds in any order


@dataclass(frozen=True)
class Changed:
    """What changing the token at `place` did to the score of each token but the first: (n,) nats, absolute."""

    place: int
    moved: NDArray[np.float32]


@dataclass(frozen=True)
class Effects:
    """before: nats of the text as it is. allowed: what two scores of the same text may differ by on this device."""

    before: NDArray[np.float32]
    allowed: float
    changes: tuple[Changed, ...]


def change_each(score: TokenScores, tokens: Tokens, places: Sequence[int], vocab_size: int, bos_id: int) -> Effects:
    """Change one token at a time, at places that begin no document and will not; 1 <= place."""
    before = score(tokens)
    noise = float(np.abs(score(tokens) - before).max())
    found = []
    for place in places:
        if tokens[place] == bos_id:
            continue
        other = tokens.copy()
        step = 2 if (int(other[place]) + 1) % vocab_size == bos_id else 1
        other[place] = (int(other[place]) + step) % vocab_size
        found.append(Changed(place, np.abs(score(other) - before)))
    return Effects(before, _MARGIN * noise, tuple(found))


def score_first(effects: Effects) -> Finding:
    """Changing token t changes the score of no token before it, through the adapter either, but that of t."""
    name, allowed = "scored before learned", effects.allowed
    for change in effects.changes:
        wrong = np.flatnonzero(~(change.moved[: change.place - 1] <= allowed))
        if len(wrong):
            worst = float(change.moved[wrong].max())
            words = f"changing token {change.place} changes the score of token {int(wrong[0]) + 1}, before it"
            return Finding(name, False, f"{words}, by up to {worst:.2e} nats")
        if not change.moved[change.place - 1] > 0:
            return Finding(name, False, f"token {change.place} costs the same whatever it is: it is not scored")
    count = len(effects.changes)
    words = f"{count} changed tokens of {len(effects.before) + 1:,} change nothing before them"
    return Finding(name, count > 0, f"{words} (allowed {allowed:.0e})")


def learns(effects: Effects, unadapted: NDArray[np.float32]) -> Finding:
    """The scores are not those of the same model without: otherwise the other experiments show nothing."""
    moved = float(np.abs(effects.before - unadapted).max())
    return Finding("something is learned", moved > effects.allowed, f"scores change by up to {moved:.2e} nats")


def documents_apart(effects: Effects, documents: NDArray[np.int64]) -> Finding:
    """Changing a token changes no score in another document. documents: (k, 2), the targets first..end-1 of each."""
    name, owner = "documents apart", np.repeat(np.arange(len(documents)), documents[:, 1] - documents[:, 0])
    for change in effects.changes:
        own = owner[change.place - 1]
        wrong = np.flatnonzero(~(change.moved <= effects.allowed) & (owner != own))
        if len(wrong):
            other, worst = int(owner[wrong[0]]), float(change.moved[wrong].max())
            words = f"changing token {change.place}, in document {own}, changes scores in document {other}"
            return Finding(name, False, f"{words}, by up to {worst:.2e} nats")
    touched = len({int(owner[change.place - 1]) for change in effects.changes})
    words = f"changes in {touched} of {len(documents)} documents show in no other"
    return Finding(name, len(documents) > 1 and touched > 1, words)
