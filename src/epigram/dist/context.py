"""Which process this is, of how many, and on which device: the only place that reads torchrun's environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from epigram.errors import UserError

_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class Context:
    """rank of world_size processes; local_rank counts on this machine; device is where this process computes."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA compute capability, None on other devices."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else None


@contextmanager
def open_context(device: str = "auto") -> Iterator[Context]:
    """The context of this process, with the process group open if there are several.

    device: "auto" (CUDA, then Apple's MPS, then the CPU) or a torch device name.
    """
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    context = Context(rank=rank, world_size=world_size, local_rank=local_rank, device=pick_device(device, local_rank))
    if context.device.type == "cuda":
        torch.cuda.set_device(context.device)
    if world_size > 1:
        backend = "nccl" if context.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield context
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device called `name`. Raises UserError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("this machine has no CUDA device that torch can use: choose --device cpu")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}, "
                "start at most so many processes"
            )
        return torch.device("cuda", local_rank if device.index is None else device.index)
    return device
