"""The three products of a Newton-Schulz iteration, batched: X Xᵀ, b A + c A A, and a X + P X.

The first two are symmetric, so the fused kernel computes the tiles on and below the diagonal and mirrors them (as
flash-muon and modded-nanogpt do): five eighths of the work for four tiles a side. It adds the scaled addend in the
epilogue of the product, where torch.baddbmm copies the addend first. The first and the last take, in the first
iteration, the division by the Frobenius norm with them, so that it is no pass of its own.

Shapes: n matrices; x (n, rows, cols), gram and polynomial (n, rows, rows). `squares` (n, parts) float32 sums up to the
square of each matrix's Frobenius norm. bfloat16, float16 or float32 (the twins also take float64) with sums in
float32 at least; strides are free.
"""

import torch
from torch import Tensor

FROBENIUS_EPS = 1e-7  # published; it also keeps a zero matrix zero


def gram(x: Tensor, squares: Tensor | None = None, *, fused: bool) -> Tensor:
    """X Xᵀ, exactly symmetric when fused; with `squares` that of X / (‖X‖ + eps)."""
    if fused:
        from epigram.kernels._triton import symmetric

        return symmetric.product(x, x.mT, squares=squares, power=2, symmetric=True)
    result = torch.bmm(x, x.mT)
    return result if squares is None else result.mul_(_inverse_norms(squares, x.dtype, power=2))


def polynomial(gram: Tensor, b: float, c: float, *, fused: bool) -> Tensor:
    """b A + c A A for symmetric A; the fused kernel reads the addend's lower tiles alone."""
    if fused:
        from epigram.kernels._triton import symmetric

        return symmetric.product(gram, gram, gram, alpha=c, beta=b, symmetric=True)
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


def advance(x: Tensor, polynomial: Tensor, a: float, squares: Tensor | None = None, *, fused: bool) -> Tensor:
    """a X + P X; with `squares` that of X / (‖X‖ + eps)."""
    if fused:
        from epigram.kernels._triton import symmetric

        return symmetric.product(polynomial, x, x, beta=a, squares=squares, power=1)
    result = torch.baddbmm(x, polynomial, x, beta=a)
    return result if squares is None else result.mul_(_inverse_norms(squares, x.dtype, power=1))


def _inverse_norms(squares: Tensor, dtype: torch.dtype, power: int) -> Tensor:
    """(n, 1, 1): 1 / (norm + eps) ** power, rounded to `dtype` only at the end."""
    norms = squares.sum(dim=1).sqrt_().add_(FROBENIUS_EPS)
    return norms.pow_(-power).to(dtype)[:, None, None]
