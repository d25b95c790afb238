"""Orthogonalisation of many matrices at once: the polar factor by Newton-Schulz iterations.

For G = U S Vᵀ the iterations move every singular value towards 1 and keep U and V, with matrix products
alone. Shapes: n matrices of (rows, cols), all in one batched product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

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
MAX_ITERATIONS = {"quintic": 100, "polar_express": len(_POLAR_EXPRESS)}

_FROBENIUS_EPS = 1e-7  # published; it also keeps a zero matrix zero
_ROW_EPS = 1e-7


def coefficients(name: str, num_iterations: int) -> tuple[Coefficients, ...]:
    """The triples of each iteration: "quintic" repeats one, "polar_express" takes the first of its five."""
    assert 1 <= num_iterations <= MAX_ITERATIONS[name]
    return (_QUINTIC,) * num_iterations if name == "quintic" else _POLAR_EXPRESS[:num_iterations]


def orthogonalize(matrices: Tensor, triples: Sequence[Coefficients], dtype: torch.dtype) -> Tensor:
    """Approximate polar factors U Vᵀ of `matrices` (n, rows, cols), computed and returned in `dtype`.

    The iterations work on the short side: a batch with rows > cols is transposed as a view, and so is the
    result. A zero matrix gives a zero matrix.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT, triples, dtype).mT
    x = _unit_frobenius(matrices.to(dtype))
    for a, b, c in triples:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def normalize_rows(matrices: Tensor) -> Tensor:
    """Each row of (n, rows, cols) divided by its L2 norm: MuonEq-R, done before orthogonalisation.

    Rows are those of the weight as the model stores it: call it before transposing. Source: parameter-golf
    #1217.
    """
    norm = torch.linalg.vector_norm(matrices, dim=-1, keepdim=True, dtype=_at_least_float32(matrices.dtype))
    return matrices / norm.clamp_min(_ROW_EPS).to(matrices.dtype)


def _unit_frobenius(matrices: Tensor) -> Tensor:
    # The norm is summed in float32 and rounded only then. In bfloat16 its rounding scales a whole matrix by
    # at most 1 + 2^-8, which the iterations undo, and the division stays one pass.
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=_at_least_float32(matrices.dtype))
    return matrices / (norm + _FROBENIUS_EPS).to(matrices.dtype)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
