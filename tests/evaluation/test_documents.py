"""Documents that are learned while they are scored: against a loop over single documents, and layer by layer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_model import CONFIG, golden_model

from epigram.evaluation.adapt_config import LORA_TARGETS, AdaptConfig, LoraConfig
from epigram.evaluation.documents import document_batches, document_parts, find_documents, work
from epigram.evaluation.lora import LoraAdapter
from epigram.kernels.heads import HeadCounts
from epigram.kernels.lora import Lora, LowRank
from epigram.kernels.residual import norm
from epigram.kernels.trunk import Layer, Shape, trunk
from epigram.model.gpt import GPT
from epigram.model.lora import lora_shapes

CPU = torch.device("cpu")
BOS, FILLER, SEQ_LEN = 1, 0, 16
# AdamW takes a whole step where a gradient is nothing but rounding, if eps lets it; other batches round otherwise.
CONFIG_FAST = LoraConfig(rank=3, alpha=6.0, lr=0.05, eps=1e-3, chunk_tokens=5, num_documents=3)


def stream(num_tokens: int, starts: list[int]) -> np.ndarray:
    tokens = np.random.default_rng(3).integers(4, CONFIG.vocab_size, num_tokens).astype(np.uint16)
    tokens[starts] = BOS
    return tokens


def adapter_of(model: GPT, config: LoraConfig = CONFIG_FAST) -> LoraAdapter:
    model.requires_grad_(False)
    return LoraAdapter(lora_shapes(model.config), model.config.num_layers, model.nll, config, SEQ_LEN, CPU)


def adapted(
    tokens: np.ndarray, config: LoraConfig = CONFIG_FAST, batch_tokens: int = 1000, model: GPT | None = None
) -> np.ndarray:
    model = model or golden_model()
    batches = document_batches(find_documents(tokens, BOS), config, SEQ_LEN, batch_tokens)
    found = np.full(len(tokens) - 1, np.nan, np.float32)
    adapter = adapter_of(model, config)
    for part in document_parts(model.nll, tokens, batches, adapter, config, SEQ_LEN, CPU, filler=FILLER):
        targets, nats = part.counted()
        assert np.isnan(found[targets]).all(), "each token once"
        assert part.num_scored == len(targets)
        found[targets] = nats
    return found


@pytest.mark.parametrize("starts", [[0, 30, 31, 50], [7, 20], [], [0, 59], [0, 60]], ids=str)
def test_documents_are_the_whole_stream(starts: list[int]) -> None:
    tokens = stream(61, starts)
    documents = find_documents(tokens, BOS)
    # A BOS token as the last of all is only predicted.
    assert documents[:, 0].tolist() == [0, *(start for start in starts if 0 < start < 60)]
    assert documents[1:, 0].tolist() == documents[:-1, 1].tolist() and documents[-1, 1] == 60
    assert not np.isnan(adapted(tokens)).any()


def test_a_loop_over_single_documents_says_the_same() -> None:
    """torch's AdamW on one document at a time, windows cut by hand."""
    tokens = stream(140, [0, 40, 63, 64, 110])
    expected = np.zeros(139, np.float32)
    model, shapes = golden_model().requires_grad_(False), lora_shapes(CONFIG)
    for start, end in find_documents(tokens, BOS):
        adapter = adapter_of(model)
        adapter.begin(1)
        first = adapter.factors(1)  # only for the values that A starts from
        a = {t: [layer[t].a.detach().clone().requires_grad_() for layer in first.layers] for t in "qkv"}
        a |= {t: [layer[t].a.detach().clone().requires_grad_() for layer in first.layers] for t in ("out", "mlp")}
        a["head"] = [first.head.a.detach().clone().requires_grad_()]
        b = {t: [torch.zeros(1, shapes[t][1], 3, requires_grad=True) for _ in some] for t, some in a.items()}
        parameters = [p for some in (a, b) for values in some.values() for p in values]
        optimizer = torch.optim.AdamW(parameters, lr=0.05, betas=(0.0, 0.999), eps=1e-3, weight_decay=0.5)
        text = torch.from_numpy(tokens[start : end + 1].astype(np.int64))[None]
        for begin in range(0, end - start, 5):
            stop = min(begin + 5, end - start)
            from_ = max(begin + 5 - SEQ_LEN, 0)
            layers = tuple({t: LowRank(a[t][i], 2 * b[t][i]) for t in ("q", "k", "v", "out", "mlp")} for i in range(6))
            lora = Lora(layers, LowRank(a["head"][0], 2 * b["head"][0]))
            nats = model.nll(text[:, from_:stop], text[:, from_ + 1 : stop + 1], rope_len=SEQ_LEN, lora=lora)
            new = nats[0, begin - from_ :]
            expected[start + begin : start + stop] = new.detach().numpy()
            if stop < end - start:
                optimizer.zero_grad()
                new.mean().backward()
                optimizer.step()
    found = adapted(tokens)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    plain = adapted(tokens, replace(CONFIG_FAST, lr=0.0))
    for start, end in find_documents(tokens, BOS):
        np.testing.assert_allclose(found[start : min(start + 5, end)], plain[start : min(start + 5, end)], atol=1e-5)
    assert np.abs(found - plain).max() > 0.01, "it does learn"


@pytest.mark.parametrize("config", [replace(CONFIG_FAST, num_documents=1), replace(CONFIG_FAST, num_documents=64)])
def test_the_batch_is_speed_and_not_score(config: LoraConfig) -> None:
    tokens = stream(140, [0, 40, 63, 64, 110])
    np.testing.assert_allclose(adapted(tokens, config), adapted(tokens), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(adapted(tokens, config, batch_tokens=20), adapted(tokens), rtol=1e-4, atol=1e-4)


def test_a_model_that_isolates_documents_reads_them_alike() -> None:
    """Each is in a row of its own: there is nothing to look back at."""
    model = GPT(replace(CONFIG, documents="isolated", bos_id=BOS))
    model.load_state_dict(golden_model().state_dict())
    tokens = stream(100, [0, 40, 63])
    np.testing.assert_allclose(adapted(tokens, model=model), adapted(tokens), rtol=1e-4, atol=1e-4)


def test_how_long_a_document_will_be_does_not_show() -> None:
    """Scores before a place are the same whether the document ends there, the text does, or it goes on."""
    tokens = stream(140, [0, 30])
    ends = tokens.copy()
    ends[57] = BOS
    for other in (ends, tokens[:58]):
        np.testing.assert_allclose(adapted(other)[:56], adapted(tokens)[:56], rtol=1e-4, atol=1e-4)


def test_what_is_handed_over_was_scored() -> None:
    """Every window that is learned ends with targets which are out, and a document's last chunk is kept."""
    tokens, model, learned = stream(140, [0, 40, 63, 64, 110]), golden_model(), []
    out = np.zeros(139, bool)

    class Watching(LoraAdapter):
        def learn(self, tokens_, num_new):
            learned.append((tokens_.copy(), num_new, out.copy()))
            tokens_[:] = 0  # its own copy

    watching = Watching(lora_shapes(CONFIG), 6, model.nll, CONFIG_FAST, SEQ_LEN, CPU)
    documents = find_documents(tokens, BOS)
    batches = document_batches(documents, CONFIG_FAST, SEQ_LEN, 1000)
    for part in document_parts(model.nll, tokens, batches, watching, CONFIG_FAST, SEQ_LEN, CPU, filler=FILLER):
        out[part.counted()[0]] = True
    rows = [(row, num_new, seen) for some, num_new, seen in learned for row in some]
    assert len(rows) == sum((end - start - 1) // 5 for start, end in documents.tolist())
    text = tokens.tolist()
    for row, num_new, seen in rows:
        place = next(i for i in range(140) if text[i : i + len(row)] == row.tolist())
        assert num_new == 5 and seen[place : place + len(row) - 1].all()
        assert BOS not in row[1:], "of one document"
    assert out.all()


def test_no_document_begins_behind_the_end_of_one() -> None:
    """Attention that keeps documents apart has room for so many in a batch."""
    tokens, model, rows = stream(140, [0, 40, 41, 63, 64, 110]), golden_model(), []

    def nll(inputs, targets, **options):
        rows.extend(inputs.tolist())
        return model.nll(inputs, targets, **options)

    still = replace(CONFIG_FAST, lr=0.0)
    batches = document_batches(find_documents(tokens, BOS), still, SEQ_LEN, 1000)
    for _ in document_parts(nll, tokens, batches, adapter_of(model, still), still, SEQ_LEN, CPU, filler=FILLER):
        pass
    assert any(FILLER in row for row in rows) and not any(BOS in row[1:] for row in rows)


def test_the_work_is_what_forwards_read() -> None:
    tokens, model, read = stream(140, [0, 40, 63, 64, 110]), golden_model(), []
    batches = document_batches(find_documents(tokens, BOS), CONFIG_FAST, SEQ_LEN, 1000)

    def nll(inputs, targets, **options):
        read.append(inputs.numel())
        return model.nll(inputs, targets, **options)

    still = replace(CONFIG_FAST, lr=0.0)
    shares: list[float] = []
    adapter = adapter_of(model, still)
    for _ in document_parts(nll, tokens, batches, adapter, still, SEQ_LEN, CPU, shares.append, filler=FILLER):
        pass
    total = sum(work(batch, still, SEQ_LEN) for batch in batches)
    assert sum(read) == total
    np.testing.assert_allclose(shares, np.cumsum(read) / total)  # told after each forward, not after each batch
    assert len(read) > len(batches)


# -- where the adapters act ---------------------------------------------------------------------------------------


def random_pair(rows: int, fan_in: int, fan_out: int, seed: int) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rows, 2, fan_in, generator=draw), 0.1 * torch.randn(rows, fan_out, 2, generator=draw))


def test_new_adapters_change_nothing() -> None:
    model, adapter = golden_model(), adapter_of(golden_model())
    adapter.begin(3)
    tokens = torch.randint(4, 128, (3, 17), generator=torch.Generator().manual_seed(0))
    plain = model.nll(tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(model.nll(tokens[:, :-1], tokens[:, 1:], lora=adapter.factors(3)), plain)
    assert {t for layer in adapter.factors(3).layers for t in layer} | {"head"} == set(LORA_TARGETS)


@pytest.mark.parametrize("target", ["q", "k", "v"])
def test_an_adapter_is_a_sum_of_weights(target: str) -> None:
    """For each row the model with B A added to its matrix; without depth scale, which sits in those rows."""
    model = GPT(replace(CONFIG, depth_scale=False))
    model.load_state_dict(golden_model().state_dict())
    tokens = torch.randint(4, 128, (2, 17), generator=torch.Generator().manual_seed(0))
    pairs = [random_pair(2, *lora_shapes(CONFIG)[target], seed=layer) for layer in range(6)]
    lora = Lora(tuple({target: pair} for pair in pairs), None)
    with torch.no_grad():
        found = model.nll(tokens[:, :-1], tokens[:, 1:], lora=lora)
        offset = {"q": 0, "k": CONFIG.query_dim, "v": CONFIG.query_dim + CONFIG.kv_dim}[target]
        kept = model.banks.qkv.clone()
        for row in range(2):
            model.banks.qkv.copy_(kept)
            for layer, pair in enumerate(pairs):
                added = pair.b[row] @ pair.a[row]
                model.banks.qkv[layer, offset : offset + len(added)] += added
            expected = model.nll(tokens[row : row + 1, :-1], tokens[row : row + 1, 1:])
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["out", "mlp"])
def test_a_bypass_reads_what_its_sublayer_reads(target: str) -> None:
    """In a layer whose own products add nothing, what the adapter adds is left."""
    width, zero = 16, torch.zeros
    draw = torch.Generator().manual_seed(1)
    x0 = torch.randn(2, 7, width, generator=draw)
    pair = random_pair(2, width, width, seed=5)
    layer = Layer(
        own=None, first=torch.ones(width), skip=None, qkv=torch.randn(32, width, generator=draw), out=zero(width, 16),
        gain=torch.ones(2), value=None, up=torch.randn(24, width, generator=draw), down=zero(width, 24),
        attend=lambda q, k, v, window: q, window=0, exclude=False, lora={target: pair},
    )  # fmt: skip
    x, _ = trunk(x0, [layer], None, Shape(HeadCounts(2, 1, 8), None, 0.5))
    expected = x0 + torch.einsum("bor,bri,bti->bto", pair.b, pair.a, norm(x0))
    torch.testing.assert_close(x, expected)


def test_the_head_adds_to_the_logits_before_they_are_capped() -> None:
    model, pair = golden_model(), random_pair(2, 64, 128, seed=9)
    tokens = torch.randint(4, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.nll(tokens[:, :-1], tokens[:, 1:], lora=Lora(({},) * 6, pair))
        x = model(tokens[:, :-1])
        logits = x @ model.embed.T + torch.einsum("bor,bri,bti->bto", pair.b, pair.a, x)
        expected = F.cross_entropy((30 * (logits / 30).tanh()).mT, tokens[:, 1:], reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bad_settings_are_refused_together() -> None:
    with pytest.raises(ValueError, match=r"rank = 0.*targets = \['q', 'x'\].*beta1 = 1"):
        LoraConfig(rank=0, targets=("q", "x"), beta1=1.0)
    with pytest.raises(ValueError, match="kind = 'both'"):
        AdaptConfig(kind="both")
    assert AdaptConfig(kind="lora").problems(32) == ["adapt.lora.chunk_tokens = 48 is over one window of seq_len = 32"]
