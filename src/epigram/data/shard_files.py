"""Reading parts of shards while others may meddle with the files."""

import collections
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from epigram.data.shards import HEADER_BYTES, TOKEN_BYTES, Shard
from epigram.errors import DataError

_OPEN_FILES = 128
_EDGE_BYTES = 4096  # at both ends of a shard, in its fingerprint


class ShardFiles:
    """Reads token ranges of shards and notices when a file changes under the run.

    Reads instead of memory maps: a map of a file that is cut short kills the process, a read can say so. Not
    for several threads at once.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._files: collections.OrderedDict[int, BinaryIO] = collections.OrderedDict()
        self._facts = [_facts(shard.path, shard) for shard in shards]
        for shard, (num_bytes, _, _) in zip(shards, self._facts, strict=True):
            if num_bytes != shard.num_bytes:
                raise _changed(shard)

    def read(self, shard: int, start: int, into: NDArray[np.uint16]) -> None:
        """Fill `into` with the tokens from `start`; DataError when the file is too short or unreadable."""
        file = self._open(shard)
        try:
            file.seek(HEADER_BYTES + TOKEN_BYTES * start)
            num_bytes = file.readinto(into.view(np.uint8))  # type: ignore[attr-defined]
        except OSError as error:
            raise _unreadable(self._shards[shard], error) from error
        if num_bytes != into.nbytes:
            raise _changed(self._shards[shard])

    def verify(self, shards: Iterable[int]) -> None:
        """DataError when one of the shards was changed since this object was made."""
        for index in shards:
            if _facts(self._open(index).fileno(), self._shards[index]) != self._facts[index]:
                raise _changed(self._shards[index])

    def fingerprint(self) -> str:
        """Hash, in hex, of the lengths of the shards and of the tokens at their ends: not of their names."""
        digest = hashlib.sha256()
        for index, shard in enumerate(self._shards):
            edge = min(shard.num_tokens, _EDGE_BYTES // TOKEN_BYTES)
            digest.update(f"{shard.num_tokens}\n".encode())
            for start in (0, shard.num_tokens - edge):
                tokens = np.empty(edge, np.uint16)
                self.read(index, start, tokens)
                digest.update(tokens.tobytes())
        return digest.hexdigest()

    def _open(self, shard: int) -> BinaryIO:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        try:
            file = self._shards[shard].path.open("rb", buffering=0)
        except OSError as error:
            raise _unreadable(self._shards[shard], error) from error
        self._files[shard] = file
        self.verify([shard])
        return file

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1].close()


def _facts(path: Path | int, shard: Shard) -> tuple[int, int, int]:
    """Size, time of change and identity of a file, by path or descriptor."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise _unreadable(shard, error) from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _changed(shard: Shard) -> DataError:
    return DataError(f"shard {shard.path} changed since it was opened: restore it, or build the data again")


def _unreadable(shard: Shard, error: OSError) -> DataError:
    return DataError(f"shard {shard.path} cannot be read: {error.strerror or error}")
