"""Attention through flash-attn-4: kernels for Hopper and Blackwell GPUs (extra `flash4`)."""

from torch import Tensor

from epigram.attention import _flash4_cache
from epigram.attention._flash import Lengths, register
from epigram.attention.base import Request, why_not_heads
from epigram.errors import UserError

_flash4_cache.enable()  # before the library is imported, which is when it reads this

try:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
except ModuleNotFoundError as error:
    raise UserError(
        f"'flash4' needs flash-attn-4 (there is no module {error.name}): pip install 'epigram[flash4]'"
    ) from error

_CAPABILITIES = (9, 10, 11)
_MOST_HEAD_DIM = 128


def check(request: Request) -> str | None:
    """CUDA of compute capability 9 to 11, half precision, head sizes that are multiples of 8 up to 128."""
    if request.device_type != "cuda" or request.capability is None:
        return "flash4 is for CUDA devices"
    if request.capability[0] not in _CAPABILITIES:
        major, minor = request.capability
        return f"flash4 is for Hopper and Blackwell data-center GPUs, this one has compute capability {major}.{minor}"
    return why_not_heads("flash4", request, _MOST_HEAD_DIM)


def _band(window: int) -> dict[str, int | None]:
    """The library's words for a window: keys to the left and to the right of the query, None for all."""
    return {"window_size_left": window or None, "window_size_right": 0 if window else None}


def _forward(q: Tensor, k: Tensor, v: Tensor, window: int, lengths: Lengths) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _flash_attn_fwd(q, k, v, causal=True, return_lse=True, **lengths, **_band(window))
    return out, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int,
    dq: Tensor, dk: Tensor, dv: Tensor, lengths: Lengths,
) -> None:  # fmt: skip
    _flash_attn_bwd(q, k, v, out, grad, lse, causal=True, dq=dq, dk=dk, dv=dv, **lengths, **_band(window))


attend = register("flash4", _forward, _backward)
# With as many key/value heads as query heads the backward writes their gradients directly; grouped ones go through
# float32 sums and two conversions: 0.15 ms a layer at 73,728 tokens on an H100.
attend.equal_heads = True  # type: ignore[attr-defined]
