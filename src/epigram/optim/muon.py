"""Muon: momentum whose every matrix is replaced by its nearest orthogonal one, for banks of weight matrices.

A bank is a 3-D parameter (layers, all rows, cols) whose rows split into matrices (q, k and v, say). One step:

1. momentum m <- mu m + s g, with s the scale of the gradients, and the Nesterov update u = s g + mu m; u is
   written into batches of equally shaped matrices, over all banks; a matrix with more rows than columns goes in
   transposed, so that `up` and `down` share a batch;
2. each batch is orthogonalised by one sequence of products;
3. w <- w (1 - lr wd) - lr kappa u, with a learning rate per layer and kappa = sqrt(max(1, rows / cols)).

Fused, the first and the last are one pass each, and the products are those of `kernels.symmetric`.
The step reads learning rate, momentum and scale from device tensors and never asks the device for a value: it can be
captured in a CUDA graph. Source: Jordan's Muon; banks and batching from parameter-golf #399, rates by layer
from #1130.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from epigram.capability import capability_of, support
from epigram.kernels.muon import descend, nesterov, num_parts
from epigram.optim.base import Group, not_among, outside, refuse
from epigram.optim.orthogonalize import MAX_ITERATIONS, coefficients, orthogonalize
from epigram.roles import ParameterRole

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Settings of Muon. In parameter-golf #1212: lr_early 0.024, lr_late 0.019, weight_decay 0.04.

    lr_early, lr_late: base learning rates of the layers below and from num_layers // 2. weight_decay:
    decoupled, times the learning rate. num_iterations, coefficients: of Newton-Schulz, "quintic" or
    "polar_express". normalize_rows: MuonEq-R. dtype, momentum_dtype: of the orthogonalisation and of the
    stored momentum; "auto" is bfloat16 on a GPU that has it and float32 elsewhere (on a CPU a bfloat16
    product takes some 200 times longer).
    """

    lr_early: float
    lr_late: float
    weight_decay: float
    num_iterations: int = 5
    coefficients: str = "quintic"
    normalize_rows: bool = False
    dtype: str = "auto"
    momentum_dtype: str = "auto"

    def __post_init__(self) -> None:
        problems = not_among("muon.coefficients", self.coefficients, MAX_ITERATIONS)
        problems += not_among("muon.dtype", self.dtype, ["auto", *_DTYPES])
        problems += not_among("muon.momentum_dtype", self.momentum_dtype, ["auto", *_DTYPES])
        for name in ("lr_early", "lr_late", "weight_decay"):
            problems += outside(f"muon.{name}", getattr(self, name), 0)
        most = MAX_ITERATIONS.get(self.coefficients, 100)
        problems += outside("muon.num_iterations", self.num_iterations, 1, most)
        refuse(problems)


class Segment(NamedTuple):
    """The matrices of one split of one bank over a run of layers; they lie at equal distances in memory."""

    bank: str
    layers: tuple[int, int]  # first, stop
    rows: tuple[int, int]  # first, stop, of the bank's axis 1
    cols: int

    @property
    def num_matrices(self) -> int:
        return self.layers[1] - self.layers[0]

    @property
    def num_rows(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def kappa(self) -> float:
        """Factor of the update that makes its size independent of the shape for tall matrices."""
        return math.sqrt(max(1.0, self.num_rows / self.cols))

    def of(self, bank: Tensor) -> Tensor:
        """View (matrices, rows, cols) of a tensor shaped like the bank."""
        return bank[self.layers[0] : self.layers[1], self.rows[0] : self.rows[1]]

    def oriented(self, matrices: Tensor) -> Tensor:
        """View that turns the bank's orientation into the batch's (short side first), and back."""
        return matrices.mT if self.num_rows > self.cols else matrices


class Batch(NamedTuple):
    """Segments whose matrices have equal short and long sides and are orthogonalised together."""

    short: int
    long: int
    segments: tuple[Segment, ...]

    @property
    def num_matrices(self) -> int:
        return sum(segment.num_matrices for segment in self.segments)


def batches(
    roles: Mapping[str, ParameterRole],
    shapes: Mapping[str, Sequence[int]],
    owned: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[Batch, ...]:
    """Plan which matrices are orthogonalised together: one batch per shape, the largest shape first.

    roles, shapes: of the banks, shapes (layers, rows, cols). owned: for each bank the layers (first, stop)
    that this process updates when several share the work, possibly none (first == stop); all layers without
    it.
    """
    by_shape: dict[tuple[int, int], list[Segment]] = {}
    for bank, role in roles.items():
        num_layers, bank_rows, cols = shapes[bank]
        assert role.kind == "matrix", bank
        assert num_layers == role.num_layers > 0, bank
        assert sum(rows for _, rows in role.splits) == bank_rows, bank
        layers = (0, num_layers) if owned is None else owned[bank]
        start = 0
        for _, rows in role.splits:
            segment = Segment(bank, layers, (start, start + rows), cols)
            if segment.num_matrices:
                by_shape.setdefault((min(rows, cols), max(rows, cols)), []).append(segment)
            start += rows
    ordered = sorted(by_shape.items(), key=lambda item: (item[0][0] * item[0][1], item[0]), reverse=True)
    return tuple(Batch(short, long, tuple(segments)) for (short, long), segments in ordered)


class Muon:
    """Muon over the banks of `groups`, which give each layer its learning rate and weight decay."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        roles: Mapping[str, ParameterRole],
        groups: Sequence[Group],
        config: MuonConfig,
        *,
        fused: bool = False,
    ) -> None:
        self._fused = fused
        self._banks = {name: named[name] for name in _bank_names(groups)}
        device = next(iter(self._banks.values())).device if self._banks else torch.device("cpu")
        self._normalize_rows = config.normalize_rows
        self._triples = coefficients(config.coefficients, config.num_iterations)
        self._dtype = resolve_dtype(config.dtype, device)
        momentum_dtype = resolve_dtype(config.momentum_dtype, device)
        self._momentum = {name: torch.zeros_like(bank, dtype=momentum_dtype) for name, bank in self._banks.items()}
        shapes = {name: tuple(bank.shape) for name, bank in self._banks.items()}
        self._plan = batches({name: roles[name] for name in self._banks}, shapes)
        # Between the halves of a step lie the updates, (matrices, short, long), and their sums of squares.
        self._updates = [
            torch.empty((batch.num_matrices, batch.short, batch.long), dtype=self._dtype, device=device)
            for batch in self._plan
        ]
        parts = [num_parts(batch.short, batch.long, fused=fused) for batch in self._plan]
        self._squares = [
            torch.empty((batch.num_matrices, n), dtype=torch.float32, device=device)
            for batch, n in zip(self._plan, parts, strict=True)
        ]
        self._set_factors(_rates_by_layer(groups, shapes), device)

    def _set_factors(self, rates: Mapping[str, Sequence[tuple[float, float]]], device: torch.device) -> None:
        """Pack -lr wd of all matrices in the order of the plan, and then -lr kappa of all matrices."""
        segments = [segment for batch in self._plan for segment in batch.segments]
        matrices = [(seg.kappa, *pair) for seg in segments for pair in rates[seg.bank][slice(*seg.layers)]]
        factors = [[-lr * decay for _, lr, decay in matrices], [-lr * kappa for kappa, lr, _ in matrices]]
        self._sizes = [segment.num_matrices for segment in segments]
        self._base_factors = torch.tensor(factors, dtype=torch.float32, device=device)

    def state(self) -> dict[str, Tensor]:
        """The live momentum of each bank, shaped like the bank."""
        return {f"momentum.{name}": momentum for name, momentum in self._momentum.items()}

    def step(self, lr_multiplier: Tensor, momentum: Tensor, scale: Tensor) -> None:
        """Update the banks from their gradients times `scale`. All arguments: 0-dim float32, on their device."""
        self.absorb(momentum, scale)
        self.apply(lr_multiplier)

    @torch.no_grad()
    def absorb(self, momentum: Tensor, scale: Tensor) -> None:
        """First half of a step, which reads the gradients: momentum, and the updates before orthogonalisation."""
        gradients = {name: _gradient(name, bank) for name, bank in self._banks.items()}
        for batch, update, squares in zip(self._plan, self._updates, self._squares, strict=True):
            for segment, matrices, sums in _split(batch, update, squares):
                nesterov(
                    segment.of(gradients[segment.bank]),
                    segment.of(self._momentum[segment.bank]),
                    segment.oriented(matrices),
                    sums,
                    momentum,
                    scale,
                    normalize=self._normalize_rows,
                    fused=self._fused,
                )

    @torch.no_grad()
    def apply(self, lr_multiplier: Tensor) -> None:
        """Second half of a step, on memory that never moves: orthogonalise the updates, and change the weights."""
        factors = iter(self._factors(lr_multiplier))
        for batch, update, squares in zip(self._plan, self._updates, self._squares, strict=True):
            orthogonal = orthogonalize(update, self._triples, self._dtype, squares, fused=self._fused)
            for segment, matrices in _split(batch, orthogonal):
                weight = segment.of(self._banks[segment.bank])
                descend(weight, segment.oriented(matrices), *next(factors), fused=self._fused)

    def _factors(self, lr_multiplier: Tensor) -> list[tuple[Tensor, Tensor]]:
        """1 - lr wd and -lr kappa of each matrix, by segment in the order of the plan."""
        factors = self._base_factors * lr_multiplier
        factors[0] += 1.0
        decays, rates = (row.split(self._sizes) for row in factors.unbind())
        return list(zip(decays, rates, strict=True))


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `name` means on `device`; for "auto" the one that the capability table gives this device."""
    return support(device.type, capability_of(device)).precision if name == "auto" else _DTYPES[name]


def _bank_names(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(part.name for group in groups for part in group.parts))


def _rates_by_layer(
    groups: Sequence[Group], shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[tuple[float, float]]]:
    """(learning rate, weight decay) of each layer of each bank."""
    rates = {name: [(math.nan, math.nan)] * shape[0] for name, shape in shapes.items()}
    for group in groups:
        for part in group.parts:
            for layer in range(*(part.layers or (0, shapes[part.name][0]))):
                rates[part.name][layer] = (group.lr, group.weight_decay)
    assert not any(math.isnan(lr) for layers in rates.values() for lr, _ in layers)
    return rates


def _split(batch: Batch, *stacked: Tensor) -> list[tuple[Any, ...]]:
    """Each segment with its part of every tensor."""
    sizes = [segment.num_matrices for segment in batch.segments]
    return list(zip(batch.segments, *(tensor.split(sizes) for tensor in stacked), strict=True))


def _gradient(name: str, parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, f"{name} has no gradient"
    return parameter.grad
