"""A run folder can be read whenever and however its run ended."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from epigram import plugin
from epigram.dist import watch
from epigram.errors import UserError
from epigram.run import machine, record
from epigram.run.record import RunRecord, final_line, num_steps, step_line, validation_line, write_atomic
from epigram.run.writers.base import PACKAGE as WRITERS

CONFIG = {"recipe": "demo", "budget": {"train_s": 100.0, "calibrate_s": 10.0}, "lanes": [{"count": 1}]}
SCORE = {
    "val_bpb": 1.5,
    "val_nats": 2.5,
    "tokens": 10,
    "bytes": 24,
    "seq_len": 8,
    "stride": 8,
    "score_s": 0.1,
}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_a_finished_run(tmp_path, capsys):
    folder = tmp_path / "runs" / "one"
    with RunRecord(folder, CONFIG) as run:
        assert result_of(folder)["status"] == "running"
        run.environment({"paths": {"attention": "sdpa"}, "folder": folder, "sizes": (1, 2)})
        run.step(step=1, elapsed_s=0.09, train_loss=6.9, lr=0.5, grad_norm=np.float32(0.25))
        run.validation(step=1, elapsed_s=0.09, val_nats=6.8, val_bpb=4.1)
        run.score("quantized", "blocks", SCORE)
        run.sample("The", " end", step=1)
        run.update(parameters=np.int64(7), sample="The end")
    assert tomllib.loads((folder / "config.toml").read_text()) == CONFIG
    assert json.loads((folder / "environment.json").read_text())["sizes"] == [1, 2]
    assert lines_of(folder / "metrics.jsonl") == [
        {"step": 1, "elapsed_s": 0.09, "train_loss": 6.9, "lr": 0.5, "grad_norm": 0.25},
        {"step": 1, "elapsed_s": 0.09, "val_nats": 6.8, "val_bpb": 4.1},
    ]
    assert lines_of(folder / "samples.jsonl") == [{"prompt": "The", "text": " end", "step": 1}]
    result = result_of(folder)
    assert (result["status"], result["parameters"], result["scores"]["quantized"]["blocks"]) == (
        "finished",
        7,
        SCORE,
    )
    assert capsys.readouterr().out == (folder / "log.txt").read_text()
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.toml", "environment.json", "log.txt", "metrics.jsonl", "result.json", "samples.jsonl",
    ]  # fmt: skip


def test_log_lines_keep_their_form(tmp_path, capsys):
    """What programs look for in the published logs."""
    assert step_line(500, 20000, 2.27512, 34812.6) == (
        "step:500/20000 train_loss:2.2751 train_time:34813ms step_avg:69.63ms"
    )
    assert validation_line(0, 20000, 6.9295, 4.104, 0.0) == (
        "step:0/20000 val_loss:6.9295 val_bpb:4.1040 train_time:0ms step_avg:0.00ms"
    )
    assert final_line("quantized_sliding", 1.87306, 1.109368) == (
        "final_quantized_sliding_exact val_loss:1.87306000 val_bpb:1.10936800"
    )
    with RunRecord(tmp_path / "run", CONFIG) as run:
        run.step(step=10, elapsed_s=1.0, train_loss=5.0)
        run.score("float", "blocks", SCORE)
    printed = capsys.readouterr().out
    assert re.search(r"^step:10/900 train_loss:5\.0000 train_time:1000ms step_avg:100\.00ms$", printed, re.M)
    assert re.search(r"^final_\w+ val_loss:\S+ val_bpb:\S+$", printed, re.M)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"steps": 50, "train_s": 5.0}, 50),
        ({"steps": 50, "max_steps": 40}, 40),
        ({"steps": 50, "max_steps": 90}, 50),
        ({"train_s": 100.0, "calibrate_s": 20.0}, 160),
        ({"train_s": 100.0, "max_steps": 90}, 90),
        ({"train_s": 10.0, "max_steps": 900}, 20),
        ({"max_steps": 30}, 30),
        ({"train_s": 1.0}, 20),
        ({}, 20),
    ],
)
def test_number_of_steps(budget, expected):
    assert num_steps(budget, step=20, elapsed_s=10.0) == expected


def stopped_by(error, folder, writers=()):
    """A run of one step that ends with `error`."""
    with RunRecord(folder, CONFIG, writers=writers) as run:
        run.step(step=1, elapsed_s=0.1, train_loss=float("nan"), lr=0.5)
        run.update(steps=3)
        raise error


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", "stopped by Ctrl-C"),
        (SystemExit(3), "interrupted", "stopped with exit code 3"),
        (UserError("the shard train_000 is damaged"), "failed", "the shard train_000 is damaged"),
        (RuntimeError("boom"), "failed", "RuntimeError: boom"),
    ],
)
def test_an_ended_run_says_why(tmp_path, error, status, reason):
    with pytest.raises(type(error)):
        stopped_by(error, tmp_path / "run")
    result = result_of(tmp_path / "run")
    assert (result["status"], result["reason"], result["steps"]) == (status, reason, 3)
    assert reason in (tmp_path / "run" / "log.txt").read_text()


KILLED = """
import os, signal, sys
from pathlib import Path
from epigram.run.record import RunRecord
run = RunRecord(Path(sys.argv[1]), {"recipe": "demo"})
for step in range(1, 4):
    run.step(step=step, elapsed_s=0.1 * step, train_loss=5.0)
run.update(steps=3)
with open(run.folder / "metrics.jsonl", "a") as half:
    half.write('{"step": 4, "elap')
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_can_be_read_and_resumed(tmp_path):
    folder = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert result_of(folder)["status"] == "running"
    assert result_of(folder)["steps"] == 3
    assert not (folder / "metrics.jsonl").read_text().endswith("\n")
    with RunRecord(folder, CONFIG, resume=True) as run:
        run.step(step=4, elapsed_s=0.4, train_loss=4.0)
    assert [row["step"] for row in lines_of(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (result_of(folder)["status"], result_of(folder)["steps"]) == ("finished", 3)
    assert len((folder / "log.txt").read_text().splitlines()) == 4


def test_a_resumed_run_forgets_why_it_failed(tmp_path):
    with pytest.raises(RuntimeError):
        stopped_by(RuntimeError("boom"), tmp_path / "run")
    with RunRecord(tmp_path / "run", CONFIG, resume=True):
        pass
    assert "reason" not in result_of(tmp_path / "run")


def test_a_run_whose_process_is_ended_from_outside_says_why(tmp_path, monkeypatch):
    """By the thread that watches over the processes, while the main one waits for a lost one."""
    watching = SimpleNamespace(last_words=None, failure=None)
    monkeypatch.setattr(watch, "current", watching)
    with RunRecord(tmp_path / "run", CONFIG):
        watching.last_words("rank 1: torn cable")
        found = result_of(tmp_path / "run")
    assert (found["status"], found["reason"]) == ("failed", "rank 1: torn cable")


def fill_the_disk(folder):
    with RunRecord(folder, CONFIG) as run:
        assert (folder / ".reserve").stat().st_size > 100_000
        run._log.close()
        run._log = open("/dev/full", "w")  # noqa: SIM115
        run.log("a line")
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_recorded(tmp_path, capsys):
    """The log is on a full disk; the result still says so, through the space that was kept back."""
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="No space left"):
        fill_the_disk(folder)
    result = result_of(folder)
    assert result["status"] == "failed"
    assert "No space left" in result["reason"]
    assert not (folder / ".reserve").exists()
    assert "warning: log.txt cannot be written ([Errno 28]" in capsys.readouterr().err


class Lost(io.StringIO):
    """Where nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


class Full:
    def write(self, row) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self, result) -> None:
        pass


def test_what_cannot_be_told_costs_no_training(tmp_path, capsys, monkeypatch):
    """Neither a reader that went away nor a full disk; each is told once."""
    folder = tmp_path / "run"
    with RunRecord(folder, CONFIG) as run:
        monkeypatch.setattr(sys, "stdout", Lost())
        run._writers.append(Full())
        for step in (1, 2):
            run.step(step=step, elapsed_s=0.1 * step, train_loss=4.0)
        run.update(steps=2)
    monkeypatch.undo()
    assert (result_of(folder)["status"], result_of(folder)["steps"]) == ("finished", 2)
    assert [row["step"] for row in lines_of(folder / "metrics.jsonl")] == [1, 2]
    assert len((folder / "log.txt").read_text().splitlines()) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" cannot")[0] for line in told] == ["warning: the output", "warning: metrics"]


def test_a_pipe_whose_reader_has_ended(tmp_path):
    """As by `| head -1`: the run finishes, in peace, to the end of its process."""
    code = (
        "import sys, time; from pathlib import Path; from epigram.run.record import RunRecord\n"
        "with RunRecord(Path(sys.argv[1]), {}) as run:\n"
        "    for step in range(200):\n"
        "        run.log('x' * 1000)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(), result_of(tmp_path / "run")["status"]) == (0, "finished")
    assert said.count("\n") == 1 and "the output cannot be written" in said
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 200


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    with RunRecord(tmp_path / "run", CONFIG) as run:
        run.step(step=1, elapsed_s=0.1, train_loss=float("nan"), grad_norm=float("inf"))
        run.update(sizes=[{"bytes": float("-inf")}])
    text = (tmp_path / "run" / "metrics.jsonl").read_text() + (tmp_path / "run" / "result.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert lines_of(tmp_path / "run" / "metrics.jsonl")[0]["train_loss"] is None


def test_other_ranks_write_nothing(tmp_path, capsys):
    with RunRecord(tmp_path / "run", CONFIG, rank=1) as run:
        run.environment({})
        run.step(step=1, elapsed_s=0.1, train_loss=5.0)
        run.score("float", "blocks", SCORE)
        run.sample("a", "b")
        run.update(steps=1)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""
    assert run.result["steps"] == 1


def test_a_used_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty.*--resume"):
        RunRecord(tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match=r"no config\.toml"):
        RunRecord(tmp_path, CONFIG, resume=True)
    with pytest.raises(UserError, match="thesis.txt is a file: a run needs a folder"):
        RunRecord(tmp_path / "thesis.txt", CONFIG)


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_two_cannot_write_one_run(tmp_path):
    """As where a cluster starts a run again before its first process has ended."""
    folder = tmp_path / "run"
    with RunRecord(folder, CONFIG) as run:
        run.update(steps=3)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match="run is in use, another process is writing this run: wait until"):
            RunRecord(folder, {}, resume=True)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with RunRecord(folder, CONFIG, resume=True):
        pass
    assert result_of(folder)["status"] == "finished"


def test_letters_that_the_output_lacks_cost_no_training(tmp_path, capsys, monkeypatch):
    with RunRecord(tmp_path / "run", CONFIG) as run:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
        run.log("┌──┐")
    monkeypatch.undo()
    assert result_of(tmp_path / "run")["status"] == "finished"
    assert (tmp_path / "run/log.txt").read_text("utf-8") == "┌──┐\n"
    assert "warning: the output cannot be written" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be"):
        RunRecord(tmp_path / "file" / "run", CONFIG)


def test_an_unknown_writer_leaves_nothing_behind(tmp_path):
    names = ", ".join(plugin.names(WRITERS))
    with pytest.raises(UserError, match=f"no 'tensorbored' in writers: choose one of {names}"):
        RunRecord(tmp_path / "run", CONFIG, writers=("tensorbored",))
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_to_start_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(*args):
        raise RuntimeError("no account")

    monkeypatch.setattr("epigram.run.writers.jsonl.Writer", refuse)
    with pytest.raises(RuntimeError, match="no account"):
        RunRecord(tmp_path / "run", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_atomic_writing_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomic(path, "old")

    def fail(descriptor):
        raise OSError("disk gone")

    monkeypatch.setattr(record.os, "fsync", fail)
    with pytest.raises(OSError, match="disk gone"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_tensorboard_writer(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunRecord(tmp_path / "run", CONFIG, writers=("tensorboard",)) as run:
        for step in (1, 2):
            run.step(step=step, elapsed_s=0.1, train_loss=5.0 / step, phase="train")
        run.validation(step=2, elapsed_s=0.2, val_nats=2.0, val_bpb=1.25)
        run.update(artifact_bytes=123)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("training/train_loss")] == [(1, 5.0), (2, 2.5)]
    assert events.Scalars("validation/val_bpb")[0].value == 1.25
    assert events.Scalars("result/artifact_bytes")[0].value == 123


class FakeWandb:
    """The calls that the writer makes, kept."""

    Error = ConnectionError  # stands for wandb.Error

    def __init__(self, logged_in=True):
        self.logged_in = logged_in
        self.settings, self.rows, self.axes, self.summary, self.exit_code = {}, [], [], {}, None

    def init(self, **settings):
        if not self.logged_in:
            raise self.Error("no key")
        self.settings = settings
        return self

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_wandb_writer(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delitem(sys.modules, "epigram.run.writers.wandb", raising=False)
    with pytest.raises(RuntimeError):
        stopped_by(RuntimeError("boom"), tmp_path / "run", writers=("wandb",))
    sys.modules.pop("epigram.run.writers.wandb")
    assert fake.settings["config"]["budget.train_s"] == 100.0
    assert fake.settings["name"] == "run"
    assert fake.rows == [{"step": 1, "elapsed_s": 0.1, "lr": 0.5}]
    assert ("*", "step") in fake.axes
    assert fake.summary["status"] == "failed"
    assert fake.exit_code == 1


def test_wandb_without_an_account_is_the_users_mistake(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(logged_in=False))
    monkeypatch.delitem(sys.modules, "epigram.run.writers.wandb", raising=False)
    with pytest.raises(UserError, match=r"no key.*WANDB_MODE=offline"):
        RunRecord(tmp_path / "run", CONFIG, writers=("wandb",))
    sys.modules.pop("epigram.run.writers.wandb")
    assert list(tmp_path.iterdir()) == []


def test_environment_names_the_machine():
    facts = machine.environment({"attention": "sdpa"}, seed=3)
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(facts["versions"]) >= {"python", "torch", "numpy"}
    assert facts["cpu_count"] >= 1
    assert facts["memory_bytes"] > 10**8
    assert (facts["paths"], facts["seed"]) == ({"attention": "sdpa"}, 3)
    json.dumps(facts)


def test_commit_of_a_checkout(tmp_path, monkeypatch):
    """The package's own checkout is named; a repository that merely contains an installed copy is not."""
    inside = tmp_path / "repository" / "package"
    (inside / "run").mkdir(parents=True)
    file, other = inside / "run" / "machine.py", inside / "elsewhere.py"
    file.write_text("")
    other.write_text("")

    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(["git", *identity, *words], cwd=inside.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    monkeypatch.setattr(machine, "__file__", str(file))
    for name in list(os.environ):
        if name.startswith("GIT_"):
            monkeypatch.delenv(name)
    assert machine.commit() is None
    git("init", "-q")
    assert machine.commit() is None
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert machine.commit() == {"hash": git("rev-parse", "HEAD"), "changed": False}
    other.write_text("changed = True\n")
    assert machine.commit()["changed"]
    git("checkout", "-q", ".")
    assert not machine.commit()["changed"]
    (inside / "run" / "plugin.py").write_text("")
    assert machine.commit()["changed"]
    (tmp_path / "link").symlink_to(inside)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "link" / "run" / "machine.py"))
    assert machine.commit()["hash"] == git("rev-parse", "HEAD"), "on the way through a link"


def command_of(*words: str, cwd: Path) -> list[str]:
    """What a process says of itself that `words` start."""
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_command_names_no_folder_of_this_machine(tmp_path):
    """However the program was started, what is recorded can be typed elsewhere."""
    ask = "import json; from epigram.run import machine; print(json.dumps(machine.command()))\n"
    (tmp_path / "tool").mkdir()
    for file in ("script.py", "tool/__init__.py", "tool/__main__.py", "tool/part.py"):
        (tmp_path / file).write_text(ask if file != "tool/__init__.py" else "")
    assert command_of(str(tmp_path / "script.py"), "--a", cwd=tmp_path) == ["script.py", "--a"]
    assert command_of("tool/part.py", cwd=tmp_path) == ["tool/part.py"]
    assert command_of("-m", "tool", "1", cwd=tmp_path) == ["python", "-m", "tool", "1"]
    assert command_of("-m", "tool.part", cwd=tmp_path) == ["python", "-m", "tool.part"]
    out = subprocess.run(
        [sys.executable, "-m", "epigram", "bench", "optimizer", "--recipe", "smoke", "--repeats", "1", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(out.stdout)["machine"]["command"][:3] == ["epigram", "bench", "optimizer"]
