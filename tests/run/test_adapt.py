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
from epigram.run.adapt_probe import probe_adapted, probe_tokens
from epigram.run.export import over_budget
from epigram.run.record import scoring_s
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
        OverTimeError, match=r"adapted_\w+\) was stopped .* 0.0 s of budget.score_s were left: raise score"
    ):
        score(replace(adaptation, limit_s=0.001), data)
    assert all(torch.equal(p, old) for p, old in zip(adaptation.model.parameters(), before, strict=True))


@lora
def test_documents_are_stopped_within_a_batch(adaptation: Adaptation, data: DataFolder, monkeypatch) -> None:
    """A second a forward pass: after two of some twenty, of one batch, it is clear that 3.5 s will not do."""
    now, model = [0.0], adaptation.model
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    nll, rows = model.nll, []

    def slow(inputs, targets, **options):
        if options["last"] is not None:
            now[0] += 1
            rows.append(len(inputs))
        return nll(inputs, targets, **options)

    monkeypatch.setattr(model, "nll", slow)
    monkeypatch.setattr(LoraAdapter, "learn", lambda self, tokens, num_new: None)
    with pytest.raises(OverTimeError, match=r"was stopped after 2.0 s, at \d+ %"):
        score(replace(adaptation, limit_s=3.5), data)
    stopped_at = len(rows)
    rows.clear()
    score(adaptation, data)
    assert stopped_at == 2 and len(rows) > 15


@both
def test_what_cannot_be_done_in_time_is_not_begun(adaptation: Adaptation, data: DataFolder, monkeypatch) -> None:
    """Windows of 32 by 16 read each token twice; documents in chunks of 16, here, about as often."""
    monkeypatch.setattr(module, "restored", lambda *a, **k: pytest.fail("begun"))
    for limit_s, plain_s in ((0.2, 3.0), (0.0, 0.0), (-1.0, 0.0)):
        with pytest.raises(
            OverTimeError, match=rf"not begun: .* {max(limit_s, 0):.1f} s of budget.score_s are left: r"
        ):
            score(replace(adaptation, limit_s=limit_s, plain_s=plain_s), data)
    monkeypatch.undo()
    assert score(replace(adaptation, limit_s=500.0, plain_s=100.0), data).tokens == 300


@sgd
def test_windows_are_read_once_as_they_were_without_adapting(adaptation: Adaptation) -> None:
    late = replace(adaptation, limit_s=9.9, plain_s=10.0)
    with pytest.raises(OverTimeError, match="take about 10.0 s, and 9.9 s"):
        late._require_time(300, [], METHOD)
    replace(late, limit_s=10.1)._require_time(300, [], METHOD)


@lora
def test_documents_are_read_as_often_as_their_chunks_say(adaptation: Adaptation) -> None:
    """One of 64 tokens in chunks of 16: 16 + 32 + 32 + 32 = 112, where windows of 32 by 16 read 128."""
    late = replace(adaptation, limit_s=1.11, plain_s=1.28)
    with pytest.raises(OverTimeError, match="was not begun"):
        late._require_time(64, [np.array([[0, 64]])], METHOD)
    replace(late, limit_s=1.13)._require_time(64, [np.array([[0, 64]])], METHOD)


def test_a_forecast_over_the_limit_ends_it_early(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pace = module._Pace(600.0, "sgd", CONTEXT)
    for seconds, share in ((40.0, 0.01), (55.0, 0.02)):  # the first chunk compiled; 15 s are too few to judge by
        now[0] = seconds
        pace(share)
    now[0] = 62.0
    with pytest.raises(OverTimeError, match="after 62.0 s, at 3 %: it would take 1129.0 s, and 600.0 s"):
        pace(0.03)
    now[0] = 100.0
    short_s = module._Pace(8.0, "lora", CONTEXT)  # two seconds are a quarter of it
    for seconds, share in ((101.0, 0.1), (102.9, 0.12)):
        now[0] = seconds
        short_s(share)
    now[0] = 103.1
    with pytest.raises(OverTimeError, match=r"after 3.1 s, at 15 %: it would take 38.8 s, and 8.0 s of budget"):
        short_s(0.15)
    now[0] = 62.0
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
        time.sleep(0.3)
        raise OverTimeError("no time was left")

    monkeypatch.setattr(Adaptation, "score", late)
    with pytest.raises(UserError, match="no time was left"):
        train_run(data_path, tmp_path / "run", *SMALL, "score.adapt.kind=sgd", "budget.steps=2")
    result = result_of(tmp_path / "run")
    assert result["status"] == "finished" and "sliding" in result["scores"]["quantized"]
    spent = scoring_s({"scores": result["scores"]})
    assert 0.25 < result["adapt_stopped_s"] < 5 and scoring_s(result) == spent + result["adapt_stopped_s"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"score_s:{round(scoring_s(result), 3)}" in log, "time that was spent for nothing was spent"
    config = short()
    limit = replace(config.budget, score_s=spent + 0.1)
    assert over_budget(replace(config, budget=limit), result) == [
        f"scoring took {scoring_s(result):.1f} s of {spent + 0.1:.1f} s", "no time was left"
    ]  # fmt: skip


# -- settings -----------------------------------------------------------------------------------------------------


def test_settings_of_the_command() -> None:
    found, limit_s = parse_adapt("sgd", ["score.adapt.sgd.lr=0.5", "budget.score_s=60"])
    assert (found.kind, found.sgd.lr, limit_s) == ("sgd", 0.5, 60.0)
    assert parse_adapt("none", []) == (AdaptConfig(), float("inf"))
    with pytest.raises(UserError, match="say --adapt sgd or --adapt lora"):
        parse_adapt("none", ["score.adapt.sgd.lr=0.5"])
    with pytest.raises(UserError, match="leave out --set score.stride"):
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
    assert len(found) == (4 if adaptation.config.kind == "sgd" else 5)


@both
@pytest.mark.parametrize("count", [64, 91, 130])
def test_a_short_text_is_probed_by_shorter_chunks(adaptation: Adaptation, data: DataFolder, count: int) -> None:
    lora = replace(adaptation.config.lora, chunk_tokens=48)
    adaptation = replace(adaptation, config=replace(adaptation.config, lora=lora))
    method = Method(name="sliding", seq_len=64, stride=16)
    found = probe_tokens(adaptation, data.stream("val", count), method, 512, batch_tokens=256)
    wrong = [finding.detail for finding in found if not finding.passed]
    assert wrong == [] or adaptation.config.kind == "sgd"


@both
def test_a_text_that_is_too_short_to_probe_says_so(adaptation: Adaptation, data: DataFolder) -> None:
    with pytest.raises(UserError, match="has 63 tokens.*at least 64"):
        probe_tokens(adaptation, data.stream("val", 63), METHOD, 512, batch_tokens=256)


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
    assert failed(knowing(adaptation), data) == {"scored before learned", "own token unseen"}


@sgd
def test_a_chunk_that_is_released_one_token_late_is_caught(
    adaptation: Adaptation, data: DataFolder, monkeypatch
) -> None:
    """It ends with the first token of the next one, whose own score is all that gains."""
    honest = scorer._released

    def released(nll, tokens, groups, method, device, batch_tokens, adapter, *rest):
        class More:
            def learn(self, some, number, count):
                first = groups[number].scored[0] + 1
                adapter.learn(tokens[first : first + len(some)].copy(), number, count)

        yield from honest(nll, tokens, groups, method, device, batch_tokens, More() if adapter else None, *rest)

    monkeypatch.setattr(scorer, "_released", released)
    assert failed(adaptation, data) == {"own token unseen"}


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
    assert failed(adaptation, data) == {"scored before learned", "own token unseen"}


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
