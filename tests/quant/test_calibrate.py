"""Hessians through a tap, and what calibration may not read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epigram.errors import UserError
from epigram.quant.calibrate import CalibrationConfig, CalibrationSource, HessianCollector, refuse_held_out

FLOAT32 = 1e-5  # relative, for some ten thousand rows


def batches(num: int = 5, cols: int = 24, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(cols, generator=generator)
    return [(torch.randn(2, 100 + i, cols, generator=generator) + mean).to(dtype) for i in range(num)]


def exact(inputs: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.cat([x.flatten(0, -2) for x in inputs]).double()
    return rows.mT @ rows / len(rows)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sum_is_that_of_float64(dtype: torch.dtype) -> None:
    inputs = batches(dtype=dtype)
    collector = HessianCollector("cpu", {"layers.0.qkv": 24})
    for x in inputs:
        collector.tap("layers.0.qkv", x)
    (hessian,) = collector.finish().values()
    assert hessian.dtype == torch.float32
    assert relative_error(hessian, exact(inputs)) < FLOAT32


def test_many_rows_go_in_chunks() -> None:
    x = torch.randn(40_000, 6, generator=torch.Generator().manual_seed(1))
    collector = HessianCollector("cpu", {"a": 6})
    collector.tap("a", x)
    assert relative_error(collector.finish()["a"], exact([x])) < FLOAT32


def test_other_taps_are_ignored_and_gradients_not_kept() -> None:
    collector = HessianCollector("cpu", {"a": 24})
    (x,) = batches(1)
    x.requires_grad_()
    collector.tap("a", x)
    collector.tap("b", x)
    hessians = collector.finish()
    assert list(hessians) == ["a"]
    assert not hessians["a"].requires_grad


def test_rows_are_counted_on_the_host() -> None:
    """Not every device has float64, and none is to be waited for: here is one without any values."""
    collector = HessianCollector("meta", {"a": 4, "b": 6})
    counts: list[list[int]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            counts.append(tensor.tolist())
        return tensor

    collector.tap("a", torch.empty(3, 4, device="meta"))
    collector.tap("b", torch.empty(2, 5, 6, device="meta"))
    assert {name: h.shape for name, h in collector.finish(note).items()} == {"a": (4, 4), "b": (6, 6)}
    assert counts == [[3, 10]]


def test_ranks_add_up_to_one_collector() -> None:
    inputs = batches(6)
    taps = {"b": 24, "a": 24}
    one, left, right = (HessianCollector("cpu", taps) for _ in range(3))
    for index, x in enumerate(inputs):
        for name in taps:
            one.tap(name, x)
            (left if index < 2 else right).tap(name, x)  # ranks see unequal numbers of rows
    sent: list[torch.Tensor] = []

    def send(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor.clone())
        return tensor

    right.finish(send)
    received = iter(sent)
    reduced = left.finish(lambda tensor: tensor.add_(next(received)))
    for name, hessian in one.finish().items():
        assert relative_error(reduced[name], hessian.double()) < FLOAT32
    again = left.finish()  # reduction in place has left the collector as it was
    assert relative_error(again["a"], exact(inputs[:2])) < FLOAT32


def test_a_tap_that_saw_nothing_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match=r"layers\.3\.up"):
        HessianCollector("cpu", {"layers.3.up": 8}).finish()


def test_an_input_of_another_width_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="8 columns, expected 9"):
        HessianCollector("cpu", {"a": 9}).tap("a", torch.zeros(3, 8))


def test_provenance_of_a_config() -> None:
    record = CalibrationConfig(num_windows=10, seq_len=100, seed=3).provenance()
    expected = {"kind": "train", "split": "train", "windows": 10, "seq_len": 100, "tokens": 1000, "seed": 3}
    assert record.to_dict() == expected
    own = CalibrationConfig(source="self", num_windows=64, seq_len=2048).provenance()
    assert (own.kind, own.split, own.tokens) == ("self-generated", "", 131_072)
    assert CalibrationSource(kind="none").tokens == 0


@pytest.mark.parametrize("split", ["val", "validation", "test", "", "train+val"])
def test_a_held_out_split_is_refused(split: str) -> None:
    with pytest.raises(UserError, match="training split only"):
        CalibrationSource(kind="train", split=split, windows=1, seq_len=2, tokens=2)


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    with pytest.raises(UserError, match="seed must be in 0"):
        CalibrationConfig(seed=-5)


def test_records_that_contradict_themselves_are_refused() -> None:
    for kwargs in (
        {"kind": "random", "tokens": 5},
        {"kind": "none", "tokens": 5},
        {"kind": "self-generated"},
        {"kind": "self-generated", "split": "val", "tokens": 5},
    ):
        with pytest.raises(UserError):
            CalibrationSource(**kwargs)


def test_config_refuses_validation_and_nonsense_in_one_message() -> None:
    with pytest.raises(ValueError, match=r"source.*validation text may not.*num_windows.*seq_len.*temperature"):
        CalibrationConfig(source="val", num_windows=0, seq_len=1, temperature=0.0)


@pytest.mark.parametrize(
    "path",
    [
        "x/fineweb_val_000000.bin",
        "x/val/000000.bin",
        "C:\\data\\validation\\0.bin",
        "VAL.bin",
        "a/test-1.bin",
    ],
)
def test_files_that_look_held_out_are_refused(path: str) -> None:
    with pytest.raises(UserError, match="looks like validation data"):
        refuse_held_out(["x/fineweb_train_000000.bin", path])


def test_training_files_are_not_refused() -> None:
    refuse_held_out(["x/fineweb_train_000001.bin", "test/train_000000.bin", "val/../evaluate/interval.bin", "0.bin"])


@given(st.text(max_size=30))
def test_a_name_with_val_in_it_is_refused_whatever_stands_before(prefix: str) -> None:
    with pytest.raises(UserError, match="looks like validation data"):
        refuse_held_out([f"{prefix}_val_000000.bin"])
