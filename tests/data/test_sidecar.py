"""Text that was transformed: a data folder counts the bytes of the text itself, and so does its score."""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import make_documents
from hypothesis import given
from hypothesis import strategies as st

from epigram import plugin
from epigram.data.build import build
from epigram.data.check import check
from epigram.data.dataset import DataFolder, open_data
from epigram.data.shards import open_shard, write_shard
from epigram.data.tokenizer import Tokenizer
from epigram.data.transforms import caseops
from epigram.data.transforms.base import PACKAGE as TRANSFORMS
from epigram.errors import DataError, UserError
from epigram.evaluation.bpb import count_bytes
from epigram.evaluation.scorer import score
from epigram.evaluation.windows import Method

TEXTS = [
    *make_documents(50, seed=6),
    "NASA, McDonald and the IPhone É 日本",
    f"marks {caseops.MARKS} in it: X{caseops.TITLE}Y",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    folder = tmp_path_factory.mktemp("sidecar")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXTS))
    (folder / "val.jsonl").write_text("".join(json.dumps({"text": one + " Val"}) + "\n" for one in TEXTS))
    built = build(
        [folder / "a.jsonl"],
        folder / "out",
        val_sources=[folder / "val.jsonl"],
        vocab_size=420,
        shard_tokens=2000,
        transform="caseops",
    )
    return open_data(built.path)


def test_the_folder(data: DataFolder) -> None:
    assert check(data.path) == []
    val_text = "".join(one + " Val" for one in TEXTS)
    counts = data.byte_counts("val")
    assert counts is not None and len(counts) == len(data.stream("val"))
    assert int(counts.sum()) == data.split_bytes("val") == len(val_text.encode())
    assert [path.name for path in sorted(data.path.glob("fineweb_val_bytes_*"))] == [
        f"fineweb_val_bytes_{i:06d}.bin" for i in range(len(data.split("val")))
    ]
    assert data.text("val", 10**9) == val_text.encode()
    assert data.text("train", 40) == "".join(TEXTS).encode()[: len(data.text("train", 40))]
    marks = [data.tokenizer.pieces.index(mark) for mark in caseops.MARKS]
    assert set(marks) <= set(data.stream("val").tolist())


def test_what_has_no_sidecar_is_counted_from_its_tokens(data: DataFolder) -> None:
    """As train, for which none is written: as the builder counted val, wherever the tokens are cut."""
    written, bare = data.byte_counts("val"), replace(data, byte_count_shards={})
    for most in (None, 1, 2, *range(3, len(written), 97), len(written) - 1):
        assert np.array_equal(bare.byte_counts("val", most), written[:most])
    counts, ends = data.byte_counts("train"), np.flatnonzero(data.stream("train") == data.tokenizer.bos_id)
    assert len(counts) == data.num_tokens("train")
    assert np.add.reduceat(counts, ends, dtype=np.int64).tolist() == [len(one.encode()) for one in TEXTS]
    assert int(counts.sum()) == data.split_bytes("train")


def nll(inputs: torch.Tensor, targets: torch.Tensor, *, rope_len: int, last: int | None = None) -> torch.Tensor:
    losses = 1.0 + 0.01 * targets.float() + 0.001 * inputs.float()
    return losses if last is None else losses[:, -last:]


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_scorer_divides_by_the_bytes_of_the_text(data: DataFolder, world_size: int) -> None:
    tokens, tables = data.stream("val"), data.tokenizer.byte_tables()
    options = {"device": torch.device("cpu"), "batch_tokens": 256, "progress": False}
    method = Method(name="sliding", seq_len=32, stride=8)
    parts = [
        score(
            nll,
            tokens,
            tables,
            method,
            expected_bytes=data.split_bytes("val"),
            byte_counts=data.byte_counts("val"),
            rank=rank,
            world_size=world_size,
            **options,
        )
        for rank in range(world_size)
    ]
    found = sum(parts[1:], parts[0])
    text_bytes = sum(len((one + " Val").encode()) for one in TEXTS)
    nats = float((1.0 + 0.01 * tokens[1:].astype(np.float64) + 0.001 * tokens[:-1]).sum())
    assert found.bytes == text_bytes < count_bytes(tokens, tables)  # the marks would make the score too good
    assert found.val_bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    with pytest.raises(DataError, match="the manifest says"):
        score(nll, tokens, tables, method, expected_bytes=data.split_bytes("val"), **options)


@given(st.integers(0, 30), st.integers(0, 30))
def test_counts_of_a_stretch_are_those_of_its_targets(first: int, length: int) -> None:
    draw = np.random.default_rng(first + 100 * length)
    tokens, counts = draw.integers(0, 9, 70), draw.integers(0, 5, 70).astype(np.uint16)
    end = first + length
    assert count_bytes(tokens, None, first, end, counts) == sum(int(counts[t + 1]) for t in range(first, end))


def test_counts_of_another_stream_are_refused(data: DataFolder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="byte counts for 3 tokens, and 4"):
        count_bytes(np.zeros(4, np.uint16), None, byte_counts=np.zeros(3, np.uint16))
    copy = tmp_path / "copy"
    shutil.copytree(data.path, copy)
    (copy / "manifest.json").unlink()  # as published: the pattern of the shards matches the byte counts too
    bare = open_data(copy)
    assert np.array_equal(bare.stream("val"), data.stream("val"))
    assert np.array_equal(bare.byte_counts("val"), data.byte_counts("val"))
    first = copy / "fineweb_val_bytes_000000.bin"
    write_shard(first, open_shard(first, "val").read()[:-1], "val")
    with pytest.raises(DataError, match="restore them, or build the data again"):
        open_data(copy).byte_counts("val")


def test_marks_without_a_manifest_take_a_sidecar(data: DataFolder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Nothing says that the text was transformed but the tokenizer, which has the marks."""
    copy = tmp_path / "copy"
    shutil.copytree(data.path, copy)
    (copy / "manifest.json").unlink()
    assert [one.text for one in check(copy) if one.is_error] == []
    for path in copy.glob("*_val_bytes_*"):
        path.unlink()
    for split in ("train", "val"):
        with pytest.raises(DataError, match=rf"has the marks of caseops.* no \*_{split}_bytes_\*\.bin .*: put those"):
            open_data(copy).byte_counts(split)
    assert ["has the marks of caseops" in one.text for one in check(copy) if one.is_error] == [True]
    (copy / "other.model").write_bytes(tokenizer.proto)  # it has no marks
    assert open_data(copy, copy / "other.model").byte_counts("val") is None


def test_counts_of_any_name_are_no_tokens(data: DataFolder, tmp_path: Path) -> None:
    """Shards need not be called as ours are, and byte counts of train are not to be trained on."""
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(data.tokenizer_path, copy)
    for split in ("train", "val"):
        for shard in data.split(split):
            shutil.copy(shard.path, copy / shard.path.name.replace("fineweb", "mine"))
    for index, shard in enumerate(data.split("train")):
        write_shard(copy / f"mine_train_bytes_{index:06d}.bin", np.full(shard.num_tokens, 3, np.uint16), "train")
    for counts in data.byte_count_shards["val"]:
        shutil.copy(counts.path, copy / counts.path.name.replace("fineweb", "mine"))
    bare = open_data(copy)
    for split in ("train", "val"):
        assert np.array_equal(bare.stream(split), data.stream(split))
    assert np.array_equal(bare.byte_counts("val"), data.byte_counts("val"))
    assert bare.byte_counts("train").tolist() == [3] * data.num_tokens("train")


def test_check_sees_wrong_counts(data: DataFolder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data.path, copy)
    path = copy / "fineweb_val_bytes_000000.bin"
    counts = open_shard(path, "val").read()
    counts[5] += 1
    write_shard(path, counts, "val")
    assert any("fineweb_val_bytes_000000.bin is not the file" in finding.text for finding in check(copy))
    values = json.loads((copy / "manifest.json").read_text())
    values["splits"]["val"]["byte_counts"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(values))
    assert any("1 documents have byte counts that are not those of their text" in one.text for one in check(copy))


def test_a_tokenizer_without_the_marks_is_refused(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "given.model").write_bytes(tokenizer.proto)
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    with pytest.raises(UserError, match=r"no pieces for U\+E001, U\+E002, U\+E003, U\+E004, the marks of .* caseops"):
        build([tmp_path / "a.txt"], tmp_path / "out", tokenizer_file=tmp_path / "given.model", transform="caseops")
    names = ", ".join(plugin.names(TRANSFORMS))
    with pytest.raises(UserError, match=f"there is no 'lower' in transforms: choose one of {names}"):
        build([tmp_path / "a.txt"], tmp_path / "out", transform="lower")


def test_normalisation_comes_first(tmp_path: Path) -> None:
    """Wide letters become plain capitals, which are then marked; the score counts the normalised text."""
    texts = [*TEXTS[:-1], "\uff26\uff35\uff2c\uff2c Width  Letters É"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    built = build(
        [tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=420, normalization="nmt_nfkc", transform="caseops"
    )
    assert check(built.path) == []
    text = (open_data(built.path).text("train", 10**9) + open_data(built.path).text("val", 10**9)).decode()
    assert "FULL Width Letters É" in text
