"""Which files are read, by which source, for which split."""

import json
import os
from pathlib import Path

import pytest

from epigram.data.gather import BY_HASH, gather
from epigram.data.manifest import FORMAT
from epigram.data.tokenizer import Tokenizer
from epigram.errors import DataError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"text of {name}")
        return tmp_path / "in"

    return make


def plan(gathered) -> list[tuple[str, str, str]]:
    return [(file.name, file.kind, file.split) for file in gathered.files]


def test_a_folder_of_text_in_the_order_of_names(folder) -> None:
    gathered = gather([folder("b.txt", "a/z.md", "a/.hidden", ".git/config", "c")])
    assert plan(gathered) == [(name, "text", BY_HASH) for name in ("a/z.md", "b.txt", "c")]
    assert all(file.whole for file in gathered.files)
    assert gathered.notes == ()


def test_records_beside_text_leave_the_text_out(folder) -> None:
    gathered = gather([folder("README.md", "LICENSE", "b.jsonl", "a.jsonl.zst")])
    assert plan(gathered) == [("a.jsonl.zst", "jsonl", BY_HASH), ("b.jsonl", "jsonl", BY_HASH)]
    assert gathered.notes == ("left out, as the folder holds records: LICENSE, README.md",)


def test_all_files_that_are_no_text_are_named_at_once(folder) -> None:
    """A character that the look at the beginning cuts in two is text; of one such file the reader says more."""
    source = folder("a.txt", "b/latin.txt", "c.png", "d.txt")
    (source / "b" / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (source / "d.txt").write_bytes(b"x" * 4095 + "\u20ac".encode() * 9)
    assert len(gather([source]).files) == 4
    (source / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    with pytest.raises(
        DataError, match=r"^2 files of .* are not UTF-8 \(b/latin\.txt, c\.png\): convert .* out of the"
    ):
        gather([source])
    (source / "one.jsonl").write_text("{}")
    assert plan(gather([source])) == [("one.jsonl", "jsonl", BY_HASH)], "beside records they are not read"


def test_a_folder_that_names_its_splits(folder) -> None:
    gathered = gather([folder("README.md", "train-00.jsonl", "train-01.jsonl", "val.jsonl", "test.jsonl")])
    assert plan(gathered) == [
        ("val.jsonl", "jsonl", "val"),
        ("train-00.jsonl", "jsonl", "train"),
        ("train-01.jsonl", "jsonl", "train"),
    ]
    assert gathered.notes[1:] == ("validation, by name: val.jsonl", "left out, as test files by name: test.jsonl")


def test_names_decide_only_where_both_splits_are_named(folder) -> None:
    names = ("validation.md", "test.md", "usage.md", "retrain.md")
    assert {split for _, _, split in plan(gather([folder(*names)]))} == {BY_HASH}
    assert len(gather([folder(*names)]).files) == 4


def test_val_sources_are_taken_out_of_train(folder) -> None:
    source = folder("a.txt", "b.txt", "val.txt")
    gathered = gather([source], [source / "val.txt"])
    assert plan(gathered) == [("val.txt", "text", "val"), ("a.txt", "text", "train"), ("b.txt", "text", "train")]


def test_single_files_and_stdlib(folder) -> None:
    source = folder("a.txt", "b.jsonl")
    gathered = gather([source / "a.txt", source / "b.jsonl", "stdlib"])
    assert [file.kind for file in gathered.files] == ["text", "jsonl", "stdlib"]
    assert not any(file.whole for file in gathered.files)


def test_the_output_inside_the_input_is_not_read(folder) -> None:
    source = folder("a.txt", "out/old.txt")
    assert plan(gather([source], exclude=source / "out")) == [("a.txt", "text", BY_HASH)]


def test_what_epigram_has_written_is_not_read(folder) -> None:
    run = [f"runs/one/{name}" for name in ("config.toml", "environment.json", "result.json", "log.txt", "export-1/x")]
    source = folder("a.txt", "config.toml", "part/result.json", "data/mine/val.bin", "data/mine/manifest.json", *run)
    (source / "data/mine/manifest.json").write_text(json.dumps({"format": FORMAT}))
    gathered = gather([source])
    assert [name for name, _, _ in plan(gathered)] == ["a.txt", "config.toml", "part/result.json"]
    assert gathered.notes == ("left out, as data and runs of epigram: data/mine, runs/one",)
    with pytest.raises(DataError, match="holds no files but data and runs of epigram: name another"):
        gather([source / "runs"])


def test_text_behind_links_is_read_once(folder, tmp_path: Path) -> None:
    """Circles and second ways to a folder add nothing, and a folder that really lies there keeps its own names."""
    source = folder("b.txt", "sub/c.txt", "sub/deep/d.txt")
    for name in ("real/1.txt", "real/2.txt", "real/inner/3.txt", "other/4.txt", "aim.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    for link, target in {
        "in/a link": "../real",
        "in/again": "../real",
        "in/.hidden": "../real",
        "in/a second way": "sub",
        "in/sub/circle": "../../in",
        "in/sub/deep/up": "..",
        "real/inner/on": "../../other",
        "real/back": "../in/sub",
        "in/file.txt": "../aim.txt",
        "in/gone": "../nowhere",
        "in/self": "self",
    }.items():
        (tmp_path / link).symlink_to(target)
    gathered = gather([source])
    names = ["a link/1.txt", "a link/2.txt", "a link/inner/3.txt", "a link/inner/on/4.txt"]
    assert [file.name for file in gathered.files] == [*names, "b.txt", "file.txt", "sub/c.txt", "sub/deep/d.txt"]
    assert gathered.notes == ("left out, as links that lead nowhere: gone, self",)
    (tmp_path / "entry").symlink_to(source)
    assert gather([tmp_path / "entry"]).content_hash() == gathered.content_hash()
    without = gather([source], exclude=tmp_path / "real" / "inner")
    assert [file.name for file in without.files][:3] == ["a link/1.txt", "a link/2.txt", "b.txt"]
    val = gather([source], [tmp_path / "other"])
    assert plan(val)[0] == ("4.txt", "text", "val")
    assert [file.name for file in val.files[1:4]] == ["a link/1.txt", "a link/2.txt", "a link/inner/3.txt"]
    assert len(val.files) == len(gathered.files)


def test_what_cannot_be_gathered(folder, tmp_path: Path) -> None:
    source = folder("a.txt")
    (tmp_path / "empty").mkdir()
    built = tmp_path / "built"
    built.mkdir()
    (built / "manifest.json").write_text('{"format": "epigram data"}')
    for sources, val, kind, message in [
        ([], [], UserError, "nothing to read"),
        ([tmp_path / "gone.txt"], [], UserError, r"no file or folder .*gone\.txt"),
        ([tmp_path / "gone.jsonl"], [], UserError, r"no file or folder .*gone\.jsonl"),
        ([tmp_path / "empty"], [], DataError, "holds no files"),
        ([source, source / "a.txt"], [], UserError, "named twice"),
        ([source / "a.txt"], [source / "a.txt"], UserError, r"a\.txt is named both to train on and with --val"),
        ([built], [], UserError, "built data folder already"),
    ]:
        with pytest.raises(kind, match=message):
            gather(sources, val)


def test_named_and_unnamed_splits_do_not_mix(folder) -> None:
    source = folder("x/train.txt", "x/val.txt", "y.txt")
    with pytest.raises(UserError, match="with --val"):
        gather([source / "x", source / "y.txt"])


def test_content_hash_follows_the_text_not_the_place(folder, tmp_path: Path) -> None:
    source = folder("a.txt", "b.txt")
    before = gather([source]).content_hash()
    source.rename(tmp_path / "moved")
    assert gather([tmp_path / "moved"]).content_hash() == before
    (tmp_path / "moved" / "a.txt").write_text("other")
    assert gather([tmp_path / "moved"]).content_hash() != before


def test_names_that_are_no_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """What a disk allows as a name must not end a long build when its manifest is written."""
    from epigram.data.build import build
    from epigram.data.check import check

    (tmp_path / "given.model").write_bytes(tokenizer.proto)
    folder = tmp_path / "in"
    folder.mkdir()
    names = [b"a b.jsonl", b"new\nline.jsonl", b"\xff\xfe.jsonl", b"-dash.jsonl", b"[bold]x.jsonl", b"\xff.txt"]
    try:
        for number, name in enumerate(names):
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text(f'{{"text": "kalo mi {number}"}}\n')
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    built = build([folder], tmp_path / "out", tokenizer_file=tmp_path / "given.model")
    assert {source.file for source in built.manifest.sources} == {
        "a b.jsonl", "new\nline.jsonl", r"\xff\xfe.jsonl", "-dash.jsonl", "[bold]x.jsonl"
    }  # fmt: skip
    assert built.notes[0] == r"left out, as the folder holds records: \xff.txt"
    assert check(built.path) == []
