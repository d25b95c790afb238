"""The finished model in Python: generation, scores and logits, from a file, a run folder, a checkpoint."""

import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import saved_tensors

import epigram
from epigram.artifact import tensors as artifact
from epigram.data.tokenizer import Tokenizer
from epigram.errors import ArtifactError, UserError
from epigram.evaluation.scorer import score
from epigram.evaluation.windows import Method
from epigram.run.api import Model, _until, silent_ids

TEXTS = [
    "A dog counts the moon. Nobody sees seven letters.",
    " leading, and trailing ",
    "茶 — Señor Müller 🙂\n\n\ttabs",
    "x",
    "The old clock forgets its own name. " * 30,
]


@pytest.fixture(scope="module")
def model(finished: Path) -> Model:
    return epigram.load(finished / "model.epigram", "cpu")


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_run_folder_is_its_artifact(model: Model, finished: Path):
    same = epigram.load(str(finished))
    assert same.info["path"] == model.info["path"] == str(finished / "model.epigram")
    assert same.info["recipe"] == "smoke"
    assert same.info["provenance"]["kind"] == "train"
    assert same.context_len == 128
    assert all(a.equal(b) for a, b in zip(same.gpt.parameters(), model.gpt.parameters(), strict=True))


@pytest.mark.parametrize("place", ["run", "checkpoint"])
def test_a_checkpoint_is_the_averaged_float_model(finished: Path, tmp_path: Path, monkeypatch, place: str):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("*.epigram"))
    checkpoint = run / "checkpoints" / "step-00000008"
    found = epigram.load(run if place == "run" else checkpoint, "cpu")
    saved = saved_tensors(finished)
    for name, weights in found.gpt.state_dict().items():
        assert weights.equal(saved[f"average.average.{name}"]), name
    assert (found.info["step"], found.context_len) == (8, 128)
    assert found.generate("A dog", 3, temperature=0)
    monkeypatch.chdir(checkpoint.parent)
    assert epigram.load(checkpoint.name, "cpu").info["step"] == 8, "named from within its folder"


def test_what_is_no_setting_and_no_text(finished: Path):
    model = epigram.load(finished / "model.epigram", "cpu")
    with pytest.raises(TypeError, match="no setting temperatur: it has temperature, top_k, top_p, seed"):
        model.generate("A dog", temperatur=1)
    with pytest.raises(TypeError, match="not bytes: decode it first"):
        model.score(b"A dog")


def test_nothing_to_load(finished: Path, tmp_path: Path):
    with pytest.raises(UserError, match="there is no model at"):
        epigram.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a run folder nor a checkpoint"):
        epigram.load(tmp_path)
    with pytest.raises(ArtifactError, match=r"no \.epigram file"):
        epigram.load(finished / "config.toml")
    shutil.copy(finished / "config.toml", tmp_path)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        epigram.load(tmp_path)


def test_a_tokenizer_is_needed(finished: Path, tmp_path: Path):
    held = artifact.load(finished / "model.epigram")
    bare = artifact.Contents(model=held.model, tensors=held.tensors)
    artifact.save(tmp_path / "bare.epigram", bare)
    with pytest.raises(UserError, match="carries no tokenizer, and there is no tokenizer.model beside it"):
        epigram.load(tmp_path / "bare.epigram")
    shutil.copy(finished / "tokenizer.model", tmp_path)
    told = [epigram.load(path).generate("A dog", 20, seed=1) for path in (tmp_path / "bare.epigram", finished)]
    assert told[0] == told[1], "a run folder has one"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_dim": 130}, r"describes a model of [\d,]+ weights, but holds 162,565"),
        ({"model_dim": 10**9, "mlp_dim": 10**9}, r"no model that this release knows: .* weights: at most 2\^40"),
        ({"head_dim": 2**62}, r"weights: at most 2\^40"),
        ({"num_layers": 2**62}, r"weights: at most 2\^40"),
        *[({name: 10**20}, f"{name}: 10+ is out of range") for name in ("num_layers", "model_dim", "head_dim")],
        *[({name: 1e308}, f"{name}: 1e.308 is out of range") for name in ("mlp_slope", "softcap", "qk_gain")],
        ({"num_layers": 5}, "describes a model of"),
        ({"window": 0}, "no model that this release knows.*window"),
        ({"colour": "red"}, "unknown key colour"),
        ({"context_len": 0}, "no usable context length"),
        ({"context_len": True}, "no usable context length"),
        ({"context_len": 1e9}, "no usable context length"),
        ({"vocab_size": "many"}, "expected an integer"),
    ],
)
def test_a_file_that_describes_another_model(finished: Path, tmp_path: Path, change: dict, message: str):
    """Refused before memory of the described size is taken."""
    held = artifact.load(finished / "model.epigram")
    contents = artifact.Contents(
        model={**held.model, **change}, tensors=held.tensors, tokenizer_proto=held.tokenizer_proto
    )
    artifact.save(tmp_path / "odd.epigram", contents)
    with pytest.raises(ArtifactError, match=message):
        epigram.load(tmp_path / "odd.epigram")


@pytest.mark.parametrize("change", [{"mlp_slope": 9e37}, {"softcap": 1e-37}, {"rotary_base": 1e-37}])
def test_a_file_with_odd_numbers_gives_text_or_one_error(finished: Path, tmp_path: Path, change: dict):
    held = artifact.load(finished / "model.epigram")
    contents = artifact.Contents(
        model={**held.model, **change}, tensors=held.tensors, tokenizer_proto=held.tokenizer_proto
    )
    artifact.save(tmp_path / "odd.epigram", contents)
    odd = epigram.load(tmp_path / "odd.epigram")
    if "mlp_slope" in change:
        with pytest.raises(UserError, match="the model predicts no numbers"):
            odd.generate("A dog")
    else:
        assert odd.generate("A dog", 5)


def test_a_scale_that_is_no_number(finished: Path, tmp_path: Path):
    held = artifact.load(finished / "model.epigram")
    held.tensors["embed"].scale[7] = math.nan
    artifact.save(tmp_path / "odd.epigram", held)
    with pytest.raises(ArtifactError, match="odd.epigram: section 'scales' has numbers out of range"):
        epigram.load(tmp_path / "odd.epigram")


def test_a_tokenizer_of_another_size(finished: Path, tmp_path: Path):
    from epigram.data.tokenizer_training import train_tokenizer

    held = artifact.load(finished / "model.epigram")
    other = train_tokenizer(["one two three four five six seven"] * 20, 300)
    contents = artifact.Contents(model=held.model, tensors=held.tensors, tokenizer_proto=other.proto)
    artifact.save(tmp_path / "odd.epigram", contents)
    with pytest.raises(UserError, match="300 pieces, the model 512: they do not belong together"):
        epigram.load(tmp_path / "odd.epigram")


def test_an_unknown_device(finished: Path):
    with pytest.raises(UserError, match="there is no device 'gpu'"):
        epigram.load(finished, "gpu")


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("seq_len", "stride"), [(None, None), (16, 5)])
def test_score_is_that_of_the_scorer(model: Model, text: str, seq_len, stride):
    found = model.score(text, seq_len=seq_len, stride=stride)
    tokens = np.array([model.tokenizer.bos_id, *model.tokenizer.encode(text)], np.uint16)
    method = Method(name="sliding", seq_len=seq_len or 128, stride=stride or 16)
    expected = score(
        model.gpt.nll, tokens, model.tokenizer.byte_tables(), method, device=torch.device("cpu"), batch_tokens=256,
        expected_bytes=len(text.encode()),
    )  # fmt: skip
    assert found.tokens.tolist() == tokens[1:].tolist()
    assert found.bytes.sum() == len(text.encode()) == expected.bytes
    assert len(found.nats) == expected.tokens
    assert found.bpb == pytest.approx(expected.val_bpb, rel=1e-5)


@given(st.text(min_size=1, max_size=40))
def test_every_byte_of_any_text_is_counted_once(model: Model, text: str):
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(UserError, match="cannot represent"):
            model.score(text)
        return
    found = model.score(text)
    assert found.bytes.sum() == len(text.encode())
    assert np.isfinite(found.nats).all()
    assert found.bpb == pytest.approx(found.nats.sum(dtype=np.float64) / math.log(2) / len(text.encode()))


def test_scores_and_logits_agree(model: Model):
    text = "The river carries the moon."
    logits, scored = model.logits(text), model.score(text)
    assert logits.shape == (len(scored.tokens) + 1, 512)
    assert logits.dtype == torch.float32
    probabilities = torch.log_softmax(logits.double(), -1)
    nats = [-float(probabilities[i, token]) for i, token in enumerate(scored.tokens)]
    assert scored.nats == pytest.approx(nats, abs=1e-4)
    assert torch.logsumexp(probabilities, -1).abs().max() < 1e-9


def test_logits_look_only_back(model: Model):
    before, after = model.logits("A dog sees the moon"), model.logits("A dog sees nothing")
    same = len(model.tokenizer.encode("A dog sees")) + 1
    torch.testing.assert_close(before[:same], after[:same], rtol=0, atol=1e-5)


def test_nothing_to_score(model: Model):
    with pytest.raises(UserError, match="nothing to score"):
        model.score("")
    with pytest.raises(UserError, match="stride = 300 is over seq_len"):
        model.score("text", stride=300)
    for wrong in ({"seq_len": 0}, {"stride": 0}):
        with pytest.raises(UserError, match="must be at least 1|of at least 1"):
            model.score("text", **wrong)


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "A dog", "The old clock forgets its own name. " * 5])
def test_greedy_generation_is_the_argmax_of_uncached_logits(model: Model, prompt: str):
    tokenizer = model.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    made: list[int] = []
    while len(made) < 12:
        with torch.no_grad():
            logits = model.gpt.logits(model.gpt(torch.tensor([ids + made]), rope_len=128))[0, -1]
        logits[silent_ids(tokenizer)] = -math.inf
        made.append(int(logits.argmax()))
    assert len(ids + made) <= model.context_len
    assert model.generate(prompt, 12, temperature=0) == tokenizer.decode(ids + made)[len(prompt) :]


def test_a_seed_is_a_text(model: Model):
    first = model.generate("Nobody", 30, seed=3)
    assert model.generate("Nobody", 30, seed=3) == first
    assert model.generate("Nobody", 30, seed=4) != first
    assert "".join(model.stream("Nobody", 30, seed=3)) == first
    assert model.generate("Nobody", 30, seed=3, top_k=1) == model.generate("Nobody", 30, temperature=0)


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_valid_text_and_what_the_tokens_mean(model: Model, seed: int):
    """Hot sampling, so that bytes which are no text come up; a character is never split over pieces."""
    pieces = list(model.stream("茶", 60, temperature=5.0, seed=seed))
    assert all(pieces)
    assert "".join(pieces).encode("utf-8").decode("utf-8") == "".join(pieces)
    assert "".join(pieces) == model.generate("茶", 60, temperature=5.0, seed=seed)


def test_a_character_of_several_tokens_comes_in_one_piece(model: Model, monkeypatch):
    tokenizer = model.tokenizer
    ids = tokenizer.encode("a€🙂")
    assert len(ids) > 3, "byte pieces"
    monkeypatch.setattr("epigram.run.api.stream", lambda *a, **k: iter(ids))
    pieces = list(model.stream(""))
    assert "".join(pieces) == "a€🙂"
    assert {"€", "🙂"} <= set(pieces)
    monkeypatch.setattr("epigram.run.api.stream", lambda *a, **k: iter(ids[:-1]))
    assert model.generate("") == "a€\ufffd", "an unfinished character is shown as such"


def test_control_tokens_are_never_chosen(model: Model):
    silent = silent_ids(model.tokenizer)
    assert model.tokenizer.bos_id in silent
    assert model.tokenizer.unk_id in silent
    assert all(model.tokenizer.piece_bytes(id) == b"" for id in silent)
    assert len(model.generate("", 50, temperature=50.0).encode()) >= 50


@pytest.mark.parametrize(("start", "length"), [(0, 1), (1, 2), (17, 5), (5, 40)])
def test_it_ends_before_a_stop_text(model: Model, start: int, length: int):
    """Stops of one character and of many tokens, from any place of a text."""
    whole = model.generate("A dog", 60, seed=1)
    stop = whole[start : start + length]
    assert len(stop) == length
    assert model.generate("A dog", 60, seed=1, stop=[stop]) == whole[: whole.index(stop)]
    assert model.generate("A dog", 60, seed=1, stop=stop) == whole[: whole.index(stop)], (
        "one text is no list of letters"
    )
    assert model.generate("A dog", 60, seed=1, stop=["not in it", stop]) == whole[: whole.index(stop)]
    assert model.generate("A dog", 60, seed=1, stop=["not in it", "", stop + "!"]) == whole


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(0, 99))
def test_stop_texts_however_the_text_is_cut(text: str, stops: list[str], seed: int):
    draw = random.Random(seed)

    def pieces() -> Iterator[str]:
        start = 0
        while start < len(text):
            end = start + draw.randint(1, 3)
            yield text[start:end]
            start = end

    found = "".join(_until(stops, pieces()))
    places = [text.index(stop) for stop in stops if stop in text]
    if not places:
        assert found == text
        return
    assert not any(stop in found for stop in stops)
    assert text.startswith(found)
    assert any(text[len(found) :].startswith(stop) for stop in stops)


def test_text_is_given_out_as_soon_as_it_cannot_be_a_stop():
    pieces = _until(["xyz"], iter(["ab", "cx", "y", "q", "x"]))
    assert list(pieces) == ["ab", "c", "xyq", "x"]


def test_a_stop_ends_the_computation(model: Model, monkeypatch):
    """No token is computed after the one that completes the stop text."""
    asked = []

    def tokens(*arguments, **options) -> Iterator[int]:
        for id in model.tokenizer.encode("one two three"):
            asked.append(id)
            yield id

    monkeypatch.setattr("epigram.run.api.stream", tokens)
    model.generate("", stop=["o"])
    assert len(asked) < len(model.tokenizer.encode("one two three"))


def test_a_prompt_that_cannot_be_represented(finished: Path, model: Model):
    with pytest.raises(UserError, match=r"cannot represent .* not valid UTF-8 at character 14"):
        model.stream("half a pair: \ud800")
    with pytest.raises(UserError, match=r"not valid UTF-8 at character 1:"):  # as the shell's bytes come
        model.stream(b"\xff".decode("utf-8", "surrogateescape"))
    blind = Model(model.gpt, _without_bytes(model.tokenizer), 128, {})
    with pytest.raises(UserError, match="characters outside its alphabet"):
        blind.generate("茶")


def _without_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """A stand-in of the same size that knows the letters of one sentence only."""
    from unittest.mock import Mock

    return Mock(wraps=tokenizer, bos_id=tokenizer.bos_id, can_encode=lambda text: text.isascii())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0 must be 0"),
        ({"top_k": -1, "top_p": 2.0}, "top_k = -1 .*; top_p = 2.0"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"seed": 10**20}, r"seed = 10+ must be below 2\^63"),
    ],
)
def test_impossible_sampling(model: Model, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        model.stream("A", **settings)
    with pytest.raises(UserError, match="num_tokens = -1 must be at least 0"):
        model.generate("A", num_tokens=-1)
    assert model.generate("A", num_tokens=0) == ""


@pytest.mark.parametrize("settings", [{"temperature": 1e-40}, {"top_p": 1e-50}, {"top_k": 10**20, "seed": -7}])
def test_extreme_sampling(model: Model, settings: dict):
    found = model.generate("A dog", 12, **settings)
    assert found == model.generate("A dog", 12, temperature=0) or "top_k" in settings


def test_the_package_itself_offers_it():
    assert epigram.Model is Model
    assert set(epigram.__all__) == {"Model", "load", "__version__"} == set(dir(epigram))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = epigram.nonsense
