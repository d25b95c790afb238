"""A compiled model is as good as one that is not: loss and all gradients, against float64, in every call.

The first call tunes what later ones use, so none is left out.
"""

from dataclasses import replace

import pytest
import torch
from parity import FLOOR, assert_as_good
from stirred import stirred
from torch import Tensor
from torch._inductor import config as inductor

from epigram.config import load_recipe
from epigram.model.gpt import GPT
from epigram.run import choices

SMALL = replace(
    load_recipe("smoke").model, num_layers=2, window_layers=(1,), xsa_layers=(1,), value_embed_layers=(1,),
    backout_layer=-1, skips="none",
)  # fmt: skip
LARGE = replace(SMALL, model_dim=512, head_dim=64, num_heads=8, num_kv_heads=4, mlp_dim=1024, window=256)
"""With enough numbers that the compiler sums rows and columns of a gradient in one kernel."""


def work(model: GPT, loss, tokens: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    value = loss(tokens[:, :-1], tokens[:, 1:])
    return dict(zip(("loss", *names), [value.detach(), *torch.autograd.grad(value, parameters)], strict=True))


def check(config, device: str, num_seqs: int, length: int) -> None:
    generator = torch.Generator().manual_seed(1)
    model = stirred(config, generator).to(device)
    tokens = torch.randint(config.vocab_size, (num_seqs, length + 1), generator=generator).to(device)
    model.compute_dtype = torch.bfloat16
    plain = work(model, model.loss, tokens)
    compiled = choices.compile_shapes(model.loss)
    calls = [work(model, compiled, tokens) for _ in range(3)]
    model.double()
    model.compute_dtype = torch.float64
    exact = work(model, model.loss, tokens)
    for found in calls:
        assert_as_good(found, plain, exact, FLOOR[torch.bfloat16])


@pytest.mark.parametrize(
    ("device", "length"), [("cpu", 48), *(pytest.param("cuda", length, marks=pytest.mark.gpu) for length in (48, 64))]
)
def test_a_compiled_model_is_as_good(device: str, length: int):
    check(SMALL, device, 2, length)


@pytest.mark.gpu
def test_a_large_compiled_model_is_as_good():
    check(LARGE, "cuda", 16, 1024)


def test_rows_and_columns_are_summed_apart(monkeypatch: pytest.MonkeyPatch):
    """See `choices.compile_shapes`; torch 2.9 has no such option, and does so anyway."""
    seen = {}
    monkeypatch.setattr(choices.torch, "compile", lambda function, **settings: seen.update(settings) or function)
    choices.compile_shapes(abs)
    joins = hasattr(inductor.triton, "mix_order_reduction")
    assert seen == {"dynamic": False, "options": {"triton.mix_order_reduction": False} if joins else None}
