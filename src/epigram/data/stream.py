"""The order in which windows of one length are drawn: coprime strides over many shards.

As parameter-golf #726 and #1060 draw it: each segment of text is walked in a stride that shares no factor
with its number of blocks, so every block comes once, in an order without neighbours; each step mixes many
segments, those with more blocks left being likelier. Different from there: the order comes from the run's
seed and not from paths; nothing begins anew before the whole pass is used up; every drawn window is used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epigram.data.lanes import LengthGroup
from epigram.data.passes import Segment, segments_of_pass

_DRAWING, _WALKING = 2, 3  # names of random streams that come from the run's seed
_RAMP_STEPS = 1800  # over which a step comes to mix more segments, more evenly (#1060)


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A walk over the blocks of a segment: its k-th is block (start + k stride) mod count, from `origin`."""

    shard: int
    origin: int
    count: int
    start: int
    stride: int

    def place(self, k: int, seq_len: int) -> int:
        """Offset in the shard of the window that is block `k` of the walk."""
        return self.origin + (self.start + k * self.stride) % self.count * seq_len


def draw_walk(segment: Segment, seq_len: int, random: np.random.Generator) -> Walk:
    """Draw phase, start and stride, in this order. The segment has room for a window."""
    assert segment.num_tokens >= seq_len
    phase = int(random.integers(min(seq_len - 1, segment.num_tokens - seq_len) + 1))
    count = (segment.num_tokens - phase) // seq_len
    start = int(random.integers(count))
    stride = 1
    if count > 1:
        stride = int(random.integers(1, count))
        while math.gcd(stride, count) != 1:
            stride = int(random.integers(1, count))
    return Walk(shard=segment.shard, origin=segment.start + phase, count=count, start=start, stride=stride)


class WindowStream:
    """Endless stream of windows for one length group; its whole state goes in and out as plain values.

    shard_tokens: length of every shard. groups: all length groups of the recipe. group: the place of this
    one. Only these and the seed determine the order.
    """

    def __init__(self, shard_tokens: Sequence[int], groups: Sequence[LengthGroup], group: int, seed: int) -> None:
        self._shard_tokens, self._groups, self._index, self._seed = shard_tokens, groups, group, seed
        self._group = groups[group]
        self._random = np.random.Generator(np.random.PCG64([seed, _DRAWING, self._group.seq_len]))
        self._step = 0
        self._begin(0)

    def _begin(self, index: int) -> None:
        """Begin pass `index`. Its walks come from a generator of their own, so they can be found again."""
        random = np.random.Generator(np.random.PCG64([self._seed, _WALKING, self._group.seq_len, index]))
        segments = segments_of_pass(self._shard_tokens, self._groups, self._seed, index)[self._index]
        self._pass = index
        self._walks = [draw_walk(segment, self._group.seq_len, random) for segment in segments]
        self._counts = np.array([walk.count for walk in self._walks], np.int64)
        self._next = np.zeros(len(self._walks), np.int64)

    def draw(self) -> NDArray[np.int64]:
        """Windows of the next step, (num_windows, 2): shard and offset. It may reach into the next pass."""
        needed, windows = self._group.num_windows, []
        while needed:
            left = int((self._counts - self._next).sum())
            if not left:
                self._begin(self._pass + 1)
                continue
            windows += self._mix(min(needed, left))
            needed = self._group.num_windows - len(windows)
        self._step += 1
        return np.array(windows, np.int64)

    def _mix(self, num_windows: int) -> list[tuple[int, int]]:
        """Take `num_windows`, at most those left in the pass, from several segments, and mix them."""
        taken = self._share_out(num_windows)
        buckets = []
        for index in self._random.permutation(np.flatnonzero(taken)).tolist():
            walk, first = self._walks[index], int(self._next[index])
            places = [walk.place(first + k, self._group.seq_len) for k in range(int(taken[index]))]
            self._next[index] += len(places)
            buckets.append([(walk.shard, places[i]) for i in self._random.permutation(len(places)).tolist()])
        mixed = []
        while buckets:
            for index in self._random.permutation(len(buckets)).tolist():
                mixed.append(buckets[index].pop())
            buckets = [bucket for bucket in buckets if bucket]
        return mixed

    def _share_out(self, num_windows: int) -> NDArray[np.int64]:
        """How many windows to take from each segment: at least one from some, the others by weight."""
        left = self._counts - self._next
        progress = min(self._step / _RAMP_STEPS, 1.0)
        weights = np.where(left > 0, left.astype(np.float64) ** (0.90 - 0.40 * progress), 0.0)
        weights /= weights.sum()
        num_lanes, most = len(self._group.lanes), min(int(np.count_nonzero(left)), num_windows)
        low, high = min(max(8, num_lanes), most), min(max(32, 8 * num_lanes), most)
        num_chosen = min(max(round(low + progress * (high - low)), 1), most)
        chosen = np.zeros(len(left), np.bool_)
        chosen[self._random.choice(len(left), num_chosen, replace=False, p=weights)] = True
        taken = chosen.astype(np.int64)
        while missing := num_windows - int(taken.sum()):
            room = chosen & (taken < left)
            if not room.any():
                chosen = left > 0  # the chosen ones are used up: the others help out
                continue
            shares = np.where(room, weights, 0.0)
            taken = np.minimum(taken + self._random.multinomial(missing, shares / shares.sum()), left)
        return taken

    @property
    def passes(self) -> float:
        """Passes over the group's part of the text so far, the begun one as a fraction."""
        return self._pass + float(self._next.sum() / self._counts.sum())

    def state(self) -> dict[str, Any]:
        """Everything that later draws depend on, beside the constructor's arguments."""
        return {
            "step": self._step,
            "pass": self._pass,
            "next": self._next.tolist(),
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._begin(state["pass"])
        assert len(state["next"]) == len(self._next)
        self._next[:] = state["next"]
        self._step = state["step"]
        self._random.bit_generator.state = state["random"]
