"""`--gpus N`: the command line under torchrun, and signals on their way to it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from epigram.errors import UserError
from epigram.run import launch as module
from epigram.run.launch import launch, torchrun_command


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["train", "pr1212", "--gpus", "8", "--data", "d"], ["train", "pr1212", "--data", "d"]),
        (["train", "--gpus=8", "pr1212", "--json"], ["train", "pr1212", "--json"]),
        (["train", "x", "--set", "run.log_every=4", "--gpus", "8"], ["train", "x", "--set", "run.log_every=4"]),
        (["train", "x", "--out", "--gpus-test"], ["train", "x", "--out", "--gpus-test"]),
    ],
)
def test_the_same_command_without_its_number_of_processes(arguments: list[str], kept: list[str]):
    command = torchrun_command(arguments, 8)
    assert command[: command.index("epigram") + 1] == [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=8", "-m", "epigram",
    ]  # fmt: skip
    assert command[command.index("epigram") + 1 :] == kept


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(lines)]


def test_failure_of_a_process_is_failure(monkeypatch):
    monkeypatch.setattr(module, "torchrun_command", lambda arguments, n: python("import sys", "sys.exit(1)"))
    with pytest.raises(UserError, match="a process of the 4 did not succeed"):
        launch(4)
    monkeypatch.setattr(module, "torchrun_command", lambda arguments, n: python("pass"))
    launch(4)


def test_what_cannot_work_is_told_before_any_process_starts(monkeypatch):
    monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: pytest.fail("started"))
    with pytest.raises(UserError, match="8 lanes cannot be shared by 9 processes, each needs one: use 1 to 8"):
        launch(9, "pr1212")
    with pytest.raises(UserError, match="unknown key model.colour"):
        launch(2, "pr1212", ["model.colour=1"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_and_waited_for(tmp_path: Path, number: int):
    """The processes get the time to complete their run folder, however the command was stopped."""
    worker = "\n".join(
        [
            "import signal, sys, time",
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))",
            "try:",
            f"    open({str(tmp_path / 'ready')!r}, 'w').close()",
            "    time.sleep(60)",
            f"except {'KeyboardInterrupt' if number == signal.SIGINT else 'SystemExit'}:",
            "    time.sleep(0.3)",
            f"    open({str(tmp_path / 'completed')!r}, 'w').close()",
        ]
    )
    parent = (
        "import sys",
        "from epigram.cli import main, train",
        "from epigram.run import launch",
        f"launch.torchrun_command = lambda arguments, n: [sys.executable, '-c', {worker!r}]",
        "sys.argv = ['epigram', 'train', 'pr1212', '--gpus', '2']",
        "main.main()",
    )
    process = subprocess.Popen(python(*parent), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    assert process.wait(30) == (130 if number == signal.SIGINT else 143)
    assert (tmp_path / "completed").exists()
