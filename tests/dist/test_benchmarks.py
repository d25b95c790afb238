"""The benchmarks of distributed training, on a CPU: what they count adds up, whatever the times are."""

import json
import os
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from epigram.dist.context import Context

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TIMEOUT_S = 180
LANES = "lanes=[{count=2, seq_len=32, num_seqs=1}, {count=1, seq_len=64, num_seqs=1}]"
SMALL = ("smoke", "--device", "cpu", "--seconds", "1", "--set", LANES, "--set", "quant.calibration.seq_len=32")


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("clip", ["lane", "global"])
def test_a_step_on_several_is_taken_apart(tmp_path: Path, clip: str):
    out = tmp_path / "found.json"
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", BENCHMARKS / "several_gpus.py", *SMALL,
        "--out", out, "--set", f"gradients.clip={clip}")  # fmt: skip
    found = json.loads(out.read_text())
    assert (found["processes"], found["tokens_per_step"]) == (2, 32 + 32 + 64)
    assert found["tokens_per_s"] * found["step_ms"] == pytest.approx(1000 * found["tokens_per_step"])
    assert [row["seq_len"] for row in found["lanes"]] == [32, 32, 64]
    assert {row["rank"] for row in found["lanes"]} == {0, 1}
    assert all(row["ms"] > 0 for row in found["lanes"])
    assert len(found["waits_ms"]) == len(found["peak_memory_bytes"]) == 2
    for row in found["waits_ms"]:
        parts = [row[name] for name in ("first message", "gradients of banks", "updates of banks")]
        assert all(part > 0 for part in parts)
        assert (row["norm of the average"] > 0) == (clip == "global")
        parts.append(row["norm of the average"])
        assert row["share of the step"] * found["step_ms"] == pytest.approx(sum(parts))
    up = [row for row in found["collectives"] if row["bank"] == "banks.up"]
    assert {row["what"]: row["bytes"] for row in up} == dict.fromkeys(
        ("reduce-scatter", "all-gather", "all-reduce"), 4 * 4 * 128 * 64
    )
    for row in up:
        sent = row["bytes"] * (1 if row["what"] == "all-reduce" else 0.5)
        assert row["sent_gb_per_s"] * row["ms"] * 1e6 == pytest.approx(sent)
    assert found["update"]["shared_ms"] > 0
    assert found["update"]["in_full_ms"] > 0


LATE_HOSTS = """
    import json, sys, time
    import torch
    sys.path.insert(0, sys.argv[1])
    import several_gpus
    from epigram.dist import collectives
    from epigram.dist.context import open_context

    with open_context("cpu") as context:
        several_gpus.keep_busy = lambda context, ms: time.sleep(0.1 * context.rank)
        sent = torch.ones(8)
        found = several_gpus.times_ms(context, lambda: collectives.summed(context, sent), 0.0)
        print(json.dumps([context.rank, found]))
"""


def test_no_process_is_charged_for_one_that_begins_late(tmp_path: Path):
    """The second comes a tenth of a second after the first, each time."""
    (tmp_path / "late.py").write_text(textwrap.dedent(LATE_HOSTS))
    said = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "late.py", BENCHMARKS)
    times_ms = dict(json.loads(line) for line in said.splitlines())
    assert {rank: len(found) for rank, found in times_ms.items()} == {0: 3, 1: 3}
    assert statistics.median(times_ms[0]) < 50


def test_a_device_is_kept_busy_by_the_clock_that_it_has(monkeypatch: pytest.MonkeyPatch):
    """A chip whose million cycles take 0.625 ms (1.6 GHz) spins 16 million for 10 ms; a CPU does nothing."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import several_gpus

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return several_gpus.PROBE_CYCLES / 1.6e6

    cycles: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append)
    several_gpus.keep_busy(Context(), 10.0)
    assert cycles == []
    several_gpus.keep_busy(Context(device=torch.device("cuda", 0)), 10.0)
    assert cycles == [several_gpus.PROBE_CYCLES, 16_000_000]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_host_that_is_slow_at_launching_does_not_count(monkeypatch: pytest.MonkeyPatch):
    """Forty launches with half a millisecond of the host between them: work of some microseconds for the device."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from several_gpus import times_ms

    x = torch.zeros(1024, device="cuda")

    def work() -> None:
        for _ in range(40):
            time.sleep(0.0005)
            x.add_(1.0)

    found = times_ms(Context(device=torch.device("cuda", 0)), work, 1.0)
    assert len(found) >= 3
    assert statistics.median(found) < 2, "the host takes 20"


@pytest.mark.slow
def test_one_that_sends_to_itself_is_compared_with_itself():
    found = json.loads(run(BENCHMARKS / "world_one.py", *SMALL).splitlines()[-1])
    ratios = sorted(talking / silent for silent, talking in found["pairs_ms"])
    assert len(ratios) >= 2
    assert ratios[0] <= found["ratio"] <= ratios[-1]


@pytest.mark.slow
def test_what_a_checkpoint_costs_is_spread_over_its_interval():
    found = json.loads(run(BENCHMARKS / "checkpoint_cost.py", *SMALL, "--block-s", "0.2").splitlines()[-1])
    low, high = min(found["costs_s"]), max(found["costs_s"])
    assert 1 + low / 60 <= found["ratio"] <= 1 + high / 60
    assert found["checkpoint_bytes"] > 1_000_000
