"""Two launchers on this machine stand for two machines: what examples/ starts is one run, in one time budget."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import SHORT, losses_of, result_of, rows_of

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "rendezvous" / "launch.sh"
SBATCH = ROOT / "examples" / "slurm" / "train.sbatch"
MEASURE = ROOT / "examples" / "8xh100" / "measure.py"
TIMEOUT_S = 150
TRAIN_S = 4.0
WALL = (
    "budget.clock=wall", "budget.steps=0", f"budget.train_s={TRAIN_S + 1}", "budget.calibrate_s=1",
    "lanes=[{count=2, seq_len=64, num_seqs=4}, {count=2, seq_len=128, num_seqs=2}]",
)  # fmt: skip


def two_launchers(*arguments: str) -> list[tuple[int, str]]:
    """(exit code, stderr) of launch.sh as each of two machines would run it, with two processes each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = {"HEAD": f"127.0.0.1:{port}", "NODES": "2", "GPUS": "2", "LOCAL_ADDR": "127.0.0.1", "RUN_ID": "test",
            "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = ["bash", str(LAUNCH), *arguments]
    launchers = [subprocess.Popen(command, env={**os.environ, **ours}, stderr=subprocess.PIPE, text=True)
                 for _ in range(2)]  # fmt: skip
    try:
        said = [launcher.communicate(timeout=TIMEOUT_S)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()  # which ends its processes
    return [(launcher.returncode, err) for launcher, err in zip(launchers, said, strict=True)]


@pytest.mark.slow
def test_two_launchers_are_one_run_in_one_budget(data_path: Path, tmp_path: Path):
    run = tmp_path / "run"
    settings = [part for setting in (*SHORT, *WALL) if not setting.startswith("budget.steps=8")
                for part in ("--set", setting)]  # fmt: skip
    found = two_launchers("smoke", "--data", str(data_path), "--out", str(run), "--until", "train", "--device", "cpu",
                          *settings)  # fmt: skip
    assert [code for code, _ in found] == [0, 0], found
    result, rows = result_of(run), rows_of(run)
    assert result["paths"]["lanes"].endswith("4 process(es)")
    assert result["steps"] == len(losses_of(run)) > 1
    assert losses_of(run)[-1] < losses_of(run)[0]
    starts = [row["elapsed_s"] for row in rows if "train_loss" in row]
    assert starts == sorted(starts)
    longest_s = max(row["step_ms"] for row in rows if "train_loss" in row) / 1000
    assert TRAIN_S <= result["train_s"] <= TRAIN_S + 2 * longest_s + 0.5, "the last step begins within the budget"


def test_what_slurm_would_start(tmp_path: Path):
    """The script with stand-ins for Slurm's own two commands."""
    for name, body in {"scontrol": 'test "$*" = "show hostnames n[3-4]"; printf "n3\\nn4\\n"',
                       "srun": 'echo "$HEAD $NODES $GPUS $RUN_ID: $*"'}.items():  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/sh\nset -e\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[3-4]", "SLURM_JOB_ID": "1234567", "SLURM_JOB_NUM_NODES": "2",
             "SLURM_GPUS_ON_NODE": "4", "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip
    done = subprocess.run(["bash", str(SBATCH), "pr1212", "--data", "a b"], env={**os.environ, **slurm},
                          capture_output=True, text=True, check=False, cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    started = "n3:24567 2 4 1234567: --kill-on-bad-exit=1 bash examples/rendezvous/launch.sh pr1212 --data a b\n"
    assert done.stdout == started


def test_a_launcher_says_what_it_needs():
    env = {name: value for name, value in os.environ.items() if name not in ("HEAD", "NODES", "GPUS")}
    done = subprocess.run(["bash", str(LAUNCH), "smoke"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "set HEAD=host:port" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the processes are found in /proc")
def test_what_eight_gpus_would_measure(data_path: Path, tmp_path: Path):
    """Every part, with two processes on a CPU."""
    command = [sys.executable, str(MEASURE), "--recipe", "smoke", "--gpus", "2", "--device", "cpu", "--steps", "4"]
    command += ["--seconds", "4", "--settle-s", "1", "--data", str(data_path), "--out", str(tmp_path / "measured")]
    settings = ("budget.calibrate_s=1", 'score.methods=["blocks"]', "run.sample_tokens=0")
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=TIMEOUT_S, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "measured").glob("*.json")}
    assert found["step"]["processes"] == 2
    assert len(found["step"]["peak_memory_bytes"]) == 2
    assert found["whole"]["status"] == "finished"
    assert found["fewer"]["1"]["apart"] < 1e-4 < found["fewer"]["1"]["last_loss"]
    assert found["killed"]["ended_after_s"] < 30
    assert "rank 1 was killed" in found["killed"]["said"][0]
    before, after = found["resumed"]["before"], found["resumed"]["after"]
    assert found["resumed"]["on"] == 1
    assert abs(after[0] - before[-1]) < 0.5


def test_a_part_that_there_is_not(tmp_path: Path):
    done = subprocess.run([sys.executable, str(MEASURE), "--out", str(tmp_path), "half"], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "choose of step, whole, fewer, killed, resumed" in done.stderr
