"""A matrix product in float8, for training: half the bytes of bfloat16 and twice the operations a second.

    y  = round(x) round(w)^T     e4m3: 3 bits of mantissa, up to 448
    dx = round(g) round(w)       g in e5m2: 2 bits of mantissa, up to 57,344, as gradients spread wider
    dw = g^T x                   in the precision of x

Each tensor has one scale, by which its largest absolute value becomes the largest of its format, so nothing overflows.
It is computed on the device: the host waits for nothing. The gradients pass through the rounding as if it were not
there. dw stays as it is: tensor cores want float8 operands contiguous along what is summed over, so x and g would both
have to be transposed, and it is what the weights are changed by.

The formats: Micikevicius et al., "FP8 formats for deep learning", arXiv:2209.05433.
Legend: R rows (tokens), K inputs, N outputs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epigram.capability import Capability, why_no_float8

_ACTIVATIONS, _GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
_LEAST = 2.0**-100  # of a tensor's largest value: a tensor of zeros has a scale, whose reciprocal is finite too
_MULTIPLE = 16  # elements: rows of float8 operands start at whole 16 bytes


class Rounded(NamedTuple):
    """A matrix in float8: what it stands for is values * scale, the scale 0-dim float32 on the same device."""

    values: Tensor
    scale: Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` in float8: x (..., K), weight (N, K), both in the precision of the result (..., N).

    What is not finite anywhere in x or weight makes all of the result NaN.
    """
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight)
    return y.view(*x.shape[:-1], len(weight))


def why_not(device_type: str, capability: Capability | None, widths: Sequence[int]) -> str | None:
    """Why `linear` cannot serve here, in a sentence; None when it can. widths: every K and N."""
    if reason := why_no_float8(device_type, capability):
        return reason
    odd = [width for width in widths if width % _MULTIPLE]
    if device_type == "cuda" and odd:
        return f"float8 products need widths that are multiples of {_MULTIPLE}, not {odd[0]}"
    return None


def rounded(x: Tensor, dtype: torch.dtype) -> Rounded:
    """x in the float8 format `dtype`, each element to the nearest, ties to even; contiguous whatever x is."""
    scale = x.abs().amax().float().clamp_min(_LEAST) / torch.finfo(dtype).max
    values = (x.float() * scale.reciprocal()).to(dtype, memory_format=torch.contiguous_format)
    return Rounded(values, scale)


def scaled_product(a: Rounded, b: Rounded, dtype: torch.dtype, fast: bool) -> Tensor:
    """a b^T by the device's float8 products: a (R, K), b (N, K), both contiguous -> (R, N) in `dtype`.

    fast: Hopper's tensor cores then add up in about 14 bits of mantissa, instead of moving their sums to float32 now
    and then (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
    """
    return torch._scaled_mm(a.values, b.values.t(), a.scale, b.scale, out_dtype=dtype, use_fast_accum=fast)


def plain_product(a: Rounded, b: Rounded, dtype: torch.dtype, fast: bool) -> Tensor:
    """The same where there are no float8 products. Products of two float8 numbers are exact in float32."""
    return (a.values.float() @ b.values.float().t() * (a.scale * b.scale)).to(dtype)


def _product(a: Rounded, b: Rounded, dtype: torch.dtype, fast: bool) -> Tensor:
    product = scaled_product if a.values.is_cuda else plain_product
    return product(a, b, dtype, fast)


class _Linear(torch.autograd.Function):
    """x (R, K), weight (N, K) -> (R, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        weight8 = rounded(weight, _ACTIVATIONS)
        ctx.save_for_backward(x, *weight8)
        return _product(rounded(x, _ACTIVATIONS), weight8, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, values, scale = ctx.saved_tensors
        transposed = Rounded(values.t().contiguous(), scale)
        # Not `fast`: gradients spread wider, so that small terms would be lost beside large ones.
        dx = _product(rounded(grad, _GRADIENTS), transposed, x.dtype, fast=False)
        return dx, grad.mT @ x
