"""Makes operators of a FlashAttention library's kernels, which the compiler cannot trace by themselves.

Each kernel becomes a custom operator with a fake implementation and the forward's gradient registered, so that a
compiled graph holds it as one opaque call. Legend: see `epigram.attention.base`; lse (B, H, Tq) float32 is the
logarithm of the softmax's denominators, which the backward starts from.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from epigram.attention.base import Attend

_ALIGNMENT_BYTES = 16  # of the first element and of every row: what the GPU's bulk copies need

Forward = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(q, k, v, window) -> out, lse."""

Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor, Tensor], None]
"""(q, k, v, out, lse, grad of out, window, dq, dk, dv): fills the last three."""


def register(name: str, forward_kernel: Forward, backward_kernel: Backward) -> Attend:
    """The operators epigram::{name}_forward and _backward around two kernels, and the `attend` that calls them.

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

    return attend


def aligned(x: Tensor) -> Tensor:
    """The view itself where a kernel may take it, else a copy that is contiguous."""
    whole = x.stride(-1) == 1 and x.data_ptr() % _ALIGNMENT_BYTES == 0
    rows = all(stride * x.element_size() % _ALIGNMENT_BYTES == 0 for stride in x.stride()[:-1])
    return x if whole and rows else x.clone(memory_format=torch.contiguous_format)
