"""Files of a dataset repository on the Hugging Face hub: listed, downloaded, resumed, and verified.

`huggingface_hub` speaks the protocol (redirects, byte ranges, tokens, offline mode, rate limits, retries of a broken
stream). Added here is what must hold for training data: a part that was downloaded survives the process, one commit of
the repository is used throughout, and a file gets its name only when its length and its hash are those that the hub
states for it.
"""

import errno
import glob
import hashlib
import os
import random
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from epigram.data.files import full_disk_explained, sha256_of, sync_folder
from epigram.errors import DataError, UserError

ATTEMPTS = 8  # without a byte of progress, each after a longer wait: three minutes together at most
_LONGEST_WAIT_S = 60.0
_TOLD_S = 2.0  # a wait that is worth a line
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # HTTP states that may pass
_LOCAL = {  # errors of this machine's disk
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.ENOTDIR)
}
_HEX = re.compile(r"[0-9a-f]{40,64}")  # what hashes look like, parts of which become names on this disk
_EXTRA_BYTES = 1 << 20  # that may come beyond the end of a file before the connection is given up
_BAD_COPIES = 3  # of a file, whole but with another hash, before the server is given up


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a repository at one commit. Exactly one of the hashes is known, in hex.

    sha256: of the contents, stated for large files. blob_id: git's SHA-1 of a small file.
    """

    repo: str
    commit: str
    path: str
    num_bytes: int
    sha256: str | None
    blob_id: str | None

    @property
    def name(self) -> str:
        """File name without folders."""
        return self.path.rpartition("/")[2]

    @property
    def stated_hash(self) -> str:
        """The hash that is known, whichever it is."""
        found = self.sha256 or self.blob_id
        assert found is not None, f"the hub states no hash of {self.path}"
        return found


class Hub:
    """A connection to the hub, by the library's own settings (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, ...).

    endpoint: another address than the settings say. wait_s: before the first retry; later ones wait longer. Raises
    UserError when the library is missing.
    """

    def __init__(self, endpoint: str | None = None, wait_s: float = 1.0) -> None:
        try:
            import huggingface_hub
        except ModuleNotFoundError as error:
            raise UserError("the hub needs the library huggingface_hub: pip install 'epigram[hub]'") from error
        self._api = huggingface_hub.HfApi(endpoint=endpoint, library_name="epigram")
        self._wait_s = wait_s
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Make downloads in other threads end soon; they raise DataError, and keep what they have."""
        self._stopped.set()

    def list_files(self, repo: str, revision: str | None = None) -> list[HubFile]:
        """All files of a dataset repository at the commit that `revision` is now.

        Raises UserError where there is no such repository or revision, or it may not be read; DataError when the hub
        cannot be reached.
        """
        commit = self._patiently(lambda: self._api.dataset_info(repo, revision=revision).sha, repo)
        entries = self._patiently(
            lambda: list(self._api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")),
            repo,
        )
        files = []
        for entry in entries:
            if (size := getattr(entry, "size", None)) is not None:
                sha256 = entry.lfs.sha256 if entry.lfs else None
                blob_id = None if entry.lfs else entry.blob_id
                if not _HEX.fullmatch(sha256 or blob_id or ""):
                    raise DataError(f"the hub states no hash of {entry.path} in {repo}: check HF_ENDPOINT")
                files.append(
                    HubFile(repo=repo, commit=commit, path=entry.path, num_bytes=size, sha256=sha256, blob_id=blob_id)
                )
        return files

    def download(
        self,
        file: HubFile,
        to: Path,
        progress: Callable[[int], None] = lambda num_bytes: None,
        verify: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Put `file` at `to`, verified; goes on with what an earlier call left beside it.

        progress: told the bytes as they come (negative where some turn out to be useless). verify: looks into the
        file, whose length and hash are right, before it gets its name. Raises DataError when the file cannot be had:
        then there is nothing new at `to`, and what has arrived waits in the partial file.
        """
        partial = partial_path(to, file)
        for stale in set(to.parent.glob(f".{glob.escape(to.name)}.*.partial")) - {partial}:
            stale.unlink()  # of an older version of the file
        if partial.exists() and partial.stat().st_size > file.num_bytes:
            partial.unlink()
        progress(partial.stat().st_size if partial.exists() else 0)
        for copy in range(_BAD_COPIES):
            with full_disk_explained(to):
                self._complete(file, partial, progress)
            if problem := mismatch(partial, file):
                progress(-partial.stat().st_size)
                partial.unlink()  # not to be mended, since nobody knows where it is wrong
                if copy == _BAD_COPIES - 1:
                    raise DataError(
                        f"{file.path} of {file.repo} came {_BAD_COPIES} times with wrong contents ({problem}): what is "
                        "between here and the hub alters it (a proxy or a mirror), so use another way"
                    )
                continue
            verify(partial)
            with partial.open("rb") as done:
                os.fsync(done.fileno())
            partial.replace(to)
            sync_folder(to.parent)
            return

    def _complete(self, file: HubFile, partial: Path, progress: Callable[[int], None]) -> None:
        """Append to `partial` until it has the length of `file`."""
        from huggingface_hub.file_download import hf_hub_url, http_get
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the caller shows one for all files
        url = hf_hub_url(file.repo, file.path, repo_type="dataset", revision=file.commit, endpoint=self._api.endpoint)
        # The resolve address each time, not where it led: addresses of storage expire.
        headers = {**self._api._build_hf_headers(), "Accept-Encoding": "identity"}

        def attempt() -> None:
            with partial.open("r+b" if partial.exists() else "w+b") as out:
                have = out.seek(0, 2)
                if have >= file.num_bytes:  # sent more than it should have: the hash will tell what is right
                    progress(file.num_bytes - have)
                    out.truncate(file.num_bytes)
                    return
                http_get(
                    url,
                    _Watched(out, self._told(progress), file.num_bytes + _EXTRA_BYTES),  # type: ignore[arg-type]
                    resume_size=have,
                    headers=dict(headers),
                    expected_size=file.num_bytes,
                )

        self._patiently(attempt, file.path, lambda: partial.stat().st_size if partial.exists() else 0)

    def _told(self, progress: Callable[[int], None]) -> Callable[[int], None]:
        def tell(num_bytes: int) -> None:
            if self._stopped.is_set():
                raise DataError("the download was stopped")
            progress(num_bytes)

        return tell

    def _patiently(self, attempt: Callable[[], Any], what: str, size: Callable[[], int] = lambda: 0) -> Any:
        """`attempt()`, again after what may pass, for as long as `size()` grows or `ATTEMPTS` allow."""
        failures, before = 0, size()
        while True:
            try:
                return attempt()
            except Exception as error:
                if not _may_pass(error):
                    if (explained := _explained(error, what)) is error:
                        raise
                    raise explained from error
                told = error
                failures, before = (0, size()) if size() > before else (failures + 1, before)
                if failures >= ATTEMPTS:
                    raise DataError(
                        f"the hub does not give {what} ({_first_line(error)}): try again later, what arrived is kept"
                    ) from error
            wait_s = min(self._wait_s * 2**failures, _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            if wait_s >= _TOLD_S:
                why = f"the hub does not give {what} now ({_first_line(told)})"
                print(f"{why}: asking again in {wait_s:.0f} s", file=sys.stderr, flush=True)
            if self._stopped.wait(wait_s):
                raise DataError("the download was stopped")


def partial_path(to: Path, file: HubFile) -> Path:
    """Where the part of `file` that has arrived lies until it is whole and verified."""
    return to.with_name(f".{to.name}.{file.stated_hash[:16]}.partial")


class _Watched:
    """A binary file that tells how many bytes were written, and takes back those that are cut off. OSError for bytes
    beyond `most`: a reply without end would fill the disk."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None], most: int) -> None:
        self._file, self._progress, self._most = file, progress, most

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._most:
            raise OSError("more bytes came than the file has")
        self._progress(len(data))
        written = self._file.write(data)
        self._file.flush()  # so that a process that is killed has lost nothing
        return written

    def truncate(self, size: int | None = None) -> int:
        end = self._file.tell() if size is None else size
        self._file.flush()
        before = self._file.seek(0, 2)
        self._file.seek(end)
        self._progress(end - before)
        return self._file.truncate(end)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def mismatch(path: Path, file: HubFile) -> str | None:
    """How the file at `path` differs from what the hub states of `file`; None when it is the very one."""
    num_bytes = path.stat().st_size
    if num_bytes != file.num_bytes:
        return f"{num_bytes:,} bytes instead of {file.num_bytes:,}"
    found = git_blob_id(path.read_bytes()) if file.sha256 is None else sha256_of(path)
    return None if found == file.stated_hash else f"hash {found[:16]}... instead of {file.stated_hash[:16]}..."


def git_blob_id(contents: bytes) -> str:
    """The name that git gives a file of these contents, in hex."""
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()


def _state(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: Exception) -> bool:
    """Whether a failure may go away: an overloaded server, a broken connection; not a wrong name or a full disk."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled | UserError):
        return False
    if (state := _state(error)) is not None:
        return state in _TRANSIENT or state == 416  # 416: a partial file that the server disowns
    if isinstance(error, OSError):
        return error.errno not in _LOCAL
    # Errors of the HTTP client, which the library has exchanged twice: requests, httpx, httpx2. And of its replies.
    return type(error).__module__.split(".")[0] in ("httpx2", "httpx", "httpcore", "requests", "json")


def _explained(error: Exception, what: str) -> Exception:
    """The error as a sentence for the user, if it is one of those that a user can do something about."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(
            f"{what} is not here yet and HF_HUB_OFFLINE forbids to ask the hub: unset it, or bring the files yourself"
        )
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{what} is only for those who were granted access: ask for it on the hub and set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.EntryNotFoundError):
        return UserError(f"the hub has no {what}, or it is private: check the name, or set HF_TOKEN")
    if (state := _state(error)) is not None:
        return DataError(f"the hub refuses {what} with state {state}: check HF_TOKEN and HF_ENDPOINT")
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{what} is no name of a repository ({_first_line(error)}): write it as OWNER/NAME")
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
