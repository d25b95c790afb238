"""Fake quantization is the export, with the identity as its gradient, eager and compiled."""

import pytest
import torch
from torch import Tensor

from epigram.quant.grid import GridConfig, SigmaConfig
from epigram.quant.methods import rtn
from epigram.quant.policy import matrix_grid
from epigram.quant.qat import fake_quantize

QKV = (("q", 24), ("k", 8), ("v", 8))
MIXED = (("q", 24), ("up", 16))
CONFIGS = {
    "search": GridConfig(),  # the floor is active in all rows of the small banks below
    "max": GridConfig(clip="max", floor=0.0),
    "sigma": GridConfig(clip="sigma", sigma=SigmaConfig(attention=3.0, mlp=6.0)),
    "int4": GridConfig(clip="sigma", matrix_bits=4),
}


def bank(scale: float = 0.14, seed: int = 0) -> Tensor:
    return torch.randn(3, 40, 48, generator=torch.Generator().manual_seed(seed)) * scale


def exported(weights: Tensor, splits: tuple[tuple[str, int], ...], config: GridConfig) -> Tensor:
    """The bank as it is read back from a round-to-nearest export."""
    pieces = []
    for piece, (matrix, _) in zip(weights.split([rows for _, rows in splits], dim=1), splits, strict=True):
        tensors = rtn.quantize(piece, None, matrix_grid(matrix, config)).tensors
        pieces.append(torch.stack([tensor.dequantize() for tensor in tensors]))
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("splits", [QKV, MIXED], ids=["one class", "two classes"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_is_the_export(config: GridConfig, splits: tuple[tuple[str, int], ...]) -> None:
    weights = bank()
    fake = fake_quantize(weights, splits, config)
    assert torch.equal(fake, exported(weights, splits, config))
    assert not torch.equal(fake, weights)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradient_is_the_identity_also_where_codes_are_clipped(config: GridConfig) -> None:
    weights = bank()
    weights[0, 0, 0] = 40.0  # far outside of the grid with "sigma"
    weights.requires_grad_()
    upstream = bank(seed=1)
    (fake_quantize(weights, QKV, config) * upstream).sum().backward()
    assert torch.equal(weights.grad, upstream)


def test_a_bank_in_bfloat16_stays_so() -> None:
    weights = bank().bfloat16()
    fake = fake_quantize(weights, QKV, CONFIGS["sigma"])
    assert fake.dtype == torch.bfloat16
    assert torch.equal(fake, exported(weights.float(), QKV, CONFIGS["sigma"]).bfloat16())


def test_splits_must_cover_the_bank() -> None:
    with pytest.raises(AssertionError, match="cover"):
        fake_quantize(bank(), (("q", 24),), GridConfig())


@pytest.mark.parametrize("name", ["search", "sigma"])
def test_compiled_is_eager_and_changes_the_loss(name: str) -> None:
    """Late QAT that is switched on under the compiler must act: parameter-golf #315 and #1212 had one that
    did not."""
    config, x = CONFIGS[name], torch.randn(64, 48, generator=torch.Generator().manual_seed(2))

    def loss(weights: Tensor, quantized: bool) -> Tensor:
        used = fake_quantize(weights, MIXED, config) if quantized else weights
        return (x @ used.mT).square().mean()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    results = {}
    for quantized in (False, True):
        for run in (loss, compiled):
            weights = bank().requires_grad_()
            value = run(weights, quantized)
            value.backward()
            results[run, quantized] = value.detach(), weights.grad
    for quantized in (False, True):
        for eager, fused in zip(results[loss, quantized], results[compiled, quantized], strict=True):
            assert torch.allclose(eager, fused, rtol=1e-5, atol=1e-8)
    off, on = results[compiled, False][0], results[compiled, True][0]
    assert abs(on - off) / off > 1e-5


def test_compiled_values_are_on_the_stored_grid() -> None:
    """A compiler drops a cast to float16 and back; the steps must be float16 values all the same."""
    config, weights = CONFIGS["sigma"], bank()
    torch.compiler.reset()
    compiled = torch.compile(lambda bank: fake_quantize(bank, QKV, config), fullgraph=True)
    assert torch.equal(compiled(weights), exported(weights, QKV, config))
