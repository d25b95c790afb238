"""Which process executes which lanes: the plan whose slowest process is as fast as can be.

A plan depends on the lanes' times and the number of processes alone, so every process finds the same one by itself. It
decides nothing but who computes: windows, weights and clipping belong to lanes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from epigram.errors import UserError

_MOST_LANES = 500  # a call deep each
_MOST_NODES = 20_000
"""Partial assignments that the search looks at, a tenth of a second; with ten or so lanes it ends before."""

_SAME = 1e-9  # relative: a smaller difference of two times comes from the order of a sum


@dataclass(frozen=True, kw_only=True)
class LanePlan:
    """ranks: for each process the lanes that it executes, ascending. times: of each lane, in any one unit."""

    ranks: tuple[tuple[int, ...], ...]
    times: tuple[float, ...]

    @property
    def loads(self) -> tuple[float, ...]:
        """For each process the time that its lanes take."""
        return tuple(math.fsum(self.times[lane] for lane in lanes) for lanes in self.ranks)

    @property
    def balance(self) -> float:
        """Share of the processes' time in which they compute and do not wait for the slowest; 1 is perfect."""
        return math.fsum(self.loads) / (len(self.ranks) * max(self.loads))

    @property
    def speedup(self) -> float:
        """How many times faster than one process all lanes are done, without what processes tell each other."""
        return math.fsum(self.times) / max(self.loads)

    def rank_of(self, lane: int) -> int:
        """The process that executes `lane`."""
        return next(rank for rank, lanes in enumerate(self.ranks) if lane in lanes)


def plan_lanes(times: Sequence[float], world_size: int) -> LanePlan:
    """The plan with the least largest load in which every process has at least one lane.

    times: positive, one of each lane. The longest lanes are placed first, each where least is to be done (Graham 1969,
    within 4/3 of the best); then all assignments that could still be better are tried, up to a limit that only recipes
    with many different lanes reach. Raises UserError for more processes than lanes.
    """
    assert world_size >= 1
    assert all(math.isfinite(time) and time > 0 for time in times), times
    if world_size > len(times):
        most = len(times)
        lanes, counts = ("1 lane", "1 process") if most == 1 else (f"{most} lanes", f"1 to {most} processes")
        raise UserError(
            f"{lanes} cannot be shared by {world_size} processes, each needs one: use {counts}, "
            "or give the recipe more lanes (a larger count)"
        )
    if world_size == 1:
        return LanePlan(ranks=(tuple(range(len(times))),), times=tuple(times))
    if len(times) > _MOST_LANES:
        raise UserError(f"{len(times)} lanes are too many to share, at most {_MOST_LANES}: give them more sequences")
    search = _Search(times, world_size)
    search.place(0, [0.0] * world_size, [])
    owned: list[list[int]] = [[] for _ in range(world_size)]
    for lane, rank in zip(search.order, search.best, strict=True):
        owned[rank].append(lane)
    return LanePlan(ranks=tuple(sorted(tuple(sorted(lanes)) for lanes in owned)), times=tuple(times))


class _Search:
    """Branch and bound over assignments, the first one that it completes being longest-processing-time-first."""

    def __init__(self, times: Sequence[float], world_size: int) -> None:
        self.order = sorted(range(len(times)), key=lambda lane: -times[lane])  # stable: ties in the recipe's order
        self.best: list[int] = []
        self._times = [times[lane] for lane in self.order]
        self._world_size = world_size
        self._least = _bound(self._times, world_size)
        self._found = math.inf
        self._nodes = 0

    def place(self, index: int, loads: list[float], chosen: list[int]) -> None:
        """Go on from lanes ..index-1, which are at `chosen` and make `loads`."""
        self._nodes += 1
        if index == len(self._times):
            self._found, self.best = max(loads), list(chosen)
            return
        idle = loads.count(0.0)
        forced = len(self._times) - index <= idle  # what is left must go to those that have nothing yet
        tried: set[float] = set()
        for rank in sorted(range(self._world_size), key=loads.__getitem__):
            load = loads[rank]
            if load in tried or (forced and load > 0):  # processes with one load are alike
                continue
            tried.add(load)
            after = load + self._times[index]
            if after >= self._found * (1 - _SAME) or self._done():
                return  # and so for all that follow, which have more to do
            loads[rank] = after
            self.place(index + 1, loads, [*chosen, rank])
            loads[rank] = load

    def _done(self) -> bool:
        reached = self._found <= self._least * (1 + _SAME)
        return reached or (bool(self.best) and self._nodes >= _MOST_NODES)


def _bound(times: Sequence[float], world_size: int) -> float:
    """No plan can be faster: the mean load, and for each k the k + 1 shortest of the k * world_size + 1 longest lanes.

    Of so many lanes some process has k + 1 at least. times: descending.
    """
    crowded = [
        math.fsum(times[k * world_size - k : k * world_size + 1])
        for k in range((len(times) - 1) // world_size + 1)
    ]  # fmt: skip
    return max(math.fsum(times) / world_size, *crowded)
