"""A small text, the data made of it, and a run of recipe `smoke` on them, for the tests of run/, cli/ and dist/."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from torch import Tensor

from epigram.config import Config, load_recipe
from epigram.data.build import build
from epigram.data.dataset import DataFolder, open_data
from epigram.dist.context import Context
from epigram.run.checkpoint import load
from epigram.run.job import run_job
from epigram.run.record import RunRecord
from epigram.run.setup import Session, build_session

STEPS = 8
SHORT = (
    f"budget.steps={STEPS}",
    "run.log_every=1",
    "run.sample_tokens=8",
    "score.batch_tokens=2048",
    "quant.calibration.num_windows=4",
)
"""Settings that make `smoke` shorter still."""

_SUBJECTS = ("A dog", "The old clock", "My neighbour", "Nobody", "The river", "Señor Müller", "Every second train")
_VERBS = ("sees", "forgets", "paints", "carries", "counts", "follows", "hears")
_OBJECTS = ("the moon", "seven letters", "a blue door", "its own name", "cold tea, or 茶", "the way home", "nothing")


def write_text(path: Path, paragraphs: int, seed: int) -> None:
    """Paragraphs of sentences that a model can learn something of, some characters of several bytes among them."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(paragraphs):
            sentences = [
                f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_OBJECTS)}."
                for _ in range(draw.randint(3, 9))
            ]
            file.write(f"{number}. {' '.join(sentences)}\n\n")


def short(*overrides: str) -> Config:
    """Recipe smoke, shortened and changed."""
    return load_recipe("smoke", [*SHORT, *overrides])


def train_run(data: Path, out: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """The main job with recipe smoke, shortened and changed."""
    return run_job("smoke", data_path=str(data), out=out, overrides=[*SHORT, *overrides], device="cpu", **options)


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> list[float]:
    return [row["train_loss"] for row in rows_of(run) if "train_loss" in row]


def saved_tensors(run: Path) -> dict[str, Tensor]:
    """All tensors of a run's newest checkpoint."""
    return load(run).tensors


def assert_same_training(a: Path, b: Path) -> None:
    """Two runs ended with the same bits in every weight, moment and average."""
    left, right = saved_tensors(a), saved_tensors(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not left[name].equal(right[name])] == []


def make_session(data: DataFolder, *overrides: str) -> Session:
    return build_session(short(*overrides), data, Context())


def python_alone(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Another Python that does not find this package by a path of ours, on one thread as the tests are: the order of
    sums decides the last bits."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of one test run have in common."""
    return tmp_path_factory.getbasetemp().parent if _is_worker() else tmp_path_factory.getbasetemp()


def _is_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


@pytest.fixture(scope="session")
def data_path(shared: Path) -> Path:
    """A built data folder; not to be changed."""
    folder = shared / "run-data"
    with FileLock(shared / "run-data.lock"):
        if not folder.exists():
            write_text(shared / "run-text.txt", 500, seed=0)
            build([shared / "run-text.txt"], folder, vocab_size=512, val_fraction=0.05, workers=1)
    return folder


@pytest.fixture(scope="session")
def data(data_path: Path) -> DataFolder:
    return open_data(data_path)


@pytest.fixture(scope="session")
def finished(shared: Path, data_path: Path) -> Path:
    """The folder of a run that went well; not to be changed."""
    folder = shared / "finished-run"
    with FileLock(shared / "finished-run.lock"):
        if not folder.exists():
            train_run(data_path, folder)
    return folder


@pytest.fixture
def session(data: DataFolder) -> Iterator[Session]:
    """A session of recipe smoke before its first step."""
    built = make_session(data)
    yield built
    built.loader.close()


@pytest.fixture
def record(tmp_path: Path) -> Iterator[RunRecord]:
    with RunRecord(tmp_path / "recorded", {"recipe": "smoke"}) as opened:
        yield opened
