"""Files that are complete or absent, whatever happens while they are written."""

import contextlib
import errno
import glob
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from epigram.errors import DataError, UserError


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well, and is removed when it does
    not.

    The bytes are on the disk before the name is. Raises DataError when the disk is full.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("w+b") as file, full_disk_explained(path):
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_half_written(folder: Path) -> None:
    """Remove what `written_beside` left in a folder when its process was killed; nobody may be writing there."""
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)


def remove_stale(path: Path) -> None:
    """Remove what `written_beside` left of `path` in processes that are gone; others may be writing there now."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        owner = leftover.name.split(".")[-2]
        if owner.isdigit() and not _is_running(int(owner)):
            leftover.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


class Growing:
    """A file that is written over a long time, beside its place until `finish`.

    resume_bytes: go on with what an earlier process left, as long as `checkpoint` then said; it may have written more
    since, or finished the file. Raises DataError when the disk is full, or what is to be resumed is not there.
    """

    def __init__(self, path: Path, resume_bytes: int | None = None) -> None:
        self.path, self._beside = path, path.with_name(f".{path.name}.growing")
        self._kept = resume_bytes is not None
        if resume_bytes is None:
            self._file: BinaryIO = self._beside.open("w+b")
            return
        if not self._beside.exists() and path.exists():
            path.rename(self._beside)
        if not self._beside.exists() or self._beside.stat().st_size < resume_bytes:
            raise DataError(f"{self._beside} is shorter than it was: remove {path.parent} and build again")
        self._file = self._beside.open("r+b")
        self._file.truncate(resume_bytes)
        self._file.seek(resume_bytes)

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        with full_disk_explained(self.path):
            self._file.write(data)

    def write_start(self, data: bytes) -> None:
        """Overwrite the first bytes."""
        self._file.seek(0)
        self.write(data)
        self._file.seek(0, os.SEEK_END)

    def read_back(self, dtype: str, skip_bytes: int = 0) -> NDArray[Any]:
        """What was written so far, without its first bytes, memory-mapped."""
        with full_disk_explained(self.path):
            self._file.flush()
        if self._file.tell() <= skip_bytes:  # nothing cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(self._beside, dtype, "r", skip_bytes)

    def checkpoint(self) -> int:
        """Put everything on the disk, to be kept whatever happens; returns its length in bytes."""
        self._kept = True
        with full_disk_explained(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()

    def finish(self) -> None:
        """Give the file its name, its bytes being on the disk."""
        with full_disk_explained(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._beside.replace(self.path)
        sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Close; the file goes, unless it was kept for a later process."""
        with contextlib.suppress(OSError):
            self._file.close()
        if not self._kept:
            self._beside.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turn the system's error for a full disk or an exhausted quota into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f"the disk of {path.parent} is full: free some space, or write to another disk") from error


@contextlib.contextmanager
def unwritable_explained(folder: Path, remedy: str) -> Iterator[None]:
    """Turn the system's error for a folder that cannot be made or written into a sentence. remedy: what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror or error}): {remedy}") from error


@contextlib.contextmanager
def held_alone(folder: Path, why: str = "filling it: wait until it is done") -> Iterator[None]:
    """Keep other processes from filling `folder` at the same time: what one has verified, another could write into.

    UserError when one is at it, which ends in `why`. Nothing is kept off where folders cannot be locked.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{folder} is in use, another process is {why}") from error
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk; a no-op where folders cannot be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex; DataError when it cannot be read."""
    return digest_of(path, "sha256")


def digest_of(path: Path, name: str) -> str:
    """A hash of `hashlib` of a file, in hex; DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, name).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
