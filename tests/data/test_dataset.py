"""Opening data folders, and checking them: each kind of damage has its finding."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_shards
from hypothesis import given
from hypothesis import strategies as st

from epigram.data.build import build
from epigram.data.check import check
from epigram.data.dataset import open_data
from epigram.data.manifest import document_hashes, hash64, read_manifest, write_manifest
from epigram.data.shards import open_shard, write_shard
from epigram.data.tokenizer import Tokenizer
from epigram.errors import DataError, UserError


@pytest.fixture
def built(tmp_path: Path, texts: list[str], tokenizer: Tokenizer) -> Path:
    (tmp_path / "given.model").write_bytes(tokenizer.proto)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    return build(
        [tmp_path / "a.jsonl"], tmp_path / "out", tokenizer_file=tmp_path / "given.model", shard_tokens=2500
    ).path


def test_an_open_folder(built: Path, tokenizer: Tokenizer) -> None:
    data = open_data(built)
    assert data.manifest == read_manifest(built)
    assert data.tokenizer.sha256 == tokenizer.sha256
    assert [shard.path.name for shard in data.split("val")] == ["fineweb_val_000000.bin"]
    assert data.num_tokens("train") == len(data.stream("train")) == data.manifest.splits["train"].tokens
    assert data.document_hashes("val").shape == (data.manifest.splits["val"].documents, 2)
    assert {shard.split for shard in data.split("train")} == {"train"}
    with pytest.raises(DataError, match="no test shards: it has train, val"):
        data.split("test")
    with pytest.raises(DataError, match="no test shards: it has train, val"):
        open_data(built, splits=("test",))


def test_the_beginning_of_a_split_is_read_alone(built: Path) -> None:
    """Shards after it may even be gone; byte counts go the same way."""
    data = open_data(built)
    first, *others = data.split("train")
    assert others, "the split has several shards"
    whole = data.stream("train")
    sizes = (1, first.num_tokens - 1, first.num_tokens, first.num_tokens + 1, len(whole), len(whole) + 1)
    for most in sizes:
        assert np.array_equal(data.stream("train", most), whole[:most])
    counted = dataclasses.replace(data, byte_count_shards=data.shards)
    for shard in others:
        shard.path.unlink()
    for most in sizes[:3]:
        assert np.array_equal(counted.byte_counts("train", most), whole[:most])
        assert np.array_equal(data.stream("train", most), whole[:most])


def test_the_published_layout(tmp_path: Path, built: Path, tokenizer: Tokenizer) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in [*built.glob("fineweb*.bin"), built / "tokenizer.model"]:
        (bare / path.name).write_bytes(path.read_bytes())
    data = open_data(bare)
    assert data.manifest is None
    assert np.array_equal(data.stream("train"), open_data(built).stream("train"))
    assert data.tokenizer.sha256 == tokenizer.sha256
    with pytest.raises(DataError, match="no manifest"):
        data.document_hashes("train")
    (finding,) = check(bare)
    assert not finding.is_error
    assert "no manifest.json" in finding.text
    (bare / "second.model").write_bytes(b"")
    with pytest.raises(UserError, match="2 tokenizers"):
        open_data(bare)
    assert open_data(bare, built / "tokenizer.model").tokenizer.sha256 == tokenizer.sha256


def test_check_of_the_published_layout(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "bare"
    (shard,) = write_shards(folder, [500], vocab_size=tokenizer.vocab_size)
    (folder / "t.model").write_bytes(tokenizer.proto)
    assert [finding.text for finding in check(folder) if finding.is_error] == ["there are no val shards"]
    write_shards(folder, [50], split="val", vocab_size=1)
    assert "val holds no BOS" in check(folder)[-1].text
    write_shard(shard.path, np.array([1, tokenizer.vocab_size], np.uint16), "train")
    assert f"the id {tokenizer.vocab_size}, beyond the vocabulary" in check(folder)[-1].text


def test_streams_without_a_first_bos_and_with_a_last_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "t.model").write_bytes(tokenizer.proto)
    for split, text in (("train", "kalo mi te"), ("val", "ru sa no")):
        body = tokenizer.encode(text)
        write_shard(folder / f"x_{split}_000000.bin", np.array([*body, 1, *body, 1], np.uint16), split)
    assert [finding.text for finding in check(folder) if finding.is_error] == []


def test_validation_documents_in_shards_of_others(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A crawl may repeat a few; a validation split that is trained on is an error (parameter-golf #2127)."""
    (tmp_path / "t.model").write_bytes(tokenizer.proto)
    val = [[1, 10 + index, 20, 30] for index in range(200)]
    other = [[1, 10 + index, 21, 30] for index in range(200)]
    write_shard(tmp_path / "x_val_000000.bin", np.array(val, np.uint16).ravel(), "val")
    for planted, is_error in ((0, None), (2, False), (3, True), (200, True)):
        train = np.array([*other, *val[:planted], *val[:planted], [1, 5, 5, 5]], np.uint16).ravel()
        write_shard(tmp_path / "x_train_000000.bin", train[:403], "train")  # a document goes on in the next shard
        write_shard(tmp_path / "x_train_000001.bin", train[403:], "train")
        found = [one.is_error for one in check(tmp_path) if f"{planted} of 200 different documents" in one.text]
        assert found == ([] if is_error is None else [is_error])


def test_what_is_no_data_folder(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UserError, match="no data folder .*gone"):
        open_data(tmp_path / "gone")
    with pytest.raises(UserError, match="epigram data build"):
        open_data(tmp_path)
    with pytest.raises(UserError, match="no data folder"):
        check(tmp_path / "gone")
    with pytest.raises(UserError, match="no data folder"):
        check(tmp_path)


def test_a_shard_that_changed_size_cannot_be_opened(built: Path) -> None:
    path = built / "fineweb_train_000001.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"fineweb_train_000001\.bin is .* bytes, but its header promises"):
        open_data(built)
    write_shard(path, np.zeros(7, np.uint16), "train")
    with pytest.raises(DataError, match=r"holds 7 tokens, not the 2,500 of the manifest"):
        open_data(built)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_data(built)


def test_another_tokenizer_is_refused(built: Path, nfkc_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "other.model").write_bytes(nfkc_tokenizer.proto)
    with pytest.raises(DataError, match="built with another tokenizer"):
        open_data(built, tmp_path / "other.model")
    (built / "tokenizer.model").write_bytes(nfkc_tokenizer.proto)
    with pytest.raises(DataError, match="not the tokenizer that the data were built with"):
        _ = open_data(built).tokenizer


def texts_of(folder: Path) -> str:
    return " | ".join(finding.text for finding in check(folder) if finding.is_error)


@pytest.mark.parametrize(
    "name", ["fineweb_train_000001.bin", "fineweb_val_000000.bin", "documents_train.bin", "tokenizer.model"]
)
def test_check_finds_flipped_bits_and_missing_files(built: Path, name: str) -> None:
    assert check(built) == []
    raw = bytearray((built / name).read_bytes())
    raw[-1] ^= 1
    (built / name).write_bytes(raw)
    assert texts_of(built).startswith(f"{name} is not the file that the manifest describes")
    (built / name).unlink()
    assert texts_of(built).startswith(f"{name} is missing")


def test_check_finds_files_that_do_not_belong(built: Path) -> None:
    (built / "fineweb_train_000099.bin").write_bytes((built / "fineweb_train_000000.bin").read_bytes())
    assert "knows nothing of fineweb_train_000099.bin" in texts_of(built)


def forge(folder: Path, split: str, **changes: object) -> None:
    """Change the manifest, keeping its own hashes right."""
    manifest = read_manifest(folder)
    entry = dataclasses.replace(manifest.splits[split], **changes)
    write_manifest(folder, dataclasses.replace(manifest, splits={**manifest.splits, split: entry}))


def rehash(folder: Path, split: str) -> None:
    """Make the manifest's hashes those of the files as they are now."""

    def sha256(name: str) -> str:
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()

    entry = read_manifest(folder).splits[split]
    shards = tuple(dataclasses.replace(shard, sha256=sha256(shard.file)) for shard in entry.shards)
    forge(folder, split, shards=shards, hashes=dataclasses.replace(entry.hashes, sha256=sha256(entry.hashes.file)))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("documents", "is .* bytes, not 16 for each of"),
        ("tokens", "tokens, and the manifest says"),
        ("normalized_bytes", "bytes of text, and the manifest says"),
        ("unknown_tokens", "unknown tokens, and the manifest says"),
    ],
)
def test_check_finds_wrong_sums(built: Path, field: str, message: str) -> None:
    entry = read_manifest(built).splits["val"]
    forge(built, "val", **{field: getattr(entry, field) + 1})
    assert any(re.search(message, finding.text) for finding in check(built))


def test_check_finds_altered_text_behind_right_hashes(built: Path) -> None:
    shard = open_shard(built / "fineweb_train_000001.bin", "train")
    tokens = shard.read()
    place = int(np.flatnonzero(tokens > 300)[0])
    tokens[place] = 301 if tokens[place] != 301 else 302
    write_shard(shard.path, tokens, "train")
    rehash(built, "train")
    assert "not the texts that their hashes were taken of" in texts_of(built)


def test_check_finds_a_missing_bos(built: Path) -> None:
    shard = open_shard(built / "fineweb_train_000000.bin", "train")
    tokens = shard.read()
    tokens[0] = 4
    write_shard(shard.path, tokens, "train")
    rehash(built, "train")
    assert "documents, and the manifest says" in texts_of(built)


def test_check_finds_ids_beyond_the_vocabulary(built: Path) -> None:
    shard = open_shard(built / "fineweb_val_000000.bin", "val")
    tokens = shard.read()
    tokens[5] = 60_000
    write_shard(shard.path, tokens, "val")
    rehash(built, "val")
    assert "the id 60000, beyond the vocabulary of 400" in texts_of(built)


def test_check_finds_val_in_train(built: Path) -> None:
    """Put a document of val at the end of train, with every hash and sum made right."""
    data = open_data(built)
    val = data.stream("val")
    document = val[: int(np.flatnonzero(val == 1)[1])]
    last = data.split("train")[-1]
    write_shard(last.path, np.concatenate([last.read(), document]), "train")
    hashes = np.concatenate([data.document_hashes("train"), data.document_hashes("val")[:1]])
    (built / "documents_train.bin").write_bytes(hashes.tobytes())
    entry, spelled = data.manifest.splits["train"], len(data.tokenizer.decode_bytes(document))
    shards = (*entry.shards[:-1], dataclasses.replace(entry.shards[-1], tokens=last.num_tokens + len(document)))
    forge(
        built,
        "train",
        documents=entry.documents + 1,
        tokens=entry.tokens + len(document),
        normalized_bytes=entry.normalized_bytes + spelled,
        shards=shards,
    )
    rehash(built, "train")
    assert texts_of(built) == (
        "1 documents of train are in val too, so scores would mean nothing: build the data again"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: "nonsense", "no manifest of a data folder"),
        (lambda values: [], "no manifest of a data folder"),
        (lambda values: {**values, "format": "other"}, "no manifest of a data folder"),
        (lambda values: {**values, "version": 3}, "has version 3"),
        (lambda values: {**values, "extra": 1}, "is damaged: .*extra"),
        (lambda values: {k: v for k, v in values.items() if k != "splits"}, "is damaged: .*splits"),
        (lambda values: {**values, "splits": {"train": values["splits"]["train"]}}, "names that cannot be"),
        (lambda values: {**values, "tokenizer": {**values["tokenizer"], "file": "../../x"}}, r"names that cannot be"),
        (
            lambda values: {**values, "tokenizer": {**values["tokenizer"], "vocab_size": "8"}},
            r"expected int @ manifest\.tokenizer\.vocab_size",
        ),
    ],
)
def test_damaged_manifests(built: Path, change, message: str) -> None:
    values = json.loads((built / "manifest.json").read_text())
    (built / "manifest.json").write_text(json.dumps(change(values)))
    with pytest.raises(DataError, match=message):
        read_manifest(built)
    assert re.search(message, texts_of(built))


def test_manifest_that_is_no_json(built: Path) -> None:
    for raw in (b"{", b"\xff", b""):
        (built / "manifest.json").write_bytes(raw)
        with pytest.raises(DataError, match="is not JSON"):
            open_data(built)


def test_manifest_round_trip(built: Path) -> None:
    before = (built / "manifest.json").read_bytes()
    write_manifest(built, read_manifest(built))
    assert (built / "manifest.json").read_bytes() == before


@given(st.binary(max_size=3000))
def test_document_hashes_are_blake2b_of_start_and_whole(text: bytes) -> None:
    def oracle(data: bytes) -> int:
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

    assert document_hashes(text) == (oracle(text[:1024]), oracle(text))
    assert hash64(text) == oracle(text)
