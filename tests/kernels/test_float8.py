"""Products in float8 against a grid written out from its bits, and against float64."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity import relative
from stirred import stirred
from torch import Tensor
from torch._dynamo.utils import counters

from epigram import capability
from epigram.config import load_recipe
from epigram.kernels import float8
from epigram.kernels.base import FLOAT8
from epigram.model.gpt import GPT
from epigram.run.graphs import CudaCapture

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {E4M3: (4, 3, 7, 448.0), E5M2: (5, 2, 15, 57344.0)}
"""Bits of exponent and mantissa, bias, and the largest number, from the paper (table 1)."""

HALF_ULP = {E4M3: 2.0**-4, E5M2: 2.0**-3}
"""Largest relative error of rounding a number that is not subnormal."""

NEAR = 0.25
"""Relative norm by which gradients of a model in float8 may differ from those without it; 0.09 to 0.15 was seen."""

DEVICE_SUMS = 2.0**-6
"""Relative norm by which the device's product may differ: its result is rounded to bfloat16 as the twin's, from a sum
in a little over bfloat16's precision."""


def grid(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All numbers of the format that are not negative, ascending, in float64, and whether the last bit of each is 0."""
    _, mantissa, bias, largest = FORMATS[dtype]
    found = []
    for bits in range(128):
        exponent, rest = bits >> mantissa, bits & (2**mantissa - 1)
        share = rest / 2**mantissa
        found.append(share * 2.0 ** (1 - bias) if exponent == 0 else (1 + share) * 2.0 ** (exponent - bias))
    numbers = [number for number in found if number <= largest]  # above are infinity and what is no number
    return torch.tensor(numbers, dtype=torch.float64), torch.arange(len(numbers)) % 2 == 0


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Each of x, float64, to the nearest number of the format, ties to the one whose last bit is 0."""
    numbers, is_even = grid(dtype)
    above = torch.searchsorted(numbers, x.abs()).clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    to_low, to_high = x.abs() - low, high - x.abs()
    takes_high = (to_high < to_low) | ((to_high == to_low) & is_even[above])
    return torch.where(takes_high, high, low) * x.sign()


def as_rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the matrix x stands for after rounding, in float64, with one scale that makes its largest the format's."""
    scale = float(x.abs().max()) / FORMATS[dtype][3]
    return nearest(x.double() / scale, dtype) * scale


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_grid_is_torchs(dtype: torch.dtype):
    """The oracle has every finite number of the format and no other."""
    bits = torch.arange(128, dtype=torch.uint8).view(dtype).double()
    assert grid(dtype)[0].equal(bits[bits.isfinite()])
    assert torch.finfo(dtype).max == FORMATS[dtype][3]


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_is_to_the_nearest(dtype: torch.dtype):
    """Numbers of the grid, the middle between each two of them, what lies beside it, and numbers of every size."""
    numbers, _ = grid(dtype)
    middles = (numbers[1:] + numbers[:-1]) / 2
    sizes = normal(2000, seed=1).double() * 2.0 ** torch.linspace(-30, 5, 2000, dtype=torch.float64)
    x = torch.cat([numbers, -numbers, middles, -middles, middles * (1 + 2**-20), middles * (1 - 2**-20), sizes])
    found = float8.rounded(x.float(), dtype)
    assert float(found.scale) == 1, "the largest is the format's own"
    assert found.values.double().equal(nearest(x.float().double(), dtype))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_largest_number_is_met_and_never_passed(dtype: torch.dtype, precision: torch.dtype):
    """Whatever the largest value is: beyond the largest number come NaN and infinity."""
    for seed, exponent in enumerate(torch.linspace(-60, 120, 500).tolist()):
        x = (normal(8, seed=seed) * 2.0**exponent).to(precision)
        found = float8.rounded(x, dtype)
        assert float(found.values.float().abs().max()) == FORMATS[dtype][3]
        assert float(found.scale) * FORMATS[dtype][3] == pytest.approx(float(x.abs().max()), rel=1e-6)


def test_rounded_matrices_lie_as_a_device_wants_them():
    """Along what is summed over, also where the gradient of a transposed or of an expanded tensor comes in."""
    x = normal(4, 16)
    for found, expected in ((x.t(), x.t().contiguous()), (x[:1].expand(6, 16), x[:1].repeat(6, 1))):
        values = float8.rounded(found, E5M2).values
        assert values.is_contiguous()
        assert values.float().equal(float8.rounded(expected, E5M2).values.float())


# -- the product -------------------------------------------------------------------------------------------------------


def test_forward_and_gradients_are_those_of_the_rounded_matrices():
    """The gradient of the weights is that of the matrices as they are."""
    x, weight, grad = normal(3, 7, 33), normal(20, 33, seed=1), normal(3, 7, 20, seed=2)
    x.requires_grad_()
    weight.requires_grad_()
    y = float8.linear(x, weight)
    dx, dw = torch.autograd.grad(y, (x, weight), grad)
    x8, w8, g8 = as_rounded(x.detach(), E4M3), as_rounded(weight.detach(), E4M3), as_rounded(grad, E5M2)
    assert (y.shape, y.dtype) == ((3, 7, 20), torch.float32)
    assert relative(y.detach(), x8 @ w8.T) < 1e-6
    assert relative(dx, g8 @ w8) < 1e-6
    assert relative(dw, grad.flatten(0, 1).double().T @ x.detach().flatten(0, 1).double()) < 1e-6


def bound(a: Tensor, b: Tensor, a_format: torch.dtype) -> Tensor:
    """What rounding a (R, K) and b (N, K) can change their product by, in float64: (R, N)."""

    def error(x: Tensor, dtype: torch.dtype) -> Tensor:
        smallest = float(grid(dtype)[0][1]) * float(x.abs().max()) / FORMATS[dtype][3]
        return HALF_ULP[dtype] * x.abs() + smallest / 2

    e, f = error(a, a_format), error(b, E4M3)
    return a.abs() @ f.T + e @ b.abs().T + e @ f.T


def test_errors_are_within_the_formats_bounds():
    """Against float64; with columns of many sizes, so that some numbers are subnormal."""
    sizes = 2.0 ** -torch.arange(48).float().remainder(12)
    x, weight, grad = normal(64, 48) * sizes, normal(80, 48, seed=1), normal(64, 80, seed=2) * 1e-6
    x.requires_grad_()
    y = float8.linear(x, weight)
    (dx,) = torch.autograd.grad(y, x, grad)
    x, weight, grad = x.detach().double(), weight.double(), grad.double()
    for found, exact, most in (
        (y, x @ weight.T, bound(x, weight, E4M3)),
        (dx, grad @ weight, bound(grad, weight.T, E5M2)),
    ):
        difference = (found.detach().double() - exact).abs()
        assert bool((difference <= most * (1 + 1e-5)).all())
        assert 0.01 < relative(found.detach(), exact) < 0.08, "rounded, and no more than that"


def test_an_outlier_takes_the_scale_and_nothing_overflows():
    for precision, outlier in ((torch.bfloat16, 3e38), (torch.float32, -3e38), (torch.float32, 1e5)):
        x, weight = normal(4, 16).to(precision), (1e-3 * normal(8, 16, seed=1)).to(precision)
        x[1, 2] = outlier
        x.requires_grad_()
        y = float8.linear(x, weight)
        (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 1.0).index_fill(0, torch.tensor(2), outlier / 1e5))
        assert bool(y.isfinite().all()) and bool(dx.isfinite().all())
        assert relative(y[1].detach(), x.detach()[1].double() @ weight.double().T) < 2 * HALF_ULP[E4M3]


@pytest.mark.parametrize("which", ["x", "weight", "grad"])
@pytest.mark.parametrize("size", [0.0, 1e-38])
def test_zeros_and_what_is_nearly_zero(which: str, size: float):
    tensors = {"x": normal(4, 16), "weight": normal(8, 16, seed=1), "grad": normal(4, 8, seed=2)}
    tensors[which] = tensors[which] * size
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    y = float8.linear(x, weight)
    dx, dw = torch.autograd.grad(y, (x, weight), tensors["grad"])
    for found in (y, dx, dw):
        assert bool(found.isfinite().all())
    assert (float(y.detach().abs().max()) < 1e-29) == (which != "grad")
    assert (float(dx.abs().max()) < 1e-29) == (which != "x")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(value: float):
    """So that a bad step is found: no format here has room for it."""
    x, weight = normal(4, 16), normal(8, 16, seed=1)
    x[3, 5] = value
    assert bool(float8.linear(x, weight).isnan().all())
    x, weight[0, 0] = normal(4, 16), value
    assert bool(float8.linear(x, weight).isnan().all())


# -- the device's products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "precision", "sizes"),
    [
        ("cpu", torch.float32, (31, 48, 32)),  # torch's own operator, slow, which takes the same arguments
        ("cpu", torch.bfloat16, (31, 48, 32)),
        pytest.param("cuda", torch.bfloat16, (31, 48, 32), marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, (4100, 1536, 512), marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float32, (4100, 512, 1536), marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(("a_format", "fast"), [(E4M3, True), (E5M2, False)])
def test_the_twin_is_the_devices_product(
    device: str, precision: torch.dtype, sizes: tuple[int, int, int], a_format: torch.dtype, fast: bool
):
    rows, outputs, inputs = sizes
    a = float8.rounded(normal(rows, inputs).to(device, precision), a_format)
    b = float8.rounded(normal(outputs, inputs, seed=1).to(device, precision), E4M3)
    found = float8.scaled_product(a, b, precision, fast)
    twin = float8.plain_product(a, b, precision, fast)
    assert found.dtype == twin.dtype == precision
    exact = (a.values.double() * a.scale.double()) @ (b.values.double() * b.scale.double()).T
    assert relative(twin, exact) < (1e-5 if precision is torch.float32 and device == "cpu" else 2.0**-8)
    assert relative(found, exact) < DEVICE_SUMS


@pytest.mark.gpu
def test_on_a_device_it_is_what_it_is_on_a_cpu():
    """Forward and gradients, with the layouts that a model has."""
    x, weight, grad = normal(3, 70, 512, dtype=torch.bfloat16), normal(1536, 512, seed=1), normal(3, 70, 1536, seed=2)

    def results(device: str) -> list[Tensor]:
        leaves = [tensor.to(device, torch.bfloat16).requires_grad_() for tensor in (x, weight)]
        y = float8.linear(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(device, torch.bfloat16))]

    for found, twin in zip(results("cuda"), results("cpu"), strict=True):
        assert relative(found.cpu(), twin) < DEVICE_SUMS


def test_where_it_can_be():
    widths = (512, 1536)
    assert float8.why_not("cpu", None, widths) is None
    assert float8.why_not("cpu", None, (24,)) is None, "the twin takes any width"
    for found in ((8, 9), (9, 0), (10, 0), (12, 0)):
        assert float8.why_not("cuda", found, widths) is None
    for found in ((7, 5), (8, 0), (8, 6)):
        reason = float8.why_not("cuda", found, widths)
        assert reason == f"float8 products need compute capability 8.9, this device has {found[0]}.{found[1]}"
        assert reason == capability.why_no_float8("cuda", found)
    assert "multiples of 16, not 40" in (float8.why_not("cuda", (9, 0), (512, 40)) or "")
    assert "no float8 formats" in (float8.why_not("mps", None, widths) or "")


# -- in a model --------------------------------------------------------------------------------------------------------


MODEL = replace(
    load_recipe("smoke").model, num_layers=2, window_layers=(1,), xsa_layers=(1,), value_embed_layers=(1,),
    backout_layer=-1, skips="none",
)  # fmt: skip


def model_and_batch(device: str = "cpu") -> tuple[GPT, Tensor, Tensor]:
    """A small model with no weight zero by chance, and a batch."""
    generator = torch.Generator().manual_seed(1)
    model = stirred(MODEL, generator)
    tokens = torch.randint(512, (2, 49), generator=generator).to(device)
    return model.to(device), tokens[:, :-1], tokens[:, 1:]


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_the_products_of_the_layers_and_no_others(monkeypatch):
    """Four a layer, each with its own matrix."""
    model, tokens, targets = model_and_batch()
    seen: list[tuple[int, ...]] = []

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(tuple(weight.shape))
        return F.linear(x, weight)

    plain = model.loss(tokens, targets)
    monkeypatch.setitem(FLOAT8.trunk.keywords, "linear", linear)
    assert model.loss(tokens, targets, kernels=FLOAT8).equal(plain)
    banks = model.banks
    assert seen == 2 * [tuple(bank.shape[1:]) for bank in (banks.qkv, banks.out, banks.up, banks.down)]


def test_training_is_near_to_that_without():
    model, tokens, targets = model_and_batch()
    plain = model.loss(tokens, targets)
    expected = gradients(model, plain)
    loss = model.loss(tokens, targets, kernels=FLOAT8)
    assert 0 < abs(float(loss.detach() - plain.detach())) < 0.01
    found = gradients(model, loss)
    for name in ("banks.qkv", "banks.out", "banks.up", "banks.down", "embed"):
        assert 0.01 < relative(found[name], expected[name]) < NEAR, name


def test_it_is_traced_into_one_graph():
    torch.compiler.reset()
    counters.clear()
    model, tokens, targets = model_and_batch()
    eager = model.loss(tokens, targets, kernels=FLOAT8)
    traced = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="aot_eager")
    compiled = traced(tokens, targets, kernels=FLOAT8)
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled.detach().equal(eager.detach())
    expected = gradients(model, eager)
    for name, found in gradients(model, compiled).items():
        assert found.equal(expected[name]), name


@pytest.mark.gpu
def test_compiled_for_a_device_and_replayed():
    """A last bit of bfloat16 that comes out otherwise, compiled, decides now and then on a whole step of float8's grid:
    so two ways to compute differ by as much as either does from bfloat16."""
    torch.compiler.reset()
    model, tokens, targets = model_and_batch("cuda")
    model.compute_dtype = torch.bfloat16
    names, parameters = zip(*model.named_parameters(), strict=True)

    def work(loss) -> list[Tensor]:
        value = loss(tokens, targets, kernels=FLOAT8)
        return [value.detach(), *torch.autograd.grad(value, parameters)]

    eager = work(model.loss)
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False)
    work(compiled)  # as a run's warm-up does: the call that compiles and tunes is not one whose results are used
    launched = work(compiled)
    results, replay = CudaCapture(torch.device("cuda", 0))(partial(work, compiled))
    replay()
    torch.cuda.synchronize()
    for name, one, two, three in zip(("loss", *names), eager, launched, results, strict=True):
        if one.numel() > 1000 or name == "loss":
            assert relative(two, one) < NEAR, name
            assert relative(three, two) < 0.01, name
