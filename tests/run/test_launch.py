"""`--gpus N`: the command line under torchrun, and signals on their way to it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_helpers import losses_of, result_of

from epigram.errors import LostPeerError, UserError
from epigram.run import launch as module
from epigram.run.checkpoint import complete, load
from epigram.run.launch import launch, torchrun_command, workers
from epigram.run.torchrun import exit_code


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
        sys.executable, "-m", "epigram.run.torchrun", "--standalone", "--nproc-per-node=8", "-m", "epigram",
    ]  # fmt: skip
    assert command[command.index("epigram") + 1 :] == kept


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(lines)]


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (1, UserError, r"a process of the 4 did not succeed \(exit code 1\)"),
        (2, LostPeerError, "a process of the 4 failed"),
        (143, SystemExit, "143"),
        (130, SystemExit, "130"),
    ],
)
def test_failure_of_a_process_is_failure(monkeypatch, code: int, error: type, message: str):
    """Once: what the processes said themselves is not said again."""
    monkeypatch.setattr(module, "torchrun_command", lambda arguments, n: python("import sys", f"sys.exit({code})"))
    with pytest.raises(error, match=message) as raised:
        launch(4)
    assert getattr(raised.value, "told", False) == (code == 2)
    monkeypatch.setattr(module, "torchrun_command", lambda arguments, n: python("pass"))
    launch(4)


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([2], 2),
        ([2, 2], 2),
        ([-9], 2),
        ([-9, 2], 2),
        ([-9, -9], 1),
        ([143, 143], 143),
        ([143], 143),
        ([143, 2], 2),
        ([130, 130], 130),
        ([130, 143], 2),
    ],
)
def test_what_torchrun_makes_of_two_processes(found: list[int], code: int):
    """Of a killed one the other tells; who prints a traceback has told too; where both are killed nobody has."""
    assert exit_code(found, 2) == code


def test_what_cannot_work_is_told_before_any_process_starts(monkeypatch):
    monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: pytest.fail("started"))
    with pytest.raises(UserError, match="8 lanes cannot be shared by 9 processes, each needs one: use 1 to 8"):
        launch(9, "pr1212")
    with pytest.raises(UserError, match="unknown key model.colour"):
        launch(2, "pr1212", ["model.colour=1"])


SIGHUP = getattr(signal, "SIGHUP", signal.SIGTERM)


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1), (SIGHUP, 1)]
)
def test_signals_are_passed_on_and_waited_for(tmp_path: Path, number: int, times: int):
    """The processes get the time to complete their run folder, however the command was stopped; the second one too is
    for them. (Whatever these tests were started by may ignore a signal, as nohup does; then so would the command.)"""
    worker = "\n".join(
        [
            "import signal, sys, time",
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))",
            "try:",
            f"    open({str(tmp_path / 'ready')!r}, 'w').close()",
            "    time.sleep(60)",
            f"except {'KeyboardInterrupt' if number == signal.SIGINT else 'SystemExit'}:",
            f"    open({str(tmp_path / 'told')!r}, 'w').close()",
            "    try:",
            f"        time.sleep({0.3 if times == 1 else 60})",
            "    except KeyboardInterrupt:",
            "        pass",
            f"    open({str(tmp_path / 'completed')!r}, 'w').close()",
        ]
    )
    parent = (
        "import signal, sys",
        "from epigram.cli import main, train",
        "from epigram.run import launch",
        f"signal.signal({int(number)}, signal.default_int_handler if {number == signal.SIGINT} else signal.SIG_DFL)",
        f"launch.torchrun_command = lambda arguments, n: [sys.executable, '-c', {worker!r}]",
        "sys.argv = ['epigram', 'train', 'pr1212', '--gpus', '2']",
        "main.main()",
    )
    process = subprocess.Popen(python(*parent), stderr=subprocess.PIPE, text=True)
    for name in ("ready", "told")[:times]:
        wait_until((tmp_path / name).exists, process)
        os.kill(process.pid, number)
    assert process.wait(30) == (130 if number == signal.SIGINT else 143)
    assert (tmp_path / "completed").exists()


def started(data_path: Path, run: Path) -> subprocess.Popen:
    """A run of two processes that would go on for ever, in the midst of its steps."""
    settings = ["budget.steps=100000", "run.log_every=1", "quant.calibration.seq_len=64",
                "lanes=[{count=2, seq_len=64, num_seqs=2}]"]  # fmt: skip
    command = [sys.executable, "-m", "epigram", "train", "smoke", "--gpus", "2", "--device", "cpu", "--until", "train",
               "--data", data_path, "--out", run, *(part for s in settings for part in ("--set", s))]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5, process)
    return process


def wait_until(happened, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not happened() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the processes are found in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_cluster_signals_the_command_and_means_the_run(data_path: Path, tmp_path: Path, number: int, code: int):
    """SIGUSR1: a checkpoint, and on it goes. The others: another, and the end, with one message and the code for it."""
    run = tmp_path / "run"
    process = started(data_path, run)
    try:
        os.kill(process.pid, signal.SIGUSR1)
        wait_until(lambda: complete(run), process)
        first = load(run).state["step"]
        steps = len(losses_of(run))
        wait_until(lambda: len(losses_of(run)) > steps + 3, process)
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert load(run).state["step"] > first
    assert "checkpoint of step" in (run / "log.txt").read_text()
    assert result_of(run)["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the processes are found in /proc")
def test_of_a_killed_process_the_user_sees_one_message(data_path: Path, tmp_path: Path):
    process = started(data_path, tmp_path / "run")
    try:
        (torchrun,) = children(process.pid)
        ranks = {rank_of(pid): pid for pid in workers(torchrun)}
        killed_s = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - killed_s < 30
    assert process.returncode == 2
    told = [line for line in said.splitlines() if "rank" in line or "epigram" in line or "Error" in line]
    assert told == ["epigram: rank 1 was killed or lost: it left no message (the system ends a process without memory)"]


def children(parent: int) -> list[int]:
    stats = {path: path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()}
    return [int(p.parent.name) for p, text in stats.items() if int(text.rpartition(")")[2].split()[1]) == parent]


def rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(entry for entry in environment if entry.startswith(b"RANK=")).removeprefix(b"RANK="))
