"""Steps of rows: float16 rounding, quantiles, policies and the forecast of their entropy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epigram.quant.grid import SEARCH_QUANTILES, Grid, gaussian_bits, gaussian_step, row_quantiles, step_bits, storable
from epigram.quant.report import code_entropy


def test_storable_is_a_cast_to_float16_for_every_float16_and_every_midpoint() -> None:
    values = torch.arange(0x0001, 0x7C00, dtype=torch.int16).view(torch.float16).double()
    between = ((values[1:] + values[:-1]) / 2).float()
    for steps in (
        values.float(),
        between,
        between.nextafter(torch.tensor(0.0)),
        between.nextafter(torch.tensor(1e9)),
    ):
        steps = steps.clamp(2**-24, 65504)
        assert torch.equal(storable(steps), steps.half().float())


def test_storable_is_never_zero_and_never_infinite() -> None:
    steps = storable(torch.tensor([0.0, 1e-30, 2**-26, 1e30, math.inf]))
    assert (steps.half() > 0).all()
    assert steps.half().isfinite().all()


def test_quantiles_are_interpolated_at_ranks_in_float32() -> None:
    """As torch.quantile does up to 2.13, bit for bit; 2.14 rounds otherwise."""
    generator = torch.Generator().manual_seed(0)
    for cols in (1, 2, 7, 512, 1536, 5000):
        weight = torch.randn(3, 6, cols, generator=generator).abs()
        ours = row_quantiles(weight, SEARCH_QUANTILES)
        ordered = weight.double().sort(dim=-1).values
        for index, quantile in enumerate(SEARCH_QUANTILES):
            rank = float(np.float32(quantile) * np.float32(cols - 1))
            below, above = ordered[..., math.floor(rank)], ordered[..., math.ceil(rank)]
            expected = below + (rank - math.floor(rank)) * (above - below)
            torch.testing.assert_close(ours[:, index].double(), expected, rtol=2.4e-7, atol=0.0)
            theirs = torch.quantile(weight, quantile, dim=-1)
            if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
                assert torch.equal(ours[:, index], theirs), (cols, quantile)
            torch.testing.assert_close(ours[:, index], theirs, rtol=1e-4, atol=0.0)


def test_candidates_of_search_end_with_max_and_respect_the_floor() -> None:
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)) * torch.tensor([[0.01], [0.2], [3], [9]])
    steps = Grid(31, "search", floor=1.0).candidates(weight)
    assert steps.shape == (5, 4)
    assert (steps[:, :2] == torch.tensor(1 / 31).half().float()).all()  # the floor is active: all five coincide
    assert (steps[:-1, 2:] <= steps[1:, 2:]).all()
    assert (steps[0, 2:] < steps[-1, 2:]).all()
    assert torch.equal(steps[-1:], Grid(31, "max", floor=1.0).candidates(weight))
    assert torch.equal(steps[-1, 2:], (weight[2:].abs().amax(1) / 31).half().float())


@pytest.mark.parametrize(("clip", "qmax"), [("search", 31), ("max", 31), ("quantile", 127)])
def test_the_rows_whose_step_is_that_of_the_floor(clip: str, qmax: int) -> None:
    """A step of another row may be the same float16 by chance, but not in rows of these sizes."""
    scales = torch.tensor([[0.01], [0.2], [0.28], [3], [9]])
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)).clamp(-3, 3) * scales
    for floor, expected in ((1.0, [True, True, True, False, False]), (0.3, [True, False, False, False, False])):
        grid = Grid(qmax, clip, floor=floor)
        for step in grid.candidates(weight):
            assert grid.at_floor(step.half()).tolist() == expected
    assert not Grid(qmax, clip).at_floor(Grid(qmax, clip).candidates(weight).half()).any(), "there is none"
    sigma = Grid(qmax, "sigma", sigma=qmax * 1.0)
    assert not sigma.at_floor(sigma.candidates(weight).half()).any()


def test_codes_round_to_the_nearest_and_stay_on_the_grid() -> None:
    grid = Grid(3, "max")
    weight = torch.tensor([[0.24, 0.26, -0.74, 1.6, -9.0]])
    assert grid.codes(weight, torch.tensor([0.5])).tolist() == [[0, 1, -1, 3, -3]]
    assert grid.bits == 3


@given(
    st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=40),
    st.sampled_from(["search", "max", "sigma", "quantile"]),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([1, 15, 127]),
)
def test_any_finite_row_gets_usable_steps(row: list[float], clip: str, floor: float, qmax: int) -> None:
    grid = Grid(qmax, clip, floor=floor, sigma=7.0)
    weight = torch.tensor([row])
    for step in grid.candidates(weight):
        stored = step.half()
        assert stored.isfinite().all()
        assert (stored > 0).all()
        codes = grid.codes(weight, step)
        assert codes.abs().max() <= qmax
        if clip == "max":  # nothing is clipped: within half a step, or float16's own spacing where steps are tiny
            error = (codes * step[:, None] - weight).abs().max()
            assert error <= 0.5 * step.max() * (1 + qmax * 2**-10) + qmax * 2**-24


@pytest.mark.parametrize(("qmax", "k"), [(31, 5.0), (31, 12.85), (127, 20.0)])
def test_sigma_keeps_rows_of_nearly_equal_values(qmax: int, k: float) -> None:
    """Their deviation says nothing about their size; the largest value is a code of its own, no coarser than it."""
    grid, noise = Grid(qmax, "sigma", sigma=k), torch.randn(6, 300, generator=torch.Generator().manual_seed(3))
    value = torch.tensor([[1.0], [-0.02], [30.0], [2e-3], [-5.0], [1.0]])
    single, near = value[:, :1], value * (1 + noise * torch.tensor([[0.0], [1e-6], [1e-4], [1e-3], [1e-2], [5e-2]]))
    for weight, most in ((single, 1e-6), (near, 0.5 / qmax)):
        step = grid.candidates(weight)[0]
        error = grid.codes(weight, step) * step[:, None] - weight
        assert (error.square().sum(1) / weight.square().sum(1)).max() < most
        assert (step <= weight.abs().amax(1) / qmax * 1.001 + k * weight.std(1, correction=0) / qmax).all()
    zeros = torch.zeros(2, 1)
    assert not grid.codes(zeros, grid.candidates(zeros)[0]).any()


@pytest.mark.parametrize("cols", [8, 64, 1536])
@pytest.mark.parametrize("k", [3.0, 5.0, 20.0])
def test_sigma_of_rows_about_zero_is_their_deviation_bit_for_bit(cols: int, k: float) -> None:
    """Rows with outliers beyond the clip among them."""
    weight = torch.randn(2, 400, cols, generator=torch.Generator().manual_seed(4))
    weight -= weight.mean(-1, keepdim=True)
    weight[:, ::3, 0] += 0.5 * cols**0.5
    expected = storable(weight.std(dim=-1, correction=0) * (k / 31))
    assert torch.equal(Grid(31, "sigma", sigma=k).candidates(weight)[:, 0], expected)


@pytest.mark.parametrize(("qmax", "k"), [(31, 6.0), (31, 7.0), (31, 12.85), (127, 20.0)])
def test_sigma_gives_the_predicted_entropy(qmax: int, k: float) -> None:
    weight = torch.randn(1, 256, 4096, generator=torch.Generator().manual_seed(2)) * 0.3
    grid = Grid(qmax, "sigma", sigma=k)
    codes = grid.codes(weight, grid.candidates(weight)[:, 0])
    measured = float(code_entropy(codes, qmax))
    forecast = gaussian_bits(k / qmax, qmax)
    assert measured == pytest.approx(forecast, abs=0.01)  # a million codes, each row by its own deviation
    rule_of_thumb = grid.bits - math.log2(k) + 1.05  # published; it takes qmax for a power of two
    assert forecast == pytest.approx(rule_of_thumb, abs=0.06)


def test_forecast_against_the_published_sizes() -> None:
    megabytes = {k: 28_311_552 * gaussian_bits(k / 31, 31) / 8 / 1e6 for k in (6, 7.2, 8, 10, 12.85)}
    assert megabytes == pytest.approx({6: 15.6, 7.2: 14.7, 8: 14.2, 10: 13.0, 12.85: 11.8}, abs=0.06)


def test_entropy_of_codes_is_that_of_their_counts() -> None:
    codes = torch.tensor([[[0, 0, 1, 1]], [[3, 3, 3, 3]], [[-3, -1, 1, 3]]])
    assert code_entropy(codes, 3).tolist() == pytest.approx([1.0, 0.0, 2.0])


@pytest.mark.parametrize("step", [0.01, 0.25, 0.9, 2.0, 6.0])
def test_bits_of_a_step_and_the_step_of_bits(step: float) -> None:
    """Against the forecast with a clip that no number reaches; a fine step costs what the density says."""
    assert step_bits(step) == pytest.approx(gaussian_bits(step, math.ceil(20 / step)), abs=1e-3)
    assert gaussian_step(step_bits(step)) == pytest.approx(step, rel=1e-6)
