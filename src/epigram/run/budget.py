"""The clock that owns a run's time. Warm-up, evaluation and the writing of checkpoints do not count; all else does.

A schedule asks only `elapsed_s(step)`, so that it can be driven by the wall, by counted steps, or by the recorded clock
of another run. The last two are deterministic.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from epigram.config import BudgetConfig
from epigram.errors import UserError

CLOCK_FILE = "clock.f64"
"""In a run folder: the elapsed seconds at the start of every step, little-endian float64, for replay."""


class Clock(Protocol):
    """What the training loop asks of time."""

    def start(self, elapsed_s: float = 0.0) -> None:
        """Begin to count, from `elapsed_s` when a run is resumed."""

    def elapsed_s(self, step: int) -> float:
        """Seconds of training at the start of `step` (from 0)."""

    def skip(self, seconds: float) -> None:
        """`seconds` of wall time that passed do not count."""


class WallClock:
    """Measured time, each process for itself; which of them counts, `epigram.run.decision` says."""

    def __init__(self) -> None:
        self._origin_s = 0.0

    def start(self, elapsed_s: float = 0.0) -> None:
        self._origin_s = time.perf_counter() - elapsed_s

    def elapsed_s(self, step: int) -> float:
        return time.perf_counter() - self._origin_s

    def skip(self, seconds: float) -> None:
        self._origin_s += seconds


class RecordedClock:
    """Elapsed seconds known beforehand, one for each step: counted steps, or a replay."""

    def __init__(self, times_s: Sequence[float]) -> None:
        self._times_s = times_s

    def start(self, elapsed_s: float = 0.0) -> None:
        pass

    def elapsed_s(self, step: int) -> float:
        return float(self._times_s[step]) if step < len(self._times_s) else float("inf")

    def skip(self, seconds: float) -> None:
        pass


def make_clock(config: BudgetConfig) -> Clock:
    """The clock that `config` asks for. Raises UserError when the run to replay has recorded none."""
    if config.clock == "wall":
        return WallClock()
    if config.clock == "steps":
        # The share first: a product divided by the number of steps can fall short of the whole, and give a step more.
        return RecordedClock([config.optimize_s * (step / config.steps) for step in range(config.steps + 1)])
    return RecordedClock(read_clock(Path(config.replay)))


def read_clock(run: Path) -> list[float]:
    """The elapsed times that the run in this folder recorded. Raises UserError when there are none that make sense."""
    path = run / CLOCK_FILE
    if not path.is_file() or path.stat().st_size < 8:
        raise UserError(f"{run} has no recorded clock ({CLOCK_FILE}): give a run folder with at least one step")
    times_s = np.fromfile(path, dtype="<f8")
    if path.stat().st_size % 8 or not np.isfinite(times_s).all() or times_s[0] < 0 or (np.diff(times_s) < 0).any():
        raise UserError(f"{path} is damaged: it should hold times that grow, as float64; give another run folder")
    return times_s.tolist()


def write_clock(run: Path, times_s: Sequence[float]) -> None:
    """Record the elapsed seconds at the start of every step, whole or not at all."""
    beside = run / f".{CLOCK_FILE}.tmp"
    try:
        beside.write_bytes(np.asarray(times_s, dtype="<f8").tobytes())
        os.replace(beside, run / CLOCK_FILE)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def not_counted(*clocks: Clock) -> Iterator[None]:
    """Time spent inside does not count on these clocks."""
    start_s = time.perf_counter()
    try:
        yield
    finally:
        for clock in clocks:
            clock.skip(time.perf_counter() - start_s)


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall seconds spent inside to into[name]."""
    start_s = time.perf_counter()
    try:
        yield
    finally:
        into[name] = into.get(name, 0.0) + time.perf_counter() - start_s
