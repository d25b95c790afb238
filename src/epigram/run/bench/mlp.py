"""The MLP of one layer in all its variants, against the matrix products alone that it cannot do without."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from epigram import plugin
from epigram.data.lanes import Lane
from epigram.dist.context import Context
from epigram.kernels import float8
from epigram.kernels.base import why_not_products
from epigram.kernels.products.base import PACKAGE as PRODUCTS
from epigram.kernels.products.base import Dims
from epigram.kernels.trunk import leaky_square
from epigram.run.bench.base import Bench, Work, lane_name

REPEATS = 20
OPTIONS = frozenset({"profile"})

Passes = tuple[Callable[[], Any], Callable[[], Any]]
"""The forward, and forward and backward."""


def plain(
    x: Tensor, h: Tensor, up: Tensor, down: Tensor, slope: float, linear: Callable[..., Tensor] = F.linear
) -> Tensor:
    """x + what the MLP makes of h: x, h (tokens, D), up (hidden, D), down (D, hidden) -> (tokens, D)."""
    return x + linear(leaky_square(linear(h, up), slope), down)


def in_float8(x: Tensor, h: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """The same by `epigram.kernels.float8`."""
    return plain(x, h, up, down, slope, float8.linear)


def variants(bench: Bench) -> dict[str, Callable[..., Passes]]:
    """What is compared, by the name in the table: from (x, h, up, down, grad, slope) to the work."""
    forms: dict[str, Callable[..., Tensor]] = {"": plain}
    context, c = bench.engine.context, bench.engine.config.model
    if reason := float8.why_not(context.device.type, context.capability, (c.model_dim, c.mlp_dim)):
        bench.left_out["float8"] = reason
    else:
        forms["float8, "] = in_float8
    found: dict[str, Callable[..., Passes]] = {}
    for form, mlp in forms.items():
        found[f"{form}eager"] = partial(differentiated, mlp)
        if bench.engine.compiled:
            found[f"{form}compiled"] = partial(differentiated, bench.compile(mlp))
    for name, products in usable_products(bench.engine.model.compute_dtype, bench.engine.context).items():
        found[f"products by {name}"] = partial(finished, products)
    return found


def differentiated(
    mlp: Callable[..., Tensor], x: Tensor, h: Tensor, up: Tensor, down: Tensor, grad: Tensor, slope: float
) -> Passes:
    """By autograd."""
    leaves = [tensor.detach().requires_grad_() for tensor in (h, up, down)]

    def forward() -> Tensor:
        with torch.no_grad():
            return mlp(x, h, up, down, slope)

    def both() -> Any:
        return torch.autograd.grad(mlp(x, *leaves, slope), leaves, grad)

    return forward, both


def finished(products: Any, x: Tensor, h: Tensor, up: Tensor, down: Tensor, grad: Tensor, slope: float) -> Passes:
    """As the fused trunk does it: with the norm of h, whose factors are one here."""
    ones, zeros = torch.ones(len(h), device=h.device), torch.zeros(len(h), device=h.device)

    def forward() -> Tensor:
        _, hidden = products.up(h, up, ones, slope, False)
        out: Tensor = products.added(hidden, down, x, False)[0]
        return out

    def both() -> Any:
        pre, hidden = products.up(h, up, ones, slope, True)
        products.added(hidden, down, x, False)
        d_pre, _ = products.down_back(grad, down, pre, ones, slope)
        dh, _ = products.back(d_pre, up, grad, h, zeros)
        return dh, d_pre.mT @ h, grad.mT @ hidden

    return forward, both


def usable_products(dtype: torch.dtype, context: Context) -> dict[str, Any]:
    """The products that can serve here, by name."""
    dims = Dims(widths=(), dtype=dtype)
    names = [
        n for n in plugin.names(PRODUCTS) if why_not_products(n, context.device.type, context.capability, dims) is None
    ]
    return {name: plugin.load(PRODUCTS, name) for name in names}


def run(bench: Bench) -> None:
    config = bench.engine.config.model
    up = bench.random(config.mlp_dim, config.model_dim, seed=1) * config.model_dim**-0.5
    down = bench.random(config.model_dim, config.mlp_dim, seed=2) * config.mlp_dim**-0.5
    for lane in bench.lanes():
        h, grad = (bench.random(lane.num_tokens, config.model_dim, seed=seed) for seed in (3, 4))
        _products(bench, lane, h, up, down, grad)
        x = torch.zeros_like(h)  # without gradient: that of a sum is the sum's own
        for name, variant in variants(bench).items():
            _time(bench, lane, name, *variant(x, h, up, down, grad, config.mlp_slope))


def _products(bench: Bench, lane: Lane, h: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> None:
    hidden = torch.mm(h, up.mT)

    def forward() -> None:
        torch.mm(h, up.mT)
        torch.mm(hidden, down.mT)

    def both() -> None:
        forward()
        torch.mm(grad, down)
        torch.mm(grad.mT, hidden)
        torch.mm(hidden, up)
        torch.mm(hidden.mT, h)

    _time(bench, lane, "products alone", forward, both)


def _time(bench: Bench, lane: Lane, name: str, forward: Callable[[], Any], both: Callable[[], Any]) -> None:
    work = products_work(lane.num_tokens, bench.engine.config.model.model_dim, bench.engine.config.model.mlp_dim,
                         bench.engine.model.compute_dtype.itemsize)  # fmt: skip
    amounts = {"tokens": lane.num_tokens}
    bench.time(f"{name}, {lane_name(lane)}, forward", forward, *work[:2], amounts=amounts)
    bench.time(f"{name}, {lane_name(lane)}, forward + backward", both, *work, amounts=amounts)


def products_work(num_tokens: int, model_dim: int, mlp_dim: int, item_bytes: int) -> list[Work]:
    """The two products of the forward and the four of the backward; all have the same three sizes.

    Whatever lies between them can be done while they run, so each has only its own operands to move.
    """
    operands = num_tokens * model_dim + num_tokens * mlp_dim + model_dim * mlp_dim
    return [Work(flops=2.0 * num_tokens * model_dim * mlp_dim, bytes=float(item_bytes * operands))] * 6
