"""The MLP of one layer in all its variants, against the matrix products alone that it cannot do without."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from epigram.data.lanes import Lane
from epigram.run.bench.base import Bench, Work, lane_name

REPEATS = 20
OPTIONS: frozenset[str] = frozenset()

Mlp = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""(x, h, up, down, slope) -> x + what the MLP makes of h; x may be overwritten. Shapes as `plain` has them."""


def plain(x: Tensor, h: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """x, h (tokens, D), up (hidden, D), down (D, hidden) -> (tokens, D)."""
    return x + F.linear(F.leaky_relu(F.linear(h, up), slope).square(), down)


def variants(bench: Bench) -> dict[str, Mlp]:
    """What is compared, by the name in the table."""
    found: dict[str, Mlp] = {"eager": plain}
    if bench.compiled:
        found["compiled"] = bench.compile(plain)
    return found


def run(bench: Bench) -> None:
    config = bench.engine.config.model
    up = bench.random(config.mlp_dim, config.model_dim, seed=1) * config.model_dim**-0.5
    down = bench.random(config.model_dim, config.mlp_dim, seed=2) * config.mlp_dim**-0.5
    for lane in bench.lanes():
        h, grad = (bench.random(lane.num_tokens, config.model_dim, seed=seed) for seed in (3, 4))
        _products(bench, lane, h, up, down, grad)
        for name, mlp in variants(bench).items():
            _variant(bench, lane, name, mlp, h, up, down, grad)


def _variant(bench: Bench, lane: Lane, name: str, mlp: Mlp, h: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> None:
    slope = bench.engine.config.model.mlp_slope
    x = torch.zeros_like(h)  # without gradient: that of a sum is the sum's own
    leaves = [tensor.detach().requires_grad_() for tensor in (h, up, down)]

    def forward() -> Tensor:
        with torch.no_grad():
            return mlp(x, h, up, down, slope)

    def both() -> Any:
        out = mlp(x, leaves[0], leaves[1], leaves[2], slope)
        return torch.autograd.grad(out, leaves, grad)

    _time(bench, lane, name, forward, both)


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
