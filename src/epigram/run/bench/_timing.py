"""How long something takes: the device's own clock on CUDA, the host's elsewhere."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from epigram.dist.context import Context

Act = Callable[[], Any]

WARM_UP = 2
"""Calls before the timed ones: the first compiles and allocates, the second sees what the first left behind."""

_HEAD_START = 10_000_000  # cycles of the device, about 6 ms: more than the host takes to launch an update


@dataclass(frozen=True, kw_only=True)
class Timing:
    """samples_ms: of each timed call. first_s: the very first call, compilation included; None if it was timed too."""

    samples_ms: tuple[float, ...]
    first_s: float | None = None

    @property
    def repeats(self) -> int:
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        return self.quantile_ms(0.5)

    @property
    def spread_ms(self) -> tuple[float, float]:
        """What a tenth of the calls stay below, and what a tenth exceed."""
        return self.quantile_ms(0.1), self.quantile_ms(0.9)

    def quantile_ms(self, share: float) -> float:
        """The time that `share` of the calls stay below, interpolated between neighbours."""
        return float(np.quantile(self.samples_ms, share))


def measure(
    work: Act,
    context: Context,
    *,
    repeats: int,
    before: Act | None = None,
    warm_up: int = WARM_UP,
    queued: bool = False,
) -> Timing:
    """Time `repeats` calls of `work`, each after an untimed call of `before`.

    On CUDA what counts is the time between two marks in the device's queue, and the calls follow each other without
    waiting. queued: the device is kept busy until the host has handed it a whole call, so that a slow host does not
    count; for work of many small kernels, which in training are queued while the device is at the backward pass.
    """
    assert repeats > 0
    warm_ups_s = _host_samples(work, context, before, warm_up)
    if context.device.type == "cuda":
        samples_ms = _device_samples(work, context, before, repeats, queued)
    else:
        samples_ms = [1000 * seconds for seconds in _host_samples(work, context, before, repeats)]
    return Timing(samples_ms=tuple(samples_ms), first_s=warm_ups_s[0] if warm_ups_s else None)


def _host_samples(work: Act, context: Context, before: Act | None, repeats: int) -> list[float]:
    """Seconds by the host's clock."""
    samples_s = []
    for _ in range(repeats):
        if before:
            before()
        context.synchronize()
        start_s = time.perf_counter()
        work()
        context.synchronize()
        samples_s.append(time.perf_counter() - start_s)
    return samples_s


def _device_samples(work: Act, context: Context, before: Act | None, repeats: int, queued: bool) -> list[float]:
    """Milliseconds by the device's."""
    marks = []
    for _ in range(repeats):
        if before:
            before()
        if queued:
            torch.cuda._sleep(_HEAD_START)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        marks.append((start, end))
    context.synchronize()
    return [start.elapsed_time(end) for start, end in marks]
