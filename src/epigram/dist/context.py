"""Which process this is, of how many, and on which device: the only place that reads torchrun's environment."""

import importlib
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from epigram.capability import Capability, capability_of
from epigram.dist import watch
from epigram.errors import LostPeerError, StoppedError, UserError

_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class Context:
    """rank of world_size processes; local_rank counts on this machine; device is where this process computes."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def has_peers(self) -> bool:
        """Whether there is anybody to communicate with."""
        return self.world_size > 1

    def synchronize(self) -> None:
        """Wait until the device has done all that it was asked, so that a host clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @property
    def capability(self) -> Capability | None:
        """CUDA compute capability, None on other devices."""
        return capability_of(self.device)


@contextmanager
def open_context(device: str = "auto") -> Iterator[Context]:
    """The context of this process, with the process group open if there are several.

    device: "auto" (CUDA, then Apple's MPS, then the CPU) or a torch device name. What fails inside ends all processes,
    see `epigram.dist.watch`, and is raised as a UserError that names the rank: in one process what happened, in the
    others LostPeerError.
    """
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    context = Context(rank=rank, world_size=world_size, local_rank=local_rank, device=pick_device(device, local_rank))
    if context.device.type == "cuda":
        torch.cuda.set_device(context.device)
    if world_size == 1:
        with _told(None):
            yield context
        return
    # Its functions have the group of the moment as a default. Imported later, as torch does when a model is made on the
    # meta device, it would hold the group for ever, and gloo's threads could abort the process at its end.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "cpu:gloo,cuda:nccl" if context.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    watch.current = watch.Watch(rank, world_size, os.environ.get("MASTER_ADDR", "localhost"))
    try:
        with _told(watch.current):
            yield context
    except BaseException:
        if context.device.type != "cuda":  # NCCL might wait for who is lost
            dist.destroy_process_group()
        raise
    watch.current.leave()
    watch.current = None
    dist.destroy_process_group()


@contextmanager
def _told(watching: watch.Watch | None) -> Iterator[None]:
    """What goes wrong inside is told to the other processes, and comes out as what this process has to say of it.

    A UserError is one sentence for the terminal; LostPeerError where another process says it.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        way_out = "compute less of a lane at a time (such as run.micro_tokens=16384), or use another device"
        raise _of_rank(watching, f"out of memory ({error}): {way_out}", error) from error
    except (KeyboardInterrupt, UserError, OSError) as error:
        if watching is None:
            raise
        stopped = isinstance(error, KeyboardInterrupt)
        told = _of_rank(watching, "stopped by Ctrl-C" if stopped else str(error), error)
        if stopped:
            raise
        raise told from error
    except StoppedError:
        if watching is not None:
            watching.leave()
        raise
    except SystemExit as error:
        if watching is None or error.code in (None, 0):
            raise
        told = _of_rank(watching, f"stopped with exit code {error.code}", error)
        if isinstance(told, LostPeerError):
            raise told from error
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):  # torch has no class for it
            way_out = "take a smaller model or batch, or compute less at a time (run.micro_tokens, score.batch_tokens)"
            raise _of_rank(watching, f"out of memory ({error}): {way_out}", error) from error
        if watching is None:
            raise
        told = _of_rank(watching, f"{type(error).__name__}: {error}", error)
        if not isinstance(told, LostPeerError):
            traceback.print_exception(error)  # a mistake of ours: where it happened is of use
        raise told from error


def _of_rank(watching: watch.Watch | None, cause: str, error: BaseException) -> UserError:
    """The error that this process raises for `error`."""
    if watching is None:
        return UserError(cause)
    # A collective may tell of another's failure before that one has said why: the cause is worth waiting for.
    if isinstance(error, LostPeerError) and watching.explain() is not None:
        return watching.lost()
    first = watching.report(cause)
    return UserError(str(first)) if first.rank == watching.rank else watching.lost()


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device called `name`. Raises UserError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"there is no device {name!r}: choose auto, cpu, cuda, cuda:1 (or another number) or mps")
    if kind == "cuda":
        return torch.device("cuda", _cuda_index(int(index) if index else local_rank))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("this machine has no device that torch can use through MPS: choose --device cpu")
    return torch.device(kind)


def _cuda_index(index: int) -> int:
    """`index`, if there is such a GPU."""
    if not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device that torch can use: choose --device cpu")
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"there is no GPU {index}, only {count} of them (from 0): name another device, or start at most "
            f"{count} processes"
        )
    return index
