"""The forward's parts: ablations, cache, tap, transform, causality, the published parameter counts."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from golden_model import CONFIG, golden, golden_model

from epigram.attention import reference
from epigram.kernels.base import PLAIN
from epigram.model import gpt
from epigram.model.cache import Cache
from epigram.model.config import ModelConfig
from epigram.model.gpt import GPT
from epigram.roles import matrices

OFF = {
    "window": {"window": 0, "window_layers": ()},
    "xsa": {"xsa_layers": ()},
    "bigram": {"bigram_buckets": 0},
    "value_embed": {"value_embed_layers": ()},
    "smear": {"smear": False},
    "skips": {"skips": "none"},
    "plain skips": {"skips": "plain"},
    "backout": {"backout_layer": -1},
    "depth_scale": {"depth_scale": False},
    "rotary": {"rotary_dim": 0},
    "softcap": {"softcap": 0.0},
    "residual_lambdas": {"residual_lambdas": True},
}


@pytest.fixture
def tokens() -> torch.Tensor:
    return golden()["short.input_ids"].long()


@pytest.mark.parametrize("name", OFF)
def test_each_technique_is_a_setting_that_matters(name: str, tokens: torch.Tensor) -> None:
    """Turning one off removes its parameters, changes the logits, and leaves a model that trains."""
    model = GPT(dataclasses.replace(CONFIG, **OFF[name]))
    model.load_state_dict(golden_model().state_dict(), strict=False)
    full = golden_model()
    logits = model.logits(model(tokens))
    # Rounding is 1e-6 here; the smallest effect, that of the value embedding, 5e-4.
    assert float((logits - full.logits(full(tokens))).abs().max()) > 1e-4
    model.loss(tokens, tokens).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@pytest.mark.parametrize("pieces", [[96], [1] * 96, [50, 1, 1, 44]])
def test_cached_logits_equal_uncached(pieces: list[int], tokens: torch.Tensor) -> None:
    model = golden_model()
    expected = model.logits(model(tokens))
    cache = Cache(CONFIG, context_len=96)
    parts = [model.logits(model(part, cache=cache)) for part in tokens.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_cache_converts_the_weights_once(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only without gradients, which would be those of the first piece alone."""
    model, made = golden_model(), []

    def scaled(*arguments: Any) -> torch.Tensor:
        made.append(arguments)
        return PLAIN.scaled(*arguments)

    monkeypatch.setattr(gpt, "PLAIN", dataclasses.replace(PLAIN, scaled=scaled))
    cache = Cache(CONFIG, context_len=96)
    with torch.no_grad():
        parts = [model.logits(model(part, cache=cache)) for part in tokens.split(32, dim=1)]
        assert len(made) == 4, "banks"
        torch.testing.assert_close(torch.cat(parts, 1), model.logits(model(tokens)), rtol=1e-4, atol=1e-4)
    assert model(tokens, cache=Cache(CONFIG, context_len=96)).requires_grad


def test_cache_looks_back_no_further_than_its_context(tokens: torch.Tensor) -> None:
    """With context c every layer sees c positions: equal to a model whose full layers have the window c - 1."""
    limited = dataclasses.replace(CONFIG, window=23, window_layers=tuple(range(6)))
    wide = dataclasses.replace(CONFIG, window=0, window_layers=())
    ours, oracle = GPT(wide), GPT(limited)
    ours.load_state_dict(golden_model().state_dict())
    oracle.load_state_dict(golden_model().state_dict())
    cache = Cache(wide, context_len=24)
    stepped = [ours.logits(ours(tokens[:, i : i + 1], cache=cache)) for i in range(96)]
    expected = oracle.logits(oracle(tokens, rope_len=24))
    torch.testing.assert_close(torch.cat(stepped, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pieces", [[96], [1] * 96, [50, 1, 45]])
def test_a_context_of_one_is_the_own_position_alone(pieces: list[int], tokens: torch.Tensor) -> None:
    """Equal to as many sequences of one token, where nothing but attention looks back."""
    alone = GPT(dataclasses.replace(CONFIG, smear=False, bigram_buckets=0))
    alone.load_state_dict(golden_model().state_dict(), strict=False)
    cache = Cache(alone.config, context_len=1)
    parts = [alone.logits(alone(part, cache=cache)) for part in tokens.split(pieces, dim=1)]
    expected = alone.logits(alone(tokens.reshape(-1, 1))).view(*tokens.shape, -1)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    last = alone.logits(alone(tokens, cache=Cache(alone.config, context_len=1), last=3))
    torch.testing.assert_close(last, expected[:, -3:], rtol=1e-4, atol=1e-4)


def test_sizes_that_no_machine_can_number_are_refused() -> None:
    """Of each size alone, and of many moderate ones together; before anything is allocated."""
    sizes = ("vocab_size", "num_layers", "model_dim", "head_dim", "mlp_dim", "bigram_buckets", "bigram_dim")
    for name in (*sizes, "value_embed_dim"):
        with pytest.raises(ValueError, match=r"make about [\d,]+ weights: at most 2\^40"):
            dataclasses.replace(CONFIG, **{name: 2**62})
    with pytest.raises(ValueError, match=r"at most 2\^40"):
        dataclasses.replace(CONFIG, num_heads=2**33, num_kv_heads=2**33)
    with pytest.raises(ValueError, match=r"at most 2\^40"):
        dataclasses.replace(CONFIG, model_dim=1 << 18, mlp_dim=1 << 18, head_dim=1 << 16)
    large = dataclasses.replace(CONFIG, num_layers=96, model_dim=12_288, mlp_dim=4 * 12_288, num_heads=96, head_dim=128)
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(large).parameters()) > 10**11


def test_changing_a_token_changes_nothing_before_it(tokens: torch.Tensor) -> None:
    model = golden_model()
    before = model.logits(model(tokens))
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % CONFIG.vocab_size
    after = model.logits(model(changed))
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=0, atol=0)
    assert float((before[:, 40:] - after[:, 40:]).abs().amax(dim=(0, 2)).min()) > 0


def test_tap_sees_the_input_of_every_product(tokens: torch.Tensor) -> None:
    """Recomputing one product from what the tap saw gives the next thing the tap saw."""
    model, seen = golden_model(), {}
    states = model(tokens, tap=lambda name, x: seen.__setitem__(name, x))
    torch.testing.assert_close(states, model(tokens), rtol=0, atol=0, msg="what calibrates is the model that trains")
    banks = ("qkv", "out", "up", "down")
    assert set(seen) == {f"layers.{i}.{b}" for i in range(6) for b in banks} | {
        "head",
        "bigram.proj",
        "value_embed.proj",
    }
    up = torch.nn.functional.linear(seen["layers.3.up"], model.banks.up[3]) / 4**0.5  # the fourth layer's depth scale
    expected = torch.where(up > 0, up * up, (0.5 * up) ** 2)
    torch.testing.assert_close(seen["layers.3.down"], expected)
    taps = {
        view.tap
        for name, role in model.roles().items()
        if role.kind == "matrix"
        for view in matrices(role, model.get_parameter(name))
    }
    assert taps <= set(seen)


def test_transform_replaces_the_banks(tokens: torch.Tensor) -> None:
    model, halved = golden_model(), golden_model()
    with torch.no_grad():
        halved.banks.up.mul_(0.5)
    out = model(tokens, transform=lambda name, bank: bank * 0.5 if name == "up" else bank)
    torch.testing.assert_close(out, halved(tokens))


def test_backends_are_called_by_layer_kind(tokens: torch.Tensor) -> None:
    model, calls = golden_model(), []

    def spy(kind: str):
        def attend(q, k, v, window):
            calls.append((kind, window))
            return reference.attend(q, k, v, window)

        return attend

    expected = model(tokens)
    model.attend, model.attend_window = spy("full"), spy("window")
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    assert calls == [("full", 0), ("full", 0), ("window", 32), ("full", 0), ("window", 32), ("full", 0)]


def test_rope_len_keeps_a_short_window_on_the_long_rotation() -> None:
    """A window of 64 scored with the base of 2048 equals the start of a window of 2048."""
    model = golden_model()
    tokens = torch.randint(4, 128, (1, 2048), generator=torch.Generator().manual_seed(3))
    long = model(tokens)[:, :64]
    torch.testing.assert_close(model(tokens[:, :64], rope_len=2048), long, rtol=1e-4, atol=1e-4)
    assert float((model(tokens[:, :64]) - long).abs().max()) > 1e-3


def test_initial_values() -> None:
    model = GPT(CONFIG)
    model.initialize(seed=1)
    q = model.banks.qkv[0, :64]
    torch.testing.assert_close(q @ q.T, torch.eye(64), atol=1e-5, rtol=0)
    assert float(model.banks.out.detach().abs().max()) == 0
    assert float(model.embed.detach().std()) == pytest.approx(0.005, rel=0.05)
    tokens, targets = torch.randint(0, 128, (2, 4, 64), generator=torch.Generator().manual_seed(0))
    # Small output weights: the first prediction is the uniform one.
    assert float(model.loss(tokens, targets).detach()) == pytest.approx(torch.tensor(128.0).log().item(), abs=0.02)
    other = GPT(CONFIG)
    other.initialize(seed=2)
    assert not torch.equal(other.embed, model.embed)


def test_initial_values_do_not_depend_on_the_number_of_threads() -> None:
    """Matrices of a real size, since threads share only those."""
    sizes = dict(num_layers=1, model_dim=512, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=1536, rotary_dim=16)
    drawn, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            model = GPT(ModelConfig(vocab_size=64, **sizes))
            model.initialize(seed=1)
            assert torch.get_num_threads() == threads, "as it was before"
            drawn.append(model.state_dict())
    finally:
        torch.set_num_threads(before)
    for other in drawn[1:]:
        assert all(torch.equal(other[name], value) for name, value in drawn[0].items())


def test_bad_settings_are_all_named_at_once() -> None:
    with pytest.raises(ValueError, match="num_kv_heads = 3") as error:
        dataclasses.replace(CONFIG, num_kv_heads=3, skips="some", xsa_layers=(9,), rotary_dim=7)
    for part in ("skips = 'some'", "xsa_layers = [9]", "rotary_dim = 7"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotary_base", 0.0), ("rotary_base", math.inf), ("rotary_reference_len", 0), ("embed_std", -1.0),
        ("softcap", math.nan), ("softcap", -30.0), ("mlp_slope", math.nan), ("qk_gain", math.inf), ("qk_gain", 0.0),
        ("bigram_dim", 0), ("value_embed_dim", -4),
    ],
)  # fmt: skip
def test_numbers_that_no_model_has(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        dataclasses.replace(CONFIG, bigram_buckets=16, value_embed_layers=(0,), **{name: value})


def test_vocabulary_beyond_the_bigram_hash_is_refused() -> None:
    sizes = dict(num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8, rotary_dim=4)
    with pytest.raises(ValueError, match="overflows the bigram hash"):
        ModelConfig(vocab_size=65_536, bigram_buckets=16, **sizes)
    # The largest that is allowed does not overflow 32 bits.
    assert 36313 * 59_000 < 2**31
