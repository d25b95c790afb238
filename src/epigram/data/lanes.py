"""Lanes: what a training step consists of, whatever machine executes it.

The published system gives each of eight GPUs a sequence length of its own (parameter-golf #1212). Here that
is a property of the recipe: a step has lanes, and ranks execute lanes. Lanes of one length draw from one
stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from epigram.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Lane:
    """A part of each step: `num_seqs` windows with `seq_len` inputs each (and as many targets)."""

    seq_len: int
    num_seqs: int

    def __post_init__(self) -> None:
        if problems := [
            f"{name} = {value} must be at least 1"
            for name, value in (("seq_len", self.seq_len), ("num_seqs", self.num_seqs))
            if value < 1
        ]:
            raise UserError("; ".join(problems))

    @property
    def num_tokens(self) -> int:
        """Targets in a step."""
        return self.seq_len * self.num_seqs

    def parts(self, most_tokens: int | None) -> int:
        """Of how many equal parts, of whole sequences each, none has more tokens; of single ones if even they do.

        Equal, so that there is one shape to compile and to record. One part where `most_tokens` is None.
        """
        if most_tokens is None:
            return 1
        fits = (n for n in range(1, self.num_seqs) if self.num_seqs % n == 0 and self.num_tokens // n <= most_tokens)
        return next(fits, self.num_seqs)


@dataclass(frozen=True, kw_only=True)
class LengthGroup:
    """The lanes of one length. lanes: their places in the recipe's list. num_seqs: of each of them."""

    seq_len: int
    lanes: tuple[int, ...]
    num_seqs: tuple[int, ...]

    @property
    def num_windows(self) -> int:
        """Windows that the group draws in a step."""
        return sum(self.num_seqs)

    @property
    def num_tokens(self) -> int:
        """Targets in a step."""
        return self.seq_len * self.num_windows

    def deal(self) -> tuple[tuple[int, ...], ...]:
        """For each lane the places of its windows in the draw of a step.

        The lanes take turns, and each draws its number: a stride over the draw where all are alike, as
        published. Every place goes to exactly one lane.
        """
        dealt: list[list[int]] = [[] for _ in self.lanes]
        place = 0
        for turn in range(max(self.num_seqs)):
            for windows, num_seqs in zip(dealt, self.num_seqs, strict=True):
                if turn < num_seqs:
                    windows.append(place)
                    place += 1
        return tuple(map(tuple, dealt))


def length_groups(lanes: Sequence[Lane]) -> tuple[LengthGroup, ...]:
    """The lanes by length, in the order in which lengths first appear; UserError when there are none."""
    if not lanes:
        raise UserError("a step needs at least one lane: give one with seq_len and num_seqs")
    members: dict[int, list[int]] = {}
    for index, lane in enumerate(lanes):
        members.setdefault(lane.seq_len, []).append(index)
    return tuple(
        LengthGroup(seq_len=seq_len, lanes=tuple(indices), num_seqs=tuple(lanes[i].num_seqs for i in indices))
        for seq_len, indices in members.items()
    )
