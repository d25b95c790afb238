"""The benchmarks of distributed training, on a CPU: what they count adds up, whatever the times are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_a_step_on_several_is_taken_apart(tmp_path: Path):
    out = tmp_path / "found.json"
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", BENCHMARKS / "several_gpus.py", *SMALL,
        "--out", out)  # fmt: skip
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
