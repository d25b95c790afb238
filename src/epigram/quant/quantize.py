"""From a model's float parameters to the tensors of an artifact, and back."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from epigram import plugin
from epigram.capability import float64_device
from epigram.errors import ArtifactError, UserError
from epigram.quant.config import METHODS, QuantConfig, needs_hessians
from epigram.quant.grid import GridConfig
from epigram.quant.methods.base import HessianError
from epigram.quant.policy import Part, method_of, plan
from epigram.quant.report import Measure, QuantReport, measure, summarize
from epigram.quantized import QuantizedTensor
from epigram.roles import ParameterRole

Stored = dict[str, QuantizedTensor | Tensor]
_LARGEST_WEIGHT = 65504.0  # of float16: what a control tensor can hold, and a sane bound for every other
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


@torch.no_grad()
def quantize_model(
    named: Mapping[str, Tensor],
    roles: Mapping[str, ParameterRole],
    hessians: Mapping[str, Tensor],
    config: QuantConfig,
    advance: Callable[[int], None] | None = None,
) -> tuple[Stored, QuantReport]:
    """Quantize all parameters; returns the stored tensors by name, on the CPU, and what that cost.

    named: parameters (floats of any dtype, on any one device, which does the work if it has float64); roles: same keys.
    hessians: by tap, undamped (`HessianCollector.finish`); also used for the report when the method needs
    none. advance: called with the number of weights done after each batch.

    Raises UserError naming the tensor for weights or Hessians that are not finite or too large, and for a
    missing Hessian.
    """
    parts = plan(named, roles, config.grid)
    methods = {part.name: method_of(part, config) for part in parts}
    _check_methods(parts, methods, hessians, config)
    _check_finite({part.name: part.tensor for part in parts}, _LARGEST_WEIGHT, "weights", "the run has diverged")
    _check_finite(hessians, _LARGEST_FLOAT32, "Hessian", "calibrate again, on inputs without overflow")
    stored: Stored = {}
    measures: dict[str, Measure] = {}
    for batch in _batches(parts, methods):
        method = methods[batch[0].name]
        tensors, measured = (
            _to_float16(batch) if method == "float16" else _quantize_batch(batch, method, hessians, config)
        )
        stored.update(tensors)
        measures.update(measured)
        if advance is not None:
            advance(sum(part.tensor.numel() for part in batch))
    assert stored.keys() == methods.keys(), "a tensor was not stored"
    redamped = [name for name, measure in measures.items() if measure.damping > config.gptq.total_damping]
    order = [part.name for part in parts]
    return {name: stored[name] for name in order}, summarize([measures[name] for name in order], redamped)


def restore(
    tensors: Mapping[str, QuantizedTensor | Tensor],
    roles: Mapping[str, ParameterRole],
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """The model's parameters in float32 from stored tensors: dequantized, matrices back in their banks.

    shapes: of the parameters, same keys as `roles`. Raises ArtifactError when a tensor is missing, left over,
    or of another shape than the model's.
    """
    named = {name: torch.empty(tuple(shape), dtype=torch.float32) for name, shape in shapes.items()}
    parts = plan(named, roles, GridConfig())  # names and views; the formats are those of `tensors`
    wanted = {part.name for part in parts}
    if wanted != tensors.keys():
        missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise ArtifactError(f"the tensors do not fit the model: missing {missing[:3]}, not in the model {extra[:3]}")
    for part in parts:
        tensor = tensors[part.name]
        if tensor.shape != part.tensor.shape:
            raise ArtifactError(
                f"{part.name} has shape {tuple(tensor.shape)}, the model wants {tuple(part.tensor.shape)}"
            )
        part.tensor.copy_(tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor)
    return named


def _check_methods(
    parts: Sequence[Part], methods: Mapping[str, str], hessians: Mapping[str, Tensor], config: QuantConfig
) -> None:
    """Raise UserError when a Hessian is missing, or when the method of tables can be used on none."""
    for part in parts:
        if part.grid and needs_hessians(methods[part.name]):
            if part.tap not in hessians:
                key = "method" if part.is_matrix else "table_method"
                raise UserError(f'there is no Hessian of {part.tap}: calibrate first, or set quant.{key} = "rtn"')
            square = hessians[part.tap].shape
            assert square == 2 * part.tensor.shape[1:], f"the Hessian of {part.tap} does not fit {part.name}"
    tables = [methods[part.name] for part in parts if part.grid and not part.is_matrix]
    if tables and config.table_method not in tables:
        raise UserError(
            f'quant.table_method = "{config.table_method}" fits no table of this model, since none has a tap '
            'on its product; set quant.table_method = "rtn"'
        )


def _check_finite(tensors: Mapping[str, Tensor], limit: float, what: str, advice: str) -> None:
    """Raise UserError naming the first tensor with a number that is not finite, or of a magnitude above `limit`."""
    if not tensors:
        return
    largest = torch.stack([tensor.abs().amax().to(torch.float32) for tensor in tensors.values()]).tolist()
    for name, value in zip(tensors, largest, strict=True):
        if not value <= limit:  # catches NaN
            raise UserError(f"the {what} of {name} cannot be quantized: largest magnitude {value:g}; {advice}")


def _batches(parts: Sequence[Part], methods: Mapping[str, str]) -> list[list[Part]]:
    """Parts that one call can quantize: equal method, grid and shape; all control tensors are one batch."""
    groups: dict[tuple[object, ...], list[Part]] = {}
    for part in parts:
        shape = tuple(part.tensor.shape) if part.grid else ()
        groups.setdefault((methods[part.name], part.grid, shape), []).append(part)
    return list(groups.values())


def _quantize_batch(
    batch: Sequence[Part], method: str, hessians: Mapping[str, Tensor], config: QuantConfig
) -> tuple[Stored, dict[str, Measure]]:
    """Quantize parts of equal grid and shape by one call."""
    grid = batch[0].grid
    assert grid is not None
    weights = torch.stack([part.tensor for part in batch]).to(float64_device(batch[0].tensor.device), torch.float32)
    measured = all(part.tap in hessians for part in batch)
    stack = torch.stack([hessians[part.tap] for part in batch]).to(weights) if measured else None
    own_config = getattr(config, method, None)  # the settings of a method are under its own name
    try:
        outcome = plugin.load(METHODS, method).quantize(weights, stack, grid, own_config)
    except HessianError as error:
        raise UserError(f"{batch[error.index].name}: {error}; calibrate on more or other text") from error
    floored = grid.at_floor(torch.stack([tensor.scale for tensor in outcome.tensors])).float().mean(dim=1).tolist()
    figures = measure(weights, outcome.tensors, stack)
    measures = {
        part.name: Measure(part.tensor_class, method, part.tensor.numel(), *facts, *own)
        for part, *facts, own in zip(batch, outcome.damping, floored, figures, strict=True)
    }
    tensors: Stored = {
        part.name: QuantizedTensor(tensor.codes.cpu(), tensor.scale.cpu(), tensor.qmax)
        for part, tensor in zip(batch, outcome.tensors, strict=True)
    }
    return tensors, measures


def _to_float16(batch: Sequence[Part]) -> tuple[Stored, dict[str, Measure]]:
    stored: Stored = {}
    measures = {}
    for part in batch:
        weight = part.tensor.detach().cpu().to(torch.float64)
        stored[part.name] = half = weight.to(torch.float16)
        energy, error = float(weight.square().sum()), float((weight - half.to(torch.float64)).square().sum())
        measures[part.name] = Measure(
            part.tensor_class, "float16", weight.numel(), 0.0, 0.0, 16.0 * weight.numel(), energy, error
        )
    return stored, measures
