"""The file format: what is written is read; every lie in the header is found before it does harm."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest

from epigram.artifact import container
from epigram.artifact.container import Reader, checksum, describe_section, pack_header, write
from epigram.errors import ArtifactError, UserError

CONTENTS = {"model": {"dim": 3, "names": ["ä", "b"]}, "lr": 0.1}
BLOBS = [b"first section", b"", bytes(range(256))]


def sections() -> list[container.Section]:
    return [describe_section(f"s{i}", "store", blob, blob) for i, blob in enumerate(BLOBS)]


def forge(table: Any, *, stored: bytes | None = None, raw_length: int | None = None) -> bytes:
    """A header with right checksums around whatever it is given."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    stored = zlib.compress(text) if stored is None else stored
    length = len(text) if raw_length is None else raw_length
    prefix = container._PREFIX.pack(container.MAGIC, container.VERSION, 0, len(stored), length)
    return prefix + checksum(prefix, stored) + stored


def table_with(**changes: Any) -> dict[str, Any]:
    """The table of one section of 4 bytes, with some of its keys changed."""
    return {"sections": [vars(describe_section("s", "store", b"data", b"data")) | changes], "contents": {}}


def refuse(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=match) as caught:
        Reader(path)
    assert type(caught.value) is ArtifactError


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.epigram"
    size = write(path, sections(), CONTENTS, BLOBS)
    assert size == path.stat().st_size
    with Reader(path) as reader:
        assert reader.header.contents == CONTENTS
        assert reader.header.sections == tuple(sections())
        assert [reader.stored(i) for i in range(3)] == BLOBS
    assert size == reader.header.header_bytes + sum(map(len, BLOBS))
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.epigram"
    path.write_bytes(b"old")
    write(path, sections(), CONTENTS, BLOBS)
    with Reader(path) as reader:
        assert reader.header.contents == CONTENTS


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write(tmp_path / "m", sections(), CONTENTS, BLOBS)
    finally:
        os.umask(old)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "m.epigram"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, step, fail)
    with pytest.raises(UserError, match="No space left on device"):
        write(path, sections(), CONTENTS, BLOBS)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(container.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m", sections(), CONTENTS, BLOBS)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*choose another folder"):
        write(tmp_path / "nowhere" / "m", sections(), CONTENTS, BLOBS)


def test_what_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe"):
        with pytest.raises(ArtifactError, match="give the path of a .epigram file"):
            Reader(path)


def test_a_header_that_is_too_long_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the format allows"):
        pack_header([], {"model": "x" * container.MAX_HEADER_BYTES})


def test_too_many_sections_are_not_written() -> None:
    with pytest.raises(UserError, match="sections"):
        pack_header(sections()[:1] * (container.MAX_SECTIONS + 1), {})


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    refuse(path, b"", "no .epigram file")
    refuse(path, b"PK\x03\x04" + bytes(100), "no .epigram file")
    refuse(path, container.MAGIC[:-1], "no .epigram file")


def test_another_version_is_refused_with_advice(tmp_path: Path) -> None:
    for version, zero in ((2, 0), (0, 0), (1, 1)):
        prefix = container._PREFIX.pack(container.MAGIC, version, zero, 0, 0)
        refuse(tmp_path / "m", prefix + checksum(prefix), "update it")


def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    for length in (50_000_000, container.MAX_HEADER_BYTES, 5):
        refuse(tmp_path / "m", forge(b"", stored=bomb, raw_length=length), "header")
    prefix = container._PREFIX.pack(container.MAGIC, container.VERSION, 0, 2**32 - 1, 5)
    refuse(tmp_path / "m", prefix + checksum(prefix), "header declares")


def test_a_malformed_deflate_stream_is_refused(tmp_path: Path) -> None:
    text = b'{"sections":[],"contents":{}}'
    whole = zlib.compress(text)
    for stored in (b"", b"garbage", whole[:-1], whole + b"x", whole[:-4] + b"abcd"):
        refuse(tmp_path / "m", forge(text, stored=stored), "header")
    for length in (len(text) - 1, len(text) + 1):
        refuse(tmp_path / "m", forge(text, raw_length=length), "another length")


JSON_BOMBS = {
    "no json": b"{",
    "not utf-8": b'{"sections":[],"contents":{"a":"\xff"}}',
    "deep lists": b'{"sections":[],"contents":{"a":' + b"[" * 400_000 + b"]" * 400_000 + b"}}",
    "deep tables": b'{"a":' * 150_000 + b"1" + b"}" * 150_000,
    "long number": b'{"sections":[],"contents":{"a":' + b"9" * 100_000 + b"}}",
    "infinite": b'{"sections":[],"contents":{"a":1e999}}',
    "nan": b'{"sections":[],"contents":{"a":NaN}}',
    "twice": b'{"sections":[],"contents":{},"contents":{}}',
    "no table": b"[]",
    "text": b'"sections"',
    "missing": b'{"sections":[]}',
    "unknown": b'{"sections":[],"contents":{},"more":1}',
    "wrong type": b'{"sections":{},"contents":{}}',
    "contents": b'{"sections":[],"contents":[]}',
    "section": b'{"sections":[1],"contents":{}}',
    "many": b'{"sections":[' + b",".join([b"{}"] * 5000) + b'],"contents":{}}',
}


@pytest.mark.parametrize("name", JSON_BOMBS)
def test_json_bombs_are_refused(tmp_path: Path, name: str) -> None:
    refuse(tmp_path / "m", forge(JSON_BOMBS[name]), "header|section")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"stored": -4}, "impossible length"),
        ({"raw": -1}, "impossible length"),
        ({"stored": 4.0}, "impossible length"),
        ({"stored": True}, "impossible length"),
        ({"stored": "4"}, "impossible length"),
        ({"raw": None}, "impossible length"),
        ({"name": 4}, "must be text"),
        ({"codec": None}, "must be text"),
        ({"raw_sum": 7}, "must be text"),
        ({"offset": 0}, "unknown keys"),
        ({"raw": container.MAX_DECLARED_BYTES + 1}, "the format allows"),
        ({"raw": 10**30}, "the format allows"),
        ({"stored": 5}, "truncated"),
        ({"stored": 3}, "appended"),
        ({"stored": 10**30}, "truncated"),
    ],
    ids=str,
)
def test_impossible_sections_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    refuse(tmp_path / "m", forge(table_with(**changes)) + b"data", match)


def test_two_sections_of_one_name_are_refused(tmp_path: Path) -> None:
    table = table_with()
    table["sections"] *= 2
    refuse(tmp_path / "m", forge(table) + b"datadata", "same name")


def test_declared_sizes_are_added_up(tmp_path: Path) -> None:
    half = container.MAX_DECLARED_BYTES // 2 + 1
    table = {"sections": [*table_with(name="a", raw=half)["sections"], *table_with(raw=half)["sections"]]}
    refuse(tmp_path / "m", forge(table | {"contents": {}}) + b"datadata", "the format allows")
    with pytest.raises(UserError, match="the format allows"):
        pack_header([container.Section(**row) for row in table["sections"]], {})


def test_a_section_is_checked_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(forge(table_with()) + b"dat_")
    with Reader(path) as reader, pytest.raises(ArtifactError, match="altered or truncated"):
        reader.stored(0)
    path.write_bytes(forge(table_with(stored_sum="")) + b"data")
    with Reader(path) as reader, pytest.raises(ArtifactError, match="altered or truncated"):
        reader.stored(0)


def test_a_file_that_shrinks_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path, blob = tmp_path / "m", bytes(1 << 20)
    write(path, [describe_section("s", "store", blob, blob)], {}, [blob])
    with Reader(path) as reader:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(ArtifactError, match="altered or truncated"):
            reader.stored(0)
