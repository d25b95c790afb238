"""The few things processes tell each other. With one process each of them returns at once: nothing to communicate."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from epigram.dist.context import Context


def sum_(context: Context, tensors: Sequence[Tensor]) -> None:
    """Add `tensors` up over the processes, in place; tensors of one dtype travel in one message."""
    if context.world_size == 1:
        return
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        group = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in group])
        dist.all_reduce(flat)
        for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def from_main(context: Context, value: float) -> float:
    """Rank 0's `value` on every rank: one clock, one decision."""
    if context.world_size == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=context.device)
    dist.broadcast(shared, src=0)
    return float(shared)


def barrier(context: Context) -> None:
    """Wait until every process is here."""
    if context.world_size > 1:
        dist.barrier()
