"""On a CUDA device: the same codes, accurate sums from bfloat16, and the time of a whole model."""

import time

import pytest
import torch
from quant_toy import Toy, gram

from epigram.quant.calibrate import HessianCollector
from epigram.quant.config import QuantConfig
from epigram.quant.grid import Grid, GridConfig
from epigram.quant.methods import gptq
from epigram.quant.qat import fake_quantize
from epigram.quant.quantize import quantize_model
from epigram.quantized import QuantizedTensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_codes_are_those_of_the_cpu(toy: Toy) -> None:
    for config in (QuantConfig(), QuantConfig(grid=GridConfig(clip="sigma"), table_method="gptq")):
        expected, _ = quantize_model(toy.named, toy.roles, toy.hessians, config)
        named = {name: tensor.cuda() for name, tensor in toy.named.items()}
        hessians = {name: tensor.cuda() for name, tensor in toy.hessians.items()}
        stored, _ = quantize_model(named, toy.roles, hessians, config)
        for name, tensor in expected.items():
            if isinstance(tensor, QuantizedTensor):
                assert torch.equal(stored[name].scale, tensor.scale) or config.grid.clip == "sigma"
                assert (stored[name].codes != tensor.codes).float().mean() < 0.005, name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-5), (torch.float16, 5e-5), (torch.float32, 2e-5)])
def test_sums_are_those_of_float64(dtype: torch.dtype, bound: float) -> None:
    """Tensor cores cut off what their sums cannot hold instead of rounding it, some 500 times over 8,192 rows: half of
    the last of 24 bits each time, and in sums of squares always the same way, which makes 2e-5."""
    torch.set_float32_matmul_precision("high")  # TF32 is allowed in training; sums must not use it
    generator = torch.Generator("cuda").manual_seed(0)
    x = (torch.randn(8, 4096, 512, device="cuda", generator=generator) + 0.5).to(dtype)
    collector = HessianCollector("cuda", {"a": 512})
    for rows in x.split(2):
        collector.tap("a", rows)
    rows = x.flatten(0, 1).double()
    exact = rows.mT @ rows / len(rows)
    assert float((collector.finish()["a"] - exact).abs().max() / exact.abs().max()) < bound


def test_compiled_fake_quantization_is_on_the_stored_grid() -> None:
    config = GridConfig(clip="sigma")
    bank = torch.randn(2, 64, 128, device="cuda") * 0.1
    torch.compiler.reset()
    fused = torch.compile(lambda bank: fake_quantize(bank, (("q", 64),), config), fullgraph=True)(bank)
    # a fused division is not always rounded as IEEE wants, which may move a value on an edge by one code
    assert (fused != fake_quantize(bank, (("q", 64),), config)).float().mean() < 1e-3


def test_the_matrices_of_a_published_model_take_seconds() -> None:
    generator = torch.Generator().manual_seed(0)
    start_s = 0.0
    for attempt in range(2):  # the first also loads the libraries of the factorisation
        torch.cuda.synchronize()
        start_s = time.monotonic()
        for num, rows, cols in ((24, 512, 512), (24, 256, 512), (12, 1536, 512), (12, 512, 1536)):
            weights = torch.randn(num, rows, cols, device="cuda") * 0.14
            hessian = gram(cols, generator).cuda().expand(num, cols, cols)
            gptq.quantize(weights, hessian, Grid(31, "search", floor=1.0), gptq.GptqConfig())
        torch.cuda.synchronize()
        print(f"GPTQ of 72 matrices, attempt {attempt}: {time.monotonic() - start_s:.2f} s")
    assert time.monotonic() - start_s < 5
