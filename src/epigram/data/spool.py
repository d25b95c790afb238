"""Files of a dataset on the hub, on this disk one after another: fetched ahead, verified, removed when they are done.

So a terabyte of text passes through a few gigabytes of disk, and every byte of it was compared with the hub's hash
before a document is read.
"""

import concurrent.futures
import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from epigram.data.files import held_alone
from epigram.data.gather import SourceFile
from epigram.data.hub import Hub
from epigram.progress import Progress

_AHEAD = 1  # files that are fetched while one is read
FILES_AT_A_TIME = 2 + _AHEAD  # on the disk: one may be done and not removed yet


class Spool:
    """Gives remote files a place under `folder` while they are read. A context manager: a good end removes the folder,
    an error nothing that a resumed build could use. UserError on entering while another build uses the folder.
    """

    def __init__(self, hub: Hub | None, files: Sequence[SourceFile], folder: Path) -> None:
        self._hub, self._folder = hub, folder
        self._remote = [file for file in files if file.remote is not None]
        self._running: dict[Path, concurrent.futures.Future[None]] = {}
        self._arrived: dict[Path, int] = {}  # bytes of what is being fetched
        self._held = contextlib.ExitStack()
        self._pool = concurrent.futures.ThreadPoolExecutor(1 + _AHEAD, thread_name_prefix="spool")

    def __enter__(self) -> "Spool":
        if self._remote:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(held_alone(self._folder))
            self._remove_stale()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._hub is not None:
            self._hub.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if error is None:
            shutil.rmtree(self._folder, ignore_errors=True)  # while it is held: after that another build may fill it
        self._held.close()

    def _remove_stale(self) -> None:
        """Files that an earlier build left and this one cannot use."""
        names = {file.path.name for file in self._remote}
        for path in self._folder.iterdir():
            if path.name not in names and not any(path.name.startswith(f".{name}.") for name in names):
                path.unlink()

    def local(self, file: SourceFile) -> Path:
        """Where `file` can be read; waits for it, and starts to fetch what comes next."""
        if file.remote is None:
            return file.path
        place = self._remote.index(file)
        for wanted in self._remote[place : place + 1 + _AHEAD]:
            self._start(wanted)
        with Progress(f"fetching {file.name}", total=file.remote.num_bytes / 1e6, unit="MB") as progress:
            while not self._running[file.path].done():
                concurrent.futures.wait([self._running[file.path]], timeout=1.0)
                progress.update(self._arrived.get(file.path, 0) / 1e6)
        self._running[file.path].result()
        return self._folder / file.path

    def _start(self, file: SourceFile) -> None:
        if file.path not in self._running:
            assert self._hub is not None and file.remote is not None
            target = self._folder / file.path
            if target.exists():  # verified before it got its name
                done: concurrent.futures.Future[None] = concurrent.futures.Future()
                done.set_result(None)
                self._running[file.path] = done
            else:
                self._arrived[file.path] = 0
                self._running[file.path] = self._pool.submit(
                    self._hub.download, file.remote, target, lambda num_bytes: self._count(file, num_bytes)
                )

    def _count(self, file: SourceFile, num_bytes: int) -> None:
        self._arrived[file.path] += num_bytes

    def release(self, file: SourceFile) -> None:
        """Remove what was fetched of a file that nobody reads any more."""
        if file.remote is not None:
            (self._folder / file.path).unlink(missing_ok=True)
            self._running.pop(file.path, None)
