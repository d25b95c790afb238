"""The run folder: what a run leaves behind, written so that it can be read whenever and however the run ended.

    config.toml         the resolved configuration, first of all
    environment.json    commit, versions, devices, active kernels and backends
    log.txt             the lines that were printed; those of `step_line` and `final_line` keep their form for programs
    metrics.jsonl       one object a logged step, through the writer `jsonl`
    samples.jsonl       generated texts
    result.json         replaced atomically: "running" from the start, then "finished", "failed" or "interrupted"

Only rank 0 writes: on other ranks a record accepts every call and does nothing.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w

from epigram import plugin
from epigram.data.files import held_alone
from epigram.dist import watch
from epigram.errors import StoppedError, UserError
from epigram.run.writers.base import PACKAGE, MetricsWriter
from epigram.run.writers.jsonl import cut_unfinished_line

CONFIG, ENVIRONMENT, LOG, SAMPLES, RESULT = (
    "config.toml", "environment.json", "log.txt", "samples.jsonl", "result.json",
)  # fmt: skip
_RESERVE = ".reserve"  # given back when a run fails, so that its result still fits on a full disk
_RESERVE_BYTES = 256 * 1024
_OWN = ("status", "reason", "wall_s")  # keys of the result that only the record sets


def step_line(step: int, steps: int, train_loss: float, train_ms: float) -> str:
    """One training step. train_ms: training time so far, evaluation excluded."""
    return f"step:{step}/{steps} train_loss:{train_loss:.4f} {_times(step, train_ms)}"


def validation_line(step: int, steps: int, val_nats: float, val_bpb: float, train_ms: float) -> str:
    """A validation in the midst of training."""
    return f"step:{step}/{steps} val_loss:{val_nats:.4f} val_bpb:{val_bpb:.4f} {_times(step, train_ms)}"


def final_line(label: str, val_nats: float, val_bpb: float) -> str:
    """A final score; `label` says of what and how, for example "quantized_sliding"."""
    return f"final_{label}_exact val_loss:{val_nats:.8f} val_bpb:{val_bpb:.8f}"


def _times(step: int, train_ms: float) -> str:
    return f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(step, 1):.2f}ms"


class RunRecord:
    """A run folder that is being written; a context manager, so that a run which fails says so in its result.

    folder: created; must be new or empty, unless `resume`. config: the resolved configuration as nested
    tables. writers: metrics writers beside `jsonl`, by name. ready: called when no other process can write the folder
    any more, and before this one does. Raises UserError when the folder cannot be used or a writer's library is
    missing; nothing is left behind then.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        writers: Sequence[str] = (),
        resume: bool = False,
        ready: Callable[[], None] | None = None,
        rank: int = 0,
    ) -> None:
        self.folder, self.writes = Path(folder), rank == 0
        self.result: dict[str, Any] = {}
        self._budget: Mapping[str, Any] = config.get("budget", {})
        self._writers: list[MetricsWriter] = []
        self._lost: set[str] = set()
        self._start_s = time.monotonic()
        if not self.writes:
            return
        modules = [plugin.load(PACKAGE, name) for name in dict.fromkeys(("jsonl", *writers))]
        _check_folder(self.folder, resume)
        self._held = ExitStack()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(held_alone(self.folder, "writing this run: wait until it has ended, or stop it"))
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        try:
            if ready is not None:
                ready()
            self._open(config, resume)
            self._writers = [m.Writer(self.folder, self.folder.resolve().name, config) for m in modules]
        except Exception as error:
            if not resume:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._held.close()
            if isinstance(error, OSError):
                raise _unwritable(self.folder, error) from error
            raise

    def __enter__(self) -> Self:
        if watch.current is not None:  # it may end the process from outside of the main thread
            watch.current.last_words = partial(self._end, "failed")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end("finished")
        elif isinstance(error, KeyboardInterrupt):
            self._end("interrupted", "stopped by Ctrl-C")
        elif isinstance(error, StoppedError):
            self._end("interrupted", error.reason)
        elif isinstance(error, SystemExit) and watch.current is not None and watch.current.failure is not None:
            self._end("failed", str(watch.current.failure))  # whoever started the processes ended this one for it
        elif isinstance(error, SystemExit):
            self._end("interrupted", f"stopped with exit code {error.code}")
        else:
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self._end("failed", f"{name}{error}")

    def environment(self, facts: Mapping[str, Any]) -> None:
        """Write environment.json; see `epigram.run.machine.environment`."""
        if self.writes:
            write_atomic(self.folder / ENVIRONMENT, json.dumps(_plain(facts), indent=2) + "\n")

    def log(self, line: str) -> None:
        """Print a line and keep it in log.txt."""
        if self.writes:
            self.attempt("the output", partial(_say, line))
            self.attempt(LOG, partial(print, line, file=self._log, flush=True))

    def step(self, *, step: int, elapsed_s: float, train_loss: float, **values: Any) -> None:
        """A logged training step: the stable line and a row of metrics.

        elapsed_s: training time so far. values: whatever else is worth a curve, such as lr, momentum,
        grad_norm, tokens, tokens_per_s, step_ms, phase.
        """
        self.log(step_line(step, num_steps(self._budget, step, elapsed_s), train_loss, 1000 * elapsed_s))
        self.metrics({"step": step, "elapsed_s": elapsed_s, "train_loss": train_loss, **values})

    def validation(self, *, step: int, elapsed_s: float, val_nats: float, val_bpb: float, **values: Any) -> None:
        """A validation during training: the stable line and a row of metrics."""
        steps = num_steps(self._budget, step, elapsed_s)
        self.log(validation_line(step, steps, val_nats, val_bpb, 1000 * elapsed_s))
        self.metrics({"step": step, "elapsed_s": elapsed_s, "val_nats": val_nats, "val_bpb": val_bpb, **values})

    def metrics(self, row: Mapping[str, Any]) -> None:
        """A row of metrics for every writer. Numbers that are not finite are stored as null."""
        row = _plain(row)
        for writer in self._writers:
            self.attempt("metrics", partial(writer.write, row))

    def score(self, model: str, method: str, row: Mapping[str, Any]) -> None:
        """A final score: its stable line, and its row under result["scores"][model][method].

        model: "float" or "quantized". row: val_bpb, val_nats, tokens, bytes, seq_len, stride, score_s.
        """
        self.log(final_line(f"{model}_{method}", row["val_nats"], row["val_bpb"]))
        self.result.setdefault("scores", {}).setdefault(model, {})[method] = dict(row)
        self.update()

    def sample(self, prompt: str, text: str, **facts: Any) -> None:
        """A generated text, `prompt` not included; facts: step, temperature and the like."""
        if self.writes:
            with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_plain({"prompt": prompt, "text": text, **facts})) + "\n")

    def update(self, **values: Any) -> None:
        """Add to the result, and store it as it stands: a run that is killed later keeps it."""
        self.result.update(values)
        if self.writes:
            self._store("running")

    def _open(self, config: Mapping[str, Any], resume: bool) -> None:
        write_atomic(self.folder / CONFIG, tomli_w.dumps(config))
        (self.folder / _RESERVE).write_bytes(bytes(_RESERVE_BYTES))
        if resume:
            self.result = _read_result(self.folder)
            cut_unfinished_line(self.folder / SAMPLES)
            cut_unfinished_line(self.folder / LOG)
        self._store("running")
        self._log = (self.folder / LOG).open("a", encoding="utf-8")

    def attempt(self, what: str, write: Callable[[], Any]) -> None:
        """A full disk, a reader that went away or letters that the output lacks are told, once each, and cost no
        training."""
        try:
            write()
        except (OSError, UnicodeEncodeError) as error:
            if what not in self._lost:
                self._lost.add(what)
                with suppress(OSError):
                    print(f"warning: {what} cannot be written ({error}): the run goes on without", file=sys.stderr)

    def _status(self, status: str, reason: str) -> dict[str, Any]:
        """The result with what only the record knows about it."""
        wall_s = round(time.monotonic() - self._start_s, 3)
        own = {"status": status, **({"reason": reason} if reason else {}), "wall_s": wall_s}
        return _plain({**own, **{key: value for key, value in self.result.items() if key not in _OWN}})

    def _store(self, status: str, reason: str = "") -> None:
        write_atomic(self.folder / RESULT, json.dumps(self._status(status, reason), indent=2) + "\n")

    def _end(self, status: str, reason: str = "") -> None:
        """Every part of the end is tried, whatever happens to the others: the disk may be full."""
        if not self.writes:
            return
        result = self._status(status, reason)
        parts: list[Callable[[], Any]] = [
            lambda: (self.folder / _RESERVE).unlink(missing_ok=True),
            lambda: self._store(status, reason),
            lambda: self.log(f"run {status}: {reason}") if reason else None,
            *(partial(writer.close, result) for writer in self._writers),
            partial(self.attempt, LOG, self._log.close),
        ]
        problems = []
        with self._held:
            for part in parts:
                try:
                    part()
                except OSError as error:
                    problems.append(error)
        if problems and status == "finished":
            raise problems[0]
        if problems:  # the error that ended the run is on its way; this one is mentioned beside it
            print(f"the end of the run is not all on disk in {self.folder}: {problems[0]}", file=sys.stderr)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"the run folder {folder} cannot be written: {error.strerror or error}")


def _say(line: str) -> None:
    """Print; where nobody reads any more, all that is printed from then on, at the very end too, goes nowhere."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def num_steps(budget: Mapping[str, Any], step: int, elapsed_s: float) -> int:
    """How many steps a run with this budget will take: as configured, or at the pace so far.

    budget: the table of the config, with steps, max_steps, train_s and calibrate_s where they are set. The
    answer is never below `step`.
    """
    limit = int(budget.get("max_steps", 0)) or None
    if budget.get("steps"):
        counted = int(budget["steps"])
        return max(min(counted, limit or counted), step)
    train_s = float(budget.get("train_s", 0)) - float(budget.get("calibrate_s", 0))
    if train_s > 0 and elapsed_s > 0:
        paced = round(step * train_s / elapsed_s)
        limit = min(paced, limit) if limit else paced
    return max(limit or step, step)


def scoring_s(result: Mapping[str, Any]) -> float:
    """Seconds that scoring the file took, one that was stopped included."""
    rows = result.get("scores", {}).get("quantized", {}).values()
    return float(sum(row["score_s"] for row in rows) + result.get("adapt_stopped_s", 0.0))


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new(folder: Path) -> None:
    """Raises UserError where a folder cannot become a new run's: it is in use, or cannot be read."""
    try:
        used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be read: {error.strerror}") from error
    if used and not folder.is_dir():
        raise UserError(f"{folder} is a file: a run needs a folder, choose another name")
    if used:
        raise UserError(
            f"{folder} is not empty: choose another folder, or go on with its run: epigram train --resume {folder}"
        )


def _check_folder(folder: Path, resume: bool) -> None:
    if not resume:
        check_new(folder)
    elif not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no run to go on with: it has no {CONFIG}")


def _read_result(folder: Path) -> dict[str, Any]:
    """The result so far of a run that is resumed; empty when there is none that can be read."""
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> Any:
    """`value` as JSON has it: tuples as lists, paths as text, scalars as numbers, NaN and inf as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
