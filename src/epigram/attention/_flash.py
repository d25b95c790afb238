"""Makes operators of a FlashAttention library's kernels, which the compiler cannot trace by themselves.

Each kernel becomes a custom operator with a fake implementation and the forward's gradient registered, so that a
compiled graph holds it as one opaque call. Legend: see `epigram.attention.base`; lse (B, H, Tq) float32 is the
logarithm of the softmax's denominators, which the backward starts from.

Within documents the libraries are called with their interface for sequences of different lengths: all rows behind each
other, and a list of where each document begins. Shapes must not follow the text (a CUDA graph replays the same calls,
and asking how many documents there are would wait for the device), so the list has a fixed length, longer than any but
odd text needs, and what is left of it stands at the end: documents without tokens. A batch with more documents than
that gives NaN, which no run and no score lets pass, and never a wrong number.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from epigram.attention.base import Attend

_ALIGNMENT_BYTES = 16  # of the first element and of every row: what the GPU's bulk copies need

LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
"""What both libraries call where sequences of different lengths begin, and how long the longest is."""

Lengths = Mapping[str, Tensor | int]
"""Arguments by the names of LENGTHS; none where each row is one sequence."""

Forward = Callable[[Tensor, Tensor, Tensor, int, Lengths], tuple[Tensor, Tensor]]
"""(q, k, v, window, lengths) -> out, lse. With lengths, rows lie behind each other: q (B T, H, D), lse (H, B T)."""

Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor, Tensor, Lengths], None]
"""(q, k, v, out, lse, grad of out, window, dq, dk, dv, lengths): fills dq, dk and dv."""

_SPARE, _SHORTEST = 64, 128  # documents that a batch may have: 64, and one for each 128 tokens


class Segments(NamedTuple):
    """A batch as sequences of different lengths, of which the libraries let the last query see the last key.

    starts_q, starts_k: (S + 1,) int32, the first query and the first key of each among those of all rows, and at the
    end how many there are. excess: () float32, 0, or NaN where S segments are too few.
    """

    starts_q: Tensor
    starts_k: Tensor
    excess: Tensor


def segments(reach: Tensor, num_keys: int) -> Segments:
    """The segments of rows of `num_keys` keys whose last Tq positions ask, by their `reach` (B, Tq).

    A segment begins with each row, with each document, and where the document begins that the first query is in; what
    lies before it in the row is a segment without queries.
    """
    rows, num_queries = reach.shape
    before, total = num_keys - num_queries, rows * num_keys
    key = torch.arange(num_keys, device=reach.device)
    begins = (key == 0) | (key == (before - reach[:, :1]).clamp(min=0))  # (B, Tk)
    begins = begins | torch.nn.functional.pad(reach == 0, (before, 0))
    most = rows + _SPARE + total // _SHORTEST
    place = begins.flatten().cumsum(0)
    # What begins nothing, or comes too late, goes to the last place, which is then overwritten.
    place = torch.where(begins.flatten() & (place <= most), place - 1, most)
    everything = torch.arange(total, device=reach.device, dtype=torch.int32)
    starts_k = torch.full((most + 1,), total, dtype=torch.int32, device=reach.device).scatter(0, place, everything)
    starts_k = torch.where(torch.arange(most + 1, device=reach.device) == most, total, starts_k).to(torch.int32)
    row, within_row = starts_k // num_keys, starts_k % num_keys
    starts_q = starts_k if before == 0 else row * num_queries + (within_row - before).clamp(min=0)
    excess = torch.where(begins.sum() > most, torch.nan, 0.0)
    return Segments(starts_q, starts_k, excess)


def register(name: str, forward_kernel: Forward, backward_kernel: Backward) -> Attend:
    """The operators epigram::{name}_forward and _backward around two kernels, and the `attend` that calls them.

    The kernels get inputs and outputs whose last dimension is contiguous and whose rows are aligned to 16 bytes; views
    that are so already are passed on as they are, without a copy.
    """

    @torch.library.custom_op(f"epigram::{name}_forward", mutates_args=())
    def forward_op(
        q: Tensor, k: Tensor, v: Tensor, window: int,
        starts_q: Tensor | None, starts_k: Tensor | None, excess: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        lengths = _lengths(q, k, starts_q, starts_k)
        shape = q.shape
        q, k, v = (aligned(_rows(x, lengths)) for x in (q, k, v))
        with torch.cuda.device_of(q):  # the libraries launch on the current device, wherever the tensors are
            out, lse = forward_kernel(q, k, v, window, lengths)
        if excess is not None:
            out[..., :1] += excess  # one channel of each head reaches all that comes after
        return out.view(shape), lse

    @forward_op.register_fake
    def _(
        q: Tensor, k: Tensor, v: Tensor, window: int,
        starts_q: Tensor | None, starts_k: Tensor | None, excess: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, length, heads, _ = q.shape
        lse_shape = (batch, heads, length) if starts_q is None else (heads, batch * length)
        return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)

    @torch.library.custom_op(f"epigram::{name}_backward", mutates_args=())
    def backward_op(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int,
        starts_q: Tensor | None, starts_k: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        lengths = _lengths(q, k, starts_q, starts_k)
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        q, k, v, out, grad = (aligned(_rows(x, lengths)) for x in (q, k, v, out, grad))
        to_fill = _rows(dq, lengths), _rows(dk, lengths), _rows(dv, lengths)  # views: the gradients are contiguous
        with torch.cuda.device_of(q):
            backward_kernel(q, k, v, out, lse, grad, window, *to_fill, lengths)
        return dq, dk, dv

    @backward_op.register_fake
    def _(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int,
        starts_q: Tensor | None, starts_k: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        q, k, v, window, starts_q, starts_k, _ = inputs
        ctx.save_for_backward(q, k, v, *output, starts_q, starts_k)
        ctx.window = window  # type: ignore[attr-defined]

    def gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, starts_q, starts_k = ctx.saved_tensors  # type: ignore[attr-defined]
        window: int = ctx.window  # type: ignore[attr-defined]
        return *backward_op(q, k, v, out, lse, grad, window, starts_q, starts_k), None, None, None, None

    forward_op.register_autograd(gradient, setup_context=save)

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return forward_op(q, k, v, window, None, None, None)[0]

    def within(reach: Tensor) -> Attend:
        known: dict[tuple[int, int], Segments] = {}  # by the numbers of queries and keys, in which layers may differ

        def attend_within(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
            sizes = q.shape[1], k.shape[1]
            if sizes not in known:
                known[sizes] = segments(reach[:, -sizes[0] :], sizes[1])
            return forward_op(q, k, v, window, *known[sizes])[0]

        if hasattr(attend, "equal_heads"):
            attend_within.equal_heads = attend.equal_heads  # type: ignore[attr-defined]
        return attend_within

    attend.within = within  # type: ignore[attr-defined]
    return attend


def _lengths(q: Tensor, k: Tensor, starts_q: Tensor | None, starts_k: Tensor | None) -> Lengths:
    """Of the sequences that begin at `starts_q` and `starts_k`, of which none is longer than a row."""
    if starts_q is None or starts_k is None:
        return {}
    return dict(zip(LENGTHS, (starts_q, starts_k, q.shape[1], k.shape[1]), strict=True))


def _rows(x: Tensor, lengths: Lengths) -> Tensor:
    """What a kernel takes for x (B, T, heads, D): with lengths all rows behind each other, (B T, heads, D)."""
    return x.flatten(0, 1) if lengths else x


def aligned(x: Tensor) -> Tensor:
    """The view itself where a kernel may take it, else a copy that is contiguous."""
    whole = x.stride(-1) == 1 and x.data_ptr() % _ALIGNMENT_BYTES == 0
    rows = all(stride * x.element_size() % _ALIGNMENT_BYTES == 0 for stride in x.stride()[:-1])
    return x if whole and rows else x.clone(memory_format=torch.contiguous_format)
