"""The published shard format: exact bytes, and every way in which a file can be wrong."""

import contextlib
import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epigram.data.files import remove_stale
from epigram.data.shards import ShardWriter, header_bytes, open_shard, shard_name, write_shard
from epigram.errors import DataError


def test_the_bytes_are_the_published_ones(tmp_path: Path) -> None:
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.array([1, 513, 65535], np.uint16), "train")
    expected = struct.pack("<3i", 20240520, 1, 3) + bytes(1012) + struct.pack("<3H", 1, 513, 65535)
    assert path.read_bytes() == expected
    shard = open_shard(path, "train")
    assert shard.tokens.tolist() == [1, 513, 65535]
    assert shard.tokens.dtype == np.dtype("<u2")
    assert (shard.num_tokens, shard.num_bytes, shard.split) == (3, 1030, "train")
    with pytest.raises(ValueError, match="read-only"):
        shard.tokens[0] = 7
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "shorter than its header"),
        (header_bytes(3)[:500], "shorter than its header"),
        (struct.pack("<3i", 1, 1, 3) + bytes(1018), "no token shard"),
        (struct.pack("<3i", 20240520, 2, 3) + bytes(1018), "version 2"),
        (header_bytes(3) + bytes(4), r"1,028 bytes.*3 tokens in 1,030"),
        (header_bytes(3) + bytes(8), r"1,032 bytes.*3 tokens"),
        (struct.pack("<3i", 20240520, 1, -1) + bytes(1012), "cut short or damaged"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        open_shard(path, "train")


def test_missing_and_changed_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        open_shard(tmp_path / "gone.bin", "train")
    shard = write_shard(tmp_path / "a.bin", np.arange(9, dtype=np.uint16), "train")
    write_shard(tmp_path / "a.bin", np.arange(8, dtype=np.uint16), "train")
    with pytest.raises(DataError, match="changed since it was opened"):
        _ = shard.tokens


def test_an_empty_shard_can_be_read(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "a.bin", np.empty(0, np.uint16), "val").read().tolist() == []


@given(st.lists(st.lists(st.integers(0, 65535), max_size=12), max_size=8), st.integers(1, 7))
def test_writer_cuts_the_stream_anywhere(tmp_path_factory, parts: list[list[int]], shard_tokens: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "val", shard_tokens) as writer:
        for part in parts:
            writer.write(np.array(part, np.uint16))
    stream = [token for part in parts for token in part]
    shards = [shard for shard, _ in writer.finished]
    assert [shard.path.name for shard in shards] == [shard_name("val", i) for i in range(len(shards))]
    assert [token for shard in shards for token in open_shard(shard.path, "val").read().tolist()] == stream
    assert all(shard.num_tokens == shard_tokens for shard in shards[:-1])
    assert {file.name for file in folder.iterdir()} == {shard.path.name for shard in shards}


def test_what_a_killed_process_left_is_removed_and_no_more(tmp_path: Path) -> None:
    """Of the same file, and of processes that are gone; a running one may still be writing."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone = int(done.stdout)
    names = [
        f".a.json.{gone}.partial",
        f".b.json.{gone}.partial",
        f".a.json.{os.getpid()}.partial",
        ".a.json.x.partial",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"{")
    remove_stale(tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_an_error_leaves_no_partial_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 4)
    with contextlib.suppress(KeyboardInterrupt), writer:
        writer.write(np.arange(6, dtype=np.uint16))
        assert len(list(tmp_path.iterdir())) == 2
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == [shard_name("train", 0)]


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="is full"):
        write_shard(tmp_path / "a.bin", np.arange(9, dtype=np.uint16), "train")
    with pytest.raises(DataError, match="is full"), ShardWriter(tmp_path, "train", 4) as writer:
        writer.write(np.arange(3, dtype=np.uint16))
    assert list(tmp_path.iterdir()) == []
