"""Ctrl-C and `kill` in the midst of training, as the system sends them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from epigram.run import signals
from epigram.run.checkpoint import load
from epigram.run.report.build import build


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGINT, 130, "Ctrl-C"), pytest.param(signal.SIGTERM, 143, "SIGTERM", marks=pytest.mark.slow)],
)
def test_a_stopped_run_can_be_read_and_gone_on_with(data_path: Path, tmp_path: Path, number: int, code: int, name: str):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "epigram", "train", "smoke", "--data", str(data_path), "--out", str(run),
               "--set", "budget.steps=100000", "--set", "run.log_every=1"]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
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
        said, errors = process.communicate(timeout=30)
    finally:
        process.kill()  # where the signal did not end it
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    result = json.loads((run / "result.json").read_text())
    step = load(run).state["step"]
    assert result["status"] == "interrupted"
    assert f"stopped by {name} after step {step}, whose checkpoint is complete" in result["reason"]
    assert f"epigram train --resume {run}" in said, "what to do, where one looks"
    (found,) = build([run], tmp_path / "report.html")
    assert found.problems == ()
    assert step >= len(found.rows) >= 5
    assert not list((run / "checkpoints").glob(".writing-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_twice_it_ends_at_once(monkeypatch: pytest.MonkeyPatch, number: int):
    """Twice within a second is once: torchrun passes on what the terminal has sent already."""
    now, ended = [10.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    ends = signal.default_int_handler if number == signal.SIGINT else lambda *_: ended.append(1)
    before = signal.signal(number, ends)
    try:
        with signals.listening() as requests:
            signal.raise_signal(number)
            now[0] += 0.9
            signal.raise_signal(number)
            assert requests.stop == number
            now[0] += 0.2
            with pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else nullcontext():
                signal.raise_signal(number)
            assert ended == [1] * (number == signal.SIGTERM)
    finally:
        signal.signal(number, before)


def test_ctrl_c_stays_with_who_has_another_use_for_it():
    """Jobs in the background ignore it, and so does what they start."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.listening() as requests:
            signal.raise_signal(signal.SIGINT)
        assert not requests.stop
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
