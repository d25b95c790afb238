"""Newton-Schulz against the singular value decomposition."""

import pytest
import torch
from torch import Tensor

from epigram.kernels.muon import normalize_rows
from epigram.optim.orthogonalize import coefficients, orthogonalize

SHAPES = [(3, 32, 32), (3, 24, 64), (3, 64, 24)]
# What five iterations leave of singular values that start at 0.01 of the Frobenius norm or more: the
# published quintic does not converge but stays in a band, Polar Express comes closer to 1.
BANDS = {"quintic": (0.6, 1.3), "polar_express": (0.85, 1.15)}


def _batch(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Random matrices with singular values from 1 to 0.1, in double precision."""
    _, rows, cols = shape
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(random, full_matrices=False)
    return u @ torch.diag(torch.linspace(1, 0.1, min(rows, cols), dtype=torch.float64)) @ vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BANDS)
def test_singular_values_come_near_one_and_vectors_stay(name: str, shape: tuple[int, int, int]) -> None:
    matrices = _batch(shape)
    result = orthogonalize(matrices, coefficients(name, 5), torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ result @ vh.mT  # diagonal, with the new singular values
    values = torch.diagonal(inner, dim1=-2, dim2=-1)
    low, high = BANDS[name]
    assert values.min() > low
    assert values.max() < high
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-10


def test_one_iteration_is_the_polynomial_of_the_singular_values() -> None:
    matrices = _batch((2, 8, 12))
    a, b, c = coefficients("quintic", 1)[0]
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / (s.square().sum(-1, keepdim=True).sqrt() + 1e-7)
    expected = u @ torch.diag_embed(a * s + b * s**3 + c * s**5) @ vh
    result = orthogonalize(matrices, coefficients("quintic", 1), torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_agrees_with_double(dtype: torch.dtype) -> None:
    matrices = _batch((3, 24, 64))
    exact = orthogonalize(matrices, coefficients("quintic", 5), torch.float64)
    result = orthogonalize(matrices, coefficients("quintic", 5), dtype)
    assert result.dtype == dtype
    # Five products of unit-sized matrices keep the dtype's relative precision within a small factor.
    error = (result.double() - exact).norm() / exact.norm()
    assert error < 8 * torch.finfo(dtype).eps


def test_each_matrix_is_treated_by_itself_and_transposition_commutes() -> None:
    matrices = _batch((3, 24, 64))
    triples = coefficients("polar_express", 4)
    together = orthogonalize(matrices, triples, torch.float64)
    alone = torch.stack([orthogonalize(m[None], triples, torch.float64)[0] for m in matrices])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(orthogonalize(matrices.mT, triples, torch.float64), together.mT)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_scale_of_the_gradient_does_not_matter(scale: float) -> None:
    matrices = _batch((1, 16, 16))
    triples = coefficients("quintic", 5)
    result = orthogonalize(scale * matrices, triples, torch.float64)
    torch.testing.assert_close(result, orthogonalize(matrices, triples, torch.float64), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", BANDS)
def test_zero_matrix_stays_zero_beside_others(name: str, dtype: torch.dtype) -> None:
    matrices = _batch((3, 16, 24))
    matrices[1] = 0
    result = orthogonalize(matrices, coefficients(name, 5), dtype)
    assert result[1].eq(0).all()
    assert result[0].norm() > 1


def test_normalize_rows() -> None:
    matrices = _batch((2, 8, 12))
    matrices[0, 3] = 0
    result = normalize_rows(matrices)
    norms = result.norm(dim=-1)
    assert norms[0, 3] == 0
    norms[0, 3] = 1
    torch.testing.assert_close(norms, torch.ones_like(norms))
    torch.testing.assert_close(result[1], matrices[1] / matrices[1].norm(dim=1, keepdim=True))
