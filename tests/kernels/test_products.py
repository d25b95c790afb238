"""Products that finish their results, against their formulas in float64."""

import pytest
import torch
from parity import FLOOR, Place, assert_as_good
from torch import Tensor

from epigram import plugin
from epigram.errors import UserError
from epigram.kernels.products.base import PACKAGE, Dims, Products

Tensors = dict[str, Tensor]


@pytest.fixture(params=plugin.names(PACKAGE))
def products(request: pytest.FixtureRequest, place: Place, monkeypatch) -> Products:
    """Each file of the folder that can serve here; with small tiles in the interpreter."""
    try:
        module = plugin.load(PACKAGE, request.param)
    except UserError as error:
        pytest.skip(str(error))
    if place.is_large:
        dims = Dims(widths=(512, 1536), dtype=place.dtype)
        if reason := module.check("cuda", torch.cuda.get_device_capability(), dims):
            pytest.skip(reason)
    elif request.param != "triton":
        pytest.skip("only Triton has an interpreter")
    else:
        for name, size in (("_TILE_M", 32), ("_TILE_N", 16), ("_TILE_K", 16)):
            monkeypatch.setattr(module, name, size)
    return module


def sizes(place: Place) -> tuple[int, int, int]:
    """Tokens and two widths; no multiples of a tile in the interpreter, and odd tokens everywhere."""
    return (4_099, 512, 1536) if place.is_large else (45, 24, 40)


def operands(place: Place) -> Tensors:
    """One set for all: a (N, M), weight (M, D) and what a product's result (N, D) is finished with."""
    tokens, width, depth = sizes(place)
    return {
        "a": place.normal(tokens, depth, seed=0),
        "weight": place.normal(depth, width, seed=1) * depth**-0.5,
        "c": place.normal(tokens, width, seed=2),
        "y": place.normal(tokens, width, seed=3),
        "z": place.normal(tokens, width, seed=4),
        "rstd": 0.5 + place.normal(tokens, seed=5, dtype=torch.float32).abs(),
        "correction": place.normal(tokens, seed=6, dtype=torch.float32),
        "own": place.normal(width, seed=7, dtype=torch.float32),
        "first": place.normal(width, seed=8, dtype=torch.float32),
        "skip": place.normal(width, seed=9, dtype=torch.float32),
    }


def scaled(t: Tensors) -> Tensors:
    return {"d": t["rstd"][:, None] * (t["a"] @ t["weight"])}


def added(t: Tensors) -> Tensors:
    d = t["a"] @ t["weight"] + t["c"]
    return {"d": d, "squares": d.square().sum(1)}


def up(t: Tensors, slope: float) -> Tensors:
    p = t["rstd"][:, None] * (t["a"] @ t["weight"])
    return {"p": p, "hidden": torch.where(p > 0, p, slope * p).square()}


def down_back(t: Tensors, slope: float) -> Tensors:
    p = t["c"]
    g = (t["a"] @ t["weight"]) * torch.where(p > 0, 2 * p, 2 * slope**2 * p)
    return {"d": t["rstd"][:, None] * g, "sums": (g * p).sum(1)}


def back(t: Tensors, with_own: bool) -> Tensors:
    own = t["own"] if with_own else torch.ones_like(t["own"])
    d = t["a"] @ t["weight"] + own * t["c"] + t["correction"][:, None] * t["y"]
    return {"d": d, "sums": (t["c"] * t["y"]).sum(0)} if with_own else {"d": d}


def mixed(t: Tensors, num_streams: int) -> Tensors:
    x = t["a"] @ t["weight"] + t["c"]
    entering = t["own"] * x + t["first"] * t["y"] + (t["skip"] * t["z"] if num_streams > 1 else 0)
    return {"entering": entering, "x": x, "squares": entering.square().sum(1)}


def check(place: Place, found: Tensors, formula, *arguments) -> None:
    """`formula` in float64 is the truth, and in the test's precision what may be expected."""
    given = operands(place)
    exact = formula({name: t.double() for name, t in given.items()}, *arguments)
    # Vectors are float32: what meets them is not rounded before it is finished, as in a product.
    plain = {n: t.to(place.dtype) for n, t in formula({n: t.float() for n, t in given.items()}, *arguments).items()}
    for name in set(exact) - set(found):
        del exact[name], plain[name]
    assert_as_good(found, plain, exact, FLOOR[place.dtype])


def total(parts: Tensor, rows: int) -> Tensor:
    """Partial sums of rows (rows, parts), added up."""
    assert parts.dtype == torch.float32
    assert parts.shape[0] == rows
    return parts.double().sum(1)


def test_scaled(place: Place, products: Products):
    t = operands(place)
    check(place, {"d": products.scaled(t["a"], t["weight"].T.contiguous(), t["rstd"])}, scaled)


@pytest.mark.parametrize("squares", [False, True])
def test_added(place: Place, products: Products, squares: bool):
    t = operands(place)
    d, parts = products.added(t["a"], t["weight"].T.contiguous(), t["c"], squares)
    assert (parts is not None) == squares
    check(place, {"d": d} if parts is None else {"d": d, "squares": total(parts, len(d))}, added)


@pytest.mark.parametrize("slope", [0.5, 0.1])
@pytest.mark.parametrize("keep", [False, True])
def test_up(place: Place, products: Products, slope: float, keep: bool):
    t = operands(place)
    p, hidden = products.up(t["a"], t["weight"].T.contiguous(), t["rstd"], slope, keep)
    assert (p is not None) == keep
    check(place, {"hidden": hidden} if p is None else {"p": p, "hidden": hidden}, up, slope)


@pytest.mark.parametrize("slope", [0.5, 0.1])
def test_down_back(place: Place, products: Products, slope: float):
    t = operands(place)
    d, parts = products.down_back(t["a"], t["weight"], t["c"], t["rstd"], slope)
    check(place, {"d": d, "sums": total(parts, len(d))}, down_back, slope)


@pytest.mark.parametrize("with_own", [False, True])
def test_back(place: Place, products: Products, with_own: bool):
    t = operands(place)
    d, sums = products.back(t["a"], t["weight"], t["c"], t["y"], t["correction"], t["own"] if with_own else None)
    assert (sums is not None) == with_own
    check(place, {"d": d} if sums is None else {"d": d, "sums": sums}, back, with_own)


@pytest.mark.parametrize("num_streams", [1, 2])
@pytest.mark.parametrize("keep", [False, True])
def test_mixed(place: Place, products: Products, num_streams: int, keep: bool):
    t = operands(place)
    streams = [(t["first"], t["y"]), (t["skip"], t["z"])][:num_streams]
    entering, x, parts = products.mixed(t["a"], t["weight"].T.contiguous(), t["c"], t["own"], streams, keep)
    assert (x is not None) == keep
    found = {"entering": entering, "squares": total(parts, len(entering))}
    check(place, found if x is None else found | {"x": x}, mixed, num_streams)
