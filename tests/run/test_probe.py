"""The probes pass an honest model in every method, and each catches what it is for."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from epigram.data.dataset import DataFolder
from epigram.data.tokenizer import Tokenizer
from epigram.dist.context import Context
from epigram.evaluation import passes, probes, scorer, windows
from epigram.evaluation.bpb import Score
from epigram.evaluation.probes import Finding
from epigram.evaluation.windows import METHODS, Method, StreamingConfig
from epigram.kernels.base import PLAIN
from epigram.kernels.front import smear
from epigram.model import gpt
from epigram.model.cache import Cache
from epigram.model.gpt import GPT
from epigram.run import choices, setup
from epigram.run import probe as module
from epigram.run import score as score_module
from epigram.run.probe import ProbeError, check, probe
from epigram.run.score import score_model
from epigram.run.setup import Losses, scoring_losses
from epigram.run.weights import load_model

CONTEXT = Context(device=torch.device("cpu"))
SEQ_LEN = 32


def method(name: str) -> Method:
    stride = {"blocks": SEQ_LEN, "sliding": 8, "streaming": 1}[name]
    return Method(name=name, seq_len=SEQ_LEN, stride=stride, streaming=StreamingConfig(overlap=1))


@pytest.fixture
def model(finished: Path) -> GPT:
    return load_model(finished, "cpu").gpt


@pytest.fixture
def isolated(model: GPT) -> GPT:
    """The same weights, in a model that keeps documents apart."""
    apart = GPT(replace(model.config, documents="isolated"))
    apart.load_state_dict(model.state_dict())
    return apart.requires_grad_(False)


def probed(losses: Losses, data: DataFolder, name: str, isolated: bool = False) -> dict[str, Finding]:
    found = probe(losses, data, method(name), CONTEXT, dtype=torch.float32, batch_tokens=128, isolated=isolated)
    return {finding.name: finding for finding in found}


def failed(losses: Losses, data: DataFolder, name: str, isolated: bool = False) -> set[str]:
    return {finding.name for finding in probed(losses, data, name, isolated).values() if not finding.passed}


def honest(model: GPT) -> Losses:
    return scoring_losses(model, False, "auto", CONTEXT)


def wrapped(losses: Losses, change) -> Losses:
    """`change(inputs, targets, nats)` on what every forward returns."""

    def windows_(inputs, targets, *, rope_len, last):
        nats = change(inputs, targets, losses.windows(inputs, targets, rope_len=rope_len, last=None))
        return nats if last is None else nats[:, -last:]

    def stream(how):
        read = losses.stream(how)
        return lambda inputs, targets: change(inputs, targets, read(inputs, targets))

    return Losses(windows=windows_, stream=stream)


@pytest.mark.parametrize("name", METHODS)
def test_an_honest_score_passes(model: GPT, data: DataFolder, name: str) -> None:
    found = probed(honest(model), data, name)
    assert [finding.detail for finding in found.values() if not finding.passed] == []
    assert len(found) == 6
    check({name: list(found.values())})


@pytest.mark.parametrize("name", METHODS)
def test_isolated_documents_pass(isolated: GPT, data: DataFolder, name: str) -> None:
    found = probed(honest(isolated), data, name, isolated=True)
    assert [finding.detail for finding in found.values() if not finding.passed] == []
    assert len(found) == 7


@pytest.mark.parametrize("name", METHODS)
def test_a_promise_that_is_not_kept_is_caught(model: GPT, data: DataFolder, name: str) -> None:
    assert failed(honest(model), data, name, isolated=True) == {"isolation"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("through", ["smear", "bigram", "attention"])
def test_documents_that_leak_by_one_way_alone_are_caught(
    isolated: GPT, data: DataFolder, through: str, name: str, monkeypatch
) -> None:
    """And nothing else is wrong with such a model."""
    if through == "smear":
        isolated.kernels = replace(PLAIN, enter=lambda *arguments: PLAIN.enter(*arguments[:5]))
        monkeypatch.setattr(gpt, "smear", lambda x, gate, before, starts: smear(x, gate, before))
    elif through == "bigram":
        isolated.bigram._reset_id = -1
    else:
        monkeypatch.setattr(gpt, "within", lambda attend, reach: attend)
    assert failed(honest(isolated), data, name, isolated=True) == {"isolation"}


@pytest.mark.parametrize("forgets", ["where the document began", "that it began with the chunk"])
def test_a_cache_that_leaks_between_documents_is_caught(isolated: GPT, data: DataFolder, forgets: str) -> None:
    """A document that lies in two chunks sees in the second one what its first one was kept from; or the first of a
    chunk gets the embedding before it."""

    class Leaky(Cache):
        def advance(self, tokens, reach):
            super().advance(tokens, reach)
            self.reach = torch.full_like(self.reach, self.position - 1)

    def stream(how):
        cache = Leaky(isolated.config, how.seq_len)
        if forgets == "where the document began":
            return partial(isolated.nll, cache=cache)
        cache = Cache(isolated.config, how.seq_len)

        def step(inputs, targets):
            begun, cache.previous_embedding = inputs[:, 0] == isolated.config.bos_id, cache.previous_embedding
            hint = 0.0 if cache.previous_embedding is None else 1e-3 * cache.previous_embedding.sum(-1)
            return isolated.nll(inputs, targets, cache=cache) + hint * begun[:, None]

        return step

    assert failed(replace(honest(isolated), stream=stream), data, "streaming", isolated=True) == {"isolation"}


@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_sees_the_next_token_is_caught(model: GPT, data: DataFolder, name: str) -> None:
    """Attention with a mask that is one position too wide."""

    model.attend = model.attend_window = one_ahead
    losses = honest(model)

    def stream(how):
        return partial(model.nll, cache=Cache(model.config, how.seq_len, attend=one_ahead))

    assert "causality" in failed(replace(losses, stream=stream), data, name)


def one_ahead(q, k, v, window):
    """Attention that sees everything before it and the next position."""
    before, groups = k.shape[1] - q.shape[1], q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    seen = torch.arange(k.shape[1]) <= torch.arange(before, k.shape[1])[:, None] + 1
    return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen).transpose(
        1, 2
    )


def ahead(x: torch.Tensor) -> torch.Tensor:
    """(B, T, ...) one position further on, zeros at the end."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("through", ["bigram", "smear", "one windowed layer", "the last state"])
def test_a_model_that_sees_just_the_token_it_foretells_is_caught(
    model: GPT, data: DataFolder, through: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One position too far and no further, by one way alone (parameter-golf #770 for the bigram table)."""
    if through == "bigram":
        buckets = model.bigram.buckets
        monkeypatch.setattr(model.bigram, "buckets", lambda tokens, before: buckets(ahead(tokens), before))
    elif through == "smear":
        embed = model._embed
        monkeypatch.setattr(model, "_embed", lambda *args: (lambda x: x + 0.05 * ahead(x))(embed(*args)))
    elif through == "the last state":
        forward = model.forward

        def peeking(tokens, *args, **settings):
            x = forward(tokens, *args, **settings)
            return x + 0.1 * ahead(model.embed[tokens])[:, -x.shape[1] :]

        monkeypatch.setattr(model, "forward", peeking)
    elif name == "streaming":  # whose windowed layers have attention of their own
        monkeypatch.setattr(setup, "stream_attention", lambda *_: (one_ahead, ""))
    else:
        model.attend_window = one_ahead
        assert len(model.config.window_layers) == 1
    assert "own token unseen" in failed(honest(model), data, name)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_looks_at_its_target_is_caught(model: GPT, data: DataFolder, name: str) -> None:
    """It knows some tokens when it sees them: causal, but no distribution."""
    cheap = wrapped(honest(model), lambda inputs, targets, nats: torch.where(targets % 7 == 0, 0.5 * nats, nats))
    assert failed(cheap, data, name) == {"normalisation"}


@pytest.mark.parametrize("name", METHODS)
def test_a_model_whose_rows_see_each_other_is_caught(model: GPT, data: DataFolder, name: str) -> None:
    """What a token costs depends on the batch: a later window gives an earlier one away."""
    mixing = wrapped(honest(model), lambda inputs, targets, nats: nats + 1e-3 * targets[-1:].float().mean())
    assert {"causality", "same for any batch and processes"} <= failed(mixing, data, name)


def test_a_model_that_reads_no_text_is_caught(model: GPT, data: DataFolder) -> None:
    constant = wrapped(honest(model), lambda inputs, targets, nats: torch.ones_like(nats))
    assert "causality" in failed(constant, data, "blocks")


def test_a_cache_that_remembers_the_future_is_caught(model: GPT, data: DataFolder) -> None:
    """A stream that peeks into the chunk that comes next, through what it was given before."""
    losses, seen = honest(model), {}

    def stream(how):
        read = losses.stream(how)

        def step(inputs, targets):
            key = inputs.shape
            hint = seen.get(key, 0.0)  # of the segment read before, whose end may lie behind this one's start
            seen[key] = 1e-3 * float(targets.sum() % 97)
            return read(inputs, targets) + hint

        return step

    assert failed(replace(losses, stream=stream), data, "streaming")


def test_a_tail_that_is_scored_twice_is_caught(model: GPT, data: DataFolder, monkeypatch) -> None:
    """As in published evaluators, whose last windows all score the end (parameter-golf #174)."""
    honest_rows = passes._rows

    def again(*arguments):
        start, skipped = honest_rows(*arguments)
        return start, np.minimum(skipped, SEQ_LEN - 8)  # every window scores the whole stride

    monkeypatch.setattr(passes, "_rows", again)
    tokens = data.stream("val")[:101]  # the last window scores 4
    subject = module.Subject(
        losses=honest(model),
        tables=data.tokenizer.byte_tables(),
        method=method("sliding"),
        device=CONTEXT.device,
        batch_tokens=64,
    )
    times = subject.times(tokens)
    assert not probes.once(lambda t: Score(1.0, 100, 1), lambda t: times, tokens).passed


@pytest.mark.parametrize("fault", ["the tail twice", "one token never", "one process's tokens twice"])
def test_what_is_counted_wrong_is_found_and_not_a_crash(model: GPT, data: DataFolder, fault: str, monkeypatch) -> None:
    """Scores of single tokens, which other probes ask for, refuse such a plan."""
    honest_rows, honest_share = passes._rows, windows.rank_share

    def rows(*arguments):
        start, skipped = honest_rows(*arguments)
        if fault == "the tail twice":
            return start, np.minimum(skipped, SEQ_LEN - 8)
        return start, np.where(skipped == 0, 1, skipped) if fault == "one token never" else skipped

    def sums(*arguments):
        nats, counted = scorer_sums(*arguments)
        return nats, counted + (fault == "one process's tokens twice")

    scorer_sums = scorer.sum_losses
    monkeypatch.setattr(passes, "_rows", rows)
    monkeypatch.setattr(scorer, "sum_losses", sums)
    assert honest_share is windows.rank_share
    assert failed(honest(model), data, "sliding") == {"each token once"}


def test_a_change_that_does_not_show_by_chance_is_no_failure() -> None:
    """Two tokens of which one costs as much as the other, and a text in which nothing costs anything else."""
    nats = np.array([1, 1, 2, 3, 5, 8], np.float32)

    def score(tokens):
        return nats[tokens[1:].astype(int)]

    tokens = np.array([0, 3, 0, 4], np.uint16)  # changing token 2 from 0 to 1 changes no score
    assert probes.causality(score, tokens, [1, 2, 3], 6).passed
    assert not probes.causality(lambda tokens: np.where(tokens[1:] == 4, 2, 1), tokens, [1, 2], 4).passed


def test_tokens_left_out_are_caught() -> None:
    tokens = np.arange(50, dtype=np.uint16)
    ones = np.ones(49, np.int64)
    assert probes.once(lambda t: Score(1.0, 49, 1), lambda t: ones, tokens).passed
    assert not probes.once(lambda t: Score(1.0, 48, 1), lambda t: ones, tokens).passed
    assert not probes.once(lambda t: Score(1.0, 49, 1), lambda t: ones[:-1], tokens).passed
    ones[7] = 0
    assert probes.once(lambda t: Score(1.0, 49, 1), lambda t: ones, tokens).detail == "token 8 is scored 0 times"


@pytest.mark.parametrize("wrong", ["blank twice", "bytes as characters of three"])
def test_a_wrong_denominator_is_caught(data: DataFolder, wrong: str) -> None:
    """The two that invalidated published scores (parameter-golf #1719, #1271)."""
    tokenizer: Tokenizer = data.tokenizer
    tables, tokens = tokenizer.byte_tables(), data.stream("val")

    def found(some):
        return probes.text_bytes(tokens, some, tokenizer.decode_bytes, tokenizer.bos_id)

    assert found(tables).passed
    if wrong == "blank twice":
        broken = replace(tables, token_bytes=tables.token_bytes + tables.has_space)
    else:
        is_byte = np.array([piece.startswith("<0x") for piece in tokenizer.pieces])
        assert is_byte[tokens].any()
        broken = replace(tables, token_bytes=np.where(is_byte, 3, tables.token_bytes))
    assert not found(broken).passed


def test_what_fails_is_named() -> None:
    good, bad = Finding("causality", True, "fine"), Finding("normalisation", False, "they add up to 277")
    check({"blocks": [good]})
    with pytest.raises(ProbeError, match=r"do not believe this score: sliding: normalisation: they add up to 277"):
        check({"blocks": [good], "sliding": [good, bad]})


def test_the_command_probes_before_it_scores(finished: Path, data_path: Path, capsys) -> None:
    result = score_model(finished, str(data_path), methods=("blocks",), device="cpu", with_probes=True)
    assert [finding["passed"] for finding in result["probes"]["blocks"]] == [True] * 6
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("probe blocks, ") and ": passed: " in line for line in lines[:6]) == 6
    assert lines[6].startswith("final_blocks_exact")


def test_on_a_cpu_probes_are_given_few_tokens_at_a_time(
    finished: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As scores are: the batch of a recipe for a large GPU does not fit into memory."""
    sizes: list[int] = []
    monkeypatch.setattr(choices, "_CPU_TOKENS", 96)
    monkeypatch.setattr(score_module, "probe", lambda *args, batch_tokens, **others: sizes.append(batch_tokens) or [])
    for seq_len in (32, 128):
        score_model(finished, str(data_path), methods=("blocks",), seq_len=seq_len, device="cpu", with_probes=True)
    assert sizes == [96, 128]


def test_probes_cross_the_seams_of_a_stream() -> None:
    """They read short segments and chunks, whatever the score's own."""
    small = module._small(windows.Method(name="streaming", seq_len=SEQ_LEN, stride=1))
    assert small.streaming.segment_tokens == 3 * SEQ_LEN
    assert small.streaming.chunk_tokens == SEQ_LEN // 2
