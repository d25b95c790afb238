"""Executes the cells of a plan on the GPUs that are there, in order of priority, until the time is used up.

Each GPU has one process at a time, with a second one that has imported everything and waits for the next cell: imports
take as long as a tenth of a short run. Codecs that need no GPU compress beside the training, on their own. On a machine
that has compiled nothing, one process compiles what most cells share, on the first GPU: several that compile the same
at once take longer than one, and each other's processors. Until it ends only cells of torch's own operators start, on
the other GPUs.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.evidence.cell import EVIDENCE, REPACK, ROOT, describe, write
from benchmarks.evidence.plan import Cell, Plan
from epigram.run.checkpoint import STATE
from epigram.run.record import CONFIG, write_atomic

_POLL_S = 0.2
_END_S = 3.0  # kept for the archive and the last lines
_GRACE_S = 2.0  # between being asked to end and being ended
_PAUSE_S = 15.0  # before the end, a run begun to be paused is asked to write its checkpoint
_LATE_S = 6.0  # before the end, so is one that was to be finished by then
_WORTH_S = 60.0  # least time for which a run is begun that will have to pause
_COMPILE_S = 300.0  # most that compiling may take, some four times what it took


@dataclass(frozen=True, kw_only=True)
class Options:
    """out: takes results. done: folders that hold results of before. work: takes runs, with models and checkpoints.

    data: data folders by the plan's names. seconds: for all of it. devices: one for each process that runs at a time.
    archive: a .tgz of `out`, written anew after every cell. only: names of experiments, cells or claims, none for all.
    retry: cells that failed, too. mix: also cells whose group was measured on another kind of GPU. keep: runs with
    models stay. fresh: the machine has compiled nothing yet. goes_on: another call follows on this machine, so that
    the end of the time need not be the end of a cell.
    """

    out: Path
    work: Path
    data: Mapping[str, Path]
    seconds: float
    devices: Sequence[str]
    gpu: str
    done: Sequence[Path] = ()
    archive: Path | None = None
    only: Sequence[str] = ()
    retry: bool = False
    mix: bool = False
    keep: bool = False
    fresh: bool = True
    goes_on: bool = False


@dataclass
class Slot:
    """A GPU: the process that waits, the one that runs, and what it runs. partial: it will have to pause."""

    device: str
    waiting: subprocess.Popen[str] | None = None
    running: subprocess.Popen[str] | None = None
    cell: Cell | None = None
    start_s: float = 0.0
    partial: bool = False
    pausing: bool = False
    log: Path | None = None


@dataclass
class Summary:
    """Names of cells by what became of them; cut: by the end of the time; left: with the reason."""

    finished: list[str] = field(default_factory=list)
    paused: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def execute_plan(plan: Plan, options: Options) -> Summary:
    """Run what is missing. Prints a line at each start and end, and at the end what is left and why."""
    return _Run(plan, options).execute()


def found_results(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """EVIDENCE by the name of its cell, of all cells that have a folder below one of `folders`; later ones win."""
    found = {}
    for folder in folders:
        for path in sorted(folder.glob(f"*/{EVIDENCE}")):
            evidence = json.loads(path.read_text("utf-8"))
            found[evidence["name"]] = {**evidence, "folder": str(path.parent)}
    return found


class _Run:
    def __init__(self, plan: Plan, options: Options) -> None:
        self.plan, self.options = plan, options
        self.start_s = time.monotonic()
        self.summary = Summary()
        self.slots = [Slot(device) for device in options.devices]
        self.packing: dict[str, subprocess.Popen[str]] = {}
        self.compiler: subprocess.Popen[str] | None = None
        self.compiler_start_s = 0.0
        self.results = found_results([*options.done, options.out])
        self.pending: list[Cell] = []

    def execute(self) -> Summary:
        for folder in (self.options.out, self.options.work):
            folder.mkdir(parents=True, exist_ok=True)
        wanted = [cell for cell in self.plan.cells if self._wanted(cell)]
        self.pending = sorted(wanted, key=lambda cell: not self._trained_s(cell))  # what was begun comes first
        total_s = sum(self._cost_s(cell) for cell in self.pending)
        self._say(
            f"{len(self.pending)} cells to run, {total_s:.0f} s of a GPU, on {len(self.slots)} x {self.options.gpu}"
        )
        try:
            if self.options.fresh and self.pending:
                self._start_compiler()
            while self._turn():
                time.sleep(_POLL_S)
        finally:
            self._end()
        return self.summary

    def _start_compiler(self) -> None:
        """Begin to fill the caches on disk, while the processes that wait for cells import what they need."""
        self._say("compiling, on the first GPU")
        with self._compile_log.open("w") as file:
            self.compiler = self._process(self.slots[0], "compile", stdout=file, stderr=file)
        self.compiler_start_s = time.monotonic()
        for slot in self.slots:
            slot.waiting = self._worker(slot)

    @property
    def _compile_log(self) -> Path:
        return self.options.work / "compile.log"

    def _look_at_compiler(self) -> None:
        """See whether it is through; a failure costs time alone, since every cell compiles what it lacks."""
        if self.compiler is None:
            return
        late = time.monotonic() - self.compiler_start_s > _COMPILE_S
        if self.compiler.poll() is None and not late:
            return
        failed = f"NOT COMPILED{f' in {_COMPILE_S:.0f} s' if late else ''}, the cells do it themselves"
        self._stop_compiler(f"{failed}; log: {self._compile_log}" if late or self.compiler.returncode else "compiled")

    def _stop_compiler(self, words: str) -> None:
        if self.compiler is not None:
            self._say(words)
            _stop([self.compiler])
            self.compiler = None

    def _wanted(self, cell: Cell) -> bool:
        """Whether the cell is to be run; the reason against it is kept, unless it is that it is done."""
        own, before = cell.experiment, self.results.get(cell.name)
        if self.options.only and not {own.name, cell.name, own.claim} & set(self.options.only):
            return False
        reason = ""
        if before and before["fingerprint"] == cell.fingerprint and before["status"] == "finished":
            return False
        if before and before["fingerprint"] == cell.fingerprint and before["status"] == "failed":
            reason = "" if self.options.retry else "failed before: --retry runs it again"
        elif own.kind != "bench" and own.data not in self.options.data:
            reason = f"no --data {own.data}=PATH"
        elif not self.options.mix and (other := self._other_gpu(cell)):
            reason = f"its group was measured on {other}: --mix runs it nevertheless"
        if reason:
            self.summary.left[cell.name] = reason
        return not reason

    def _other_gpu(self, cell: Cell) -> str:
        """Another kind of GPU, on which cells of the same group were measured."""
        group = cell.experiment.group
        others = {e.name for e in self.plan.experiments if group and e.group == group}
        gpus = {
            result["gpu"]
            for result in self.results.values()
            if result["experiment"] in others and result["status"] == "finished" and "gpu" in result
        }
        return next(iter(gpus - {self.options.gpu}), "")

    def _turn(self) -> bool:
        """One look at all processes; False when nothing runs and nothing more can start."""
        self._look_at_compiler()
        for slot in self.slots:
            if slot.running is not None and slot.running.poll() is not None:
                self._finish(slot)
            if slot.running is None:
                self._start(slot)
            elif self._must_pause(slot):
                slot.pausing = True
                slot.running.terminate()
        for name in [name for name, process in self.packing.items() if process.poll() is not None]:
            self._packed(name)
        running = [slot for slot in self.slots if slot.running is not None]
        if self._left_s() < 0:
            return False
        return bool(running or self.packing or self.compiler)

    def _left_s(self) -> float:
        return self.options.seconds - _END_S - (time.monotonic() - self.start_s)

    def _start(self, slot: Slot) -> None:
        ready = [cell for cell in self.pending if not self._waits_for(cell)]
        if self.compiler is not None:
            ready = [cell for cell in ready if cell.is_plain and slot is not self.slots[0]]
        cell = next((cell for cell in ready if self._fits(cell)), None)
        if cell is None:
            if self.compiler is None:
                self._dismiss(slot)
            return
        self.pending.remove(cell)
        about_s = self._cost_s(cell)
        own = cell.experiment
        slot.log = self.options.work / f"{cell.name}.log"
        job = {
            "cell": cell.name,
            "folder": str((self.options.out / cell.name).resolve()),
            "work": str((self.options.work / cell.name).resolve()),
            "data": str(self.options.data.get(own.data, "")),
            "recipe": str(self._repeated(cell) or cell.recipe),
            "log": str(slot.log.resolve()),
            "resume": self._trained_s(cell) > 0,
            "plan": str(self.plan.path.resolve()),
        }
        process = slot.waiting or self._worker(slot)
        assert process.stdin is not None
        with suppress(OSError):  # it ended while it waited; what it said is on the standard error
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.close()
        slot.running, slot.waiting, slot.cell, slot.start_s = process, None, cell, time.monotonic()
        slot.partial, slot.pausing = about_s > self._left_s(), False
        self._say(f"{slot.device}: {cell.name} starts, about {about_s:.0f} s of {self._left_s():.0f} left")
        slot.waiting = self._worker(slot)

    def _must_pause(self, slot: Slot) -> bool:
        """Whether it is time to ask the run for its checkpoint, so that it can go on in the next call."""
        late = self._left_s() < (_PAUSE_S if slot.partial else _LATE_S)
        return late and not slot.pausing and slot.cell is not None and slot.cell.can_pause

    def _fits(self, cell: Cell) -> bool:
        """Whether there is time for it; for part of it, where another call goes on with it or it fits into none."""
        left_s = self._left_s()
        in_parts = self.options.goes_on or cell.cost_s > self.options.seconds - _END_S
        enough = self._cost_s(cell) <= left_s
        return enough or (cell.can_pause and in_parts and left_s >= _WORTH_S)

    def _cost_s(self, cell: Cell) -> float:
        """Seconds that it still takes."""
        trained_s = self._trained_s(cell)
        return cell.cost_s - trained_s + (self.plan.costs.resume_s if trained_s else 0)

    def _trained_s(self, cell: Cell) -> float:
        """Seconds of training that a paused run of this cell has behind it, 0 where there is none to go on with."""
        before = self.results.get(cell.name, {})
        same = before.get("status") == "paused" and before.get("fingerprint") == cell.fingerprint
        saved = sorted((self.options.work / cell.name / "run").glob(f"checkpoints/step-*/{STATE}")) if same else []
        return float(json.loads(saved[-1].read_text("utf-8"))["trained_s"]) if saved else 0.0

    def _waits_for(self, cell: Cell) -> bool:
        """Whether the run that it repeats is still to come."""
        return bool(cell.experiment.repeats) and self._repeated(cell) is None

    def _repeated(self, cell: Cell) -> Path | None:
        name = cell.experiment.repeats
        result = found_results([*self.options.done, self.options.out]).get(name) if name else None
        return Path(result["folder"]) / CONFIG if result and result["status"] == "finished" else None

    def _worker(self, slot: Slot) -> subprocess.Popen[str]:
        """A process that imports everything and waits for a job on its standard input."""
        return self._process(slot, "worker", stdin=subprocess.PIPE)

    def _process(self, slot: Slot, command: str, **streams: Any) -> subprocess.Popen[str]:
        """`python -m benchmarks.evidence COMMAND` on the GPU of `slot`."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        device = slot.device
        if device.startswith("cuda:"):
            environment["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
            device = "cuda"
        words = [sys.executable, "-m", "benchmarks.evidence", command, "--device", device]
        return subprocess.Popen(words, text=True, cwd=ROOT, env=_with_path(environment), **streams)

    def _finish(self, slot: Slot) -> None:
        """Take in what a process that ended left."""
        cell, process = slot.cell, slot.running
        assert cell is not None and process is not None
        slot.running = slot.cell = None
        folder = self.options.out / cell.name
        evidence = self._evidence(folder, cell)
        took_s = time.monotonic() - slot.start_s
        if slot.pausing and evidence["status"] == "running":  # it was before training, or past it with a checkpoint
            evidence["status"] = "paused"
            write(folder, evidence)
        if process.returncode == 0 and evidence["status"] == "finished":
            self.summary.finished.append(cell.name)
            self._say(f"{slot.device}: {cell.name} finished in {took_s:.0f} s: {_scores(evidence)}")
            self._pack(cell)
        elif evidence["status"] == "paused":
            self.summary.paused.append(cell.name)
            self._say(f"{slot.device}: {cell.name} paused: the next call goes on with it, on this machine")
        else:
            evidence.setdefault("reason", f"its process ended with {process.returncode}")
            write(folder, {**evidence, "status": "failed"})
            self.summary.failed.append(cell.name)
            self._say(f"{slot.device}: {cell.name} FAILED after {took_s:.0f} s: {evidence['reason']}; log: {slot.log}")
        self._archive()

    def _evidence(self, folder: Path, cell: Cell) -> dict[str, Any]:
        """What the process wrote, or the beginning of it where it wrote nothing."""
        if (folder / EVIDENCE).exists():
            found: dict[str, Any] = json.loads((folder / EVIDENCE).read_text("utf-8"))
            return found
        folder.mkdir(parents=True, exist_ok=True)
        return {**describe(cell), "status": "running", "rows": []}

    def _pack(self, cell: Cell) -> None:
        work = self.options.work / cell.name
        if not (work / REPACK).exists() or json.loads((work / REPACK).read_text("utf-8")) == []:
            self._clean(cell.name)
            return
        command = [sys.executable, "-m", "benchmarks.evidence", "repack", str(work.resolve())]
        environment = _with_path({**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""})
        self.packing[cell.name] = subprocess.Popen(command, text=True, cwd=ROOT, env=environment)

    def _packed(self, name: str) -> None:
        process = self.packing.pop(name)
        self._say(f"{name}: sizes by codec {'found' if process.returncode == 0 else 'NOT FOUND'}")
        self._clean(name)
        self._archive()

    def _clean(self, name: str) -> None:
        """Checkpoints and models are large; what is kept of a run is in its results."""
        if not self.options.keep:
            shutil.rmtree(self.options.work / name, ignore_errors=True)

    def _dismiss(self, slot: Slot) -> None:
        if slot.waiting is not None:
            _stop([slot.waiting])
            slot.waiting = None

    def _end(self) -> None:
        """End whatever still runs, and say what is left."""
        self._stop_compiler(f"NOT COMPILED in the time that there is; log: {self._compile_log}")
        for slot in self.slots:
            self._dismiss(slot)
            if slot.running is not None and slot.running.poll() is not None:
                self._finish(slot)
        running = [slot for slot in self.slots if slot.running is not None]
        _stop([slot.running for slot in running if slot.running is not None])
        for slot in running:
            assert slot.cell is not None
            self.summary.cut.append(slot.cell.name)
            folder = self.options.out / slot.cell.name
            write(folder, {**self._evidence(folder, slot.cell), "status": "cut"})
        for name in self.packing:
            self._say(f"{name}: no time was left for its sizes by codec")
        _stop(list(self.packing.values()))
        for cell in self.pending:
            waits = self._waits_for(cell)
            self.summary.left[cell.name] = f"{cell.experiment.repeats} first" if waits else f"{cell.cost_s:.0f} s"
        self._archive()
        summary = self.summary
        self._say(f"finished {len(summary.finished)}, failed {len(summary.failed)}: {', '.join(summary.failed) or '-'}")
        if summary.cut:
            self._say(f"cut off by the end of the time: {', '.join(summary.cut)}")
        if summary.paused:
            self._say(f"paused: {', '.join(summary.paused)}")
        for name, reason in summary.left.items():
            self._say(f"left: {name} ({reason})")

    def _archive(self) -> None:
        """All results in one file, whole or not at all."""
        if self.options.archive is None:
            return
        part = self.options.archive.with_name(f".{self.options.archive.name}.part")
        with tarfile.open(part, "w:gz") as tar:
            tar.add(self.options.out, arcname=self.options.out.name)
        part.replace(self.options.archive)

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.start_s:5.0f} s] {line}", flush=True)


def _with_path(environment: dict[str, str]) -> dict[str, str]:
    """The package of this checkout, installed or not."""
    known = environment.get("PYTHONPATH")
    return {**environment, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), *([known] if known else [])])}


def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.terminate()
    end_s = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(max(end_s - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None and not process.stdin.closed:
            with suppress(OSError):
                process.stdin.close()


def _scores(evidence: dict[str, Any]) -> str:
    """The scores of the export as configured, or the first time of each timing, in a line."""
    rows = evidence["rows"]
    if evidence["kind"] == "bench":
        return ", ".join(f"{row['variant']} {row['step'][0]['median_ms']:.1f} ms" for row in rows)
    return ", ".join(f"{r['model']} {r['score']} {r['val_bpb']:.4f}" for r in rows if r["variant"] == "base")


def note_failure(folder: Path, reason: str) -> None:
    """The reason of a failure, beside what the cell had found by then."""
    path = folder / EVIDENCE
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        write_atomic(path, json.dumps({**found, "status": "failed", "reason": reason}, indent=1) + "\n")
