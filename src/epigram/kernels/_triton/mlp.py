"""The MLP sublayer through finished products: neither the normalised view nor an unfinished product is ever written."""

from typing import Any

import torch
from torch import Tensor

from epigram.kernels._triton.residual import correction_of, rstd_of
from epigram.kernels.products.base import Products


class _AddMlp(torch.autograd.Function):
    """See `epigram.kernels.mlp.add_mlp`; how the norm is done without its view: `epigram.kernels.products.base`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, up: Tensor, down: Tensor, arguments: tuple[Any, ...]
    ) -> Tensor:
        rstd, slope, products, keep = arguments
        flat = x.reshape(-1, x.shape[-1])
        rstd = rstd_of(flat) if rstd is None else rstd
        pre, hidden = products.up(flat, up, rstd, slope, keep)
        out, _ = products.added(hidden, down, flat if residual is None else residual.reshape(flat.shape), False)
        if keep:
            ctx.save_for_backward(flat, rstd, pre, hidden, up, down)
            ctx.same, ctx.slope, ctx.products = residual is None, slope, products
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, pre, hidden, up, down = ctx.saved_tensors
        flat = grad.reshape(x.shape).contiguous()
        d_pre, sums = ctx.products.down_back(flat, down, pre, rstd, ctx.slope)
        d_down, d_up = flat.T @ hidden, d_pre.T @ x
        carried = flat if ctx.same else torch.zeros_like(flat)
        dx = ctx.products.back(d_pre, up, carried, x, correction_of(sums, rstd, x.shape[1]))
        return dx.view(grad.shape), None if ctx.same else grad, d_up, d_down, None


def add_mlp(
    x: Tensor, residual: Tensor, rstd: Tensor | None, up: Tensor, down: Tensor, slope: float, products: Products
) -> Tensor:
    """See `epigram.kernels.mlp`."""
    # Not one tensor as two arguments: the gradient of the sum is part of the one that is returned.
    tensors = (x, None if residual is x else residual, up, down)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    result: Tensor = _AddMlp.apply(*tensors, (rstd, slope, products, keep))
    return result
