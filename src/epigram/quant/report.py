"""What quantization cost: bits per weight and errors, by class of tensor."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from epigram.quant.methods.base import full_float32
from epigram.quantized import QuantizedTensor


class Measure(NamedTuple):
    """What one stored tensor cost.

    floor_share: of the rows whose step is that of the grid's floor. bits: order-0 entropy of all its codes together.
    energy: sum of squares of the weights; error: of what rounding changed. weighted_*: tr(W H Wᵀ) and tr(E H Eᵀ), None
    without a Hessian.
    """

    tensor_class: str
    method: str
    weights: int
    damping: float
    floor_share: float
    bits: float
    energy: float
    error: float
    weighted_energy: float | None = None
    weighted_error: float | None = None


@dataclass(frozen=True)
class ClassRow:
    """One row of the table.

    entropy_bits: mean order-0 entropy in bits a weight (16 for float16), each tensor with its own statistics.
    relative_error: |E|² / |W|². hessian_error: tr(E H Eᵀ) / tr(W H Wᵀ), the share of the products' output
    energy that rounding changes; None where no Hessian was measured. damping: the largest that a matrix
    needed. floor_share: of the rows whose clip would be below quant.grid.floor: their step does not depend on their
    weights.
    """

    tensor_class: str
    method: str
    tensors: int
    weights: int
    entropy_bits: float
    relative_error: float
    hessian_error: float | None
    damping: float
    floor_share: float


@dataclass(frozen=True)
class QuantReport:
    """What quantization cost.

    rows: in the order in which the classes appear in the model. redamped: matrices that needed more damping
    than configured, since their Hessian was not positive definite.
    """

    rows: tuple[ClassRow, ...]
    redamped: tuple[str, ...] = ()

    def to_dicts(self) -> list[dict[str, object]]:
        """The rows as plain values, for JSON."""
        return [asdict(row) for row in self.rows]


def summarize(measures: Sequence[Measure], redamped: Iterable[str] = ()) -> QuantReport:
    """Add up tensors of one class and method."""
    groups: dict[tuple[str, str], list[Measure]] = {}
    for measure in measures:
        groups.setdefault((measure.tensor_class, measure.method), []).append(measure)
    return QuantReport(tuple(_row(*key, group) for key, group in groups.items()), tuple(redamped))


def _row(tensor_class: str, method: str, group: list[Measure]) -> ClassRow:
    weights = sum(measure.weights for measure in group)
    weighted = [(m.weighted_error, m.weighted_energy) for m in group if m.weighted_error is not None]
    hessian_error = None
    if len(weighted) == len(group):
        hessian_error = _ratio(sum(error or 0 for error, _ in weighted), sum(energy or 0 for _, energy in weighted))
    return ClassRow(
        tensor_class=tensor_class,
        method=method,
        tensors=len(group),
        weights=weights,
        entropy_bits=sum(measure.bits for measure in group) / max(weights, 1),
        relative_error=_ratio(sum(m.error for m in group), sum(m.energy for m in group)),
        hessian_error=hessian_error,
        damping=max(measure.damping for measure in group),
        floor_share=sum(measure.floor_share * measure.weights for measure in group) / max(weights, 1),
    )


def _ratio(error: float, energy: float) -> float:
    """error / energy, where no energy means weights of zero, which every grid represents."""
    return error / energy if energy > 0 else 0.0


def measure(weights: Tensor, tensors: Sequence[QuantizedTensor], hessians: Tensor | None) -> list[list[float]]:
    """The figures of Measure from `bits` on, by matrix; the last two only with Hessians.

    weights: (n, rows, cols) float32, of which `tensors` are the quantized form; hessians: (n, cols, cols).
    """
    codes = torch.stack([tensor.codes for tensor in tensors])
    errors = weights - torch.stack([tensor.dequantize() for tensor in tensors])
    bits = code_entropy(codes, tensors[0].qmax) * weights[0].numel()
    columns = [bits, energies(weights), energies(errors)]
    if hessians is not None:
        columns += [energies(weights, hessians), energies(errors, hessians)]
    figures: list[list[float]] = torch.stack(columns, dim=1).tolist()
    return figures


def code_entropy(codes: Tensor, qmax: int) -> Tensor:
    """Order-0 entropy in bits of a code, by matrix: (n, rows, cols) integers in +-qmax -> (n,) float64."""
    num, levels = len(codes), 2 * qmax + 1
    symbols = codes.to(torch.int64).flatten(1) + qmax + levels * torch.arange(num, device=codes.device)[:, None]
    counts = torch.bincount(symbols.flatten(), minlength=num * levels).view(num, levels).to(torch.float64)
    share = counts / counts.sum(dim=1, keepdim=True)
    return -torch.xlogy(share, share).sum(dim=1) / math.log(2)


def energies(weights: Tensor, hessians: Tensor | None = None) -> Tensor:
    """Sum of squares of each matrix, tr(W Wᵀ), or tr(W H Wᵀ): (n, rows, cols) -> (n,) float64."""
    with full_float32():
        other = weights if hessians is None else weights @ hessians
    return (weights * other).sum(dim=(1, 2), dtype=torch.float64)
