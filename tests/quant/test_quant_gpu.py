"""On a CUDA device: the same codes, accurate sums from bfloat16, and the time of a whole model."""

import time

import pytest
import torch
from quant_toy import Toy, gram

from epigram.quant.calibrate import HessianCollector
from epigram.quant.config import QuantConfig
from epigram.quant.grid import Grid, GridConfig
from epigram.quant.methods import gptq
from epigram.quant.policy import matrix_grid
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
    """Each row is codes times a float16 number, as it is uncompiled.

    Fused sums and divisions are rounded otherwise, which may move a step to the next float16 number, some 2e-4 of all
    rows, and a value on an edge to the next code.
    """
    config = GridConfig(clip="sigma")
    bank = torch.randn(2, 64, 128, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 0.1
    torch.compiler.reset()
    fused = torch.compile(lambda bank: fake_quantize(bank, (("q", 64),), config), fullgraph=True)(bank)
    grid = matrix_grid("q", config).without_search()
    step = grid.candidates(bank)[..., 0, :]
    codes = grid.codes(bank, step)
    largest = fused.abs().argmax(-1, keepdim=True)
    found = (fused.gather(-1, largest) / codes.gather(-1, largest)).squeeze(-1)
    assert torch.equal(found.half().float(), found)
    assert float((found / step - 1).abs().max()) < 2**-9.9
    assert float((found != step).float().mean()) < 0.02
    assert float((fused != codes * found[..., None]).float().mean()) < 1e-3


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
