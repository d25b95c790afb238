"""The operations that a model is built of, and who computes them: the plain twins, or fused kernels.

Each file of this folder describes its operations by plain torch code, which runs everywhere and is what the kernels of
`_triton/` (the same names) are tested against. Those build their matrix products from a file of `products/`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epigram import plugin
from epigram.capability import Capability, why_no_triton
from epigram.errors import UserError
from epigram.kernels import float8
from epigram.kernels.choice import CHOICES
from epigram.kernels.products.base import PACKAGE as PRODUCTS
from epigram.kernels.products.base import Dims


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One implementation of every operation; what each does say the files of this folder.

    products: the file of `products/` that they are built on, None for the plain ones. front: enter, look_up, scaled.
    trunk: trunk. residual: mix_norm. head: head_loss, head_nll.
    """

    name: str
    products: str | None
    enter: Callable[..., Tensor]
    look_up: Callable[..., Tensor]
    scaled: Callable[..., Tensor]
    trunk: Callable[..., tuple[Tensor, Tensor | None]]
    mix_norm: Callable[..., Tensor]
    head_loss: Callable[..., Tensor]
    head_nll: Callable[..., Tensor]


_PLACES = {
    "front": ("enter", "look_up", "scaled"),
    "trunk": ("trunk",),
    "residual": ("mix_norm",),
    "head": ("head_loss", "head_nll"),
}


def _load(folder: str) -> dict[str, Callable[..., Any]]:
    return {
        operation: getattr(importlib.import_module(f"{folder}.{file}"), operation)
        for file, operations in _PLACES.items()
        for operation in operations
    }


PLAIN = Kernels(name="plain", products=None, **_load("epigram.kernels"))

FLOAT8 = replace(PLAIN, name="plain, float8", trunk=partial(PLAIN.trunk, linear=float8.linear))
"""The plain ones, with the products of the layers in float8."""


def fused(products: str) -> Kernels:
    """The fused kernels over a file of `products/`. Needs Triton."""
    operations = _load("epigram.kernels._triton")
    chosen = plugin.load(PRODUCTS, products)
    operations["trunk"] = partial(operations["trunk"], products=chosen)
    return Kernels(name=f"fused, products by {products}", products=products, **operations)


def why_not_fused(device_type: str, capability: Capability | None, dims: Dims) -> str | None:
    """Why the fused kernels cannot serve here, in a sentence; None when they can."""
    if reason := why_no_triton(device_type, capability):
        return reason
    if dims.dtype not in (torch.bfloat16, torch.float16):
        return f"the fused kernels are for bfloat16 and float16, not {dims.dtype}"
    if dims.carries:
        return "the fused kernels do not know residual lambdas"
    return None


def choose(name: str, device_type: str, capability: Capability | None, dims: Dims) -> Kernels:
    """The kernels called `name`; "auto" takes the fused ones where they can serve, over the fastest products.

    Raises UserError when the fused ones are asked for where they cannot.
    """
    assert name in CHOICES
    reason = why_not_fused(device_type, capability, dims)
    if name == "fused" and reason:
        raise UserError(f'run.kernels = "fused" cannot be used here: {reason}')
    if name == "plain" or reason:
        return PLAIN
    return fused("quack" if why_not_products("quack", device_type, capability, dims) is None else "triton")


def why_not_products(products: str, device_type: str, capability: Capability | None, dims: Dims) -> str | None:
    """Why the file `products` of `products/` cannot serve here, in a sentence; None when it can."""
    try:
        reason: str | None = plugin.load(PRODUCTS, products).check(device_type, capability, dims)
    except UserError as error:  # its library is not installed
        return str(error)
    return reason
