"""Orthogonalisation of many matrices at once: the polar factor by Newton-Schulz iterations.

For G = U S Vᵀ the iterations move every singular value towards 1 and keep U and V, with matrix products
alone. Shapes: n matrices of (rows, cols), all in one batched product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from epigram.kernels import symmetric
from epigram.kernels.muon import square_sums

Coefficients = tuple[float, float, float]

# (a, b, c) of X <- a X + (b A + c A A) X with A = X Xᵀ. One triple for all iterations: the slope at zero is
# as steep as possible, so five iterations lift even small singular values, which then stay between about 0.68
# and 1.2 instead of converging (Jordan's Muon, parameter-golf #399).
_QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
# A triple an iteration, each the best for the interval that the one before leaves (Polar Express, arXiv
# 2505.16932; the values are those of parameter-golf #1344).
_POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.15655, -22.48329, 15.87877),
    (4.04293, -2.80892, 0.50002),
    (3.89167, -2.77248, 0.50606),
    (3.28575, -2.36813, 0.46449),
    (2.34654, -1.70978, 0.42324),
)
_TRIPLES = {"quintic": (_QUINTIC,) * 100, "polar_express": _POLAR_EXPRESS}  # of as many iterations as may be
MAX_ITERATIONS = {name: len(triples) for name, triples in _TRIPLES.items()}


def coefficients(name: str, num_iterations: int) -> tuple[Coefficients, ...]:
    """The triples of each iteration: "quintic" repeats one, "polar_express" takes the first of its five."""
    assert 1 <= num_iterations <= MAX_ITERATIONS[name]
    return _TRIPLES[name][:num_iterations]


def orthogonalize(
    matrices: Tensor,
    triples: Sequence[Coefficients],
    dtype: torch.dtype,
    squares: Tensor | None = None,
    *,
    fused: bool = False,
) -> Tensor:
    """Approximate polar factors U Vᵀ of `matrices` (n, rows, cols), computed and returned in `dtype`.

    The iterations work on the short side: a batch with rows > cols is transposed as a view, and so is the
    result. A zero matrix gives a zero matrix. squares: (n, parts) float32 with the squared Frobenius norms as
    sums over the parts, where the caller has them. fused: the products by the kernels of `kernels.symmetric`.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT, triples, dtype, squares, fused=fused).mT
    x = matrices.to(dtype)
    norms: Tensor | None = square_sums(x) if squares is None else squares
    for a, b, c in triples:
        gram = symmetric.gram(x, norms, fused=fused)
        polynomial = symmetric.polynomial(gram, b, c, fused=fused)
        x = symmetric.advance(x, polynomial, a, norms, fused=fused)
        norms = None  # only the first iteration's input is not yet divided by its norm
    return x
