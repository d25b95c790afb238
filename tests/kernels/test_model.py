"""A whole model with fused kernels against the same one with plain kernels: loss, every gradient, and nats."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from parity import FLOOR, Place, assert_as_good, joined
from stirred import stirred
from torch import Tensor

from epigram import capability
from epigram.attention import flex, sdpa
from epigram.config import load_recipe
from epigram.errors import UserError
from epigram.kernels import base
from epigram.kernels.base import PLAIN, Kernels, choose
from epigram.kernels.products.base import Dims
from epigram.model import gpt
from epigram.model.cache import Cache
from epigram.model.config import ModelConfig
from epigram.model.gpt import GPT

TINY = ModelConfig(
    vocab_size=50, num_layers=4, model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=40, window=6,
    window_layers=(1, 2), xsa_layers=(2, 3), rotary_dim=4, bigram_buckets=64, bigram_dim=16,
    value_embed_layers=(0, 3), value_embed_dim=16, backout_layer=2, zero_init_out=False,
)  # fmt: skip
"""Every technique at once; no width is a multiple of a tile."""

LAYERS = 4
"""Times the floor of a single operation: errors of layers add up."""

BEST_PRECISION = pytest.mark.parametrize(
    "place",
    [
        pytest.param("cpu-float32", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
        pytest.param("cuda-bfloat16", marks=pytest.mark.gpu),
    ],
    indirect=True,
)

NO_LAYERS = {"window_layers": (), "xsa_layers": (), "value_embed_layers": (), "backout_layer": -1}
VARIANTS = {
    "plain skips, an odd number of layers": {"skips": "plain", "num_layers": 5},
    "gated skips, an odd number of layers": {
        "skips": "gated", "num_layers": 3, "xsa_layers": (0,), "value_embed_layers": (1,),
    },
    "no skips, the last layer backs itself out": {"skips": "none", "backout_layer": 3},
    "one layer": {**NO_LAYERS, "num_layers": 1, "xsa_layers": (0,), "window": 0, "rotary_dim": 0},
    "two layers, backout of a skip's source": {
        **NO_LAYERS, "num_layers": 2, "window_layers": (1,), "backout_layer": 0, "softcap": 0.0, "depth_scale": False,
    },
    "all channels rotated, as many values as queries, no backout": {
        "rotary_dim": 8, "num_kv_heads": 4, "num_layers": 3, "xsa_layers": (1,), "value_embed_layers": (2,),
        "backout_layer": -1,
    },
    "one value for all queries, nothing beside the tokens": {
        "num_layers": 3, "num_kv_heads": 1, "bigram_buckets": 0, "value_embed_layers": (), "smear": False,
        "xsa_layers": (0, 1, 2), "backout_layer": 1,
    },
    "isolated documents": {"documents": "isolated", "bos_id": 7},
}  # fmt: skip


def kernels_here(place: Place, monkeypatch) -> list[Kernels]:
    """The fused kernels over each file of products that serves here; with small tiles in the interpreter."""
    if not place.is_large:
        from epigram.kernels.products import triton

        for name, size in (("_TILE_M", 64), ("_TILE_N", 32), ("_TILE_K", 32)):
            monkeypatch.setattr(triton, name, size)
        return [base.fused("triton")]
    best = choose("fused", "cuda", torch.cuda.get_device_capability(), Dims(widths=(512,), dtype=place.dtype))
    return [base.fused("triton"), *([best] if "quack" in best.name else [])]


def model_of(config: ModelConfig, place: Place) -> GPT:
    return stirred(config, torch.Generator().manual_seed(1), 0.02 if place.is_large else 0.05).to(place.device)


def trained(model: GPT, tokens: Tensor, kernels: Kernels, dtype: torch.dtype, transform=None) -> dict[str, Tensor]:
    """Loss and gradients of a batch (B, T + 1)."""
    model.kernels, model.compute_dtype = kernels, dtype
    model.zero_grad()
    gamma = torch.tensor(0.5, device=tokens.device)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], gamma, 0.2, transform)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def scored(
    model: GPT, tokens: Tensor, kernels: Kernels, dtype: torch.dtype, last: int | None = None
) -> dict[str, Tensor]:
    model.kernels, model.compute_dtype = kernels, dtype
    with torch.no_grad():
        return {"nats": model.nll(tokens[:, :-1], tokens[:, 1:], rope_len=40, last=last)}


def check(model: GPT, place: Place, kernels: list[Kernels], run, batches: Sequence[Tensor]) -> None:
    """`run` of this model by each of the kernels, against the plain ones in the same precision and in float64."""
    exact = joined([run(model, batch, PLAIN, torch.float64) for batch in batches])
    plain = joined([run(model, batch, PLAIN, place.dtype) for batch in batches])
    for fused in kernels:
        found = joined([run(model, batch, fused, place.dtype) for batch in batches])
        assert_as_good(found, plain, exact, LAYERS * FLOOR[place.dtype])


@BEST_PRECISION
@pytest.mark.parametrize("name", VARIANTS)
def test_every_technique(place: Place, name: str, monkeypatch):
    model = model_of(replace(TINY, **VARIANTS[name]), place)
    batches = [place.tokens(50, 2, 22, seed=seed) for seed in range(24 if place.is_large else 2)]
    for tokens in batches:
        tokens[:, [5, 9, 10]] = 7  # begins a document where documents are isolated
    check(model, place, kernels_here(place, monkeypatch), trained, batches)


def published(place: Place) -> ModelConfig:
    """Recipe pr1212's model in the size of its widths, fewer layers; TINY in the interpreter."""
    if not place.is_large:
        return TINY
    return replace(
        load_recipe("pr1212").model, num_layers=6, window_layers=(1, 3), xsa_layers=(3, 4, 5),
        value_embed_layers=(4, 5), backout_layer=3, zero_init_out=False,
    )  # fmt: skip


def batch(place: Place, config: ModelConfig) -> Tensor:
    return place.tokens(config.vocab_size, *((2, 1025) if place.is_large else (2, 22)))


def test_training(place: Place, monkeypatch):
    model = model_of(published(place), place)
    check(model, place, kernels_here(place, monkeypatch), trained, [batch(place, model.config)])


@pytest.mark.gpu
@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_training_with_a_backend_that_compiles_itself(documents: str, monkeypatch):
    """flex, in the graph that the fused trunk keeps of each layer's attention."""
    place = Place(torch.device("cuda"), torch.bfloat16)
    model = model_of(replace(published(place), documents=documents, bos_id=7), place)
    tokens = batch(place, model.config)
    tokens[:, 100:1000:90] = 7

    def run(model: GPT, tokens: Tensor, kernels: Kernels, dtype: torch.dtype) -> dict[str, Tensor]:
        model.attend = model.attend_window = sdpa.attend if kernels is PLAIN else flex.attend
        return trained(model, tokens, kernels, dtype)

    check(model, place, kernels_here(place, monkeypatch), run, [tokens])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("place", ["cpu-float32"], indirect=True)
def test_training_on_sequences_of_one_token(place: Place, monkeypatch):
    """Gradients of a backend that computes heads first: their axis of one position has a stride of its own."""

    class HeadsFirst(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad.mT.clone(memory_format=torch.contiguous_format).mT

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        q, k, v = (HeadsFirst.apply(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        return sdpa.attend(q, k, v, window)

    model = model_of(published(place), place)
    model.attend = model.attend_window = attend
    check(model, place, kernels_here(place, monkeypatch), trained, [place.tokens(model.config.vocab_size, 3, 2)])


@BEST_PRECISION
def test_training_on_the_grid_of_the_export(place: Place, monkeypatch):
    """Banks pass through a transform first."""
    model = model_of(published(place), place)
    run = partial(trained, transform=lambda _, bank: 0.5 * bank.sin())
    check(model, place, kernels_here(place, monkeypatch), run, [batch(place, model.config)])


@BEST_PRECISION
@pytest.mark.parametrize(("last", "backout"), [(None, 2), (5, 2), (1, -1)])
def test_scoring(place: Place, last: int | None, backout: int, monkeypatch):
    """Of all positions, and of the last ones only."""
    model = model_of(replace(published(place), backout_layer=backout), place)
    tokens = batch(place, model.config)
    check(model, place, kernels_here(place, monkeypatch), partial(scored, last=last), [tokens])
    if last is not None:
        dense, found = (scored(model, tokens, PLAIN, torch.float64, end)["nats"] for end in (None, last))
        torch.testing.assert_close(found, dense[:, -last:], rtol=1e-5, atol=0)


@BEST_PRECISION
@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_streaming(place: Place, documents: str, monkeypatch):
    """Chunk after chunk through a cache."""
    monkeypatch.setattr(gpt, "_FEW", 1)
    model = model_of(replace(published(place), documents=documents, bos_id=7), place)
    tokens = batch(place, model.config)
    tokens[:, [3, 7, 8, 15]] = 7
    model.attend_window = model.attend = sdpa.attend

    def streamed(model: GPT, tokens: Tensor, kernels: Kernels, dtype: torch.dtype) -> dict[str, Tensor]:
        model.kernels, model.compute_dtype = kernels, dtype
        cache = Cache(model.config, 9 if not place.is_large else 300)
        pieces = [x.split(tokens.shape[1] // 3, dim=1) for x in (tokens[:, :-1], tokens[:, 1:])]
        with torch.no_grad():
            found = [model.nll(*chunk, cache=cache) for chunk in zip(*pieces, strict=True)]
        return {"nats": torch.cat(found, dim=1)}

    check(model, place, kernels_here(place, monkeypatch), streamed, [tokens])


# -- the choice --------------------------------------------------------------------------------------------------------

DIMS = Dims(widths=(512, 1536), dtype=torch.bfloat16)


def test_auto_fuses_where_it_can():
    assert choose("auto", "cuda", (8, 0), DIMS).name == "fused, products by triton"
    assert choose("fused", "cuda", (8, 0), DIMS).name == "fused, products by triton"
    assert choose("plain", "cuda", (9, 0), DIMS) is PLAIN


@pytest.mark.parametrize(
    ("device_type", "version", "dims", "reason"),
    [
        ("cpu", None, DIMS, "compiles for GPUs"),
        ("cuda", (7, 5), DIMS, "compute capability 8.0"),
        ("cuda", (9, 0), replace(DIMS, dtype=torch.float32), "not torch.float32"),
        ("cuda", (9, 0), replace(DIMS, carries=True), "residual lambdas"),
    ],
)
def test_where_it_cannot_it_says_why(device_type: str, version, dims: Dims, reason: str):
    assert choose("auto", device_type, version, dims) is PLAIN
    with pytest.raises(UserError, match=f'run.kernels = "fused" cannot be used here: .*{reason}'):
        choose("fused", device_type, version, dims)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(capability, "triton_installed", lambda: False)
    assert choose("auto", "cuda", (9, 0), DIMS) is PLAIN
    with pytest.raises(UserError, match="Triton is not installed"):
        choose("fused", "cuda", (9, 0), DIMS)


def test_quack_serves_hopper_with_whole_tiles():
    quack = pytest.importorskip("epigram.kernels.products.quack", exc_type=ImportError)
    assert quack.check("cuda", (9, 0), DIMS) is None
    assert "Hopper" in quack.check("cuda", (10, 0), DIMS)
    assert "multiples of 64, not 40" in quack.check("cuda", (9, 0), replace(DIMS, widths=(512, 40)))
