"""A compiled model is as good as one that is not: loss and all gradients, against float64, in every call.

The first call tunes what later ones use, so none is left out.
"""

from dataclasses import replace

import pytest
import torch
from parity import FLOOR, assert_as_good, joined
from stirred import stirred
from torch import Tensor
from torch._inductor import config as inductor

from epigram import compiling
from epigram.config import load_recipe
from epigram.model.gpt import GPT

SMALL = replace(
    load_recipe("smoke").model, num_layers=2, window_layers=(1,), xsa_layers=(1,), value_embed_layers=(1,),
    backout_layer=-1, skips="none",
)  # fmt: skip
LARGE = replace(SMALL, model_dim=512, head_dim=64, num_heads=8, num_kv_heads=4, mlp_dim=1024, window=256)
"""With enough numbers that the compiler sums rows and columns of a gradient in one kernel."""


def work(model: GPT, loss, batches: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of each of the batches."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = []
    for tokens in batches:
        value = loss(tokens[:, :-1], tokens[:, 1:])
        gradients = torch.autograd.grad(value, parameters)
        found.append(dict(zip(("loss", *names), (value.detach(), *gradients), strict=True)))
    return joined(found)


def check(config, device: str, num_seqs: int, length: int) -> None:
    generator = torch.Generator().manual_seed(1)
    model = stirred(config, generator).to(device)
    size = (24 if device == "cuda" else 8, num_seqs, length + 1)
    batches = torch.randint(config.vocab_size, size, generator=generator).to(device)
    model.compute_dtype = torch.bfloat16
    plain = work(model, model.loss, batches)
    compiled = work(model, compiling.compile_shapes(model.loss), batches)
    model.double()
    model.compute_dtype = torch.float64
    assert_as_good(compiled, plain, work(model, model.loss, batches), FLOOR[torch.bfloat16])


@pytest.mark.parametrize(
    ("device", "length"), [("cpu", 48), *(pytest.param("cuda", length, marks=pytest.mark.gpu) for length in (48, 64))]
)
def test_a_compiled_model_is_as_good(device: str, length: int):
    check(SMALL, device, 2, length)


@pytest.mark.gpu
def test_a_large_compiled_model_is_as_good():
    check(LARGE, "cuda", 16, 1024)


def test_rows_and_columns_are_summed_apart(monkeypatch: pytest.MonkeyPatch):
    """See `compiling.compile_shapes`; torch 2.9 has no such option, and does so anyway."""
    seen = {}
    monkeypatch.setattr(compiling.torch, "compile", lambda function, **settings: seen.update(settings) or function)
    compiling.compile_shapes(abs)
    joins = hasattr(inductor.triton, "mix_order_reduction")
    assert seen == {"dynamic": False, "options": {"triton.mix_order_reduction": False} if joins else None}
