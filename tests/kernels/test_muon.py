"""The elementwise passes of Muon, fused and plain, against the formulas in double precision."""

import pytest
import torch
from torch import Tensor

from epigram.kernels import muon

pytest.importorskip("triton")

# A split (rows 8 on) of a bank of three layers, in tiles of 64 x 64: one, several, not full.
SIZES = [(16, 24), (72, 130), (64, 128)]
OFFSET = 8


def _bank(rows: int, cols: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((3, OFFSET + rows, cols), generator=generator).to(device, dtype)


def _squares(update: Tensor, fused: bool) -> Tensor:
    """Room for the sums of squares, filled with what must not survive."""
    count, rows, cols = update.shape
    return torch.full((count, muon.num_parts(rows, cols, fused=fused)), torch.nan, device=update.device)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_nesterov(size: tuple[int, int], normalize: bool, transposed: bool, fused: bool, device: torch.device) -> None:
    rows, cols = size
    gradient, buffer = (_bank(rows, cols, torch.float32, device, seed) for seed in (0, 1))
    other_rows, before = buffer[:, :OFFSET].clone(), buffer[:, OFFSET:].double()
    shape = (3, cols, rows) if transposed else (3, rows, cols)
    update = torch.full(shape, torch.nan, device=device)
    view = update.mT if transposed else update
    momentum, scale = torch.tensor(0.95, device=device), torch.tensor(0.3, device=device)
    squares = _squares(view, fused)
    muon.nesterov(
        gradient[:, OFFSET:], buffer[:, OFFSET:], view, squares, momentum, scale, normalize=normalize, fused=fused
    )
    scaled = 0.3 * gradient[:, OFFSET:].double()
    expected_buffer = 0.95 * before + scaled
    expected = scaled + 0.95 * expected_buffer
    if normalize:
        expected = expected / expected.norm(dim=2, keepdim=True)
    torch.testing.assert_close(buffer[:, OFFSET:].double(), expected_buffer, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(view.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares.double().sum(1), expected.square().sum((1, 2)), rtol=1e-5, atol=0)
    assert torch.equal(buffer[:, :OFFSET], other_rows), "rows of another split were touched"


@pytest.mark.parametrize("fused", [False, True])
def test_low_precision_rounds_the_momentum_before_it_is_used(fused: bool, device: torch.device) -> None:
    """bfloat16 buffer and update: the update follows from the momentum as stored, and is rounded once.

    To the bit, but for the interpreter: it cuts off where the device rounds to nearest.
    """
    ulp = 2**-7 if fused and device.type == "cpu" else 0.0
    gradient = _bank(20, 30, torch.float32, device, 0)[:, OFFSET:]
    buffer = _bank(20, 30, torch.bfloat16, device, 1)[:, OFFSET:]
    before, update = buffer.double(), torch.empty(gradient.shape, dtype=torch.bfloat16, device=device)
    one = torch.ones((), device=device)
    squares = _squares(update, fused)
    muon.nesterov(gradient, buffer, update, squares, 0.5 * one, one, fused=fused)
    momentum = (0.5 * before + gradient.double()).float().bfloat16()
    torch.testing.assert_close(buffer, momentum, rtol=ulp, atol=0)
    expected = (gradient.double() + 0.5 * buffer.double()).float().bfloat16()
    torch.testing.assert_close(update, expected, rtol=ulp, atol=0)
    torch.testing.assert_close(squares.double().sum(1), update.double().square().sum((1, 2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_descend(size: tuple[int, int], transposed: bool, fused: bool, device: torch.device) -> None:
    rows, cols = size
    weight = _bank(rows, cols, torch.float32, device, 2)
    other_rows, before = weight[:, :OFFSET].clone(), weight[:, OFFSET:].double()
    update = _bank(rows, cols, torch.bfloat16, device, 3)[:, OFFSET:]
    update = update.mT.contiguous().mT if transposed else update
    decay, rate = torch.tensor([1.0, 0.9, 0.5], device=device), torch.tensor([-0.1, 0.0, -2.0], device=device)
    muon.descend(weight[:, OFFSET:], update, decay, rate, fused=fused)
    expected = decay.double()[:, None, None] * before + rate.double()[:, None, None] * update.double()
    torch.testing.assert_close(weight[:, OFFSET:].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight[:, :OFFSET], other_rows), "rows of another split were touched"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_with_a_scale_of_zero_a_gradient_counts_as_zero(normalize: bool, fused: bool, device: torch.device) -> None:
    """Also where it is not finite: with a momentum of 1 the buffer stays to the bit, and the update is finite."""
    gradient, buffer = (_bank(72, 130, dtype, device, 0)[:, OFFSET:] for dtype in (torch.float32, torch.bfloat16))
    gradient[:, 0], gradient[:, 1] = torch.nan, torch.inf
    before, update = buffer.clone(), torch.full(gradient.shape, torch.nan, device=device)
    one, squares = torch.ones((), device=device), _squares(update, fused)
    muon.nesterov(gradient, buffer, update, squares, one, 0 * one, normalize=normalize, fused=fused)
    assert torch.equal(buffer, before)
    expected = before / before.float().norm(dim=2, keepdim=True) if normalize else before
    torch.testing.assert_close(update, expected.float(), rtol=1e-5, atol=1e-6)
    assert squares.isfinite().all()


def test_zero_rows_stay_zero(device: torch.device) -> None:
    gradient, buffer, update = (torch.zeros(1, 16, 16, device=device) for _ in range(3))
    one = torch.ones((), device=device)
    squares = _squares(update, fused=True)
    muon.nesterov(gradient, buffer, update, squares, one, one, normalize=True, fused=True)
    assert update.eq(0).all() and squares.eq(0).all()
