"""A model of transformed text: whoever uses it gives and gets text as it is written."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from run_helpers import result_of, train_run, write_text

import epigram
from epigram.artifact import tensors as artifact
from epigram.data.build import build
from epigram.data.dataset import open_data
from epigram.data.text_codec import TextCodec
from epigram.data.transforms import caseops
from epigram.errors import ArtifactError, UserError
from epigram.run.api import Model
from epigram.run.score import score_model
from epigram.run.submission import execute

TEXT = "NASA and McDonald see a dog. THE END É 日本"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformed")
    write_text(folder / "text.txt", 300, seed=1)
    build([folder / "text.txt"], folder / "data", vocab_size=512, transform="caseops", workers=1)
    train_run(folder / "data", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    return epigram.load(run, "cpu")


def test_the_transform_travels_with_the_weights(run: Path, model: Model, tmp_path: Path) -> None:
    assert model.transform == "caseops"
    assert result_of(run)["transform"] == "caseops"
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.epigram"))
    assert epigram.load(tmp_path / "run", "cpu").transform == "caseops"


def test_ids_are_those_of_the_builder(run: Path, model: Model) -> None:
    """A document of the folder, decoded to text and encoded again."""
    data = open_data(run.parent / "data")
    tokens = data.stream("val")
    ends = [*np.flatnonzero(tokens == data.tokenizer.bos_id)[1:].tolist(), len(tokens)]
    text = caseops.decode(data.tokenizer.decode(tokens[: ends[0]]))
    codec = TextCodec(model.tokenizer, model.transform)
    assert any(letter.isupper() for letter in text)
    assert codec.encode(text).tolist() == tokens[: ends[0]].tolist()
    assert codec.count_bytes(codec.encode(text)).tolist() == data.byte_counts("val")[1 : ends[0]].tolist()


def test_a_score_counts_the_bytes_of_the_text(run: Path, model: Model, tmp_path: Path, monkeypatch) -> None:
    found = model.score(TEXT)
    assert found.bytes.sum() == len(TEXT.encode())
    assert len(found.tokens) == len(model.logits(TEXT)) - 1
    monkeypatch.chdir(tmp_path)  # for the cache
    write_text(tmp_path / "new.txt", 60, seed=9)
    row = score_model(run, str(tmp_path / "new.txt"), methods=["blocks"], device="cpu")["scores"]["blocks"]
    (folder,) = (tmp_path / ".cache" / "epigram" / "data").glob("new.txt-*")
    data = open_data(folder)
    assert data.transform == "caseops"
    assert row["bytes"] == data.split_bytes("val") == len(data.text("val", 1 << 20))


def test_generated_text_is_as_it_is_written(model: Model, monkeypatch) -> None:
    ids = TextCodec(model.tokenizer, "caseops").encode(TEXT)[1:].tolist()
    monkeypatch.setattr("epigram.run.api.stream", lambda *_, **__: iter(ids))
    pieces = list(model.stream(""))
    assert "".join(pieces) == TEXT
    assert len(pieces) > 10
    assert model.generate("", stop=["Mc"]) == "NASA and "
    asked = []
    monkeypatch.setattr("epigram.run.api.stream", lambda _, prompt, *__, **___: iter(asked.append(prompt) or ids[:0]))
    model.generate("NASA")
    assert asked == [TextCodec(model.tokenizer, "caseops").encode("NASA").tolist()]


def test_a_word_in_capitals_goes_on_behind_the_prompt(model: Model, monkeypatch) -> None:
    ids = [model.tokenizer.pieces.index(letter) for letter in "sas"]
    monkeypatch.setattr("epigram.run.api.stream", lambda *_, **__: iter(ids))
    assert model.generate("NA") == "SAS"
    assert model.generate("Na") == "sas"


def test_what_cannot_be_represented(model: Model) -> None:
    with pytest.raises(UserError, match="cannot represent"):
        model.generate("half a pair: \ud800")


def test_made_up_data_for_a_script_can_be_scored(run: Path, finished: Path, tmp_path: Path) -> None:
    """`check --execute` trains on it: without counts of bytes a score of such a tokenizer's tokens is refused."""
    for name, folder in (("transformed", run), ("plain", finished)):
        proto = artifact.load(folder / "model.epigram").tokenizer_proto
        assert proto is not None
        data = open_data(execute._made_up(tmp_path / name, proto, 512))
        counts = data.byte_counts("val")
        assert (counts is None) == (name == "plain")
        assert counts is None or counts.shape == data.stream("val").shape


@pytest.mark.parametrize("name", ["rot13", "../evil", 7, None])
def test_an_unknown_transform_is_refused(run: Path, tmp_path: Path, name: object) -> None:
    held = artifact.load(run / "model.epigram")
    contents = artifact.Contents(
        model={**held.model, "transform": name}, tensors=held.tensors, tokenizer_proto=held.tokenizer_proto
    )
    artifact.save(tmp_path / "odd.epigram", contents)
    with pytest.raises(ArtifactError, match="names a text transform that this release does not know"):
        epigram.load(tmp_path / "odd.epigram")


def test_no_transform_changes_nothing(finished: Path) -> None:
    assert "transform" not in artifact.load(finished / "model.epigram").model
    assert "transform" not in result_of(finished)
    assert epigram.load(finished, "cpu").transform == ""
