"""Writes one split of a data folder: shards, document hashes, and the sums for its manifest entry."""

import array
import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from epigram.data.encode import EncodedBatch
from epigram.data.files import sha256_of, written_beside
from epigram.data.manifest import START_BYTES, HashesEntry, ShardEntry, SplitEntry, hashes_name, read_hashes
from epigram.data.shards import ShardWriter

_SUMS = ("original_bytes", "normalized_bytes", "unknown_tokens", "unknown_bytes")
_CHUNK = 1 << 20  # documents


class SplitWriter:
    """Takes encoded documents in order. A context manager: files are complete after a good end, removed after
    an error.

    documents, tokens: written so far. whole_hashes: of the documents, when `keep_hashes`.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int, *, keep_hashes: bool = False) -> None:
        self._folder, self._split = folder, split
        self._stack = contextlib.ExitStack()
        self._shards = ShardWriter(folder, split, shard_tokens)
        self._sums = dict.fromkeys(_SUMS, 0)
        self._keep_hashes = keep_hashes
        self._whole_hashes = array.array("Q")
        self.documents = self.tokens = self.empty_documents = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._hashes = stack.enter_context(written_beside(self._folder / hashes_name(self._split)))
            stack.enter_context(self._shards)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, batch: EncodedBatch, chosen: NDArray[np.bool_]) -> None:
        """Write the `chosen` documents of a batch, (N,) bool; those without text are only counted."""
        filled = batch.num_tokens > 0
        self.empty_documents += int(np.count_nonzero(chosen & ~filled))
        chosen = chosen & filled
        tokens = batch.tokens if chosen.all() else batch.tokens[np.repeat(chosen, batch.num_tokens)]
        self._shards.write(tokens)
        self._hashes.write(np.ascontiguousarray(batch.hashes[chosen], "<u8").data)
        if self._keep_hashes:
            self._whole_hashes.frombytes(np.ascontiguousarray(batch.hashes[chosen, 1]).tobytes())
        self.documents += int(np.count_nonzero(chosen))
        self.tokens += len(tokens)
        for name in _SUMS:
            self._sums[name] += int(getattr(batch, name)[chosen].sum())

    def whole_hashes(self) -> NDArray[np.uint64]:
        """Sorted hashes of the documents written so far."""
        return np.unique(np.frombuffer(self._whole_hashes, np.uint64))

    def entry(self) -> SplitEntry:
        """What was written, for the manifest; after the end."""
        path = self._folder / hashes_name(self._split)
        return SplitEntry(
            documents=self.documents,
            tokens=self.tokens,
            **self._sums,
            empty_documents=self.empty_documents,
            duplicates=0,
            shared_starts=0,
            shards=tuple(
                ShardEntry(file=shard.path.name, tokens=shard.num_tokens, sha256=sha256)
                for shard, sha256 in self._shards.finished
            ),
            hashes=HashesEntry(file=path.name, sha256=sha256_of(path), start_bytes=START_BYTES),
        )


def count_shared(folder: Path, splits: dict[str, SplitEntry], column: int) -> int:
    """Documents of train whose hash is one of val's; column 0 compares starts, column 1 whole texts."""
    val = np.unique(read_hashes(folder, splits["val"])[:, column])
    train = read_hashes(folder, splits["train"])[:, column]
    chunks = (train[start : start + _CHUNK] for start in range(0, len(train), _CHUNK))
    return sum(int(np.count_nonzero(is_member(chunk, val))) for chunk in chunks)


def is_member(values: NDArray[np.uint64], members: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are among the sorted `members`."""
    if not len(members):
        return np.zeros(len(values), np.bool_)
    return members[np.searchsorted(members, values).clip(max=len(members) - 1)] == values
