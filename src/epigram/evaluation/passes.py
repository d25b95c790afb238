"""The forwards of a score: windows by themselves, or segments of a stream that are read chunk by chunk.

Legend: B windows or segments in a forward, T tokens of each that it reads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epigram.evaluation.windows import Method, WindowPlan, batch_size, batches


class TokenLoss(Protocol):
    """The model as windows need it: int64 (B, T) and (B, T) in, float32 nats out.

    Each position is computed from the inputs up to it in its own row. All positions are wanted, (B, T), or with `last`
    = n the last ones only, (B, n), so that the model may leave out what these do not need. `rope_len` is the method's
    seq_len: rotary frequencies depend on the length of the window, and a stream shorter than one window must be turned
    the same way as a full window.
    """

    def __call__(self, inputs: Tensor, targets: Tensor, /, *, rope_len: int, last: int | None) -> Tensor: ...


StreamLoss = Callable[[Tensor, Tensor], Tensor]
"""The model as a stream needs it: (B, T) and (B, T) in, (B, T) float32 nats out; each call continues the one before."""

OpenStream = Callable[[Method], StreamLoss]
"""Begins B streams that remember nothing yet."""


@dataclass(frozen=True)
class Part:
    """What one forward gave. losses, scored: (B, T) float32 nats, and bool, which of them count. first: (B,) the target
    that the first column is of. num_scored: how many count.
    """

    losses: Tensor
    scored: Tensor
    first: NDArray[np.int64]
    num_scored: int

    def counted(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The targets that count, (num_scored,), and what each costs in nats, likewise."""
        counts = self.scored.cpu().numpy()
        return (self.first[:, None] + np.arange(counts.shape[1]))[counts], self.losses.cpu().numpy()[counts]


def parts(
    nll: TokenLoss | OpenStream,
    tokens: NDArray[np.uint16],
    plan: WindowPlan,
    method: Method,
    *,
    batch_tokens: int,
    world_size: int,
    device: torch.device,
    num_windows: int | None = None,
) -> Iterator[Part]:
    """The losses of `plan`, a rank's share of the method's plan, forward by forward.

    Forwards have as few shapes as can be, since each is a graph to compile: the last batch is filled up with other
    windows of the text of which nothing counts, and the end of a segment with tokens that nobody sees.
    num_windows: of the whole plan, if `plan` is not all of it.
    """
    if not len(plan):
        return
    total = len(plan) if num_windows is None else num_windows
    if method.is_streaming:
        chunk = min(method.streaming.chunk_tokens or batch_tokens, batch_tokens, plan.length)
        size = batch_size(total, chunk, world_size, batch_tokens)
        for some in batches(plan, size):
            yield from _read_segments(cast(OpenStream, nll)(method), tokens, some, size, chunk, device)
        return
    read = cast(TokenLoss, nll)
    size = batch_size(total, plan.length, world_size, batch_tokens)
    for batch in _window_batches(tokens, plan, size, method, device):
        losses = read(batch.inputs, batch.targets, rope_len=method.seq_len, last=batch.last)
        yield _checked(Part(losses, batch.scored, batch.first, batch.num_scored))


def _checked(part: Part) -> Part:
    found = part.losses
    assert found.shape == part.scored.shape, f"one loss a target that is asked for, not {tuple(found.shape)}"
    assert found.dtype == torch.float32, f"losses in float32, not {found.dtype}"
    return part


# -- windows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """inputs, targets: (B, T) int64 on the device. last: only the losses at so many positions at the end are
    wanted; None for all. scored, first, num_scored: as in `Part`.
    """

    inputs: Tensor
    targets: Tensor
    last: int | None
    scored: Tensor
    first: NDArray[np.int64]
    num_scored: int


def _window_batches(
    tokens: NDArray[np.uint16], plan: WindowPlan, size: int, method: Method, device: torch.device
) -> Iterator[_Batch]:
    """The windows of `plan`, `size` at a time, on the device; copies do not wait for the device.

    In a sliding evaluation every window but the first scores at most `stride` targets, those at its end. So the first
    window goes alone, and all others ask for their last `stride` losses.
    """
    if method.stride >= plan.length:
        for part in batches(plan, size):
            yield _batch(tokens, part, size, None, device)
        return
    num_alone = int(plan.num_scored_of(0) > method.stride)
    if num_alone:
        yield _batch(tokens, plan[:1], 1, None, device)
    for part in batches(plan[num_alone:], size):
        yield _batch(tokens, part, size, method.stride, device)


def _batch(tokens: NDArray[np.uint16], part: WindowPlan, size: int, last: int | None, device: torch.device) -> _Batch:
    """The windows of `part`, filled up to `size`."""
    length = part.length
    start, skipped = _rows(part, size, len(tokens))
    shown = 0 if last is None else length - last
    wanted = torch.arange(shown, length, device=device)
    assert int(skipped.min()) >= shown, "a target that counts is not asked for"
    window = _to_device(tokens[start[:, None] + np.arange(length + 1)].astype(np.int64), device)
    scored = wanted >= _to_device(skipped, device)[:, None]
    inputs, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    return _Batch(inputs, targets, last, scored, start + shown, part.num_scored)


def _rows(part: WindowPlan, size: int, num_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each row of a batch where in the text it begins, and how many targets at its start do not count.

    Rows that only fill the batch up read what lies before its last window, each a window further back. (That window
    again and again could be of so many documents that attention cannot keep them apart, which fails the whole batch.)
    """
    back = np.arange(1, size - len(part) + 1) * part.length
    filling = (part.start[-1] - back) % max(num_tokens - part.length, 1)
    skipped = np.concatenate([part.first_scored - part.start, np.full(len(back), part.length)])
    return np.concatenate([part.start, filling]), skipped


def _to_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# -- streams ------------------------------------------------------------------------------------------------------


def _read_segments(
    read: StreamLoss, tokens: NDArray[np.uint16], part: WindowPlan, size: int, chunk: int, device: torch.device
) -> Iterator[Part]:
    """The segments of `part` side by side, `chunk` tokens of each a forward."""
    start, skipped = _rows(part, size, len(tokens))
    from_here = _to_device(skipped, device)[:, None]
    for begin in range(0, part.length, chunk):
        # What lies behind a segment's end fills its last chunk up, behind the text's its beginning: no earlier position
        # sees it. (The last token again and again could be as many documents, and attention keeps only so many apart.)
        places = (start[:, None] + begin + np.arange(chunk + 1)) % len(tokens)
        window = _to_device(tokens[places].astype(np.int64), device)
        position = torch.arange(begin, begin + chunk, device=device)
        scored = (position >= from_here) & (position < part.length)
        losses = read(window[:, :-1].contiguous(), window[:, 1:].contiguous())
        first_scored = np.maximum(skipped, begin)
        count = int(np.maximum(min(begin + chunk, part.length) - first_scored, 0).sum())
        yield _checked(Part(losses, scored, start + begin, count))
