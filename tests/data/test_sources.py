"""Every source against what was written into its files, and against broken files."""

import ast
import gzip
import io
import json
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from epigram import plugin
from epigram.data.sources import base, jsonl, stdlib, text
from epigram.data.sources.base import split_paragraphs
from epigram.errors import DataError, UserError

TEXTS = ["one", "", "two\nlines", "é 日本 😀", "  blanks  ", '"quoted" \\ \u2028 end']


def as_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: one, "id": i}) + "\n" for i, one in enumerate(texts)).encode()


def long_window(raw: bytes) -> bytes:
    """As `zstd --long=27` writes: a window of 128 MiB, more than a decoder grants by default."""
    settings = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    stream = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=settings).stream_writer(stream, closefd=False) as writer:
        writer.write(raw)
    return stream.getvalue()


def test_each_source_offers_what_the_builder_uses() -> None:
    assert plugin.names(base.PACKAGE) == ["jsonl", "parquet", "stdlib", "text"]
    for name in plugin.names(base.PACKAGE):
        source = base.load(name)
        assert callable(source.claims)
        assert callable(source.documents)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("a.JSONL.zst", "jsonl"),
        ("a.jsonl.gz", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.parquet", "parquet"),
        ("stdlib", "stdlib"),
        ("./stdlib.txt", "text"),
        ("a.txt", "text"),
        ("a.json", "text"),
        ("a.txt.gz", "text"),
        ("README", "text"),
    ],
)
def test_the_name_decides_the_source(path: str, kind: str) -> None:
    assert base.source_for(Path(path)) == kind


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".jsonl", bytes),
        (".jsonl.gz", gzip.compress),
        (".jsonl.zst", zstandard.compress),
        (".jsonl.zst", long_window),
        (".jsonl.zst", lambda raw: zstandard.compress(raw[:50]) + zstandard.compress(raw[50:])),
        (".jsonl.gz", lambda raw: gzip.compress(raw[:50]) + gzip.compress(raw[50:])),
    ],
)
def test_json_lines(tmp_path: Path, suffix: str, pack) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(as_lines(TEXTS)))
    assert list(jsonl.documents(path, "text")) == TEXTS
    path.write_bytes(pack(as_lines(TEXTS, "body").replace(b"\n", b"\r\n\r\n").rstrip()))
    assert list(jsonl.documents(path, "body")) == TEXTS


def test_json_lines_larger_than_any_buffer(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh \n", k=draw.randint(0, 60_000))) for _ in range(100)]
    for suffix, pack in ((".jsonl", bytes), (".jsonl.gz", gzip.compress), (".jsonl.zst", long_window)):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(pack(as_lines(texts)))
        assert list(jsonl.documents(path)) == texts


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"line 2 is not JSON"),
        (b'{"text": "a"}\n[1]\n', r"line 2 is no JSON object"),
        (b'{"text": "a"}\n\n{"body": "b", "id": 1}\n', r"line 3 has no field 'text': .*'body', 'id'"),
        (b'{"text": 7}\n', r"line 1: field 'text' holds a int"),
        (b'{"text": null}\n', r"line 1: field 'text' holds a NoneType"),
        (b'{"text": "\xff"}\n', r"is not UTF-8 at line 1, byte 10 \(0xff\)"),
        (b'{"text": "\\ud800"}\n', r"line 1: .* half a surrogate pair \(character 0\)"),
        (b"[" * 100_000, r"line 1 is nested too deeply"),
    ],
)
def test_broken_json_lines(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        list(jsonl.documents(path))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_cut_and_altered_archives_are_noticed(tmp_path: Path, suffix: str, pack) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = pack(as_lines([f"document {i} " * 5 for i in range(2000)]))
    for damaged in (whole[:-3], whole[: len(whole) // 2], whole[:5], whole[:-9] + b"\x55" * 9, b"nonsense" * 9):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cut short|damaged|not JSON|not UTF-8"):
            list(jsonl.documents(path))


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_DOCUMENT_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(["a"]) + b'{"text": "' + b"x" * (4 << 20))
    with pytest.raises(DataError, match=r"line 2 is longer than 1 MiB"):
        list(jsonl.documents(path))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    from epigram.data.sources import parquet

    path = tmp_path / "a.parquet"
    for kind in (pyarrow.string(), pyarrow.large_string()):
        table = pyarrow.table({"id": list(range(600)), "text": pyarrow.array(TEXTS * 100, kind)})
        writer.write_table(table, path, row_group_size=130)
        assert list(parquet.documents(path, "text")) == TEXTS * 100
    with pytest.raises(DataError, match=r"no column 'body'.*'id', 'text'"):
        list(parquet.documents(path, "body"))
    with pytest.raises(DataError, match=r"column 'id' holds int64"):
        list(parquet.documents(path, "id"))
    writer.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"row 2 has no 'text'"):
        list(parquet.documents(path, "text"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(parquet.documents(path, "text"))


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from epigram.data.sources import parquet

    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'epigram\[parquet\]'"):
        list(parquet.documents(tmp_path / "a.parquet"))


def test_text_is_cut_at_paragraphs_and_stays_whole(tmp_path: Path) -> None:
    draw = random.Random(1)
    paragraphs = ["é日 kalo mi. " * draw.randint(1, 60) for _ in range(900)]
    whole = "\n\n".join(paragraphs) + "\n"
    path = tmp_path / "a.txt"
    path.write_bytes(whole.encode())
    pieces = list(text.documents(path))
    assert "".join(pieces) == whole
    sizes = [len(piece.encode()) for piece in pieces]
    target = min(text.PIECE_BYTES, len(whole.encode()) // text.PIECES)
    assert max(sizes) <= 2 * target
    assert min(sizes[:-1]) >= target
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])


def test_small_text_is_cut_for_a_split_too(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("A short paragraph of some sixty characters, and a bit more.\n\n" * 400)
    assert 6 <= len(list(text.documents(path))) <= 12  # 24 kB in pieces of at least 2 kB
    assert len(list(text.documents(path, whole=True))) == 1


@given(st.text(st.sampled_from("ab é😀\n\r "), max_size=300), st.integers(4, 40), st.integers(1, 50))
def test_cutting_loses_nothing_and_breaks_no_character(sample: str, target: int, read: int) -> None:
    raw = sample.encode()
    chunks = [raw[start : start + read] for start in range(0, len(raw), read)]
    pieces = list(split_paragraphs(chunks, target))
    assert b"".join(pieces) == raw
    assert all(piece.decode() for piece in pieces)
    assert all(len(piece) <= 2 * target for piece in pieces)


def test_line_ends_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert list(text.documents(path)) == ["\ufeffone\r\ntwo\rthree\n"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"good \xff bad", r"a\.txt is not UTF-8 at byte 5 \(0xff\)"),
        ("hello".encode("utf-16"), r"byte 0 .*looks like UTF-16"),
        (b"%PDF-1.7\n%\xe2\xe3", r"byte 10 .*looks like a PDF, whose text has to be extracted first"),
        (gzip.compress(b"hello", mtime=0), r"looks compressed with gzip"),
        (b"x" * 300_000 + b"\n\n" + b"\x80", r"byte 300,002 \(0x80\)"),
    ],
)
def test_text_that_is_not_utf8(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        list(text.documents(path))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for source, name in ((text, "gone.txt"), (jsonl, "gone.jsonl")):
        with pytest.raises(DataError, match=rf"{name} cannot be read: No such file"):
            list(source.documents(tmp_path / name, "text"))


def test_stdlib_text() -> None:
    documents = list(stdlib.documents())
    assert documents == list(stdlib.documents())
    assert sum(len(document.encode()) for document in documents) > 1_500_000
    assert any(document.startswith('The "assert" statement') for document in documents)
    files = [file.as_posix() for file in stdlib.module_files()]
    assert not any("/test/" in file or "/site-packages/" in file or "/tests/" in file for file in files)
    import argparse

    assert sum(argparse.__doc__.strip() in document for document in documents) == 1
    assert len(stdlib.content_hash()) == 64


def test_docstrings_in_source_order(tmp_path: Path) -> None:
    source = '''"""Module."""
import sys
if sys:
    def first():
        "First."
        class Inner:
            """Inner.

            More.
            """
    x = lambda: "not this"
try:
    pass
except ValueError:
    async def second(): "Second."
def none(): pass
'''
    file = tmp_path / "module.py"
    file.write_text(source)
    assert stdlib.docstrings(file) == "Module.\n\nFirst.\n\nInner.\n\nMore.\n\nSecond."
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(nodes) == 3  # and one async function: the oracle sees the same ones
    file.write_text("x = 1\n")
    assert stdlib.docstrings(file) == ""
    file.write_text("def (:\n")
    with pytest.raises(DataError, match="cannot be parsed"):
        stdlib.docstrings(file)
