"""Three short runs of one recipe, and the record folder made of them."""

import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from run_helpers import train_run

from epigram.run.submission.folder import About, submit

SEEDS = (1, 2, 3)
CAP = 1_200_000  # of the readable file, which is most of it, and a small artifact
ABOUT = About(author="A. Author", github_id="an-author", date="2026-04-01")


@pytest.fixture(scope="session")
def runs(shared: Path, data_path: Path) -> list[Path]:
    """Finished runs, one a seed; not to be changed."""
    folders = [shared / f"record-run-{seed}" for seed in SEEDS]
    with FileLock(shared / "record-runs.lock"):
        for seed, folder in zip(SEEDS, folders, strict=True):
            if not folder.exists():
                train_run(data_path, folder, f"seed={seed}", f"artifact.cap_bytes={CAP}", "run.sample_tokens=0")
    return folders


@pytest.fixture(scope="session")
def good(shared: Path, runs: list[Path]) -> Path:
    """A record folder, packed; not to be changed."""
    folder = shared / "record"
    with FileLock(shared / "record.lock"):
        if not folder.exists():
            submit(runs, folder, ABOUT)
    return folder


@pytest.fixture
def record(good: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(good, tmp_path / "record"))
