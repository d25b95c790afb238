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

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from epigram.attention.base import Attend

_ALIGNMENT_BYTES = 16  # of the first element and of every row: what the GPU's bulk copies need

Forward = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(q, k, v, window) -> out, lse."""

Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor, Tensor], None]
"""(q, k, v, out, lse, grad of out, window, dq, dk, dv): fills the last three."""


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


VarlenForward = Callable[..., tuple[Tensor, Tensor]]
"""(q, k, v, window, starts_q, starts_k, longest_q, longest_k) -> out, lse: q (N, H, D), lse (H, N)."""

VarlenBackward = Callable[..., None]
"""(q, k, v, out, lse, grad of out, window, dq, dk, dv, starts_q, starts_k, longest_q, longest_k)."""


def register(
    name: str,
    forward_kernel: Forward,
    backward_kernel: Backward,
    varlen_forward_kernel: VarlenForward,
    varlen_backward_kernel: VarlenBackward,
) -> Attend:
    """The operators epigram::{name}_forward and _backward around two kernels, and the `attend` that calls them.

    Two more, epigram::{name}_varlen_forward and _backward, are for documents that are kept apart (`attend.within`).

    The kernels get inputs and outputs whose last dimension is contiguous and whose rows are aligned to 16 bytes; views
    that are so already are passed on as they are, without a copy.
    """

    @torch.library.custom_op(f"epigram::{name}_forward", mutates_args=())
    def forward_op(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        return forward_kernel(aligned(q), aligned(k), aligned(v), window)

    @forward_op.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        batch, length, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)

    @torch.library.custom_op(f"epigram::{name}_backward", mutates_args=())
    def backward_op(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        backward_kernel(aligned(q), aligned(k), aligned(v), aligned(out), lse, aligned(grad), window, dq, dk, dv)
        return dq, dk, dv

    @backward_op.register_fake
    def _(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        q, k, v, window = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.window = window  # type: ignore[attr-defined]

    def gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *backward_op(*ctx.saved_tensors, grad, ctx.window), None  # type: ignore[attr-defined]

    forward_op.register_autograd(gradient, setup_context=save)

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return forward_op(q, k, v, window)[0]

    varlen = _register_varlen(name, varlen_forward_kernel, varlen_backward_kernel)

    def within(reach: Tensor) -> Attend:
        known: dict[tuple[int, int], Segments] = {}  # by the numbers of queries and keys, in which layers may differ

        def attend_within(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
            sizes = q.shape[1], k.shape[1]
            if sizes not in known:
                known[sizes] = segments(reach[:, -sizes[0] :], sizes[1])
            return varlen(q, k, v, window, *known[sizes])

        if hasattr(attend, "equal_heads"):
            attend_within.equal_heads = attend.equal_heads  # type: ignore[attr-defined]
        return attend_within

    attend.within = within  # type: ignore[attr-defined]
    return attend


def _register_varlen(
    name: str, forward_kernel: VarlenForward, backward_kernel: VarlenBackward
) -> Callable[..., Tensor]:
    """(q, k, v, window, starts_q, starts_k, excess) -> out, with rows (B, T, heads, D) as everywhere."""

    @torch.library.custom_op(f"epigram::{name}_varlen_forward", mutates_args=())
    def forward_op(
        q: Tensor, k: Tensor, v: Tensor, window: int, starts_q: Tensor, starts_k: Tensor, excess: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward_kernel(*map(_flat, (q, k, v)), window, starts_q, starts_k, q.shape[1], k.shape[1])
        out[..., :1] += excess  # one channel of each head reaches all that comes after
        return out.view(q.shape), lse

    @forward_op.register_fake
    def _(
        q: Tensor, k: Tensor, v: Tensor, window: int, starts_q: Tensor, starts_k: Tensor, excess: Tensor
    ) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty((q.shape[2], q.shape[0] * q.shape[1]), dtype=torch.float32)

    @torch.library.custom_op(f"epigram::{name}_varlen_backward", mutates_args=())
    def backward_op(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int,
        starts_q: Tensor, starts_k: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        backward_kernel(
            *map(_flat, (q, k, v, out)), lse, _flat(grad), window, *(x.flatten(0, 1) for x in (dq, dk, dv)),
            starts_q, starts_k, q.shape[1], k.shape[1],
        )  # fmt: skip
        return dq, dk, dv

    @backward_op.register_fake
    def _(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int,
        starts_q: Tensor, starts_k: Tensor,
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

    def attend(*arguments: Tensor | int) -> Tensor:
        found: Tensor = forward_op(*arguments)[0]
        return found

    return attend


def _flat(x: Tensor) -> Tensor:
    """(B, T, heads, D) to (B T, heads, D) as a kernel may take it, a view where that can be."""
    return aligned(x.flatten(0, 1))


def aligned(x: Tensor) -> Tensor:
    """The view itself where a kernel may take it, else a copy that is contiguous."""
    whole = x.stride(-1) == 1 and x.data_ptr() % _ALIGNMENT_BYTES == 0
    rows = all(stride * x.element_size() % _ALIGNMENT_BYTES == 0 for stride in x.stride()[:-1])
    return x if whole and rows else x.clone(memory_format=torch.contiguous_format)
