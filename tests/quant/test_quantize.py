"""A whole model to stored tensors and back, with its report; and what is refused."""

import dataclasses
import json

import pytest
import torch
from quant_toy import LAYERS, Toy

from epigram.errors import ArtifactError, UserError
from epigram.quant.config import QuantConfig
from epigram.quant.grid import Grid, GridConfig
from epigram.quant.methods import gptq, rtn
from epigram.quant.quantize import quantize_model, restore
from epigram.quantized import QuantizedTensor

CONFIGS = {
    "published": QuantConfig(),
    "sigma": QuantConfig(grid=GridConfig(clip="sigma"), table_method="gptq"),
    "nearest": QuantConfig(method="rtn", grid=GridConfig(clip="max", floor=0.0)),
    "five bits": QuantConfig(grid=GridConfig(matrix_bits=5, table_bits=7)),
}


def shapes(toy: Toy) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in toy.named.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(toy: Toy, config: QuantConfig) -> None:
    stored, _ = quantize_model(toy.named, toy.roles, toy.hessians, config)
    restored = restore(stored, toy.roles, shapes(toy))
    assert restored.keys() == toy.named.keys()
    start = 0
    for split, rows in toy.roles["banks.qkv"].splits:  # each matrix is back in its place
        for layer in range(LAYERS):
            piece = restored["banks.qkv"][layer, start : start + rows]
            assert torch.equal(piece, stored[f"layers.{layer}.{split}"].dequantize())
        start += rows
    assert torch.equal(restored["embed"], stored["embed"].dequantize())
    assert torch.equal(restored["resid_mix"], toy.named["resid_mix"].half().float())
    for name, tensor in toy.named.items():
        assert restored[name].dtype == torch.float32
        assert (restored[name] - tensor).norm() < 0.25 * tensor.norm() + 1e-3, name
    again, _ = quantize_model(restored, toy.roles, {}, dataclasses.replace(QuantConfig(), method="rtn"))
    if config == QuantConfig():  # with the floor the steps are the same, so the grid's values are fixed points
        for name, tensor in stored.items():
            same = again[name]
            if isinstance(tensor, QuantizedTensor) and name.startswith("layers"):
                assert torch.equal(same.codes, tensor.codes)


def test_tensors_are_those_of_the_methods(toy: Toy) -> None:
    stored, _ = quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig())
    grid = Grid(31, "search", floor=1.0)
    down, hessian = toy.named["banks.down"][1:2], toy.hessians["layers.1.down"][None]
    (expected,) = gptq.quantize(down, hessian, grid, QuantConfig().gptq).tensors
    assert torch.equal(stored["layers.1.down"].codes, expected.codes)
    # q, k and v share one Hessian, and rows do not influence each other: as one matrix they come out the same
    (expected,) = gptq.quantize(
        toy.named["banks.qkv"][2:3], toy.hessians["layers.2.qkv"][None], grid, QuantConfig().gptq
    ).tensors
    together = torch.cat([stored[f"layers.2.{name}"].codes for name in "qkv"])
    assert (together != expected.codes).float().mean() < 0.005
    (table,) = rtn.quantize(toy.named["bigram.embed"][None], None, Grid(127, "quantile", floor=1.0)).tensors
    assert torch.equal(stored["bigram.embed"].codes, table.codes)


def test_parameters_with_gradients_and_in_bfloat16_are_left_alone(toy: Toy) -> None:
    named = {name: torch.nn.Parameter(tensor.bfloat16()) for name, tensor in toy.named.items()}
    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    stored, _ = quantize_model(named, toy.roles, toy.hessians, QuantConfig())
    assert all(torch.equal(named[name], before[name]) for name in named)
    assert not any(t.requires_grad for t in stored.values() if isinstance(t, torch.Tensor))
    widened = {name: tensor.float() for name, tensor in before.items()}
    expected, _ = quantize_model(widened, toy.roles, toy.hessians, QuantConfig())
    assert torch.equal(stored["layers.0.up"].codes, expected["layers.0.up"].codes)


def test_report_against_sums_in_float64(toy: Toy) -> None:
    progress: list[int] = []
    stored, report = quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig(), progress.append)
    assert sum(progress) == sum(row.weights for row in report.rows) == sum(t.numel() for t in toy.named.values())
    rows = {row.tensor_class: row for row in report.rows}
    assert list(rows) == ["embed", "q", "k", "v", "out", "up", "down", "bigram.embed", "control"]
    assert (rows["up"].tensors, rows["up"].method, rows["control"].method) == (LAYERS, "gptq", "float16")
    energy = error = weighted_energy = weighted_error = 0.0
    bits = []
    for layer in range(LAYERS):
        W, H = toy.named["banks.up"][layer].double(), toy.hessians[f"layers.{layer}.up"].double()
        tensor = stored[f"layers.{layer}.up"]
        E = W - tensor.dequantize().double()
        energy, error = energy + float((W * W).sum()), error + float((E * E).sum())
        weighted_energy += float((W @ H @ W.mT).trace())
        weighted_error += float((E @ H @ E.mT).trace())
        share = torch.unique(tensor.codes, return_counts=True)[1].double() / tensor.codes.numel()
        bits.append(-float((share * share.log2()).sum()))
    assert rows["up"].relative_error == pytest.approx(error / energy, rel=1e-5)
    assert rows["up"].hessian_error == pytest.approx(weighted_error / weighted_energy, rel=1e-4)
    assert rows["up"].entropy_bits == pytest.approx(sum(bits) / len(bits), rel=1e-9)
    assert rows["control"].entropy_bits == 16
    assert rows["embed"].hessian_error is not None  # its tap was measured although it was rounded to nearest
    assert rows["bigram.embed"].hessian_error is None
    assert json.loads(json.dumps(report.to_dicts()))[1]["tensor_class"] == "q"


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_the_report_tells_how_many_rows_the_floor_decides(toy: Toy, method: str) -> None:
    """A floor that half of the rows of `up` stay below: all matrices of the bank count together."""
    largest = toy.named["banks.up"].abs().amax(dim=-1)
    floor = float(largest.flatten().median()) * 1.001
    grid = GridConfig(clip="max", floor=floor)
    _, report = quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig(method=method, grid=grid))
    rows = {row.tensor_class: row for row in report.rows}
    assert rows["up"].floor_share == pytest.approx(float((largest < floor).double().mean()))
    assert 0.4 < rows["up"].floor_share < 0.6
    assert rows["control"].floor_share == 0
    _, report = quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig(grid=GridConfig(clip="sigma")))
    assert {row.floor_share for row in report.rows} == {0}


def test_gptq_is_better_by_the_hessian_and_rounding_by_the_plain_error(toy: Toy) -> None:
    _, ours = quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig())
    _, nearest = quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig(method="rtn"))
    for row, other in zip(ours.rows, nearest.rows, strict=True):
        assert row.tensor_class == other.tensor_class
        if row.method == "gptq":
            assert row.hessian_error < 0.8 * other.hessian_error
            assert row.relative_error > other.relative_error


def test_more_damping_is_reported(toy: Toy) -> None:
    hessian = toy.hessians["layers.1.qkv"].double()
    vector = torch.linalg.eigh(hessian).eigenvectors[:, 0]
    toy.hessians["layers.1.qkv"] = (hessian - 0.1 * hessian.diagonal().mean() * torch.outer(vector, vector)).float()
    _, report = quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig())
    assert report.redamped == ("layers.1.q", "layers.1.k", "layers.1.v")
    assert {row.tensor_class: row.damping for row in report.rows}["q"] == pytest.approx(0.201)


def test_a_hopeless_hessian_is_refused_by_name(toy: Toy) -> None:
    toy.hessians["layers.2.down"] = -torch.eye(80)
    with pytest.raises(UserError, match=r"layers\.2\.down: its Hessian"):
        quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e6])
def test_weights_that_cannot_be_stored_are_refused_by_name(toy: Toy, value: float) -> None:
    for parameter, index, name in (
        ("banks.qkv", (1, 40, 0), r"layers\.1\.k"),
        ("embed", (0, 0), "embed"),
        ("backout", (), "backout"),
    ):
        kept = toy.named[parameter]
        toy.named[parameter] = kept.clone()
        toy.named[parameter][index] = value
        with pytest.raises(UserError, match=f"weights of {name} cannot be quantized"):
            quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig())
        toy.named[parameter] = kept


def test_hessians_that_are_missing_or_broken_are_refused_by_name(toy: Toy) -> None:
    toy.hessians["layers.0.out"][3, 4] = float("nan")
    with pytest.raises(UserError, match=r"Hessian of layers\.0\.out cannot"):
        quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig())
    del toy.hessians["layers.0.out"]
    with pytest.raises(UserError, match=r"no Hessian of layers\.0\.out: calibrate first"):
        quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig())
    quantize_model(toy.named, toy.roles, {}, QuantConfig(method="rtn"))
    with pytest.raises(UserError, match=r'no Hessian of head: .* set quant\.table_method = "rtn"'):
        quantize_model(toy.named, toy.roles, {}, QuantConfig(method="rtn", table_method="gptq"))


def test_a_table_method_without_a_tap_is_refused(toy: Toy) -> None:
    toy.roles["embed"] = toy.roles["bigram.embed"]
    with pytest.raises(UserError, match="fits no table"):
        quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig(table_method="gptq"))


def test_tensors_that_do_not_fit_the_model_are_refused(toy: Toy) -> None:
    stored, _ = quantize_model(toy.named, toy.roles, toy.hessians, QuantConfig())
    without = {name: tensor for name, tensor in stored.items() if name != "layers.1.v"}
    with pytest.raises(ArtifactError, match=r"missing \['layers\.1\.v'\]"):
        restore(without, toy.roles, shapes(toy))
    with pytest.raises(ArtifactError, match=r"not in the model \['extra'\]"):
        restore(stored | {"extra": torch.zeros(2)}, toy.roles, shapes(toy))
    with pytest.raises(ArtifactError, match=r"backout has shape \(1,\), the model wants \(\)"):
        restore(stored | {"backout": torch.zeros(1)}, toy.roles, shapes(toy))
