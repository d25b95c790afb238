"""Several processes as threads of this one, whose messages are passed on by hand and written down."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from epigram.dist import collectives
from epigram.dist.collectives import Message
from epigram.dist.context import Context

TIMEOUT_S = 30
T = TypeVar("T")


class Peers:
    """sent: for each rank, what it sent, in order: (kind, numbers). What others' rows hold is spoilt, as it may be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
        self.contexts = [Context(rank=rank, world_size=world_size) for rank in range(world_size)]
        self.sent: list[list[tuple[str, int]]] = [[] for _ in self.contexts]
        self._barrier = threading.Barrier(world_size, timeout=TIMEOUT_S)
        self._slots: list[Tensor] = [torch.empty(0)] * world_size
        for name in ("sum", "scatter", "gather"):
            monkeypatch.setattr(collectives, f"begin_{name}", partial(self._send, name))

    def run(self, work: Callable[[Context], T]) -> list[T]:
        """What `work` returns in each of them."""
        with ThreadPoolExecutor(len(self.contexts)) as pool:
            return list(pool.map(work, self.contexts))

    def _send(self, name: str, context: Context, sent: list[Tensor] | Tensor) -> Message:
        tensors = [sent] if isinstance(sent, Tensor) else sent
        flat = torch.cat([t.reshape(-1) for t in tensors])
        self.sent[context.rank].append((name, flat.numel()))
        self._slots[context.rank] = flat
        self._barrier.wait()
        everything = torch.stack(self._slots)
        self._barrier.wait()
        if name == "gather":
            return Message(everything.view(-1, *tensors[0].shape[1:]))
        for tensor, part in zip(tensors, everything.sum(0).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
        if name == "sum":
            return Message(tensors[0])
        rows = len(tensors[0]) // context.world_size
        mine = torch.arange(len(tensors[0])) // rows == context.rank
        tensors[0][~mine] = math.nan
        return Message(tensors[0][mine])
