"""Building: what lands in the folder, compared with the text; what is refused, and what remains then: nothing."""

import csv
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import listing, make_documents, train_with

from epigram.data import build as build_module
from epigram.data.build import build
from epigram.data.cache import ensure_built
from epigram.data.check import check
from epigram.data.dataset import open_data
from epigram.data.manifest import document_hashes, read_hashes, read_manifest
from epigram.data.tokenizer import Tokenizer
from epigram.errors import DataError, UserError


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    return path


def documents_of(folder: Path, split: str) -> list[bytes]:
    """Documents read back by hand: cut at BOS, spelled piece by piece."""
    data = open_data(folder)
    documents: list[list[int]] = []
    for token in data.stream(split).tolist():
        if token == data.tokenizer.bos_id:
            documents.append([])
        documents[-1].append(token)
    return [data.tokenizer.decode_bytes(document) for document in documents]


@pytest.fixture
def tokenizer_file(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    path = tmp_path / "given.model"
    path.write_bytes(tokenizer.proto)
    return path


def test_every_document_lands_in_one_split_as_it_was(tmp_path: Path, texts: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    built = build([source], tmp_path / "out", vocab_size=400, shard_tokens=1000)
    train, val = (documents_of(built.path, split) for split in ("train", "val"))
    assert sorted([*train, *val]) == sorted(text.encode() for text in texts)
    assert train == [text.encode() for text in texts if text.encode() in set(train)]  # the order of the source
    assert len(val) == 3  # 5 % of 60
    manifest = read_manifest(built.path)
    assert manifest == built.manifest
    for split, found in (("train", train), ("val", val)):
        entry = manifest.splits[split]
        assert entry.documents == len(found)
        assert entry.original_bytes == entry.normalized_bytes == sum(map(len, found))
        assert entry.tokens == sum(shard.tokens for shard in entry.shards) == len(open_data(built.path).stream(split))
        assert all(shard.tokens == 1000 for shard in entry.shards[:-1])
        assert [tuple(row) for row in read_hashes(built.path, entry).tolist()] == [
            document_hashes(one) for one in found
        ]
        for shard in entry.shards:
            assert hashlib.sha256((built.path / shard.file).read_bytes()).hexdigest() == shard.sha256
    assert len(manifest.splits["train"].shards) > 3
    assert manifest.tokenizer.sha256 == hashlib.sha256((built.path / "tokenizer.model").read_bytes()).hexdigest()
    assert check(built.path) == []


def test_same_input_same_bytes_wherever_it_lies(tmp_path: Path, texts: list[str]) -> None:
    for place in ("one", "two"):
        write_jsonl(tmp_path / place / "a.jsonl", texts)
        build([tmp_path / place / "a.jsonl"], tmp_path / place / "out", vocab_size=400)
    assert listing(tmp_path / "one" / "out") == listing(tmp_path / "two" / "out")
    build([tmp_path / "one" / "a.jsonl"], tmp_path / "three", vocab_size=400, seed=1)
    assert documents_of(tmp_path / "three", "val") != documents_of(tmp_path / "one" / "out", "val")


def test_the_number_of_workers_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_file: Path
) -> None:
    monkeypatch.setattr(build_module, "_SMALL_BYTES", 0)
    monkeypatch.setattr("epigram.data.sources.jsonl._PART_BYTES", 2000)
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(200, seed=7))
    for workers in (1, 2, 3):
        build([source], tmp_path / str(workers), tokenizer_file=tokenizer_file, workers=workers, shard_tokens=5000)
    assert listing(tmp_path / "1") == listing(tmp_path / "2") == listing(tmp_path / "3")


def test_published_tokenizer_settings(tmp_path: Path, texts: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, "  \n\t ", ""])
    built = build([source], tmp_path / "out", vocab_size=400, normalization="nmt_nfkc")
    data = open_data(built.path)
    expected = sorted(data.tokenizer.normalize(text).encode() for text in texts)
    assert sorted(documents_of(built.path, "train") + documents_of(built.path, "val")) == expected
    entry = built.manifest.splits["train"]
    assert entry.normalized_bytes < entry.original_bytes
    assert sum(split.empty_documents for split in built.manifest.splits.values()) == 2
    assert any("2 empty documents were left out" in note for note in built.notes)
    assert check(built.path) == []


def test_unknown_characters_are_counted_and_told(tmp_path: Path, texts: list[str], fallbackless_proto: bytes) -> None:
    """The published tokenizer of 1,024 pieces has no byte pieces: its missing bytes are proven, not assumed."""
    (tmp_path / "poor.model").write_bytes(fallbackless_proto)
    poor = Tokenizer.from_bytes(fallbackless_proto)
    plain = [text for text in texts if poor.can_encode(text)]
    odd = ["kalo ☃ mi ☃☃ te", "☃", "no ☃", "☃ vi", "beka ☃, ☃lo dor"]
    source, val = write_jsonl(tmp_path / "a.jsonl", plain + odd), write_jsonl(tmp_path / "val.jsonl", plain[:1])
    built = build([source], tmp_path / "out", val_sources=[val], tokenizer_file=tmp_path / "poor.model")
    entry = built.manifest.splits["train"]
    # Each snowman is three bytes, and the blank of a word behind an unknown token is not counted either.
    blanks_behind = sum(one.count("☃ ") for one in odd)
    assert entry.unknown_tokens == sum(one.count("☃") for one in odd) - 1  # two in a row are one token
    assert entry.unknown_bytes == 3 * sum(one.count("☃") for one in odd) + blanks_behind
    assert any("cannot express" in note for note in built.notes)
    assert check(built.path) == []


def test_a_tokenizer_that_misses_much_of_the_text_is_refused(tmp_path: Path, fallbackless_proto: bytes) -> None:
    (tmp_path / "poor.model").write_bytes(fallbackless_proto)
    source = write_jsonl(tmp_path / "a.jsonl", ["☃ не наш язык " * 9 + str(i) for i in range(30)])
    with pytest.raises(DataError, match=r"no pieces for \d+% of this text"):
        build([source], tmp_path / "out", tokenizer_file=tmp_path / "poor.model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "poor.model"]


def test_documents_of_val_are_kept_out_of_train(tmp_path: Path, texts: list[str], tokenizer_file: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [*texts, texts[3], texts[0][:-1] + "x"])
    val = write_jsonl(tmp_path / "val.jsonl", [texts[3], texts[7]])
    built = build([train], tmp_path / "out", val_sources=[val], tokenizer_file=tokenizer_file)
    assert documents_of(built.path, "val") == [texts[3].encode(), texts[7].encode()]
    kept = [text.encode() for text in [*texts, texts[0][:-1] + "x"] if text not in (texts[3], texts[7])]
    assert documents_of(built.path, "train") == kept
    assert built.manifest.splits["train"].duplicates == 3
    assert check(built.path) == []
    with pytest.raises(DataError, match="val has the same ones"):
        build(
            [write_jsonl(tmp_path / "same.jsonl", [texts[3]])],
            tmp_path / "b",
            val_sources=[val],
            tokenizer_file=tokenizer_file,
        )
    assert not (tmp_path / "b").exists()


def test_shared_beginnings_are_counted(tmp_path: Path, texts: list[str], tokenizer_file: Path) -> None:
    head = ("kalo mi te ru " * 100)[:1024]
    train = write_jsonl(tmp_path / "train.jsonl", [*texts, head + "one", head + "two"])
    val = write_jsonl(tmp_path / "val.jsonl", [head + "three"])
    built = build([train], tmp_path / "out", val_sources=[val], tokenizer_file=tokenizer_file)
    assert built.manifest.splits["train"].shared_starts == 2
    assert built.manifest.splits["train"].documents == len(texts) + 2


def test_equal_documents_stay_in_one_split(tmp_path: Path, texts: list[str], tokenizer_file: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts * 40)  # 2,400: the hash decides
    built = build([source], tmp_path / "out", tokenizer_file=tokenizer_file, val_fraction=0.2)
    train, val = (set(documents_of(built.path, split)) for split in ("train", "val"))
    assert not train & val
    assert len(train) + len(val) == len(set(texts))
    assert 3 <= len(val) <= 25  # 12 expected


def test_rows_of_a_table_are_documents(tmp_path: Path, texts: list[str], tokenizer_file: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with (folder / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "body"], *enumerate(texts)])
    (folder / "README").write_text("What this is.")
    built = build([folder], tmp_path / "out", tokenizer_file=tokenizer_file, field="body")
    found = documents_of(built.path, "train") + documents_of(built.path, "val")
    assert sorted(found) == sorted(text.encode() for text in texts)
    assert built.notes == ("left out, as the folder holds records: README",)
    assert check(built.path) == []


def test_text_file_folder_and_stdlib_like_sources(tmp_path: Path, texts: list[str], tokenizer_file: Path) -> None:
    single = tmp_path / "book.txt"
    single.write_text("\n\n".join(texts))
    built = build([single], tmp_path / "a", tokenizer_file=tokenizer_file)
    pieces = documents_of(built.path, "train") + documents_of(built.path, "val")
    assert sum(map(len, pieces)) == single.stat().st_size
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, one in enumerate(texts):
        (folder / f"{index}.txt").write_text(one)
    built = build([folder], tmp_path / "b", tokenizer_file=tokenizer_file)
    assert sorted(documents_of(built.path, "train") + documents_of(built.path, "val")) == sorted(
        t.encode() for t in texts
    )


def test_a_data_folder_is_replaced_when_asked_and_anything_else_is_not(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is free
    build([source], out, tokenizer_file=tokenizer_file)
    build([source], out, tokenizer_file=tokenizer_file, shard_tokens=700, replace=True)
    assert len(open_data(out).split("train")) > 1
    assert check(out) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "given.model", "out"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    for place in (precious, source):
        before = listing(tmp_path)
        with pytest.raises(UserError, match="is no data folder, so it is not overwritten"):
            build([source], place, tokenizer_file=tokenizer_file, replace=True)
        assert listing(tmp_path) == before


def test_a_data_folder_of_other_text_stays(
    tmp_path: Path, texts: list[str], tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out"
    build([source], out, tokenizer_file=tokenizer_file)
    before = listing(out)
    build([source], out, tokenizer_file=tokenizer_file)  # the same again
    assert listing(out) == before
    with pytest.raises(UserError, match=r"of other text or settings: name another place with --out, or .* --replace"):
        build([source], out, tokenizer_file=tokenizer_file, seed=1)
    write_jsonl(source, [*texts[:-1], "one other document"])  # the same names, settings and number of documents
    with pytest.raises(UserError, match=r"out is a data folder already"):
        build([source], out, tokenizer_file=tokenizer_file)
    assert listing(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "given.model", "out"]
    monkeypatch.setattr("epigram.data.survey._SMALL_INPUT_BYTES", 1000)
    with pytest.raises(UserError, match=r"is not built again to see whether it is of this text: .* --replace"):
        build([source], out, tokenizer_file=tokenizer_file)
    build([source], out, tokenizer_file=tokenizer_file, replace=True)
    assert check(out) == []
    assert listing(out) != before


@pytest.mark.parametrize("place", [".", "..", "../in", "here", "sub/.."])
def test_the_folder_that_one_is_in_stays(
    tmp_path: Path, texts: list[str], tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """It could only be replaced under the feet of whoever is in it."""
    here = tmp_path / "new" / "in"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    out = here if place == "here" else place
    message = "is no data folder" if place == ".." else "in is the folder .* called in.* such as .*in/data,"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        build([source], out, tokenizer_file=tokenizer_file)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.chdir(tmp_path)
    build([source], here, tokenizer_file=tokenizer_file)
    monkeypatch.chdir(here)
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"called in|is no data folder"):
        build([source], out, tokenizer_file=tokenizer_file, shard_tokens=500, replace=True)
    assert listing(tmp_path) == before
    build([source], "data", tokenizer_file=tokenizer_file)
    assert check(Path("data")) == []


BROKEN = [
    ("latin.txt", b"caf\xe9 " * 50, {}, r"latin\.txt is not UTF-8 at byte 3 "),
    ("empty.txt", b"", {}, "no text to train on"),
    ("blank.txt", b" \n\n ", {}, "no text to learn a tokenizer from"),
    (
        "good.txt",
        b"good text. " * 2000,
        {"tokenizer_file": "gone.model", "vocab_size": 1024, "normalization": "identity"},
        r"vocab_size = 1024 is for a tokenizer that is trained, and .*gone\.model is used: .*; normalization = ident",
    ),
    ("one.txt", b"just one document", {}, "only one document, .* by epigram data build --val"),
    ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', {}, r"line 2 has no field 'text'"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "y"}\n', {"field": "body"}, r"line 1 has no field 'body'"),
    ("a.jsonl", b'{"text": ""}\n{"text": ""}\n', {}, "no text to train on"),
    (
        "good.txt",
        b"good text. " * 2000,
        {"field": "text"},
        r"--field text names a field .* only text to read: leave it",
    ),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], {}, "cut short"),
    ("good.txt", b"good text. " * 2000, {"tokenizer_file": "broken.model"}, "no SentencePiece model"),
    ("good.txt", b"good text. " * 2000, {"tokenizer_file": "gone.model"}, "cannot be read"),
    ("good.txt", b"good text. " * 2000, {"vocab_size": 262}, "is too small for this text"),
    (
        "good.txt",
        b"good text. " * 2000,
        {"vocab_size": 9, "normalization": "x", "val_fraction": 1.0, "shard_tokens": 0, "workers": 0},
        r"vocab_size = 9 .*normalization = 'x' .*val_fraction = 1\.0 .* below 1; shard_tokens = 0 .*workers = 0",
    ),
]


@pytest.mark.parametrize(("name", "raw", "options", "message"), BROKEN)
def test_bad_input_is_named_and_leaves_nothing(tmp_path: Path, name: str, raw: bytes, options, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "broken.model").write_bytes(b"broken")
    options = {key: tmp_path / value if key == "tokenizer_file" else value for key, value in options.items()}
    before = listing(tmp_path)
    with pytest.raises(UserError, match=message):
        build([tmp_path / name], tmp_path / "new" / "out", **options)
    assert listing(tmp_path) == before


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    before = listing(tmp_path)
    monkeypatch.setattr(build_module, "survey", lambda *_, **__: pytest.fail("the text was read"))
    for place, reason in ((source / "out", "File exists"), (source / "deeper" / "out", "Not a directory")):
        with pytest.raises(DataError, match=rf"cannot be written \({reason}\): name another place with --out"):
            build([source], place)
    assert listing(tmp_path) == before


def test_what_may_not_be_written_is_told_too(
    tmp_path: Path, texts: list[str], tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever tests may write everywhere, so the system's answer is made up."""
    source, cache = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "cache"
    first = ensure_built(source, cache, tokenizer_file=tokenizer_file)

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr("epigram.data.place.tempfile.TemporaryFile", refuse)
    with pytest.raises(DataError, match=rf"^{tmp_path} cannot be written \(Permission denied\): name another place"):
        build([source], tmp_path / "out", tokenizer_file=tokenizer_file)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        DataError, match=rf"^{cache} cannot be written \(Permission denied\): .*epigram data build TEXT"
    ):
        ensure_built(source, cache, vocab_size=400)
    assert ensure_built(source, cache, tokenizer_file=tokenizer_file).data.path == first.data.path, "it only reads"


def test_a_bad_document_deep_in_the_text_leaves_nothing(tmp_path: Path, texts: list[str], tokenizer_file: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, one in enumerate(texts):
        (folder / f"{index:03d}.txt").write_text(one)
    (folder / "990.txt").write_bytes(b"fine until here \xc3(")
    before = listing(tmp_path)
    with pytest.raises(DataError, match=r"990\.txt is not UTF-8 at byte 16"):
        build([folder], tmp_path / "out", tokenizer_file=tokenizer_file)
    assert listing(tmp_path) == before


def test_a_first_blank_that_cannot_be_written_is_unknown(tmp_path: Path, texts: list[str]) -> None:
    """Identity without byte pieces has nothing for a blank behind the BOS that counts; one such document is no reason
    to build nothing."""
    proto = train_with(texts, byte_fallback=False, normalization_rule_name="identity", remove_extra_whitespaces=False)
    (tmp_path / "poor.model").write_bytes(proto)
    plain = [text for text in texts if Tokenizer.from_bytes(proto).can_encode(text)]
    source, val = (
        write_jsonl(tmp_path / "a.jsonl", [*plain, " kalo mi"]),
        write_jsonl(tmp_path / "val.jsonl", plain[:1]),
    )
    built = build([source], tmp_path / "out", val_sources=[val], tokenizer_file=tmp_path / "poor.model")
    entry = built.manifest.splits["train"]
    assert (entry.unknown_tokens, entry.unknown_bytes) == (1, 1)
    assert check(built.path) == []


def test_a_tokenizer_that_loses_text_fails_the_proof(
    tmp_path: Path, texts: list[str], tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Tokenizer.encode_normalized
    monkeypatch.setattr(
        Tokenizer, "encode_normalized", lambda self, text: whole(self, text)[: -1 if "lost" in text else None]
    )
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, "kalo, and what is lost"])
    before = listing(tmp_path)
    with pytest.raises(DataError, match=r"a\.jsonl, line 61: .* does not account for its text"):
        build([source], tmp_path / "out", tokenizer_file=tokenizer_file)
    assert listing(tmp_path) == before


def test_the_proof_sees_a_wrong_byte_table(
    tmp_path: Path, texts: list[str], tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = Tokenizer.byte_tables

    def double_count(self: Tokenizer):
        right = tables(self)
        return type(right)(
            token_bytes=right.token_bytes + right.has_space, has_space=right.has_space, is_edge=right.is_edge
        )

    monkeypatch.setattr(Tokenizer, "byte_tables", double_count)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match="line 1: .* the byte tables count"):
        build([source], tmp_path / "out", tokenizer_file=tokenizer_file)


def test_too_small_a_disk_is_refused_before_writing(
    tmp_path: Path, texts: list[str], tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    before = listing(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"would take about 1 MB, but its disk has 0 MB free"):
        build([source], tmp_path / "out", tokenizer_file=tokenizer_file)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")])
def test_whatever_happens_on_the_way_leaves_nothing(
    tmp_path: Path, texts: list[str], tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    build([source], tmp_path / "out", tokenizer_file=tokenizer_file)
    before = listing(tmp_path)
    calls = []

    def fail(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError if isinstance(error, OSError) else type(error)):
        build([source], tmp_path / "out", tokenizer_file=tokenizer_file, shard_tokens=500, replace=True)
    assert listing(tmp_path) == before


def test_sources_that_change_meanwhile_are_noticed(
    tmp_path: Path, texts: list[str], tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    check_disk = build_module._check_disk

    def grow(*arguments) -> None:
        check_disk(*arguments)
        write_jsonl(source, [*texts, "one more"])

    monkeypatch.setattr(build_module, "_check_disk", grow)
    with pytest.raises(DataError, match=r"changed while they were read \(60 documents, then 61\)"):
        build([source], tmp_path / "out", tokenizer_file=tokenizer_file)


def test_interrupted_from_the_keyboard(tmp_path: Path, tokenizer_file: Path) -> None:
    """A real process group with workers, a real Ctrl-C."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(300, seed=8) * 60)
    script = (
        "import sys; from epigram.data import build as b; b._SMALL_BYTES = 0\n"
        "if __name__ == '__main__':\n"
        "    b.build([sys.argv[1]], sys.argv[2], tokenizer_file=sys.argv[3], workers=2)\n"
    )
    (tmp_path / "script.py").write_text(script)
    arguments = [sys.executable, tmp_path / "script.py", source, tmp_path / "out", tokenizer_file]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline_s = time.monotonic() + 30
    while not list(tmp_path.glob(".out.building*/.fineweb*")) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert process.poll() is None, "the build ended before it could be interrupted"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "given.model", "script.py"]
    assert group_ends(process.pid), "a worker outlived the build"


def group_ends(group: int) -> bool:
    """Whether the last process of a group goes within some seconds."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_leftovers_of_killed_builds_are_removed(tmp_path: Path, texts: list[str], tokenizer_file: Path) -> None:
    from epigram.data.place import _building

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = tmp_path / f"{_building(tmp_path / 'out')}{socket.gethostname()}-{dead.pid}"
    alive = tmp_path / f"{_building(tmp_path / 'out')}{socket.gethostname()}-{os.getppid()}"
    for folder in (stale, alive):
        folder.mkdir()
    build([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", tokenizer_file=tokenizer_file)
    assert not stale.exists()
    assert alive.exists()


def test_cache_is_keyed_by_text_and_settings(tmp_path: Path, texts: list[str]) -> None:
    source = tmp_path / "book.txt"
    source.write_text("\n\n".join(texts))
    cache = tmp_path / "cache"
    first = ensure_built(source, cache, vocab_size=400)
    stamp = (first.data.path / "manifest.json").stat().st_mtime_ns
    again = ensure_built(source, cache, vocab_size=400)
    assert again.data.path == first.data.path
    assert again.notes == ()
    assert (first.data.path / "manifest.json").stat().st_mtime_ns == stamp
    assert ensure_built(source, cache, vocab_size=420).data.path != first.data.path
    assert ensure_built(first.data.path, cache).data.path == first.data.path  # a built folder is itself
    source.write_text("\n\n".join([*texts, "one more paragraph"]))
    changed = ensure_built(source, cache, vocab_size=400)
    assert changed.data.path != first.data.path
    assert changed.data.path.name.startswith("book.txt-")


def test_few_long_documents_hold_out_much_and_it_is_told(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    for name, part in (("a.txt", texts[:20]), ("b.txt", texts[20:40])):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("\n\n".join(part))
    (note,) = build([tmp_path / "in"], tmp_path / "out", tokenizer_file=tokenizer_file).notes
    assert re.match(r"\d\d% of the text is held out instead of 5%, since documents are held out whole", note)
    assert build([tmp_path / "in"], tmp_path / "half", tokenizer_file=tokenizer_file, val_fraction=0.5).notes == ()


def test_settings_of_a_recipe_that_nothing_reads_are_passed_over(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    """A recipe has values for all of them, whatever the text is."""
    folder, cache = tmp_path / "in", tmp_path / "cache"
    write_jsonl(folder / "train.jsonl", texts[:40])
    write_jsonl(folder / "val.jsonl", texts[40:])
    built = [
        ensure_built(folder, cache, vocab_size=400, normalization="identity", val_fraction=share)
        for share in (0.1, 0.2)
    ]
    assert [len(one.notes) > 0 for one in built] == [True, False], "the share is no part of it"
    assert documents_of(built[0].data.path, "val") == [text.encode() for text in texts[40:]]
    given = ensure_built(folder, cache, tokenizer_file=tokenizer_file, vocab_size=420, normalization="nmt_nfkc")
    assert given.data.tokenizer.proto == tokenizer_file.read_bytes()


def test_cache_survives_a_failed_build(tmp_path: Path, texts: list[str]) -> None:
    source = tmp_path / "book.txt"
    source.write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match="not UTF-8"):
        ensure_built(source, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_processes_that_want_the_same_text_build_it_once(tmp_path: Path, texts: list[str]) -> None:
    source = tmp_path / "book.txt"
    source.write_text("\n\n".join(texts * 5))
    script = (
        "import sys; from epigram.data.cache import ensure_built\n"
        "print(len(ensure_built(sys.argv[1], sys.argv[2], vocab_size=400).notes), 'ok')"
    )
    arguments = [sys.executable, "-c", script, str(source), str(tmp_path / "cache")]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert all(process.communicate(timeout=60)[0].endswith("ok\n") for process in processes)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_streams_are_what_the_shards_hold(tmp_path: Path, texts: list[str], tokenizer_file: Path) -> None:
    built = build(
        [write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", tokenizer_file=tokenizer_file, shard_tokens=300
    )
    data = open_data(built.path)
    stream = data.stream("train")
    assert stream.dtype == np.uint16
    assert stream.tolist() == [token for shard in data.split("train") for token in shard.tokens.tolist()]
    assert int(np.count_nonzero(stream == data.tokenizer.bos_id)) == built.manifest.splits["train"].documents
