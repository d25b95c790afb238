"""GPTQ and rounding to nearest: the published vectors, a plain loop in float64, and independence within a
batch."""

import pytest
import torch
from quant_toy import correlated_inputs, gram
from torch import Tensor

from epigram import plugin
from epigram.quant.config import METHODS
from epigram.quant.grid import SEARCH_QUANTILES, Grid
from epigram.quant.methods import gptq, rtn
from epigram.quant.methods.base import HessianError, full_float32
from epigram.quant.methods.gptq import GptqConfig, factorize
from epigram.quant.report import energies

INT6 = Grid(31, "search", floor=1.0)
GRIDS = [
    INT6,
    Grid(31, "search"),
    Grid(31, "sigma", sigma=7.0),
    Grid(127, "quantile", floor=1.0),
    Grid(7, "max"),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(name: str, weights: Tensor, hessians: Tensor | None, grid: Grid, config: GptqConfig | None = None):
    return plugin.load(METHODS, name).quantize(weights, hessians, grid, config or GptqConfig())


def test_gptq_is_the_published_one(golden: dict[str, Tensor]) -> None:
    # the vectors were made with the damping of the GPTQ step alone, not that of the calibration before it
    config = GptqConfig(damping_passes=1)
    outcome = gptq.quantize(golden["gptq.weight"][None], golden["gptq.hessian"][None], INT6, config)
    assert torch.equal(outcome.tensors[0].codes, golden["gptq.q"])
    assert torch.equal(outcome.tensors[0].scale, golden["gptq.scale"])
    assert outcome.damping == pytest.approx([0.01])


def test_rounding_is_the_published_one(golden: dict[str, Tensor]) -> None:
    weight = golden["gptq.weight"][None]
    for name, grid in {"rtn": INT6, "int8": Grid(127, "quantile", floor=1.0)}.items():
        (tensor,) = rtn.quantize(weight, None, grid).tensors
        assert torch.equal(tensor.codes, golden[f"{name}.q"])
        assert torch.equal(tensor.scale, golden[f"{name}.scale"])


def plain_gptq(weight: Tensor, hessian: Tensor, step: Tensor, qmax: int, damping: float) -> Tensor:
    """Column by column in float64, with the inverse written out and no blocks."""
    W, H, s = weight.double(), hessian.double().clone(), step.double()
    H += damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    order = H.diagonal().argsort(descending=True)
    W, H = W[:, order], H[order][:, order]
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    codes = torch.zeros_like(W)
    for j in range(W.shape[1]):
        codes[:, j] = (W[:, j] / s).round().clamp(-qmax, qmax)
        lost = (W[:, j] - codes[:, j] * s) / U[j, j]
        W[:, j:] -= lost[:, None] * U[j, j:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


@pytest.mark.parametrize("block_size", [1, 40, 128, 500])
def test_gptq_equals_a_plain_loop(block_size: int) -> None:
    weight = torch.randn(48, 200, generator=generator(0)) * 0.4
    hessian = gram(200, generator(1))
    grid = Grid(31, "sigma", sigma=5.0)
    config = GptqConfig(block_size=block_size, damping=0.02, damping_passes=1)
    (tensor,) = gptq.quantize(weight[None], hessian[None], grid, config).tensors
    expected = plain_gptq(weight, hessian, tensor.scale.float(), 31, 0.02)
    # a code on the edge between two may fall either way in float32, and its row differs from there on
    assert (tensor.codes != expected).float().mean() < 0.002


def test_search_keeps_the_candidate_of_least_plain_error() -> None:
    weight = torch.randn(30, 120, generator=generator(2)) * 2
    weight[::3, 5] *= 6  # outliers make the candidates differ
    hessian = gram(120, generator(3))
    candidates = [(torch.quantile(weight.abs(), q, dim=1) / 31).half().float() for q in SEARCH_QUANTILES]
    trials = [plain_gptq(weight, hessian, step, 31, 0.0201) for step in candidates]
    errors = [
        float((codes * step[:, None].double() - weight).square().mean())
        for codes, step in zip(trials, candidates, strict=True)
    ]
    best = errors.index(min(errors))
    assert len({round(error, 9) for error in errors}) == 5  # the choice is a real one
    (tensor,) = gptq.quantize(weight[None], hessian[None], Grid(31, "search"), GptqConfig()).tensors
    assert torch.equal(tensor.scale.float(), candidates[best])
    assert (tensor.codes != trials[best]).float().mean() < 0.002


@pytest.mark.parametrize("name", plugin.names(METHODS))
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.clip}{grid.qmax}")
def test_a_batch_is_its_matrices_one_by_one(name: str, grid: Grid) -> None:
    sizes = torch.tensor([0.1, 1.0, 0.4, 0.0])[:, None, None]  # with floor and without, and a matrix of zeros
    weights = torch.randn(4, 20, 70, generator=generator(4)) * sizes
    weights[1, ::2, 3] *= 5
    hessians = torch.stack([gram(70, generator(seed)) for seed in range(4)])
    together = run(name, weights, hessians, grid).tensors
    for index, tensor in enumerate(together):
        (alone,) = run(name, weights[index : index + 1], hessians[index : index + 1], grid).tensors
        assert torch.equal(tensor.scale, alone.scale)
        # float32 products of other batch sizes may add in another order, which moves codes on an edge
        assert (tensor.codes != alone.codes).float().mean() < 0.005
        assert tensor.codes.abs().max() <= grid.qmax


def test_rows_with_equal_clips_are_swept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = []
    sweep = gptq.sweep

    def spy(weights: Tensor, *rest: object) -> Tensor:
        swept.append(tuple(weights.shape))
        return sweep(weights, *rest)

    monkeypatch.setattr(gptq, "sweep", spy)
    weights = torch.randn(2, 20, 64, generator=generator(5)) * 0.1
    hessians = torch.stack([gram(64, generator(6))] * 2)
    gptq.quantize(weights, hessians, INT6, GptqConfig())
    weights[1, 0, 0] = 9.0  # one row leaves the floor: its five clips may be five jobs, the others stay one
    gptq.quantize(weights, hessians, INT6, GptqConfig())
    assert swept[0] == (2, 20, 64)
    assert 20 < swept[1][1] <= 24


def test_gptq_beats_rounding_where_inputs_are_correlated() -> None:
    weights = torch.randn(3, 64, 96, generator=generator(7)) * 0.14
    inputs = torch.stack([correlated_inputs(500, 96, generator(seed)) for seed in range(3)])
    hessians = inputs.mT @ inputs
    grid = Grid(7, "sigma", sigma=3.0)
    errors = {}
    for name in ("gptq", "rtn"):
        dequantized = torch.stack([t.dequantize() for t in run(name, weights, hessians, grid).tensors])
        errors[name] = energies(weights - dequantized, hessians)
        outputs = (inputs @ (weights - dequantized).mT).double().square().sum(dim=(1, 2))
        assert torch.allclose(errors[name], outputs, rtol=1e-4)  # tr(E H Eᵀ) is the error of the product
    assert (errors["gptq"] < 0.6 * errors["rtn"]).all()


def test_a_product_with_uncorrelated_inputs_is_rounded_to_nearest() -> None:
    weights = torch.randn(1, 16, 40, generator=generator(8))
    diagonal = torch.diag_embed(torch.rand(1, 40, generator=generator(9)) + 0.1)
    (ours,) = run("gptq", weights, diagonal, INT6).tensors
    (nearest,) = run("rtn", weights, None, INT6).tensors
    assert torch.equal(ours.codes, nearest.codes)


def test_columns_that_never_had_an_input_get_zero() -> None:
    inputs = correlated_inputs(300, 40, generator(10))
    inputs[:, [3, 17]] = 0
    weights = torch.randn(1, 16, 40, generator=generator(11))
    (tensor,) = run("gptq", weights, (inputs.mT @ inputs)[None], INT6).tensors
    assert (tensor.codes[:, [3, 17]] == 0).all()
    alive = [i for i in range(40) if i not in (3, 17)]
    assert (tensor.codes[:, alive] != 0).any(dim=0).all()


def test_the_scale_of_a_hessian_does_not_matter() -> None:
    weights, hessian = torch.randn(1, 16, 40, generator=generator(12)), gram(40, generator(13))[None]
    codes = [run("gptq", weights, hessian * scale, INT6).tensors[0].codes for scale in (1.0, 2.0**-20, 2.0**30)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


def test_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    hessian = gram(50, generator(14))
    factors = factorize(hessian[None], 0.05)
    order = factors.order[0]
    damped = hessian.double() + 0.05 * hessian.double().diagonal().mean() * torch.eye(50)
    assert damped.diagonal()[order].diff().le(0).all()
    U = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    expected = U / U.diagonal()[:, None]
    assert torch.allclose(factors.unit_upper[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_more_damping_is_tried_for_the_failing_matrix_only_and_reported() -> None:
    good = gram(30, generator(15)).double()
    vector = torch.linalg.eigh(good).eigenvectors[:, 0]
    bad = good - 0.1 * good.diagonal().mean() * torch.outer(vector, vector)  # one direction is negative
    weights = torch.randn(2, 8, 30, generator=generator(16))
    outcome = run("gptq", weights, torch.stack([good, bad]).float(), INT6)
    assert outcome.damping[0] == pytest.approx(0.0201)
    assert outcome.damping[1] == pytest.approx(0.201)
    (alone,) = run("gptq", weights[:1], good[None].float(), INT6).tensors
    assert torch.equal(outcome.tensors[0].codes, alone.codes)


def test_a_hopeless_hessian_is_refused() -> None:
    weights = torch.randn(3, 8, 30, generator=generator(17))
    hessians = torch.stack([gram(30, generator(18)), gram(30, generator(19)), -1e3 * torch.eye(30)])
    with pytest.raises(HessianError, match=r"even with damping 20\.1") as caught:
        run("gptq", weights, hessians, INT6)
    assert caught.value.index == 2


def test_full_float32_restores_the_choice() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32():
            inside = torch.get_float32_matmul_precision()
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert (inside, after) == ("highest", "high")


@pytest.mark.parametrize(
    ("key", "value"), [("damping", -1.0), ("damping", float("nan")), ("damping_passes", 0), ("block_size", 0)]
)
def test_settings_are_checked(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"quant.gptq.{key}"):
        GptqConfig(**{key: value})
