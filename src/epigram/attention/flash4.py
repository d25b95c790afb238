"""Attention through flash-attn-4: the fastest kernels for Hopper and Blackwell GPUs (extra `flash4`).

Its calls are not traceable, so they are wrapped as custom operators with fake implementations and a registered
backward; the compiler then treats each as one opaque kernel.
"""

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor

from epigram.attention.base import Request

_DTYPES = (torch.bfloat16, torch.float16)
_CAPABILITIES = (9, 10, 11)


def check(request: Request) -> str | None:
    """CUDA of compute capability 9 to 11, half precision, head sizes that are multiples of 8 up to 128."""
    if request.device_type != "cuda" or request.capability is None:
        return "flash4 is for CUDA devices"
    if request.capability[0] not in _CAPABILITIES:
        return f"flash4 needs a Hopper or Blackwell GPU, this one has compute capability {request.capability}"
    if request.dtype not in _DTYPES:
        return f"flash4 needs bfloat16 or float16, not {request.dtype}"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"flash4 needs a head size that is a multiple of 8 up to 128, not {request.head_dim}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """See `epigram.attention.base`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, _ = _forward(q, k, v, window)
    return out


@torch.library.custom_op("epigram::flash4_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Output, and the log of the softmax's denominators (B, H, T) float32."""
    found = _flash_attn_fwd(
        q, k, v, causal=True, window_size_left=window or None, window_size_right=0 if window else None, return_lse=True
    )
    return found[0], found[1]


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return torch.empty_like(q), q.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("epigram::flash4_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _flash_attn_bwd(
        q, k, v, out, grad, lse, causal=True, window_size_left=window or None, window_size_right=0 if window else None
    )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, window = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.window = window  # type: ignore[attr-defined]


def _gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    return *_backward(q, k, v, out, lse, grad.contiguous(), ctx.window), None  # type: ignore[attr-defined]


torch.library.register_autograd("epigram::flash4_forward", _gradient, setup_context=_save)
