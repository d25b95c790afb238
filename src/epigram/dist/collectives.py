"""The few things processes tell each other. With one process each of them returns at once: nothing to communicate.

Gradients travel between devices. All else travels between hosts, so that no clock or decision waits for a device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor

from epigram.dist import watch
from epigram.dist.context import Context
from epigram.errors import LostPeerError


def sum_(context: Context, tensors: Sequence[Tensor]) -> None:
    """Add `tensors` up over the processes, in place; tensors of one dtype travel in one message."""
    if context.world_size == 1:
        return
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        group = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in group])
        with _peers():
            dist.all_reduce(flat)
        for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def summed(context: Context, tensor: Tensor) -> Tensor:
    """`tensor` added up over the processes, in place."""
    sum_(context, [tensor])
    return tensor


def from_main(context: Context, value: float) -> float:
    """Rank 0's `value` on every rank: one clock, one decision."""
    if context.world_size == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    with _peers():
        dist.broadcast(shared, src=0)
    return float(shared)


def largest(context: Context, values: Sequence[float]) -> list[float]:
    """Each of `values` as the process has it where it is largest: one message, however many decisions."""
    if context.world_size == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64)
    with _peers():
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.tolist()


def gathered(context: Context, tensor: Tensor) -> Tensor:
    """The `tensor` of every process, which is on the host and of one shape, stacked by rank."""
    if context.world_size == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(context.world_size)]
    with _peers():
        dist.all_gather(parts, tensor)
    return torch.stack(parts)


@contextmanager
def together(context: Context) -> Iterator[None]:
    """Around work that the ranks share unequally (rank 0 writes a file) and in which they do not communicate.

    At its end all wait for all; when it failed on one rank it raises on every rank, so that none waits for a lost one.
    """
    if context.world_size == 1:
        yield
        return
    try:
        yield
    except Exception:
        with suppress(LostPeerError):  # the error itself says more
            _count(True)
        raise
    if _count(False):
        raise LostPeerError("another process of this run failed: its message says why")


def _count(failed: bool) -> int:
    """Processes that failed."""
    total = torch.tensor(int(failed))
    with _peers():
        dist.all_reduce(total)
    return int(total)


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise when a process is gone
        if watch.current is not None and watch.current.explain() is not None:
            raise watch.current.lost() from error
        raise LostPeerError(
            f"this process lost the others ({error}): the one that ended first says why, in its own message"
        ) from error
