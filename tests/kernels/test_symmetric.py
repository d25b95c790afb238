"""The products of a Newton-Schulz iteration, fused and plain, against the same in double precision."""

import pytest
import torch
from torch import Tensor

from epigram.kernels import symmetric

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from epigram.kernels._triton import symmetric as fused  # noqa: E402

EPS = 1e-7
SMALL_TILES = fused.Tiles(16, 16, 16, num_warps=4, num_stages=2)
# Rows and columns: multiples of the tile or not, one tile or several.
SIZES = [(32, 48), (40, 24), (9, 70), (16, 16)]
# Of the largest entry: sums in float32, and one rounding to the dtype at the end.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def _assert_near(result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype and result.shape == exact.shape
    error = (result.double() - exact.double()).abs().max()
    assert error <= TOLERANCE[dtype] * exact.abs().max()


def _squares(x: Tensor, parts: int) -> Tensor:
    """(n, parts) float32 that sum up to the squared norms."""
    pieces = x.double().square().flatten(1).tensor_split(parts, dim=1)
    return torch.stack([piece.sum(1) for piece in pieces], dim=1).float()


def _norms(x: Tensor) -> Tensor:
    return x.double().square().sum((1, 2), keepdim=True).sqrt() + EPS


@pytest.fixture(params=["plain", "fused"])
def use_fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both paths; the fused one with tiles so small that a matrix has several."""
    monkeypatch.setattr(fused, "tiles_of", lambda num_rows, dtype: SMALL_TILES)
    return request.param == "fused"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_gram(size: tuple[int, int], dtype: torch.dtype, use_fused: bool, device: torch.device) -> None:
    x = _random(2, *size, dtype=dtype, device=device)
    result = symmetric.gram(x, fused=use_fused)
    _assert_near(result, x.double() @ x.double().mT, dtype)
    if use_fused:
        assert torch.equal(result.tril(-16), result.triu(16).mT), "mirrored tiles are equal to the bit"


@pytest.mark.parametrize("size", [32, 40])
def test_polynomial(size: int, use_fused: bool, device: torch.device) -> None:
    a = _random(2, size, size, dtype=torch.float32, device=device)
    a = (a + a.mT) / 8
    result = symmetric.polynomial(a, -4.775, 2.0315, fused=use_fused)
    _assert_near(result, -4.775 * a.double() + 2.0315 * a.double() @ a.double(), torch.float32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_advance(size: tuple[int, int], transposed: bool, use_fused: bool, device: torch.device) -> None:
    """Also on transposed views, which stay transposed."""
    rows, cols = size
    x = _random(2, rows, cols, dtype=torch.float32, device=device)
    x = x.mT.contiguous().mT if transposed else x
    p = _random(2, rows, rows, dtype=torch.float32, device=device)
    result = symmetric.advance(x, p, 3.4445, fused=use_fused)
    _assert_near(result, 3.4445 * x.double() + p.double() @ x.double(), torch.float32)
    if use_fused:
        assert result.stride() == x.stride()


@pytest.mark.parametrize("parts", [1, 5])
def test_division_by_the_norm(parts: int, use_fused: bool, device: torch.device) -> None:
    x = _random(3, 24, 40, dtype=torch.float32, device=device)
    x[1] *= 1e-4
    squares = _squares(x, parts)
    unit = x.double() / _norms(x)
    gram = symmetric.gram(x, squares, fused=use_fused)
    for index in range(3):  # one by one: their sizes differ
        _assert_near(gram[index], unit[index] @ unit[index].mT, torch.float32)
    p = _random(3, 24, 24, dtype=torch.float32, device=device)
    result = symmetric.advance(x, p, 2.5, squares, fused=use_fused)
    for index in range(3):
        _assert_near(result[index], 2.5 * unit[index] + p[index].double() @ unit[index], torch.float32)


def test_zero_matrix_gives_zero(use_fused: bool, device: torch.device) -> None:
    x = torch.zeros(1, 16, 32, device=device)
    assert symmetric.gram(x, _squares(x, 2), fused=use_fused).eq(0).all()
    assert symmetric.advance(x, torch.zeros(1, 16, 16, device=device), 3.0, _squares(x, 2), fused=use_fused).eq(0).all()


def test_tiles_above_the_diagonal_are_not_read_from_the_addend(use_fused: bool, device: torch.device) -> None:
    if not use_fused:
        pytest.skip("of the kernel only")
    x = _random(1, 48, 16, dtype=torch.float32, device=device)
    addend = torch.ones(1, 48, 48, device=device)
    addend[:, :16, 16:], addend[:, 16:32, 32:] = torch.nan, torch.nan
    result = fused.product(x, x.mT, addend, symmetric=True)
    _assert_near(result, x.double() @ x.double().mT + 1, torch.float32)


@triton.jit
def _tiles(out, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    row, col = fused._lower_tile(index)
    tl.store(out + 2 * index, row)
    tl.store(out + 2 * index + 1, col)


def test_every_tile_of_the_lower_triangle_once(device: torch.device) -> None:
    found = torch.zeros((1 << 12, 2), dtype=torch.int32, device=device)
    _tiles[(1,)](found, 1 << 12)
    side = 90  # tiles a side, with 90 * 91 / 2 <= 2 ** 12 in all
    expected = torch.tril_indices(side, side).T.to(device, torch.int32)
    assert torch.equal(found[: len(expected)], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [(128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (64, 64, 64, 4, 4)])
@pytest.mark.parametrize("shape", [(24, 512, 1536), (24, 512, 512), (24, 256, 512), (3, 200, 328)])
def test_bfloat16_at_full_size(shape: tuple[int, int, int], tiles: tuple[int, ...]) -> None:
    """The shapes of parameter-golf #1212, and one that fits no tile."""
    chosen, dtype = fused.Tiles(*tiles), torch.bfloat16
    x = _random(*shape, dtype=dtype, device=torch.device("cuda")) / shape[2] ** 0.5
    gram = fused.product(x, x.mT, symmetric=True, tiles=chosen)
    exact = x.double() @ x.double().mT
    _assert_near(gram, exact, dtype)
    polynomial = fused.product(gram, gram, gram, alpha=2.0, beta=-4.8, symmetric=True, tiles=chosen)
    _assert_near(polynomial, -4.8 * gram.double() + 2.0 * gram.double() @ gram.double(), dtype)
    squares = _squares(x, 7)
    result = fused.product(polynomial, x, x, beta=3.4, squares=squares, tiles=chosen)
    _assert_near(result, (3.4 * x.double() + polynomial.double() @ x.double()) / _norms(x), dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_products_that_the_interpreter_gets_wrong_are_refused() -> None:
    x = torch.zeros(1, 16, 16, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="no bfloat16 products in Triton's interpreter"):
        symmetric.gram(x, fused=True)
