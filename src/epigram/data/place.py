"""A folder that appears complete or not at all, in a place that may hold an older one."""

import contextlib
import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from epigram.data.files import remove_half_written, sync_folder, unwritable_explained
from epigram.data.gather import is_data_folder
from epigram.data.journal import has_journal, journal_age_s, journal_fingerprint, remove_journal
from epigram.errors import UserError

_REMEDY = "name another place with --out, or make this one writable"
_SILENT_S = 900.0  # a journal is written every half minute


def check_place(out: Path) -> None:
    """UserError when `out` holds something that is no data folder, or whoever calls is in it, who would be left in a
    folder that was removed."""
    is_free = out.is_dir() and (is_data_folder(out) or not any(out.iterdir()))
    if not is_free and (out.exists() or out.is_symlink()):
        raise UserError(f"{out} exists and is no data folder, so it is not overwritten: name another, or remove it")
    if is_free and Path.cwd().is_relative_to(out.resolve()):
        raise UserError(
            f"{out} is the folder that this command is called in, and what is built would take its place: name a "
            f"folder in it, such as {out / 'data'}, or call from elsewhere"
        )


def make_parent(out: Path) -> None:
    """Make the folder that `out` will lie in; DataError when nothing can be written there, before any work is done."""
    with unwritable_explained(out.parent, _REMEDY):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass


@contextlib.contextmanager
def built_beside(out: Path, fingerprint: str = "") -> Iterator[Path]:
    """A folder that takes the place of `out` when the block ends well, and is removed if not.

    It is empty, or what an interrupted build with the same `fingerprint` left (`data.journal`). A folder with a journal
    outlives an interruption, a full disk or a killed process; a mistake of the user's that comes to light removes it.
    """
    make_parent(out)
    folder = out.with_name(f"{_building(out)}{socket.gethostname()}-{os.getpid()}")
    try:
        if left := _left_over(out, fingerprint):
            left.rename(folder)
        else:
            folder.mkdir()
        yield folder
        remove_journal(folder)
        remove_half_written(folder)  # by processes that were killed, whose work this one went on with
        sync_folder(folder)
        _move(folder, out)
    except BaseException as error:
        is_mistake = isinstance(error, UserError) and not isinstance(error.__cause__, OSError)
        if is_mistake or not has_journal(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(out.parent)


def _building(out: Path) -> str:
    return f".{out.name}.building-"


def _left_over(out: Path, fingerprint: str) -> Path | None:
    """What a build that is not running any more has left to go on from; what cannot be used is removed.

    A build of another machine counts as ended when it has not written its journal for long.
    """
    usable = None
    for folder in sorted(out.parent.glob(f"{glob.escape(_building(out))}*")):
        machine, _, process = folder.name.removeprefix(_building(out)).rpartition("-")
        if not process.isdecimal():
            continue
        age_s = journal_age_s(folder)
        if machine == socket.gethostname():
            is_over = not _is_running(int(process))
        else:
            is_over = age_s is not None and age_s > _SILENT_S
        if is_over and usable is None and fingerprint and journal_fingerprint(folder) == fingerprint:
            usable = folder
        elif is_over:
            shutil.rmtree(folder, ignore_errors=True)
    return usable


def _is_running(process: int) -> bool:
    if process == os.getpid():  # the number of a process that ended long ago, or a build of this one that did
        return False
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
