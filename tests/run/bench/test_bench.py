"""Floors, rows, and the parts of a run that benchmarks time: they are the run's own."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_helpers import short

from epigram import plugin
from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.evaluation.windows import Method
from epigram.run.bench import _updates, attention, mlp, score, step
from epigram.run.bench._ceilings import Ceilings, Work, measure_ceilings
from epigram.run.bench._kernels import break_down
from epigram.run.bench._profile import prepare_folder
from epigram.run.bench._tables import print_breakdown, print_result
from epigram.run.bench._timing import Timing
from epigram.run.bench.base import PACKAGE, Bench, Options, Row, fill_zeros
from epigram.run.bench.pack import raw_bytes
from epigram.run.benchmark import benchmark
from epigram.run.setup import build_engine
from epigram.run.warmup import random_tokens

CEILINGS = Ceilings(copy_bytes_per_s=1e9, product_flops_per_s=1e12, dtype="float32")


@pytest.fixture
def bench() -> Iterator[Bench]:
    return Bench(engine=build_engine(short(), Context()), repeats=1)


# -- floors and rows --------------------------------------------------------------------------------------------------


def test_the_floor_of_parts_that_follow_each_other():
    """A millisecond of operations that hides half a millisecond of traffic, then two of traffic."""
    parts = [Work(flops=1e9, bytes=5e5), Work(bytes=2e6)]
    assert CEILINGS.floor_ms(parts) == pytest.approx(3.0)
    assert CEILINGS.floor_ms([]) == 0


def test_a_row_in_numbers():
    timing = Timing(samples_ms=(3, 4, 5), first_s=7.5)
    row = Row(name="r", timing=timing, work=(Work(flops=1e9), Work(bytes=1e6)), amounts={"tokens": 100})
    found = row.as_dict(CEILINGS)
    assert (found["median_ms"], found["repeats"], found["first_s"]) == (4, 3, 7.5)
    assert (found["p10_ms"], found["p90_ms"]) == pytest.approx((3.2, 4.8))
    assert (found["floor_ms"], found["floor_share"]) == pytest.approx((2.0, 0.5))
    assert (found["flops"], found["traffic_bytes"]) == (1e9, 1e6)
    assert found["rates"] == {"tokens/s": 25_000}
    assert Row(name="r", timing=timing).as_dict(CEILINGS)["floor_share"] is None


def test_ceilings_are_those_of_the_measured_times(monkeypatch):
    """128 MiB read and written in 10 ms; a product of 1,024 in the same time."""

    def ten_ms(work, context, repeats):
        work()
        return Timing(samples_ms=(10.0,) * repeats)

    monkeypatch.setattr("epigram.run.bench._ceilings.measure", ten_ms)
    found = measure_ceilings(Context(), torch.float32)
    assert found.dtype == "float32"
    assert found.copy_bytes_per_s == pytest.approx(2 * 2**27 / 0.010)
    assert found.product_flops_per_s == pytest.approx(2 * 1024**3 / 0.010)


# -- what is timed ----------------------------------------------------------------------------------------------------


def test_zeros_are_filled_where_weights_are_multiplied_or_packed(bench: Bench):
    model, roles = bench.engine.model, bench.engine.model.roles()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not before["banks.out"].any()
    fill_zeros(bench.engine)
    for name, parameter in model.named_parameters():
        if roles[name].kind == "control" or before[name].any():
            assert torch.equal(parameter, before[name]), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(parameter.shape[-1] ** -0.5, rel=0.1), name


def test_lanes_of_one_shape_are_timed_once(bench: Bench):
    assert [(lane.num_seqs, lane.seq_len) for lane in bench.lanes()] == [(4, 64), (2, 128)]
    assert random_tokens(bench.engine, 4, 65).dtype == torch.int64


def test_what_a_step_needs_is_what_its_parts_need(bench: Bench):
    step.run(bench)
    whole, *parts = bench.rows
    lanes = {row.name.rpartition(", ")[2]: CEILINGS.floor_ms(row.work) for row in parts if "backward" in row.name}
    updates = [CEILINGS.floor_ms(row.work) for row in parts if "backward" not in row.name]
    assert CEILINGS.floor_ms(whole.work) == pytest.approx(2 * lanes["4 x 64"] + lanes["2 x 128"] + sum(updates))
    assert whole.amounts == {"tokens": 3 * 256}
    assert bench.figures["peak_memory_bytes"] > 0
    assert all(p.grad is None for p in bench.engine.model.parameters())


def test_an_update_is_timed_on_the_same_gradients_each_time(bench: Bench):
    updates = _updates.Updates(bench)
    updates._reset()
    updates._clip()
    once = [p.grad.clone() for p in bench.engine.model.parameters()]
    for _ in range(3):
        updates._reset()
        updates._clip()
    for first, again in zip(once, bench.engine.model.parameters(), strict=True):
        assert torch.equal(first, again.grad)


def test_clipping_handles_every_lane(bench: Bench):
    """Three lanes of equal weight with equal gradients: their average is one lane's, clipped to 0.3."""
    updates = _updates.Updates(bench)
    updates._clip()
    found = torch.cat([p.grad.flatten() for p in bench.engine.model.parameters()])
    saved = torch.cat([g.flatten() for g in updates._saved])
    assert saved.norm() > 0.3
    torch.testing.assert_close(found, saved * (0.3 / saved.norm()), rtol=1e-4, atol=0)


def test_without_averaging_there_is_nothing_to_time():
    bench = Bench(engine=build_engine(short("average.mode=none"), Context()), repeats=1)
    _updates.Updates(bench).time_average()
    assert (bench.rows, bench.left_out) == ([], {"EMA": 'average.mode is "none"'})
    assert _updates.average_work(bench.engine) == ()


def test_the_products_of_an_mlp(bench: Bench):
    """Against a count of what the plain variant runs, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    x, up, down = torch.randn(10, 4), torch.randn(6, 4), torch.randn(4, 6)
    leaves = [tensor.requires_grad_() for tensor in (x, up, down)]
    with FlopCounterMode(display=False) as counter:
        mlp.plain(torch.zeros(10, 4), *leaves, 0.5).sum().backward()
    work = mlp.products_work(10, 4, 6, item_bytes=2)
    assert counter.get_total_flops() == sum(part.flops for part in work)
    assert {part.bytes for part in work} == {2 * (10 * 4 + 10 * 6 + 4 * 6)}


def test_the_plain_mlp_is_the_models_own(bench: Bench):
    """What the model's layer makes of an input, seen through the taps of its two products."""
    fill_zeros(bench.engine)
    model, seen = bench.engine.model, {}
    model(torch.randint(512, (1, 16)), tap=lambda name, x: seen.setdefault(name, x))
    up, down = 2**-0.5 * model.banks.up[1], model.banks.down[1]
    h, hidden = seen["layers.1.up"], seen["layers.1.down"]
    found = mlp.plain(torch.zeros_like(h), h, up, down, model.config.mlp_slope)
    torch.testing.assert_close(found, torch.nn.functional.linear(hidden, down))


def test_the_oracle_is_left_out_where_it_does_not_fit(bench: Bench, monkeypatch):
    lane = bench.lanes()[0]
    assert attention._too_large(bench, lane) is None
    monkeypatch.setattr(attention.machine, "memory_bytes", lambda: 100_000)
    assert "writes out all logits" in attention._too_large(bench, lane)


def test_a_backend_that_runs_out_of_memory_says_so(bench: Bench, monkeypatch):
    def hungry(q, k, v, window):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(plugin.load("epigram.attention", "sdpa"), "attend", hungry)
    attention.run(bench)
    assert {row.name.split(",")[0] for row in bench.rows} == {"reference"}
    assert bench.left_out["sdpa, full, 4 x 64"] == "it needs more memory than this device has"


def test_the_forecast_of_the_validation_set():
    """By hand: 62,000,000 tokens in windows of 2,048, 96 at a time; and every 128."""
    blocks = Method(name="blocks", seq_len=2048, stride=2048)
    sliding = Method(name="sliding", seq_len=2048, stride=128)
    assert score.full_batches(blocks, 196_608) == -(-30_274 // 96)  # 30,273.4 windows
    assert score.full_batches(sliding, 196_608) == -(-484_360 // 96)  # (62,000,000 - 2,048) / 128, and the first


def test_how_to_score_follows_the_options(bench: Bench):
    assert score.settings(bench) == bench.engine.config.score
    bench.options = Options(seq_len=64)
    assert (score.settings(bench).seq_len, score.settings(bench).stride) == (64, 8)
    bench.options = Options(seq_len=64, stride=16, methods=("sliding",))
    assert score.settings(bench).method("sliding") == Method(name="sliding", seq_len=64, stride=16)
    bench.options = Options(stride=256)
    with pytest.raises(UserError, match="stride = 256 is over seq_len = 128"):
        score.settings(bench)


def test_raw_bytes():
    from epigram.quantized import QuantizedTensor

    codes, scale = torch.zeros(3, 5, dtype=torch.int8), torch.zeros(3, dtype=torch.float16)
    assert raw_bytes({"a": QuantizedTensor(codes, scale, 31), "b": torch.zeros(7, dtype=torch.float16)}) == 35


# -- the command's function -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", plugin.names(PACKAGE))
def test_every_benchmark_is_a_whole_plugin(name: str):
    module = plugin.load(PACKAGE, name)
    assert module.REPEATS >= 1
    assert set(module.OPTIONS) <= set(Options.__dataclass_fields__)
    assert callable(module.run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            Options(profile=Path("p")),
            "bench lanes has no --profile: it belongs to attention, mlp, optimizer, pack, score",
        ),
        (Options(methods=("blocks",)), "bench lanes has no --method: it belongs to score"),
        (Options(seq_len=8), "bench lanes has no --seq-len: it belongs to score"),
    ],
)
def test_an_option_of_another_benchmark_is_refused(options: Options, message: str):
    with pytest.raises(UserError, match=message):
        benchmark("lanes", options=options)


def test_several_processes_are_refused(monkeypatch):
    from contextlib import contextmanager

    @contextmanager
    def two(device):
        yield Context(world_size=2)

    monkeypatch.setattr("epigram.run.benchmark.open_context", two)
    with pytest.raises(UserError, match="start it without torchrun"):
        benchmark("mlp")


def test_a_profile_is_never_written_over(tmp_path: Path):
    folder = tmp_path / "new" / "profile"
    prepare_folder(folder)
    assert folder.is_dir()
    prepare_folder(folder)  # still empty
    (folder / "trace.json").write_text("{}")
    with pytest.raises(UserError, match=r"already holds trace\.json"):
        prepare_folder(folder)
    with pytest.raises(UserError, match="is a file"):
        prepare_folder(folder / "trace.json")


# -- tables -----------------------------------------------------------------------------------------------------------

RESULT = {
    "benchmark": "step",
    "recipe": "smoke",
    "settings": ["seed=2"],
    "machine": {
        "cpu": "a processor",
        "threads": 2,
        "driver": "580.1",
        "commit": {"hash": "0123456789abcdef", "changed": True},
        "versions": {"python": "3.12.1", "torch": "2.11.0"},
        "paths": {"device": "cpu", "compile": "off"},
    },
    "ceilings": {"copy_bytes_per_s": 2.95e12, "product_flops_per_s": 6.8e14, "dtype": "bfloat16"},
    "rows": [
        {"name": "whole step", "median_ms": 1234.5, "p10_ms": 1.25, "p90_ms": 1300.0, "repeats": 3, "first_s": 60.0,
         "floor_ms": 500.0, "floor_share": 0.405, "rates": {"tokens/s": 73728.4}},
        {"name": "quantize", "median_ms": 2.0, "p10_ms": 2.0, "p90_ms": 2.0, "repeats": 3, "first_s": None,
         "floor_ms": None, "floor_share": None, "rates": {}},
    ],
    "figures": {"peak_memory_bytes": 20_200_000_000, "first_step_s": 61.5, "weights": 5},
    "left_out": {"flex, full": "flex attention is for CUDA devices"},
    "paste": "",
}  # fmt: skip


def test_the_table_as_plain_text(capsys):
    print_result(RESULT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "machine: a processor, 2 threads",
        "versions: python 3.12.1, torch 2.11.0; 0123456789 (changed)",
        "recipe: smoke seed=2",
        "compile: off",
    ]
    assert "ceilings: 2,950.0 GB/s copied (read + written), 680 TFLOP/s in bfloat16 products, measured here" in lines
    whole = next(line for line in lines if "whole step" in line)
    cells = [cell.strip() for cell in whole.strip("│").split("│")]
    assert cells == ["whole step", "1,234", "1.250 - 1,300", "500.000", "40 %", "60.00", "73,728"]
    quantize = next(line for line in lines if "quantize" in line)
    assert [cell.strip() for cell in quantize.strip("│").split("│")] == [
        "quantize", "2.000", "2.000 - 2.000", "", "", "", "",
    ]  # fmt: skip
    assert lines[-4:] == [
        "peak memory: 20,200,000,000 bytes",
        "first step: 61.50 s",
        "weights: 5",
        "left out: flex, full: flex attention is for CUDA devices",
    ]


def test_a_gpu_is_named_with_its_driver(capsys):
    print_result(json.loads(json.dumps(RESULT).replace('"device": "cpu"', '"device": "NVIDIA H100"')))
    assert capsys.readouterr().out.startswith("machine: NVIDIA H100, driver 580.1\n")


def test_the_table_of_kernels():
    trace = [{"ph": "X", "cat": "kernel", "name": "nvjet" + "x" * 100, "ts": 0, "dur": 750},
             {"ph": "X", "cat": "kernel", "name": "other", "ts": 1000, "dur": 1000}]  # fmt: skip
    found = replace(break_down(trace, 1, "update"), unprofiled_ms=1.9)
    file = io.StringIO()
    print_breakdown(found, file)
    text = file.getvalue()
    assert "mean of 1 calls, 2.000 ms each under the profiler, 1.900 ms without the profiler" in text
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    assert ["products", "0.750", "37.5 %", "1"] in cells
    assert ["idle", "0.250", "12.5 %", ""] in cells
    assert ["other", "elementwise and reductions", "1.000", "1"] in cells
    assert any(row[0] == "nvjet" + "x" * 62 + "..." for row in cells)
