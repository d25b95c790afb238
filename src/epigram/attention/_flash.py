"""Makes operators of a FlashAttention library's kernels, which the compiler cannot trace by themselves.

Each kernel becomes a custom operator with a fake implementation and the forward's gradient registered, so that a
compiled graph holds it as one opaque call. Legend: see `epigram.attention.base`; lse (B, H, Tq) float32 is the
logarithm of the softmax's denominators, which the backward starts from.
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


class Flash(NamedTuple):
    """attend is differentiable; forward and backward are for who writes the gradient of a larger part by hand.

    backward(q, k, v, out, lse, grad, window, dq=None, dk=None, dv=None) returns dq, dk, dv: new tensors, or the three
    that were given, which may be views into one packed gradient.
    """

    attend: Attend
    forward: Forward
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def register(name: str, forward_kernel: Forward, backward_kernel: Backward) -> Flash:
    """The operators epigram::{name}_forward, _backward and _backward_into around two kernels.

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

    @torch.library.custom_op(f"epigram::{name}_backward_into", mutates_args=("dq", "dk", "dv"))
    def backward_into_op(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int,
        dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> None:  # fmt: skip
        wanted = (dq, dk, dv)
        written = [x if is_aligned(x) else x.new_empty(x.shape) for x in wanted]
        backward_kernel(aligned(q), aligned(k), aligned(v), aligned(out), lse, aligned(grad), window, *written)
        for target, source in zip(wanted, written, strict=True):
            if target is not source:
                target.copy_(source)

    def save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        q, k, v, window = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.window = window  # type: ignore[attr-defined]

    def gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *backward_op(*ctx.saved_tensors, grad, ctx.window), None  # type: ignore[attr-defined]

    forward_op.register_autograd(gradient, setup_context=save)

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return forward_op(q, k, v, window)[0]

    def backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int,
        dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if dq is None or dk is None or dv is None:
            assert dq is dk is dv is None, "give all three gradients to write into, or none"
            return backward_op(q, k, v, out, lse, grad, window)
        backward_into_op(q, k, v, out, lse, grad, window, dq, dk, dv)
        return dq, dk, dv

    return Flash(attend, forward_op, backward)


def is_aligned(x: Tensor) -> bool:
    """Whether a kernel may take this view as it is."""
    if x.stride(-1) != 1 or x.data_ptr() % _ALIGNMENT_BYTES:
        return False
    return all(stride * x.element_size() % _ALIGNMENT_BYTES == 0 for stride in x.stride()[:-1])


def aligned(x: Tensor) -> Tensor:
    """The view itself where a kernel may take it, else a copy that is contiguous."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
