"""Writes one split of a data folder: shards, byte counts, document hashes, and the sums for its manifest entry."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from epigram.data.clean import DROPPED, is_member
from epigram.data.encode import EncodedBatch
from epigram.data.files import Growing, sha256_of
from epigram.data.manifest import START_BYTES, HashesEntry, ShardEntry, SplitEntry, hashes_name, read_hashes
from epigram.data.shards import ShardWriter, byte_counts_name

_SUMS = ("original_bytes", "normalized_bytes", "unknown_tokens", "unknown_bytes")
_CHUNK = 1 << 20  # documents
_PIECE = 1 << 16  # tokens


class SplitWriter:
    """Takes encoded documents in order. A context manager: files are complete after a good end, removed after
    an error (unless a `state` was taken).

    byte_counts: write them too. state: to go on where an earlier process was. documents, tokens: written so far.
    """

    def __init__(
        self, folder: Path, split: str, shard_tokens: int, *, byte_counts: bool = False, state: dict[str, Any] | None
    ) -> None:
        self._folder, self._split = folder, split
        self._stack = contextlib.ExitStack()
        self._shards = ShardWriter(folder, split, shard_tokens)
        self._counts = ShardWriter(folder, split, shard_tokens, byte_counts_name) if byte_counts else None
        self._restored = state
        self.sums = dict.fromkeys((*_SUMS, *DROPPED, "documents", "tokens"), 0)

    def __enter__(self) -> Self:
        state, path = self._restored, self._folder / hashes_name(self._split)
        self._hashes = Growing(path, None if state is None else state["hashes"])
        with contextlib.ExitStack() as stack:
            stack.callback(self._hashes.abandon)
            stack.enter_context(self._shards)
            if self._counts is not None:
                stack.enter_context(self._counts)
            if state is not None:
                self.sums = dict(state["sums"])
                self._shards.restore(state["shards"])
                if self._counts is not None:
                    self._counts.restore(state["counts"])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._hashes.finish()
        finally:
            self._stack.__exit__(kind, error, trace)

    @property
    def documents(self) -> int:
        """Written so far."""
        return self.sums["documents"]

    def add(self, batch: EncodedBatch, chosen: NDArray[np.bool_]) -> None:
        """Write the `chosen` documents of a batch, (N,) bool; those that are left out are only counted."""
        for reason, name in enumerate(DROPPED, 1):
            self.sums[name] += int(np.count_nonzero(chosen & (batch.reasons == reason)))
        chosen = chosen & (batch.reasons == 0)
        everywhere = np.repeat(chosen, batch.num_tokens)
        tokens = batch.tokens if everywhere.all() else batch.tokens[everywhere]
        self._shards.write(tokens)
        if self._counts is not None:
            self._counts.write(batch.byte_counts[everywhere])
        self._hashes.write(np.ascontiguousarray(batch.hashes[chosen], "<u8").data)
        self.sums["documents"] += int(np.count_nonzero(chosen))
        self.sums["tokens"] += len(tokens)
        for name in _SUMS:
            self.sums[name] += int(getattr(batch, name)[chosen].sum())

    def state(self) -> dict[str, Any]:
        """Everything that a later process needs to go on, in plain values; what was written is kept for it."""
        return {
            "shards": self._shards.state(),
            "counts": None if self._counts is None else self._counts.state(),
            "hashes": self._hashes.checkpoint(),
            "sums": dict(self.sums),
        }

    def hashes_so_far(self) -> NDArray[np.uint64]:
        """Hashes of the whole texts of the documents written so far, in order."""
        return self._hashes.read_back("<u8").reshape(-1, 2)[:, 1]

    def documents_so_far(self, bos_id: int) -> Iterator[NDArray[np.uint16]]:
        """Tokens of each document written so far, BOS in front, read from the disk a little at a time."""
        shards = self._shards.read_back()
        pieces = (
            np.asarray(tokens[start : start + _PIECE]) for tokens in shards for start in range(0, len(tokens), _PIECE)
        )
        return cut_documents(pieces, bos_id)

    def entry(self) -> SplitEntry:
        """What was written, for the manifest; after the end."""
        path = self._folder / hashes_name(self._split)
        return SplitEntry(
            **self.sums,
            duplicates=0,
            repeated=0,
            shared_starts=0,
            shards=_entries(self._shards),
            byte_counts=() if self._counts is None else _entries(self._counts),
            hashes=HashesEntry(file=path.name, sha256=sha256_of(path), start_bytes=START_BYTES),
        )


def cut_documents(pieces: Iterable[NDArray[np.uint16]], bos_id: int) -> Iterator[NDArray[np.uint16]]:
    """The documents of a stream that comes in pieces and begins with BOS, each with its own BOS in front."""
    begun: list[NDArray[np.uint16]] = []
    for piece in itertools.chain(pieces, [np.array([bos_id], np.uint16)]):  # with which the last one ends
        rest, *following = np.split(piece, np.flatnonzero(piece == bos_id))
        begun.append(rest)
        for first in following:
            if len(document := np.concatenate(begun)):
                yield document
            begun = [first]


def _entries(writer: ShardWriter) -> tuple[ShardEntry, ...]:
    return tuple(
        ShardEntry(file=shard.path.name, tokens=shard.num_tokens, sha256=sha256) for shard, sha256 in writer.finished
    )


def count_shared(folder: Path, splits: dict[str, SplitEntry], column: int) -> int:
    """Documents of train whose hash is one of val's; column 0 compares starts, column 1 whole texts."""
    val = np.unique(read_hashes(folder, splits["val"])[:, column])
    train = read_hashes(folder, splits["train"])[:, column]
    chunks = (train[start : start + _CHUNK] for start in range(0, len(train), _CHUNK))
    return sum(int(np.count_nonzero(is_member(chunk, val))) for chunk in chunks)
