"""The few things processes tell each other. With one process each of them returns at once: nothing to communicate.

Gradients travel between devices. All else travels between hosts, so that no clock or decision waits for a device.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor

from epigram.dist import watch
from epigram.dist.context import Context
from epigram.errors import LostPeerError


class Message:
    """What several processes send each other, under way.

    Messages are under way in the order in which they began, which must be the same in all processes, while this one
    goes on; what is sent must not be written meanwhile.
    """

    def __init__(
        self, result: Tensor, work: dist.Work | None = None, unpack: Callable[[Tensor], None] | None = None
    ) -> None:
        self._result, self._work, self._unpack = result, work, unpack

    def wait(self) -> Tensor:
        """What the message brings. With NCCL the device waits for it before what it is asked next, with gloo the host.

        May be called again.
        """
        if self._work is not None:
            with _peers():
                self._work.wait()
            if self._unpack is not None:
                self._unpack(self._result)
            self._work = self._unpack = None
        return self._result


def begin_sum(context: Context, tensors: Sequence[Tensor]) -> Message:
    """Begin to add `tensors`, of one dtype, up over the processes: one message, after whose wait they are the sums."""
    if not context.has_peers:
        return Message(tensors[0])

    def unpack(flat: Tensor) -> None:
        parts = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(t) for t, part in zip(tensors, parts, strict=True)])

    flat = torch.cat([t.reshape(-1) for t in tensors])
    with _peers():
        return Message(flat, dist.all_reduce(flat, async_op=True), unpack)


def begin_scatter(context: Context, whole: Tensor) -> Message:
    """Begin to add `whole` (rows, ...) up over the processes, of which each is to have its part of the rows alone.

    The parts are equal and in the order of ranks; the message brings the own one, a view of `whole`, whose other rows
    mean nothing any more.
    """
    size, rest = divmod(len(whole), context.world_size)
    assert rest == 0
    own = whole[context.rank * size : (context.rank + 1) * size]
    if not context.has_peers:
        return Message(own)
    with _peers():
        return Message(own, _reduce_scatter(own, whole, async_op=True))


def begin_gather(context: Context, own: Tensor) -> Message:
    """Begin to put the `own` (rows, ...) of all processes together, in the order of ranks: (world_size * rows, ...)."""
    if not context.has_peers:
        return Message(own)
    whole = own.new_empty((context.world_size * len(own), *own.shape[1:]))
    with _peers():
        return Message(whole, _all_gather(whole, own, async_op=True))


# torch 2.13 renames both. NCCL and gloo have both of them.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def sum_(context: Context, tensors: Sequence[Tensor]) -> None:
    """Add `tensors` up over the processes, in place; tensors of one dtype travel in one message."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        begin_sum(context, [t for t in tensors if t.dtype == dtype]).wait()


def summed(context: Context, tensor: Tensor) -> Tensor:
    """`tensor` added up over the processes, in place."""
    sum_(context, [tensor])
    return tensor


def from_main(context: Context, value: float) -> float:
    """Rank 0's `value` on every rank: one clock, one decision."""
    if not context.has_peers:
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    with _peers():
        dist.broadcast(shared, src=0)
    return float(shared)


def largest(context: Context, values: Sequence[float]) -> list[float]:
    """Each of `values` as the process has it where it is largest: one message, however many decisions."""
    if not context.has_peers:
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64)
    with _peers():
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.tolist()


def gathered(context: Context, tensor: Tensor) -> Tensor:
    """The `tensor` of every process, which is on the host and of one shape, stacked by rank."""
    if not context.has_peers:
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
    if not context.has_peers:
        yield
        return
    try:
        yield
    except Exception:
        with suppress(LostPeerError, RuntimeError):  # the error itself says more
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
    """Around a collective: LostPeerError where another process is at fault. Any other error is raised as it is."""
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise, whatever is wrong
        if watch.current is not None and watch.current.explain() is not None:
            raise watch.current.lost() from error
        if not _is_lost_connection(error):
            raise
        raise LostPeerError(
            f"this process lost the others ({error}): the one that ended first says why, in its own message"
        ) from error


# What gloo, NCCL and torch's store say of a process that is gone or does not answer. The names of NCCL's errors do not
# tell: a closed connection can come out as ncclRemoteError, ncclSystemError or ncclInternalError.
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket (unexpectedly )?closed|pair closure|remote process exited|"
    r"got 0 bytes|timed out waiting|timeout waiting|(connect|operation|read|socket|wait|write) timeout",
    re.IGNORECASE,
)


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistNetworkError) or _LOST.search(str(error)) is not None
