"""Scores of a model that learns meanwhile: what they leave behind, what they may take, and that cheats are caught."""

import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_helpers import result_of, short, train_run

from epigram.config import parse_adapt
from epigram.data.dataset import DataFolder
from epigram.data.files import sha256_of
from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.evaluation import scorer
from epigram.evaluation.adapt import SgdAdapter
from epigram.evaluation.adapt_config import AdaptConfig, LoraConfig, SgdConfig
from epigram.evaluation.lora import LoraAdapter
from epigram.evaluation.windows import Method
from epigram.run import adapt as module
from epigram.run.adapt import Adaptation, OverTimeError, restored
from epigram.run.adapt_probe import probe_adapted
from epigram.run.export import over_budget
from epigram.run.score import score_model
from epigram.run.setup import scoring_losses
from epigram.run.weights import load_model

CONTEXT = Context(device=torch.device("cpu"))
METHOD = Method(name="sliding", seq_len=32, stride=16)
SETTINGS = {
    "sgd": AdaptConfig(kind="sgd", sgd=SgdConfig(chunk_tokens=64, lr=0.02, epochs=1, num_rows=4)),
    "lora": AdaptConfig(kind="lora", lora=LoraConfig(rank=2, alpha=4.0, lr=0.01, chunk_tokens=16)),
}
SMALL = (
    "score.seq_len=64", "score.stride=64", "score.adapt.sgd.chunk_tokens=512", "score.adapt.sgd.epochs=1",
    "score.adapt.lora.rank=2", "score.adapt.lora.chunk_tokens=64",
)  # fmt: skip


@pytest.fixture
def adaptation(finished: Path, request: pytest.FixtureRequest, data: DataFolder) -> Adaptation:
    model = load_model(finished, "cpu").gpt
    losses = scoring_losses(model, False, "auto", CONTEXT)
    return Adaptation(
        config=SETTINGS[request.param], model=model, losses=losses, context=CONTEXT, bos_id=data.tokenizer.bos_id
    )


both = pytest.mark.parametrize("adaptation", ["sgd", "lora"], indirect=True)
sgd = pytest.mark.parametrize("adaptation", ["sgd"], indirect=True)
lora = pytest.mark.parametrize("adaptation", ["lora"], indirect=True)


def score(adaptation: Adaptation, data: DataFolder, count: int = 300):
    tokens = data.stream("val")[: count + 1]
    tables = data.tokenizer.byte_tables()
    options = {"batch_tokens": 128, "expected_bytes": None, "byte_counts": None, "progress": False}
    return adaptation.score(tokens, tables, METHOD, **options)


# -- what it leaves behind ----------------------------------------------------------------------------------------


@both
def test_the_model_is_afterwards_as_it_was(adaptation: Adaptation, data: DataFolder) -> None:
    model, tokens = adaptation.model, data.stream("val")[:301]
    before = {name: p.clone() for name, p in model.named_parameters()}
    plain = scorer.token_nlls(model.nll, tokens, METHOD, device=CONTEXT.device, batch_tokens=128)
    found = score(adaptation, data)
    each = adaptation.nats(tokens, METHOD, 128)
    assert found.nats == pytest.approx(each.sum(dtype=np.float64), rel=1e-6) and found.tokens == 300
    assert np.abs(each - plain).max() > 1e-3, "it does learn"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    after = scorer.token_nlls(model.nll, tokens, METHOD, device=CONTEXT.device, batch_tokens=128)
    np.testing.assert_array_equal(after, plain)


def test_weights_come_back_after_a_failure() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.grad = grad = torch.ones(2, 2)
    model.bias.requires_grad_(False)
    before = model.weight.clone(), model.bias.clone()

    def fail() -> None:
        with restored(model, trains=True):
            assert model.bias.requires_grad and model.weight.grad is None
            with torch.no_grad():
                model.weight.mul_(2)
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert torch.equal(model.weight, before[0]) and torch.equal(model.bias, before[1])
    assert model.weight.grad is grad and model.weight.requires_grad and not model.bias.requires_grad


@sgd
def test_frozen_layers_keep_their_weights(adaptation: Adaptation, data: DataFolder) -> None:
    config = replace(adaptation.config, sgd=replace(adaptation.config.sgd, frozen_layers=2))
    model, adapter = adaptation.model, replace(adaptation, config=config)._sgd(METHOD)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with restored(model, trains=True):
        adapter.learn(data.stream("val")[:65].copy(), 0, 2)
        moved = {name: (p.detach() - before[name]).abs() for name, p in model.named_parameters()}
    for bank in ("banks.qkv", "banks.down", "attn_scale"):
        assert moved[bank][:2].max() == 0 and moved[bank][2:].amin(0).max() > 0, bank
    assert moved["embed"].max() > 0


# -- what it may take ---------------------------------------------------------------------------------------------


@both
def test_what_is_over_its_time_is_stopped(adaptation: Adaptation, data: DataFolder) -> None:
    before = [p.clone() for p in adaptation.model.parameters()]
    with pytest.raises(
        OverTimeError, match=r"adapted_\w+\) was stopped .* 0 s of budget.score_s are left: raise score"
    ):
        score(replace(adaptation, limit_s=0.001), data)
    assert all(torch.equal(p, old) for p, old in zip(adaptation.model.parameters(), before, strict=True))


def test_a_forecast_over_the_limit_ends_it_early(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pace = module._Pace(600.0, "sgd", CONTEXT)
    for seconds, share in ((40.0, 0.01), (55.0, 0.02)):  # the first chunk compiled; 15 s are too few to judge by
        now[0] = seconds
        pace(share)
    now[0] = 62.0
    with pytest.raises(OverTimeError, match="after 62.0 s, at 3 %: it would take 1129 s, and 600 s"):
        pace(0.03)
    enough = module._Pace(1200.0, "sgd", CONTEXT)
    for seconds, share in ((102.0, 0.01), (124.0, 0.03)):
        now[0] = seconds
        enough(share)


@pytest.mark.parametrize("kind", ["sgd", "lora"])
def test_a_run_that_adapts(kind: str, data_path: Path, tmp_path: Path) -> None:
    """Its result has both scores, the log names the method, and what cannot be done in time is a limit exceeded."""
    small = [*SMALL, f"score.adapt.kind={kind}", "score.methods=['sliding']", "budget.steps=2"]
    train_run(data_path, tmp_path / "run", *small)
    result = result_of(tmp_path / "run")
    rows = result["scores"]["quantized"]
    row, plain = rows[f"adapted_{kind}"], rows["sliding"]
    assert row["unadapted_bpb"] == plain["val_bpb"] and row["gain_bpb"] == plain["val_bpb"] - row["val_bpb"]
    assert row["gain_bpb"] != 0 and row["adapt"]["kind"] == kind and row["tokens"] == plain["tokens"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"final_quantized_adapted_{kind}_exact val_loss:{row['val_nats']:.8f}" in log
    spent = plain["score_s"] + row["score_s"]
    assert f"score_s:{spent:.3f}".rstrip("0") in log
    config = short(*small)
    limit = replace(config.budget, score_s=spent * 0.9)
    assert "scoring took" in over_budget(replace(config, budget=limit), result)[0]
    assert sha256_of(tmp_path / "run" / "model.epigram") == result["artifact_sha256"]


def test_a_run_without_time_to_adapt_keeps_its_other_scores(data_path: Path, tmp_path: Path, monkeypatch) -> None:
    def late(self, *arguments, **options):
        raise OverTimeError("no time was left")

    monkeypatch.setattr(Adaptation, "score", late)
    with pytest.raises(UserError, match="no time was left"):
        train_run(data_path, tmp_path / "run", *SMALL, "score.adapt.kind=sgd", "budget.steps=2")
    result = result_of(tmp_path / "run")
    assert result["status"] == "finished" and "sliding" in result["scores"]["quantized"]


# -- settings -----------------------------------------------------------------------------------------------------


def test_settings_of_the_command() -> None:
    found, limit_s = parse_adapt("sgd", ["score.adapt.sgd.lr=0.5", "budget.score_s=60"])
    assert (found.kind, found.sgd.lr, limit_s) == ("sgd", 0.5, 60.0)
    assert parse_adapt("none", []) == (AdaptConfig(), float("inf"))
    with pytest.raises(UserError, match="say --adapt sgd or --adapt lora"):
        parse_adapt("none", ["score.adapt.sgd.lr=0.5"])
    with pytest.raises(UserError, match="unknown key score.stride"):
        parse_adapt("sgd", ["score.stride=3"])


def test_a_recipe_that_cannot_adapt_says_why() -> None:
    with pytest.raises(UserError, match=r"adapt.kind = 'sgd' .* add sliding.*adapt.sgd.chunk_tokens = 9 is below"):
        short("score.adapt.kind=sgd", "score.methods=['blocks']", "score.adapt.sgd.chunk_tokens=9")
    with pytest.raises(UserError, match=r"frozen_layers = 99 is more than the \d+ layers"):
        short("score.adapt.sgd.frozen_layers=99")


@lora
def test_a_text_without_documents_is_refused(adaptation: Adaptation) -> None:
    with pytest.raises(UserError, match="the tokenizer has none: take sgd"):
        replace(adaptation, bos_id=-1)


def test_a_text_of_one_chunk_is_refused(finished: Path, data_path: Path) -> None:
    config = AdaptConfig(kind="sgd")
    with pytest.raises(UserError, match="nothing would be learned.*score.adapt.sgd.chunk_tokens = 32768"):
        score_model(finished, str(data_path), device="cpu", adapt=config, max_tokens=500)


# -- probes -------------------------------------------------------------------------------------------------------


def failed(adaptation: Adaptation, data: DataFolder) -> set[str]:
    found = probe_adapted(adaptation, data, METHOD, batch_tokens=128)
    return {finding.name for finding in found if not finding.passed}


@both
def test_an_honest_adapter_passes(adaptation: Adaptation, data: DataFolder) -> None:
    found = probe_adapted(adaptation, data, METHOD, batch_tokens=128)
    assert [finding.detail for finding in found if not finding.passed] == []
    assert len(found) == (3 if adaptation.config.kind == "sgd" else 4)


class Knowing(Adaptation):
    """It is handed the whole text, and lets its adapter know."""

    text = np.zeros(0, np.uint16)

    def nats(self, tokens, method, batch_tokens):
        Knowing.text = tokens
        return super().nats(tokens, method, batch_tokens)


def knowing(adaptation: Adaptation) -> Adaptation:
    return Knowing(**vars(adaptation))


@sgd
@pytest.mark.parametrize("first", [64, -1], ids=["the chunk that comes next", "all of the text"])
def test_sgd_on_what_is_not_scored_is_caught(adaptation: Adaptation, data: DataFolder, monkeypatch, first) -> None:
    class Leaky(SgdAdapter):
        def learn(self, tokens, chunk, num_chunks):
            start = (chunk + 1) * first if first > 0 else 0
            super().learn(Knowing.text[start : start + 65 if first > 0 else None].copy(), chunk, num_chunks)

    monkeypatch.setattr(module, "SgdAdapter", Leaky)
    assert failed(knowing(adaptation), data) == {"scored before learned"}


@sgd
def test_sgd_on_a_chunk_before_it_is_scored_is_caught(adaptation: Adaptation, data: DataFolder, monkeypatch) -> None:
    """The scorer releases every chunk before its windows are read, the last one too."""
    honest = scorer._released

    def early(nll, tokens, groups, method, device, batch_tokens, adapter, *rest):
        for number, group in enumerate(groups):
            first, end = group.scored
            if adapter is not None:
                adapter.learn(tokens[first : end + 1].copy(), number, len(groups))
            yield from honest(nll, tokens, [group], method, device, batch_tokens, None, *rest)

    monkeypatch.setattr(scorer, "_released", early)
    assert failed(adaptation, data) == {"scored before learned"}


@both
def test_an_adapter_that_does_nothing_proves_nothing(adaptation: Adaptation, data: DataFolder, monkeypatch) -> None:
    monkeypatch.setattr(SgdAdapter, "learn", lambda self, *released: None)
    monkeypatch.setattr(LoraAdapter, "learn", lambda self, *released: None)
    assert failed(adaptation, data) == {"something is learned"}


@lora
def test_adapters_that_are_carried_over_documents_are_caught(
    adaptation: Adaptation, data: DataFolder, monkeypatch
) -> None:
    class Carrying(LoraAdapter):
        def begin(self, num_documents):
            if not self._a or self._a["q"].shape[1] != num_documents:
                super().begin(num_documents)

    monkeypatch.setattr(module, "LoraAdapter", Carrying)
    assert "documents apart" in failed(adaptation, data)


@lora
def test_adapters_that_documents_share_are_caught(adaptation: Adaptation, data: DataFolder, monkeypatch) -> None:
    """Rows side by side learn from each other."""

    class Shared(LoraAdapter):
        def factors(self, num_rows):
            with torch.no_grad():
                for b in self._b.values():
                    b.copy_(b.mean(1, keepdim=True).expand_as(b))
            return super().factors(num_rows)

    monkeypatch.setattr(module, "LoraAdapter", Shared)
    assert "documents apart" in failed(adaptation, data)


@lora
def test_lora_on_a_chunk_before_it_is_scored_is_caught(adaptation: Adaptation, data: DataFolder, monkeypatch) -> None:
    """It learns the text's end, which the last chunk of the last document has."""

    class Leaky(LoraAdapter):
        def learn(self, tokens, num_new):
            end = np.broadcast_to(Knowing.text[-tokens.shape[1] :], tokens.shape)
            super().learn(end, num_new)

    monkeypatch.setattr(module, "LoraAdapter", Leaky)
    assert {"scored before learned", "documents apart"} <= failed(knowing(adaptation), data)


@sgd
def test_weights_that_stay_changed_are_caught(adaptation: Adaptation, data: DataFolder, monkeypatch) -> None:
    class Keeps(SgdAdapter):
        def learn(self, tokens, chunk, num_chunks):
            with torch.no_grad():
                self._parameters[0].add_(1e-3)

    @contextmanager
    def not_restored(model, *, trains):
        yield

    monkeypatch.setattr(module, "restored", not_restored)
    monkeypatch.setattr(module, "SgdAdapter", Keeps)
    assert "weights restored" in failed(adaptation, data)
