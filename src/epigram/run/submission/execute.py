"""Runs a record's script, which is foreign code: in a subprocess, in an empty folder, with a time limit, and guarded.

This is no sandbox. Hooks of Python's own audit (`epigram.run.submission.guard`) refuse connections and name look-ups,
other programs, and, while an artifact is scored, files other than the artifact and the made-up validation text; where
Linux lets it, the process gets a network of its own without any interface, and native code is kept from those files
too. A script of ours is trained and scored on made-up tokens in a tiny setting; of any other only the import is tried.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from epigram.artifact import tensors as artifact
from epigram.data.shards import shard_name, write_shard
from epigram.data.tokenizer import Tokenizer
from epigram.data.transforms.base import marked_by
from epigram.errors import UserError
from epigram.run.submission import guard
from epigram.run.submission.findings import Finding
from epigram.run.submission.record import Record

LIMIT_S = 300
_TOKENS = {"train": 20_000, "val": 1_001}
_LENGTH = 64
_REFUSED = {
    "network": ("run.network", "tried"),
    "process": ("run.process", "tried to start another program by"),
    "data": ("run.data", "tried, while it scored, to open"),
}


def execute(record: Record, is_ours: bool) -> Iterator[Finding]:
    """Findings of running train_gpt.py."""
    with tempfile.TemporaryDirectory(prefix="epigram-check-") as scratch:
        runner = _Runner(Path(scratch), record.folder / "train_gpt.py")
        if is_ours:
            yield from _train_and_score(record, runner)
        else:
            code = "import runpy; runpy.run_path('train_gpt.py', run_name='imported')"
            if problem := runner.run("-c", code):
                yield Finding(rule="run.import", message=f"importing train_gpt.py in an empty folder: {problem}")
            message = "the script's interface is not known, so it was imported and not run"
            yield Finding(rule="run.untested", message=message)
        for kind, words in runner.refused():
            rule, tried = _REFUSED[kind]
            yield Finding(rule=rule, message=f"train_gpt.py {tried} {words}")


class _Runner:
    """Runs Python with a copy of the script in an empty folder, guarded."""

    def __init__(self, scratch: Path, script: Path) -> None:
        self.scratch, self.folder, self._guard = scratch, scratch / "work", scratch / "guard"
        self._temporary = scratch / "temporary"
        for folder in (self.folder, self._guard, self._temporary):
            folder.mkdir()
        source = (resources.files("epigram.run.submission") / "guard.py").read_text("utf-8")
        (self._guard / "sitecustomize.py").write_text(f"{source}\n\ninstall()\n", "utf-8")
        self._log = scratch / "refused"
        shutil.copyfile(script, self.folder / script.name)
        self._prefix = _own_network()
        self.output = ""

    def run(self, *arguments: str, readable: Path | None = None) -> str | None:
        """None, or what went wrong in a line. readable: with it, this file and the scratch folder are all that may be
        read. Processes that the script started end with it, unless they left its session."""
        environment = {key: value for key, value in os.environ.items() if key not in ("DATA_PATH", "SEED", "RUN_ID")}
        environment |= {"PYTHONPATH": str(self._guard), guard.LOG: str(self._log), "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"TMPDIR": str(self._temporary), "XDG_CACHE_HOME": str(self._temporary)}
        if readable is not None:
            environment[guard.READABLE] = os.pathsep.join(map(str, (self.scratch, readable)))
        with subprocess.Popen(
            [*self._prefix, sys.executable, *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                self.output, errors = process.communicate(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                return f"it had not ended after {LIMIT_S} s"
            finally:
                _end(process)
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        return lines[-1] if process.returncode else None

    def refused(self) -> list[tuple[str, str]]:
        """(kind, words) of each thing that was, once."""
        lines = self._log.read_text("utf-8", errors="replace").splitlines() if self._log.exists() else []
        parts = (line.partition(" ") for line in dict.fromkeys(lines))
        return [(kind, words) for kind, _, words in parts if kind in _REFUSED]


def _own_network() -> list[str]:
    """A prefix that gives a process a network without interfaces; empty where this machine has no such thing."""
    prefix = ["unshare", "-rn"]
    if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
        return prefix
    return []


def _train_and_score(record: Record, runner: _Runner) -> Iterator[Finding]:
    if problem := runner.run("train_gpt.py", "--recipe"):
        yield Finding(rule="run.import", message=f"train_gpt.py --recipe in an empty folder: {problem}")
        return
    recipe = tomllib.loads(runner.output)
    if not record.artifacts:
        yield Finding(rule="run.untested", message="no artifact brings a tokenizer, so no tiny training was tried")
        return
    path = record.artifacts[min(record.artifacts)]
    try:
        proto = artifact.load(path).tokenizer_proto
    except UserError:
        return  # the probes of the artifact tell
    if proto is None:
        yield Finding(rule="run.untested", message=f"{path.name} brings no tokenizer, so no tiny training was tried")
        return
    data = _made_up(runner.folder.parent / "data", proto, recipe["model"]["vocab_size"])
    tiny = [word for change in _tiny(recipe) for word in ("--set", change)]
    command = ["train_gpt.py", "--data", str(data), "--device", "cpu", *tiny]
    if problem := runner.run(*command, "--out", "run"):
        yield Finding(rule="run.train", message=f"a tiny training run: {problem}")
    for shard in data.glob("*_train_*.bin"):
        shard.unlink()  # scoring must do without
    if problem := runner.run(*command, "--score", str(path.resolve()), readable=path.resolve()):
        yield Finding(rule="run.train", message=f"scoring {path.name} without training shards: {problem}")


def _end(process: subprocess.Popen[str]) -> None:
    """End it, if it has not ended, and where systems have sessions all that is left in its own."""
    if os.name != "posix":
        process.kill()
        return
    with suppress(ProcessLookupError):  # as a rule nothing is left
        os.killpg(process.pid, signal.SIGKILL)


def _made_up(folder: Path, proto: bytes, vocab_size: int) -> Path:
    """A data folder of random tokens, with the tokenizer of the artifact.

    One byte for each, where that has marks of a transform: they are no bytes of any text.
    """
    folder.mkdir()
    draw = np.random.default_rng(0)
    for split, count in _TOKENS.items():
        write_shard(folder / shard_name(split, 0), draw.integers(vocab_size, size=count).astype(np.uint16), split)
    (folder / "tokenizer.model").write_bytes(proto)
    if marked_by(Tokenizer.from_bytes(proto).pieces):
        write_shard(folder / shard_name("val_bytes", 0), np.ones(_TOKENS["val"], np.uint16), "val")
    return folder


def _tiny(recipe: dict[str, Any]) -> list[str]:
    """Settings that make a recipe a matter of seconds on a CPU; what is trained and how stays as it is, but for who
    computes it, which may have been a choice for GPUs, and for chunks that are longer than all of the text."""
    changes = [f"lanes.{i}.{key}" for i in range(len(recipe["lanes"])) for key in (f"seq_len={_LENGTH}", "num_seqs=1")]
    changes += ["budget.clock=steps", "budget.steps=2", "budget.train_s=600", "budget.score_s=600"]
    changes += ["quant.calibration.num_windows=2", f"quant.calibration.seq_len={_LENGTH}"]
    changes += [f"score.seq_len={_LENGTH}", f"score.stride={_LENGTH // 2}", "score.batch_tokens=1024"]
    changes += [f"score.adapt.sgd.chunk_tokens={4 * _LENGTH}", f"score.adapt.lora.chunk_tokens={_LENGTH // 2}"]
    changes += ["run.attention=auto", "run.kernels=auto", "run.cuda_graphs=auto"]
    return [*changes, "run.compile=off", "run.sample_tokens=0", "run.val_every=0"]
