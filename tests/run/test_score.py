"""What a score says of the validation text it was made on, and of text that is scored whole."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_helpers import short, write_text

import epigram
from epigram.config import load_recipe
from epigram.data import published
from epigram.data.build import build
from epigram.data.cache import ensure_built
from epigram.data.check import check
from epigram.data.dataset import open_data
from epigram.data.published import Published
from epigram.data.shards import write_shard
from epigram.data.tokenizer_training import train_tokenizer
from epigram.dist.context import Context
from epigram.errors import DataError, UserError
from epigram.evaluation.windows import Method
from epigram.model.gpt import GPT
from epigram.run import choices, score, setup
from epigram.run.probe import probe
from epigram.run.score import score_model, score_split
from epigram.run.setup import Losses
from epigram.run.submission import entry
from epigram.run.weights import load_model

METHOD = Method(name="blocks", seq_len=16, stride=16)


def nll(inputs: torch.Tensor, targets: torch.Tensor, *, rope_len: int, last: int | None = None) -> torch.Tensor:
    return torch.ones(targets.shape if last is None else (len(targets), last))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards with the tokenizer of a published variant, whose validation split has 200 tokens."""
    tokenizer = train_tokenizer(["some words to learn from, and some more words " * 20], 300)
    variant = Published(
        name="tiny",
        repo="someone/shards",
        folder="tiny",
        tokenizer="tiny.model",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        val_tokens=(200, 200),
    )
    monkeypatch.setitem(published.PUBLISHED, "tiny", variant)
    (tmp_path / "tiny.model").write_bytes(tokenizer.proto)
    words = np.array([tokenizer.bos_id, *tokenizer.encode("some words to learn from")], np.uint16)
    write_shard(tmp_path / "fineweb_train_000000.bin", np.resize(words, 300), "train")
    write_shard(tmp_path / "fineweb_val_000000.bin", np.resize(words, 200), "val")
    return tmp_path


def row(folder: Path, **options) -> dict:
    context = Context(device=torch.device("cpu"))
    losses = Losses(windows=nll, stream=lambda method: nll)
    return score_split(losses, open_data(folder), METHOD, context, batch_tokens=64, **options)


def test_a_cpu_is_given_few_tokens_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the recipe says: a batch for a large GPU would not fit into memory. The score is the same."""
    sizes: list[int] = []

    def watched(inputs: torch.Tensor, targets: torch.Tensor, **options) -> torch.Tensor:
        sizes.append(inputs.numel())
        return nll(inputs, targets, **options)

    losses = Losses(windows=watched, stream=lambda method: nll)
    for most, largest in ((8192, 64), (32, 32), (1, 16)):
        monkeypatch.setattr(choices, "_CPU_TOKENS", most)
        sizes.clear()
        found = score_split(losses, open_data(folder), METHOD, Context(), batch_tokens=64)
        assert max(sizes) == largest
        assert (found["tokens"], found["val_nats"]) == (199, 1.0)


def test_a_score_names_the_published_split(folder: Path) -> None:
    found = row(folder)
    assert found["tokens"] == 199
    assert found["validation"].startswith("published tiny (200 tokens, sha256 ")
    assert "validation" not in row(folder, split="train")


def test_a_score_on_another_split_says_so_or_is_not_made(folder: Path) -> None:
    path = folder / "fineweb_val_000000.bin"
    write_shard(path, open_data(folder).stream("val")[:150], "val")
    with pytest.raises(DataError, match="tiny has 200 tokens, and this one has 150"):
        row(folder)
    check(folder, allow_other_validation=True)
    found = row(folder)
    assert found["tokens"] == 149
    assert found["validation"].startswith(
        "NOT the published one, allowed by choice: the validation split of tiny has 200"
    )


def test_text_to_train_on_is_scored_by_the_bytes_before_its_transform(tmp_path: Path) -> None:
    """No sidecar is written for it, and by the byte tables each mark would be three bytes of text."""
    write_text(tmp_path / "a.txt", 100, seed=4)
    built = build([tmp_path / "a.txt"], tmp_path / "out", vocab_size=512, transform="caseops", workers=1)
    data = open_data(built.path)
    for most in (0, 500):
        found = row(built.path, split="train", max_tokens=most)
        text = data.text("train", most + 1 if most else data.num_tokens("train"))
        assert found["bytes"] == len(text)
        assert found["val_bpb"] == pytest.approx(found["tokens"] / math.log(2) / len(text))
    context, model = Context(), GPT(replace(load_recipe("smoke").model, vocab_size=data.tokenizer.vocab_size))
    model.initialize(0)
    losses = setup.scoring_losses(model, False, "auto", context)
    found = probe(losses, data, METHOD, context, dtype=torch.float32, batch_tokens=64, split="train")
    (told,) = [one for one in found if one.name == "bytes of the text"]
    assert told.passed and "before its transform" in told.detail


@pytest.mark.parametrize("paragraphs", [0, 200])
def test_a_text_is_scored_whole_as_from_python(finished: Path, tmp_path: Path, monkeypatch, paragraphs: int) -> None:
    """One document, however long it is: nothing is held out, and no cut begins another."""
    monkeypatch.chdir(tmp_path)  # for the cache
    path = tmp_path / "a.txt"
    write_text(path, paragraphs, seed=3)
    if not paragraphs:
        path.write_text("A dog forgets the old moon.")
    found = score_model(finished, str(path), methods=["sliding"], device="cpu")
    expected = epigram.load(finished, "cpu").score(path.read_text())
    row = found["scores"]["sliding"]
    assert (row["tokens"], row["bytes"]) == (len(expected.tokens), path.stat().st_size)
    assert row["val_bpb"] == pytest.approx(expected.bpb, rel=1e-6)


def test_mistakes_come_out_before_the_work(finished: Path, data_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(score, "score_split", lambda *a, **k: pytest.fail("scored"))
    for methods, stride, message in ((["blocks", "foo"], None, "foo"), (["blocks", "sliding"], 1000, "1000")):
        with pytest.raises(UserError, match=message):
            score_model(finished, str(data_path), methods=methods, stride=stride, device="cpu")


def test_a_score_needs_the_shards_of_its_split_as_they_were_built(
    finished: Path, data_path: Path, tmp_path: Path
) -> None:
    """And no others: whoever checks a score need not have the text to train on."""
    data = tmp_path / "data"
    shutil.copytree(data_path, data)
    for shard in data.glob("fineweb_train_*.bin"):
        shard.unlink()
    rows = [
        score_model(finished, str(place), methods=("blocks",), device="cpu")["scores"] for place in (data_path, data)
    ]
    assert rows[0]["blocks"]["val_nats"] == rows[1]["blocks"]["val_nats"]
    with pytest.raises(DataError, match=r"fineweb_train_000000\.bin cannot be read"):
        score_model(finished, str(data), split="train", device="cpu")
    (shard,) = data.glob("fineweb_val_0*.bin")
    raw = bytearray(shard.read_bytes())
    raw[-2] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=r"fineweb_val_000000\.bin is not the file that the manifest describes"):
        score_model(finished, str(data), methods=("blocks",), device="cpu")


def test_a_script_scores_as_its_recipe_says(finished: Path, data_path: Path, monkeypatch) -> None:
    """Also a recipe without all methods, whose settings for the others nobody reads; and in its own precision."""
    config = short('score.methods=["blocks", "sliding"]', "run.precision=bfloat16")
    monkeypatch.setattr(entry, "the_recipe", lambda overrides: config)
    seen, real = [], score.load_model
    monkeypatch.setattr(score, "load_model", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    found = entry.score_artifact(finished / "model.epigram", str(data_path), "cpu", ())
    assert list(found["scores"]) == ["blocks", "sliding"]
    assert seen[0].gpt.compute_dtype == torch.bfloat16


def test_a_run_is_scored_in_its_own_precision(finished: Path, tmp_path: Path) -> None:
    """From its folder and from its checkpoints; a file alone does not know it."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace('precision = "auto"', 'precision = "bfloat16"'))
    places = {run: "bfloat16", run / "model.epigram": "float32", next((run / "checkpoints").iterdir()): "bfloat16"}
    for path, precision in places.items():
        assert load_model(path, "cpu").gpt.compute_dtype == getattr(torch, precision)
    assert load_model(run, "cpu", precision="float32").gpt.compute_dtype == torch.float32


def test_a_method_named_twice_is_scored_once(finished: Path, data_path: Path, monkeypatch) -> None:
    calls, score_split = [], score.score_split
    monkeypatch.setattr(score, "score_split", lambda *a, **k: calls.append(a) or score_split(*a, **k))
    found = score_model(finished, str(data_path), methods=["blocks", "blocks"], max_tokens=200, device="cpu")
    assert (len(calls), list(found["scores"])) == (1, ["blocks"])


def test_windows_longer_than_training_are_told(finished: Path, data_path: Path, capsys) -> None:
    warning = "windows of 256 tokens are longer than any that the model was trained on (128)"
    for seq_len in (128, 256):
        score_model(finished, str(data_path), methods=["blocks"], seq_len=seq_len, max_tokens=600, device="cpu")
        assert (warning in capsys.readouterr().err) == (seq_len == 256)


def test_windows_of_a_rotary_base_that_was_not_trained_are_told(finished: Path, tmp_path: Path) -> None:
    """A model that was trained at 2048 and 6144 knows the bases of these lengths alone."""
    config = load_recipe("pr1212").model
    told = {length: score.unlike_training(length, {2048, 6144}, config) for length in (512, 2048, 4096, 6144, 8192)}
    assert (told[2048], told[6144]) == (None, None)
    assert all(
        "another rotary base" in str(told[length]) and "2,048 and 6,144" in str(told[length]) for length in (512, 4096)
    )
    assert "longer than any" in str(told[8192])
    assert score.unlike_training(512, {1024}, config) is None, "below the reference there is one base"
    assert score.unlike_training(512, {2048}, replace(config, rotary_scaling="none")) is None
    checkpoint = next((finished / "checkpoints").iterdir())
    assert [score._trained_lens(path) for path in (finished, finished / "model.epigram", checkpoint)] == [{64, 128}] * 3
    assert score._trained_lens(tmp_path / "model.epigram") == set()
    (tmp_path / "config.toml").write_text("another = 'program'")
    assert score._trained_lens(tmp_path / "model.epigram") == set()


def test_every_document_is_scored(finished: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [f"{number}. A dog sees the moon." for number in range(9)] * 2  # repeated ones too
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    row = score_model(finished, "a.jsonl", methods=["blocks"], device="cpu")["scores"]["blocks"]
    tokenizer = epigram.load(finished, "cpu").tokenizer
    assert row["tokens"] == sum(1 + len(tokenizer.encode(one)) for one in texts) - 1
    assert row["bytes"] == sum(map(len, texts))


def test_of_a_folder_that_names_its_splits_the_validation_text_is_scored(finished: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name, text in (("train", "The old clock."), ("val", "A dog sees the moon."), ("test", "Nobody.")):
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    row = score_model(finished, "in", methods=["blocks"], device="cpu")["scores"]["blocks"]
    assert row["bytes"] == len("A dog sees the moon.")


def test_a_text_that_the_run_learned_from_is_told(finished: Path, data_path: Path, tmp_path: Path, monkeypatch, capsys):
    """In a file whose first piece was trained on or held out, and as single documents; not text that is held out."""
    monkeypatch.chdir(tmp_path)
    data = open_data(data_path)

    def warning(name: str, *texts: bytes) -> str:
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / name / f"{number}.txt").write_bytes(text)
        score_model(finished, name, methods=["blocks"], max_tokens=50, device="cpu")
        return next((line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")), "")

    def first(split: str) -> bytes:
        """The first document of a split."""
        tokens = data.stream(split)
        ends = [*np.flatnonzero(tokens == data.tokenizer.bos_id)[1:].tolist(), len(tokens)]
        return data.tokenizer.decode_bytes(tokens[: ends[0]])

    assert "1 of 2 documents begin like text that this run learned from" in warning("a", first("train"), b"Another.")
    assert f"what was held out is scored by --data {data_path}" in warning("b", first("train") + b"And on.")
    assert "1 of 1 documents" in warning("c", first("val") + first("train"))
    assert warning("d", first("val"), b"Another.") == ""
    (tmp_path / "model.epigram").write_bytes((finished / "model.epigram").read_bytes())
    score_model(tmp_path / "model.epigram", "a", methods=["blocks"], max_tokens=50, device="cpu")
    assert "warning" not in capsys.readouterr().err, "a file does not say what its model learned from"


def test_text_to_train_on_and_to_score_is_kept_apart(finished: Path, tmp_path: Path) -> None:
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    write_text(path, 200, seed=3)
    for _ in range(2):  # the second time out of the cache
        split = ensure_built(path, cache, tokenizer_file=finished / "tokenizer.model").data
        whole = ensure_built(path, cache, tokenizer_file=finished / "tokenizer.model", for_score=True).data
        assert split.split_bytes("train") + split.split_bytes("val") == path.stat().st_size
        assert split.split_bytes("train") > 0
        assert (whole.split_bytes("val"), whole.split_bytes("train")) == (path.stat().st_size, 0)
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 2


def test_a_text_without_anything_to_score(finished: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"there is no text to score in a\.txt"):
        score_model(finished, "a.txt", device="cpu")


@pytest.mark.parametrize(
    ("device", "compiled", "pays"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_scores_are_compiled_where_that_pays(device: str, compiled: bool, pays: bool, monkeypatch: pytest.MonkeyPatch):
    model, prepared = GPT(load_recipe("smoke").model), []
    monkeypatch.setattr(setup, "compile_shapes", lambda function: prepared.append(function) or function)
    losses = setup.scoring_losses(model, compiled, "auto", Context(device=torch.device(device)))
    assert prepared == ([model.nll, model.loss] if pays else [])
    assert (losses.windows, losses.learning) == (model.nll, model.loss)
