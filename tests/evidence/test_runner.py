"""The runner: order, time, failures, what is left; with processes that only pretend to train."""

import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import runner
from benchmarks.evidence.__main__ import usable_gpus
from benchmarks.evidence.cell import EVIDENCE
from benchmarks.evidence.plan import Plan, load_plan
from benchmarks.evidence.runner import Options, Summary, execute_plan
from epigram.errors import UserError

TOY = Path(__file__).parent / "toy.toml"

# Reads a job as the real one does, and finishes at once, or does what `behave` says for its cell.
STUB = """
import json, pathlib, sys, time, signal
job = json.loads(sys.stdin.readline() or "null")
if job is None:
    sys.exit()
behave = json.loads(sys.argv[1]).get(job["cell"], {})
folder = pathlib.Path(job["folder"])
folder.mkdir(parents=True, exist_ok=True)
evidence = {**json.loads(sys.argv[2])[job["cell"]], "status": "finished", "gpu": "cpu", "rows": [],
            "resume": job["resume"], "recipe_was": job["recipe"], "began": time.time()}
def save(**more):
    (folder / "evidence.json").write_text(json.dumps({**evidence, **more, "ended": time.time()}))
def pause(*_):
    saved = pathlib.Path(job["work"]) / "run/checkpoints/step-00000007"
    saved.mkdir(parents=True, exist_ok=True)
    (saved / "state.json").write_text('{"trained_s": 3.5}')
    save(status="paused")
    sys.exit()
if behave.get("pauses"):
    signal.signal(signal.SIGTERM, pause)
(folder.parent / (job["cell"] + ".began")).touch()
while not all((folder.parent / (other + ".began")).exists() for other in behave.get("together", [])):
    time.sleep(0.01)
time.sleep(behave.get("sleep", 0))
if behave.get("dies"):
    sys.exit(3)
save()
"""


class Runs:
    """Runs the toy plan with stubs; each call is one command on a machine that keeps its folders."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan, self.out, self.work = load_plan(TOY), tmp_path / "out", tmp_path / "work"
        self.behave: dict[str, Any] = {}
        (tmp_path / "data").mkdir()
        self.options = Options(
            out=self.out,
            work=self.work,
            data={"toy": tmp_path / "data"},
            seconds=60,
            devices=["cpu"],
            gpu="cpu",
            fresh=False,
        )
        self.patch(monkeypatch)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner._Run, "_worker", lambda _, slot: self._stub())
        monkeypatch.setattr(runner, "_POLL_S", 0.01)

    def _stub(self) -> subprocess.Popen[str]:
        cells = {cell.name: runner.describe(cell) for cell in self.plan.cells}
        command = [sys.executable, "-c", STUB, json.dumps(self.behave), json.dumps(cells)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    def __call__(self, plan: Plan | None = None, **options: Any) -> Summary:
        self.plan = plan or self.plan
        return execute_plan(self.plan, replace(self.options, **options))

    def evidence(self, name: str) -> dict[str, Any]:
        return json.loads((self.out / name / EVIDENCE).read_text())


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def test_in_order_of_priority_and_then_never_again(runs: Runs, capsys: pytest.CaptureFixture[str]):
    order = ["plain-s1", "again-s1", "diverges-s1337", "steps-64", "plain-s2", "whole-s1"]
    assert runs().finished == order
    began = [runs.evidence(name)["began"] for name in order]
    assert began == sorted(began)
    assert runs.evidence("again-s1")["recipe_was"] == str(runs.out / "plain-s1" / "config.toml")
    assert "6 cells to run" in capsys.readouterr().out
    assert runs() == Summary()


def test_a_failure_stops_nothing_else_and_is_told(runs: Runs, capsys: pytest.CaptureFixture[str]):
    runs.behave = {"diverges-s1337": {"dies": True}}
    summary = runs()
    assert summary.failed == ["diverges-s1337"]
    assert len(summary.finished) == 5
    assert runs.evidence("diverges-s1337")["status"] == "failed"
    assert "diverges-s1337 FAILED" in capsys.readouterr().out
    assert runs().left == {"diverges-s1337": "failed before: --retry runs it again"}
    runs.behave = {}
    assert runs(retry=True).finished == ["diverges-s1337"]


def test_what_does_not_fit_is_left(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """14 s are left, on a clock that stands still: the dearest cells would take 15, the others fit."""
    monkeypatch.setattr(runner._Run, "_left_s", lambda _: 14.0)
    summary = runs()
    assert set(summary.left) == {"plain-s1", "plain-s2", "again-s1"}
    assert summary.left["again-s1"] == "plain-s1 first"
    assert summary.left["plain-s1"] == "15 s"
    assert summary.finished == ["diverges-s1337", "steps-64", "whole-s1"]


def test_the_end_of_the_time_cuts_off(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "_END_S", 0.2)
    runs.behave = {"steps-64": {"sleep": 60}}
    assert runs(only=["steps-64"], seconds=6).cut == ["steps-64"]
    assert runs.evidence("steps-64")["status"] == "cut"
    runs.behave = {}
    assert runs(only=["steps-64"]).finished == ["steps-64"]


def test_a_long_run_pauses_and_goes_on_first(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """Its 9 s are more than there is in all, so it is begun; then asked to pause, here as soon as it runs."""
    monkeypatch.setattr(runner, "_WORTH_S", 1.0)
    began = runs.out / "whole-s1.began"
    monkeypatch.setattr(runner._Run, "_must_pause", lambda _, slot: not slot.pausing and began.exists())
    runs.behave = {"whole-s1": {"sleep": 60, "pauses": True}}
    assert runs(only=["whole-s1"], seconds=11).paused == ["whole-s1"]
    run = runner._Run(runs.plan, runs.options)
    cell = next(cell for cell in runs.plan.cells if cell.name == "whole-s1")
    assert run._cost_s(cell) == cell.cost_s - 3.5 + runs.plan.costs.resume_s
    monkeypatch.undo()
    runs.patch(monkeypatch)
    runs.behave = {}
    assert runs().finished[0] == "whole-s1"
    assert runs.evidence("whole-s1")["resume"] is True
    assert runs.evidence("plain-s1")["resume"] is False


def test_when_to_pause(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """Some seconds before the end, fewer where it was to be finished by then, and only what can go on: no timings."""
    run = runner._Run(runs.plan, runs.options)
    cells = {cell.name: cell for cell in runs.plan.cells}
    slot = runner.Slot("cpu", cell=cells["whole-s1"], partial=True)
    for left_s, partial, expected in ((16, True, False), (14, True, True), (14, False, False), (5, False, True)):
        monkeypatch.setattr(run, "_left_s", lambda left_s=left_s: left_s)
        slot.partial = partial
        assert run._must_pause(slot) == expected
    slot.cell = cells["steps-64"]
    assert not run._must_pause(slot)


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_another_call_can_finish_is_begun(runs: Runs, monkeypatch: pytest.MonkeyPatch, goes_on: bool):
    """14 s are left, on a clock that stands still, for a run that would take 15."""
    monkeypatch.setattr(runner, "_WORTH_S", 14.0)
    monkeypatch.setattr(runner, "_PAUSE_S", 1.0)
    monkeypatch.setattr(runner._Run, "_left_s", lambda _: 14.0)
    summary = runs(only=["plain-s1"], goes_on=goes_on)
    assert summary.finished == ["plain-s1"] * goes_on
    assert list(summary.left) == [] if goes_on else ["plain-s1"]


@pytest.mark.parametrize("words", ["sys.exit()", "sys.exit(3)", "time.sleep(60)"])
def test_a_fresh_machine_compiles_before_anything_starts(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
):
    """Once, however many GPUs there are; whatever becomes of it, the cells are run, and no process is left."""
    asked: list[tuple[str, str]] = []
    made: list[subprocess.Popen[str]] = []

    def process(_: Any, slot: runner.Slot, command: str, **streams: Any) -> subprocess.Popen[str]:
        asked.append((slot.device, command))
        code = f"import pathlib, sys, time; pathlib.Path({str(runs.work)!r}, 'compiled').touch(); {words}"
        made.append(subprocess.Popen([sys.executable, "-c", code], text=True, **streams))
        return made[-1]

    monkeypatch.setattr(runner._Run, "_process", process)
    if "sleep" in words:
        monkeypatch.setattr(runner, "_COMPILE_S", 0.5)
    summary = runs(devices=["a", "b"], fresh=True, only=["plain-s1", "steps-64"])
    assert asked == [("a", "compile")]
    assert set(summary.finished) == {"plain-s1", "steps-64"}
    assert made[0].returncode is not None
    assert ("NOT COMPILED" in capsys.readouterr().out) == (words != "sys.exit()")
    assert runs(fresh=True, only=["plain-s1"]) == Summary() and len(asked) == 1, "nothing to run, nothing to compile"


def compile_until(monkeypatch: pytest.MonkeyPatch, there: Path) -> None:
    """A compiler that ends as soon as a file is there."""
    code = f"import pathlib, time\nwhile not pathlib.Path({str(there)!r}).exists(): time.sleep(0.01)"

    def process(*_: Any, **streams: Any) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code], text=True, **streams)

    monkeypatch.setattr(runner._Run, "_process", process)


def test_plain_cells_run_while_another_gpu_compiles(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The compiler waits for the plain cell, and everything else, on both GPUs, for the compiler."""
    plain = """set = ['run.kernels="plain"', 'run.compile="off"', 'run.attention="sdpa"', """
    text = TOY.read_text("utf-8").replace('set = ["optim.muon.lr_early=1e30"', f'{plain}"optim.muon.lr_early=1e30"')
    (path := tmp_path / "plan.toml").write_text(text)
    plan = load_plan(path)
    assert [cell.name for cell in plan.cells if cell.is_plain] == ["diverges-s1337"]
    compile_until(monkeypatch, runs.out / "diverges-s1337.began")
    summary = runs(plan, devices=["a", "b"], fresh=True)
    assert len(summary.finished) == 6
    first = runs.evidence("diverges-s1337")["began"]
    assert all(runs.evidence(cell.name)["began"] > first for cell in plan.cells if not cell.is_plain)


def test_one_gpu_compiles_first(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing starts beside it, and the end of the time ends it too."""
    compile_until(monkeypatch, tmp_path / "never")
    monkeypatch.setattr(runner, "_END_S", 0.2)
    summary = runs(fresh=True, seconds=1)
    assert summary.finished == []
    assert not list(runs.out.glob("*.began"))


def test_one_process_for_each_gpu(runs: Runs):
    """Two that wait for each other finish together; with one GPU they never would."""
    pair = ["plain-s1", "diverges-s1337"]
    runs.behave = {name: {"together": pair} for name in pair}
    assert set(runs(devices=["cpu", "cpu"], only=[*pair, "steps-64"]).finished) == {*pair, "steps-64"}
    ended = min(runs.evidence(name)["ended"] for name in pair)
    assert runs.evidence("steps-64")["began"] >= ended


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, {"cuda:0": "a", "cuda:1": "b", "cuda:2": "c"}),
        ("2,0", {"cuda:2": "c", "cuda:0": "a"}),
        ("", {}),
        ("-1", {}),
        ("7", {}),
    ],
)
def test_gpus_that_the_environment_leaves(visible: str | None, expected: dict[str, str]):
    assert usable_gpus(["a", "b", "c"], visible) == expected


def test_gpus_by_other_names_than_numbers():
    with pytest.raises(UserError, match="by number"):
        usable_gpus(["a"], "GPU-8932f937")


def test_a_group_stays_on_one_kind_of_gpu(runs: Runs):
    runs(only=["plain-s1"])
    summary = runs(gpu="another")
    assert summary.left["plain-s2"] == "its group was measured on cpu: --mix runs it nevertheless"
    assert summary.finished == ["steps-64", "whole-s1"]
    assert "plain-s2" in runs(gpu="another", mix=True).finished


def test_other_settings_are_another_cell(runs: Runs, tmp_path: Path):
    runs(only=["steps-64"])
    (path := tmp_path / "plan.toml").write_text(
        TOY.read_text().replace('name = "16"', 'name = "16", set = ["model.window=32"]')
    )
    assert runs(load_plan(path), only=["steps-64"]).finished == ["steps-64"]


def test_results_of_before_and_the_archive(runs: Runs, tmp_path: Path):
    archive = tmp_path / "a.tgz"
    runs(only=["plain-s1"], archive=archive)
    with tarfile.open(archive) as tar:
        assert f"out/plain-s1/{EVIDENCE}" in tar.getnames()
    assert runs(only=["plain"], out=tmp_path / "other", done=[runs.out]).finished == ["plain-s2"]


def test_without_its_data(runs: Runs):
    summary = runs(data={})
    assert summary.finished == ["steps-64"]
    assert set(summary.left.values()) == {"no --data toy=PATH"}
