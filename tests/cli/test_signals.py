"""Ctrl-C and `kill` in the midst of training, as the system sends them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from epigram.run.checkpoint import load
from epigram.run.report.build import build


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "stopped by Ctrl-C"),
        pytest.param(signal.SIGTERM, 143, "whose checkpoint is complete", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_can_be_read_and_gone_on_with(data_path: Path, tmp_path: Path, number: int, code: int, said: str):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "epigram", "train", "smoke", "--data", str(data_path), "--out", str(run),
               "--set", "budget.steps=100000", "--set", "run.checkpoint_every_s=0.0002",
               "--set", "run.log_every=1"]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 5) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()  # where the signal did not end it
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], said in result["reason"]) == ("interrupted", True)
    (found,) = build([run], tmp_path / "report.html")
    assert found.problems == ()
    assert len(found.rows) >= 5
    assert not list((run / "checkpoints").glob(".writing-*"))
    assert load(run).state["step"] >= 1
