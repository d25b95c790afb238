"""Statistics of made-up times, and what a measurement calls when."""

import itertools
from typing import ClassVar

import pytest
import torch

from epigram.dist.context import Context
from epigram.run.bench import _timing
from epigram.run.bench._timing import Timing, measure


def test_median_and_spread_of_known_times():
    """Eleven times: a tenth of the way along is the second, half the sixth, nine tenths the tenth."""
    timing = Timing(samples_ms=(5, 1, 3, 2, 4, 6, 7, 8, 9, 10, 110))
    assert timing.repeats == 11
    assert timing.median_ms == 6
    assert timing.spread_ms == (2, 10)


def test_times_between_samples_are_interpolated():
    timing = Timing(samples_ms=(10, 20))
    assert timing.median_ms == 15
    assert timing.spread_ms == pytest.approx((11, 19))
    assert Timing(samples_ms=(7,)).spread_ms == (7, 7)


def test_on_the_host(monkeypatch):
    """A clock that advances by a second a look, and calls that take what they say."""
    log: list[str] = []
    times = itertools.count(step=1.0)
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: next(times))
    found = measure(
        lambda: log.append("work"), Context(), repeats=3, before=lambda: log.append("before"), warm_up=2
    )  # fmt: skip
    assert log == ["before", "work"] * 5
    assert found.samples_ms == (1000, 1000, 1000)
    assert found.first_s == 1.0


def test_without_warm_up_the_first_call_is_timed():
    log: list[str] = []
    found = measure(lambda: log.append("work"), Context(), repeats=1, warm_up=0)
    assert (log, found.first_s, found.repeats) == (["work"], None, 1)


class FakeEvent:
    """A mark in a queue whose clock is the number of things that were put into it."""

    queue: ClassVar[list[str]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.queue.append("mark")
        self.place = len(self.queue)

    def elapsed_time(self, end: "FakeEvent") -> float:
        return float(end.place - self.place)


@pytest.mark.parametrize("queued", [False, True])
def test_on_cuda_what_lies_between_two_marks_counts(monkeypatch, queued: bool):
    """Not what is put into the queue before them, and without waiting between the calls."""
    queue = FakeEvent.queue = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: queue.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append("sleep"))
    found = measure(
        lambda: queue.extend(["kernel"] * 3), Context(device=torch.device("cuda", 0)), repeats=2,
        before=lambda: queue.append("before"), warm_up=0, queued=queued,
    )  # fmt: skip
    assert found.samples_ms == (4, 4)  # three kernels and the end's mark itself
    sleep = ["sleep"] if queued else []
    assert queue == [*["before", *sleep, "mark", "kernel", "kernel", "kernel", "mark"] * 2, "wait"]
