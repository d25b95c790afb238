"""Token shards in the published format of parameter-golf.

256 little-endian int32 (word 0 = 20240520, word 1 = 1, word 2 = number of tokens n, others 0), then n
little-endian uint16 ids. A document may go on in the next shard.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from epigram.data.files import Growing, sha256_of, written_beside
from epigram.errors import DataError

MAGIC, VERSION = 20240520, 1
HEADER_BYTES, TOKEN_BYTES = 1024, 2
SHARD_TOKENS = 100_000_000  # of a full shard
MAX_SHARD_TOKENS = 2**31 - 1  # what the header can say


def shard_name(split: str, index: int) -> str:
    """File name of a shard: the one that published training scripts look for, whatever the text."""
    return f"fineweb_{split}_{index:06d}.bin"


def byte_counts_name(split: str, index: int) -> str:
    """File name of the byte counts beside a shard: the published one (parameter-golf #1729)."""
    return f"fineweb_{split}_bytes_{index:06d}.bin"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard file: its place, how many tokens its header promises, and the split that it belongs to."""

    path: Path
    num_tokens: int
    split: str

    @property
    def num_bytes(self) -> int:
        """Size that the file must have."""
        return HEADER_BYTES + TOKEN_BYTES * self.num_tokens

    @property
    def tokens(self) -> NDArray[np.uint16]:
        """The tokens, memory-mapped, read-only; DataError when the file is gone or has another size now."""
        if open_shard(self.path, self.split) != self:
            raise DataError(f"{self.path} changed since it was opened: restore it, or build the data again")
        if not self.num_tokens:
            return np.empty(0, np.uint16)
        return np.memmap(self.path, np.dtype("<u2"), "r", HEADER_BYTES, (self.num_tokens,))

    def read(self) -> NDArray[np.uint16]:
        """The tokens in memory; DataError when the file is gone or has another size by now."""
        return np.array(self.tokens)


def open_shard(path: str | Path, split: str) -> Shard:
    """Check the header and the size of a shard; DataError that says what is wrong with it."""
    path = Path(path)
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), np.uint8)
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from error
    if len(header) < HEADER_BYTES:
        raise DataError(
            f"shard {path} is shorter than its header ({num_bytes} of {HEADER_BYTES} bytes): it is cut short"
        )
    words = header.view("<i4")
    if words[0] != MAGIC:
        raise DataError(f"{path} is no token shard: it begins with {words[0]} instead of {MAGIC}")
    if words[1] != VERSION:
        raise DataError(f"shard {path} has version {words[1]}, and only version {VERSION} can be read")
    num_tokens = int(words[2])
    expected_bytes = HEADER_BYTES + TOKEN_BYTES * num_tokens
    if num_tokens < 0 or num_bytes != expected_bytes:
        raise DataError(
            f"shard {path} is {num_bytes:,} bytes, but its header promises {num_tokens:,} tokens in "
            f"{expected_bytes:,} bytes: it is cut short or damaged, download or build it again"
        )
    return Shard(path=path, num_tokens=num_tokens, split=split)


def header_bytes(num_tokens: int) -> bytes:
    """The header of a shard of `num_tokens`."""
    words = np.zeros(HEADER_BYTES // 4, "<i4")
    words[:3] = MAGIC, VERSION, num_tokens
    return words.tobytes()


def write_shard(path: Path, tokens: NDArray[np.uint16], split: str) -> Shard:
    """Write one shard whole: beside, to the disk, renamed."""
    assert tokens.dtype == np.uint16
    assert len(tokens) <= MAX_SHARD_TOKENS
    with written_beside(path) as file:
        file.write(header_bytes(len(tokens)))
        file.write(np.ascontiguousarray(tokens, "<u2").data)
    return Shard(path=path, num_tokens=len(tokens), split=split)


class ShardWriter:
    """Cuts a stream of 16-bit values into shards of `shard_tokens` in a folder, on the disk as it comes.

    name: of shard i of the split. `finished` lists the complete shards with their SHA-256. A context manager: a good
    end completes the last, shorter shard, an error removes it unless a `state` was taken. DataError when the disk is
    full.
    """

    def __init__(
        self, folder: Path, split: str, shard_tokens: int, name: Callable[[str, int], str] = shard_name
    ) -> None:
        assert 0 < shard_tokens <= MAX_SHARD_TOKENS
        self._folder, self._split, self._shard_tokens, self._name = folder, split, shard_tokens, name
        self._file: Growing | None = None
        self._file_tokens = 0
        self.finished: list[tuple[Shard, str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._file is not None:
                self._file.abandon()

    def write(self, tokens: NDArray[np.uint16]) -> None:
        """Append tokens to the stream."""
        while len(tokens):
            if self._file is None:
                self._file = Growing(self._path)
                self._file.write(header_bytes(0))
            part = tokens[: self._shard_tokens - self._file_tokens]
            self._file.write(np.ascontiguousarray(part, "<u2").data)
            self._file_tokens += len(part)
            tokens = tokens[len(part) :]
            if self._file_tokens == self._shard_tokens:
                self._finish()

    def state(self) -> dict[str, Any]:
        """Everything that a later process needs to go on, in plain values; what was written is kept for it."""
        return {
            "finished": [[shard.num_tokens, sha256] for shard, sha256 in self.finished],
            "tokens": self._file_tokens,
            "bytes": None if self._file is None else self._file.checkpoint(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, in the same folder. DataError when its files are not there."""
        for num_tokens, sha256 in state["finished"]:
            shard = open_shard(self._path, self._split)
            if shard.num_tokens != num_tokens:
                raise DataError(f"{shard.path} is not what it was: remove {self._folder} and build again")
            self.finished.append((shard, sha256))
        self._file_tokens = state["tokens"]
        if state["bytes"] is not None:
            self._file = Growing(self._path, state["bytes"])

    def read_back(self) -> Iterator[NDArray[np.uint16]]:
        """What was written so far, memory-mapped, shard after shard."""
        for shard, _ in self.finished:
            yield shard.tokens
        if self._file is not None:
            yield self._file.read_back("<u2", HEADER_BYTES)

    @property
    def _path(self) -> Path:
        return self._folder / self._name(self._split, len(self.finished))

    def _finish(self) -> None:
        """Complete the open shard, if there is one."""
        if self._file is None:
            return
        self._file.write_start(header_bytes(self._file_tokens))
        self._file.finish()
        shard = Shard(path=self._path, num_tokens=self._file_tokens, split=self._split)
        self.finished.append((shard, sha256_of(shard.path)))
        self._file, self._file_tokens = None, 0
