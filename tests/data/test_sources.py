"""Every source against what was written into its files, and against broken files."""

import ast
import csv
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
from epigram.data.sources import base, jsonl, stdlib, table, text
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
    names = plugin.names(base.PACKAGE)
    assert {"jsonl", "parquet", "stdlib", "table", base.FALLBACK} <= set(names)
    for name in names:
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
        ("a.csv", "table"),
        ("a.TSV", "table"),
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
        (
            b'{"text": "a"}\n\n{"body": "b", "id": 1}\n',
            r"line 3 has no field 'text': .*`epigram data build \.\.\. --field NAME`.*'body', 'id'",
        ),
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


def test_zeros_behind_a_member_are_padding(tmp_path: Path) -> None:
    """However many: a file is read a MiB at a time, and a tape's blocks may end anywhere."""
    path = tmp_path / "a.jsonl.gz"
    member = gzip.compress(as_lines(TEXTS))
    for zeros in (1, (1 << 20) - len(member), 1 << 20, 3 << 20):
        for rest, texts in ((b"", TEXTS), (member, TEXTS * 2)):
            path.write_bytes(member + bytes(zeros) + rest)
            assert list(jsonl.documents(path)) == texts
    for damaged in (bytes(4 << 20), bytes(1 << 20) + member, member + bytes(1 << 20) + member[:-3]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cut short|damaged"):
            list(jsonl.documents(path))


def test_numbers_of_any_length_beside_the_text(tmp_path: Path) -> None:
    """Python converts none of more than 4,300 digits, and nobody asks it to."""
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": {"7" * 5000}, "text": "kalo", "deep": [-{"8" * 9000}, 1.5e{"9" * 5000}]}}\n')
    assert list(jsonl.documents(path)) == ["kalo"]
    path.write_text(f'{{"text": {"7" * 5000}}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: field 'text' holds a int"):
        list(jsonl.documents(path))


def test_a_small_archive_of_much_text_comes_in_small_pieces(tmp_path: Path) -> None:
    """16 KiB of such a file hold half a GB, which would lie in memory at once."""
    raw = b"x" * (96 << 20)
    whole = zstandard.compress(raw)
    assert len(whole) < 4096
    for packed, num_bytes in ((whole, len(raw)), (whole + zstandard.compress(b"end"), len(raw) + 3)):
        sizes = [len(piece) for piece in jsonl._unzstd([packed], tmp_path / "a.jsonl.zst")]
        assert sum(sizes) == num_bytes
        assert max(sizes) <= 5 << 20
    with pytest.raises(DataError, match="cut short"):
        list(jsonl._unzstd([whole[:-1]], tmp_path / "a.jsonl.zst"))


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
    with pytest.raises(DataError, match=r"no column 'body'.* --field NAME`.*'id', 'text'"):
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


def test_lines_end_in_lf_and_no_mark_is_in_front(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xef\xbb\xbf")
    assert list(text.documents(path)) == ["one\ntwo\rthree\n\ufeff"]
    path.write_bytes(b"\xef\xbb\xbfkalo\r\n\xff")
    with pytest.raises(DataError, match=r"at byte 9 \(0xff\)"):  # of the file
        list(text.documents(path))
    path.write_bytes(b"kalo mi te\r\n" * 20_000)
    assert len(pieces := list(text.documents(path))) > 10
    assert "".join(pieces) == "kalo mi te\n" * 20_000


@pytest.mark.parametrize("num_before", [0, 1, 2, 3])
def test_a_line_end_is_never_cut_in_two(tmp_path: Path, num_before: int) -> None:
    """Without any better place the cut is at a number of bytes, here before, within or behind CR LF."""
    path = tmp_path / "a.txt"
    size = 2 * text.SMALLEST_PIECE_BYTES
    raw = b"x" * (size - num_before) + b"\r\n" + b"y" * size
    path.write_bytes(raw)
    pieces = list(text.documents(path))
    assert len(pieces) > 1
    assert "".join(pieces) == raw.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(("suffix", "pack"), [(".jsonl", bytes), (".jsonl.gz", gzip.compress)])
def test_a_mark_in_front_of_records_is_no_text(tmp_path: Path, suffix: str, pack) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(b"\xef\xbb\xbf" + as_lines([*TEXTS, "kept\r\nas written", "\ufeffthis too"])))
    assert list(jsonl.documents(path)) == [*TEXTS, "kept\r\nas written", "\ufeffthis too"]


@pytest.mark.parametrize(("name", "dialect"), [("a.csv", "excel"), ("a.tsv", "excel-tab"), ("a.csv", "unix")])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables(tmp_path: Path, name: str, dialect: str, mark: str) -> None:
    """What csv writes: commas, tabs, quotes and line ends within fields, a document above csv's own limit."""
    texts = [*TEXTS, "a, b;\tc", '"', "lines\nof\n\nmany", "x" * 200_000, "\u2028\x0b"]
    path = tmp_path / name
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        rows = csv.writer(file, dialect)
        rows.writerow(["text", "the id"])
        rows.writerows((one, number) for number, one in enumerate(texts))
    assert list(table.documents(path)) == texts
    assert list(table.documents(path, "the id")) == [str(number) for number in range(len(texts))]
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))  # within fields too
    assert list(table.documents(path)) == texts


def test_a_table_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_PART_BYTES", 1000)
    path = tmp_path / "a.csv"
    path.write_text("id,text\n\n" + "".join(f'{i},"row\n{i}"\n' for i in range(400)))
    parts = list(table.parts(path))
    assert len(parts) > 3
    assert sum(part.input_bytes for part in parts) == path.stat().st_size
    found = [document for part in parts for document in part.documents("text")]
    assert [one for _, one in found] == [f"row\n{i}" for i in range(400)]
    assert [where for where, _ in found[:2]] == [f"{path}, line 4", f"{path}, line 6"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"no column 'text': .* --field NAME`.*it has none"),
        (b"id,body\n1,a\n", r"a\.csv has no column 'text': .* --field NAME`.*'id', 'body'"),
        (b"text,text\n1,a\n", r"several columns 'text'"),
        (b"id;text\n1;a\n", r"no column 'text': .*'id;text'"),
        (b"id,text\n1,a\n2,b,c\n", r"line 3: a row of 3 fields ends here, and the first row names 2"),
        (b"id,text\n1,a\n2\n", r"line 3: a row of 1 fields"),
        (b'id,text\n1,a\n2,"b\n\n', r"line 4 cannot be read as CSV \(unexpected end of data\)"),
        (b'id,text\n1,"a"b\n', r"line 2 cannot be read as CSV"),
        (b'text\n"' + b"xx\n" * 50_000, r"cannot be read as CSV \(field larger than field limit"),
        (b"id,text\n1,caf\xe9\n", r"is not UTF-8 at line 2, byte 5 \(0xe9\)"),
        ("id,text\n".encode("utf-16"), r"looks like UTF-16"),
    ],
)
def test_broken_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, message: str) -> None:
    monkeypatch.setattr(base, "MAX_DOCUMENT_BYTES", 1 << 16)
    monkeypatch.setattr(csv, "field_size_limit", lambda *_, set=csv.field_size_limit: set(1 << 16))
    path = tmp_path / "a.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        list(table.documents(path))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"good \xff bad", r"a\.txt is not UTF-8 at byte 5 \(0xff\)"),
        ("hello".encode("utf-16"), r"byte 0 .*looks like UTF-16"),
        (b"%PDF-1.7\n%\xe2\xe3", r"byte 10 .*looks like a PDF, whose text has to be extracted first"),
        (gzip.compress(b"hello", mtime=0), r"looks compressed with gzip.*: unpack it, or leave it out"),
        (b"x" * 300_000 + b"\n\n" + b"\x80", r"byte 300,002 \(0x80\)"),
    ],
)
def test_text_that_is_not_utf8(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        list(text.documents(path))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for source, name in ((text, "gone.txt"), (jsonl, "gone.jsonl"), (table, "gone.csv")):
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
