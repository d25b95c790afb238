"""Keeps the host at most a few steps ahead of the device, and reads each step's numbers without making it wait."""

import math
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from epigram.run.guard import HOST_AHEAD, Measured

Plan = TypeVar("Plan")


class Pace(Generic[Plan]):
    """Steps on their way. look: is given each step's plan and numbers, in order, once they are known.

    latest: the last of them, None before the first. step, trained_s: where the run begins.
    """

    def __init__(
        self, device: torch.device, look: Callable[[Plan, Measured], None], step: int, trained_s: float
    ) -> None:
        self._cuda = device.type == "cuda"
        self._look = look
        self._queue: deque[tuple[Plan, Tensor, torch.cuda.Event | None]] = deque()
        self.latest: tuple[Plan, Measured] | None = None
        self._last = (step, trained_s)

    def push(self, plan: Plan, measured: Tensor) -> None:
        """`measured` of this step, as `Measured` takes it, is on its way."""
        event = None
        if self._cuda:
            host = torch.empty(measured.shape, dtype=measured.dtype, pin_memory=True)
            measured = host.copy_(measured, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._queue.append((plan, measured, event))
        while len(self._queue) > HOST_AHEAD:
            self._pop()

    def drain(self) -> None:
        """Wait until every step is done."""
        while self._queue:
            self._pop()

    def step_s(self, trained_s: float, step: int) -> float:
        """Mean seconds that a step really took since the last call; `step` has grown."""
        last_step, last_s = self._last
        self._last = (step, trained_s)
        return (trained_s - last_s) / (step - last_step) if step > last_step else math.nan

    def _pop(self) -> None:
        plan, measured, event = self._queue.popleft()
        if event is not None:
            event.synchronize()
        found = Measured(measured.tolist())
        self.latest = (plan, found)
        self._look(plan, found)
