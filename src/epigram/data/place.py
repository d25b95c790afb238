"""A folder that appears complete or not at all, in a place that may hold an older one."""

import contextlib
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from epigram.data.files import sync_folder
from epigram.data.gather import is_data_folder
from epigram.errors import UserError


def check_place(out: Path) -> None:
    """UserError when `out` holds something that is no data folder."""
    if out.is_dir() and (is_data_folder(out) or not any(out.iterdir())):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists and is no data folder, so it is not overwritten: name another, or remove it")


@contextlib.contextmanager
def built_beside(out: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `out` when the block ends well, and is removed if not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    folder = out.with_name(f"{_building(out)}{os.getpid()}")
    try:
        folder.mkdir()
        yield folder
        sync_folder(folder)
        _move(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(out.parent)


def _building(out: Path) -> str:
    return f".{out.name}.building-{socket.gethostname()}-"


def _remove_stale(out: Path) -> None:
    """Remove what builds of this machine that were killed outright have left beside `out`."""
    for stale in out.parent.glob(f"{glob.escape(_building(out))}*"):
        process = stale.name.rpartition("-")[2]
        if process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(stale, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _move(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`, whose place may hold an older data folder, which is removed last."""
    check_place(out)
    aside = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    if out.exists():
        out.rename(aside)
    try:
        folder.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
