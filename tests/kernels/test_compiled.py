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


BATCHES = 8
FEW, SLACK_OF_FEW = 16, 3.0
"""A gradient of few numbers is a sum in which most cancels: rounding leaves a thousandth of it, or a sixth.
So such numbers of all batches are compared at once, and more generously; what this looks for is wrong as a whole."""


def work(model: GPT, loss, batches: Tensor) -> dict[str, Tensor]:
    """Loss and gradients by name, each of all batches (BATCHES, ...)."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = []
    for tokens in batches:
        value = loss(tokens[:, :-1], tokens[:, 1:])
        found.append((value.detach(), *torch.autograd.grad(value, parameters)))
    return dict(zip(("loss", *names), map(torch.stack, zip(*found, strict=True)), strict=True))


def check(config, device: str, num_seqs: int, length: int) -> None:
    generator = torch.Generator().manual_seed(1)
    model = stirred(config, generator).to(device)
    batches = torch.randint(config.vocab_size, (BATCHES, num_seqs, length + 1), generator=generator).to(device)
    model.compute_dtype = torch.bfloat16
    plain = work(model, model.loss, batches)
    compiled = work(model, choices.compile_shapes(model.loss), batches)
    model.double()
    model.compute_dtype = torch.float64
    exact = work(model, model.loss, batches)
    few = {name for name, parameter in model.named_parameters() if parameter.numel() < FEW}
    assert few and len(few) < len(exact) / 2

    def part(found: dict[str, Tensor], names: set[str], batch: int | slice) -> dict[str, Tensor]:
        return {name: found[name][batch] for name in names}

    for i in range(BATCHES):
        assert_as_good(
            *(part(found, exact.keys() - few, i) for found in (compiled, plain, exact)), FLOOR[torch.bfloat16]
        )
    every = (part(found, few, slice(None)) for found in (compiled, plain, exact))
    assert_as_good(*every, FLOOR[torch.bfloat16], SLACK_OF_FEW)


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
