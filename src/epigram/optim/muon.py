"""Muon: momentum whose every matrix is replaced by its nearest orthogonal one, for banks of weight matrices.

A bank is a 3-D parameter (layers, all rows, cols) whose rows split into matrices (q, k and v, say). One step:

1. momentum m <- mu m + s g, with s the scale of the gradients, and the Nesterov update u = s g + mu m; u is
   written into batches of equally shaped matrices, over all banks; a matrix with more rows than columns goes in
   transposed, so that `up` and `down` share a batch;
2. each batch is orthogonalised by one sequence of products;
3. w <- w (1 - lr wd) - lr kappa u, with a learning rate per layer and kappa = sqrt(max(1, rows / cols)).

Several processes share the layers of each bank: each has the gradient and the momentum of its own layers alone, and
orthogonalises those; the updates of one batch are gathered while the next is at 1 and 2; then each changes all weights,
by the same operations on the same numbers. Where the layers do not divide by the processes, matrices of zeros take the
places at the end, and stay zeros. One process is the same with all layers its own and nothing to gather.

Fused, the first and the last are one pass each, and the products are those of `kernels.symmetric`.
The step reads learning rate, momentum and scale from device tensors and never asks the device for a value: it can be
captured in a CUDA graph. Source: Jordan's Muon; banks and batching from parameter-golf #399, rates by layer
from #1130.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from epigram.capability import capability_of, support
from epigram.dist import collectives
from epigram.dist.collectives import Message
from epigram.dist.context import Context
from epigram.dist.share import Share, as_whole, mesh_of
from epigram.kernels.muon import descend, nesterov, num_parts
from epigram.optim.base import Group, not_among, outside, refuse
from epigram.optim.orthogonalize import MAX_ITERATIONS, coefficients, orthogonalize
from epigram.roles import ParameterRole

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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
    """One split of one bank: a matrix in each layer; they lie at equal distances in memory."""

    bank: str
    num_matrices: int
    rows: tuple[int, int]  # first, stop, of the bank's axis 1
    cols: int

    @property
    def num_rows(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def kappa(self) -> float:
        """Factor of the update that makes its size independent of the shape for tall matrices."""
        return math.sqrt(max(1.0, self.num_rows / self.cols))

    def of(self, bank: Tensor) -> Tensor:
        """View (layers, rows, cols) of a tensor shaped like the bank, or like some layers of it."""
        return bank[:, self.rows[0] : self.rows[1]]

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


def batches(roles: Mapping[str, ParameterRole], shapes: Mapping[str, Sequence[int]]) -> tuple[Batch, ...]:
    """Plan which matrices are orthogonalised together: one batch per shape, the largest shape first.

    roles, shapes: of the banks, shapes (layers, rows, cols).
    """
    by_shape: dict[tuple[int, int], list[Segment]] = {}
    for bank, role in roles.items():
        num_layers, bank_rows, cols = shapes[bank]
        assert role.kind == "matrix", bank
        assert num_layers == role.num_layers > 0, bank
        assert sum(rows for _, rows in role.splits) == bank_rows, bank
        start = 0
        for _, rows in role.splits:
            segment = Segment(bank, num_layers, (start, start + rows), cols)
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
        context: Context | None = None,
    ) -> None:
        self._fused = fused
        self._context = context or Context()
        self._banks = {name: named[name] for name in _bank_names(groups)}
        device = next(iter(self._banks.values())).device if self._banks else torch.device("cpu")
        self._normalize_rows = config.normalize_rows
        self._triples = coefficients(config.coefficients, config.num_iterations)
        self._dtype = resolve_dtype(config.dtype, device)
        self._shares = {
            name: Share(len(bank), self._context.rank, self._context.world_size) for name, bank in self._banks.items()
        }
        momentum_dtype = resolve_dtype(config.momentum_dtype, device)
        self._momentum = {
            name: torch.zeros_like(self._shares[name].of(bank), dtype=momentum_dtype)
            for name, bank in self._banks.items()
        }
        shapes = {name: tuple(bank.shape) for name, bank in self._banks.items()}
        self._plan = batches({name: roles[name] for name in self._banks}, shapes)
        # Between momentum and products lie the updates, (own matrices, short, long), and their sums of squares. Zeros,
        # where a matrix is only there for the messages to be equally long.
        self._counts = [[self._shares[segment.bank].rows_each for segment in batch.segments] for batch in self._plan]
        self._updates = [
            torch.zeros((sum(counts), batch.short, batch.long), dtype=self._dtype, device=device)
            for batch, counts in zip(self._plan, self._counts, strict=True)
        ]
        self._squares = [
            torch.zeros((sum(counts), num_parts(batch.short, batch.long, fused=fused)), device=device)
            for batch, counts in zip(self._plan, self._counts, strict=True)
        ]
        last = {segment.bank: index for index, batch in enumerate(self._plan) for segment in batch.segments}
        self._complete = [[bank for bank, at in last.items() if at == index] for index in range(len(self._plan))]
        self._set_factors(_rates_by_layer(groups, shapes), device)

    def _set_factors(self, rates: Mapping[str, Sequence[tuple[float, float]]], device: torch.device) -> None:
        """Pack -lr wd of all matrices in the order of the plan, and then -lr kappa of all matrices."""
        segments = [segment for batch in self._plan for segment in batch.segments]
        matrices = [(segment.kappa, *pair) for segment in segments for pair in rates[segment.bank]]
        factors = [[-lr * decay for _, lr, decay in matrices], [-lr * kappa for kappa, lr, _ in matrices]]
        self._sizes = [segment.num_matrices for segment in segments]
        self._base_factors = torch.tensor(factors, dtype=torch.float32, device=device)

    def state(self) -> dict[str, Tensor]:
        """The live momentum of each bank, shaped like the bank: a DTensor where several processes share it."""
        return {
            f"momentum.{name}": as_whole(momentum, len(self._banks[name]), self._mesh)
            for name, momentum in self._momentum.items()
        }

    @cached_property
    def _mesh(self) -> "DeviceMesh | None":
        return mesh_of(self._context)

    @torch.no_grad()
    def step(
        self,
        lr_multiplier: Tensor,
        momentum: Tensor,
        scale: Tensor,
        arriving: Mapping[str, Message] | None = None,
        done: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        """Update the banks from their gradients times `scale`.

        lr_multiplier, momentum, scale: 0-dim float32, on their device. arriving: what brings gradients to `.grad`, by
        bank, waited for where it is needed. done: called with the names of banks as soon as they are updated.
        """
        factors = iter(self._factors(lr_multiplier))
        before: tuple[int, list[Message]] | None = None
        for index in range(len(self._plan)):
            for segment in self._plan[index].segments:
                if arriving and segment.bank in arriving:
                    arriving[segment.bank].wait()
            self._absorb(index, momentum, scale)
            leaving = self._orthogonalize(index)
            if before is not None:
                self._descend(*before, factors, done)
            before = index, leaving
        if before is not None:
            self._descend(*before, factors, done)

    def _absorb(self, index: int, momentum: Tensor, scale: Tensor) -> None:
        """Read the own gradients of a batch: momentum, and the updates before orthogonalisation."""
        parts = (tensor[index].split(self._counts[index]) for tensor in (self._updates, self._squares))
        for segment, matrices, sums in zip(self._plan[index].segments, *parts, strict=True):
            share = self._shares[segment.bank]
            if not share.num_own:
                continue
            nesterov(
                segment.of(share.of(_gradient(segment.bank, self._banks[segment.bank]))),
                segment.of(self._momentum[segment.bank]),
                segment.oriented(matrices[: share.num_own]),
                sums[: share.num_own],
                momentum,
                scale,
                normalize=self._normalize_rows,
                fused=self._fused,
            )

    def _orthogonalize(self, index: int) -> list[Message]:
        """Orthogonalise the own matrices of a batch, and begin to gather those of all: a message of each segment."""
        update, squares = self._updates[index], self._squares[index]
        orthogonal = orthogonalize(update, self._triples, self._dtype, squares, fused=self._fused)
        return [collectives.begin_gather(self._context, part) for part in orthogonal.split(self._counts[index])]

    def _descend(
        self,
        index: int,
        leaving: Sequence[Message],
        factors: Iterator[tuple[Tensor, Tensor]],
        done: Callable[[Sequence[str]], None] | None,
    ) -> None:
        """Change the weights of a batch, in all layers."""
        for segment, message in zip(self._plan[index].segments, leaving, strict=True):
            weight = segment.of(self._banks[segment.bank])
            update = segment.oriented(message.wait()[: segment.num_matrices])
            descend(weight, update, *next(factors), fused=self._fused)
        if done is not None and self._complete[index]:
            done(self._complete[index])

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


def _gradient(name: str, parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, f"{name} has no gradient"
    return parameter.grad
