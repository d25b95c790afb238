"""Which tensor is stored how: pure functions of roles and shapes, without data.

- a bank of matrices: each matrix by itself, as rows of `matrix_bits` codes (int6);
- a table (embedding): rows of `table_bits` codes (int8);
- control tensors (gates, scales, small projections): float16; a projection with more than 65,536 elements
  that belongs to no layer is stored like a table (the size rule of parameter-golf #1212).

Unlike #1212, a *table* of up to 65,536 elements is int8 too: none of the published recipes has one, and in a
small model float16 would double its bytes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epigram.quant.config import QuantConfig, needs_hessians
from epigram.quant.grid import Grid, GridConfig
from epigram.roles import ParameterRole, matrices

FLOAT16_MAX_ELEMENTS = 65_536
_SIGMA_CLASS = {
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "out": "attention",
    "up": "mlp",
    "down": "mlp",
}


class Part(NamedTuple):
    """One stored tensor.

    name: in the artifact; `layers.{i}.q` for a matrix of a bank, else the parameter's own. parameter: where
    it comes from. tensor_class: the row of a report ("q", ..., "embed", "control"). grid: None for float16.
    tap: what sees the input of its product, "" for none. tensor: a view of the parameter.
    """

    name: str
    parameter: str
    tensor_class: str
    grid: Grid | None
    tap: str
    tensor: Tensor

    @property
    def is_matrix(self) -> bool:
        """Whether it is one matrix of a bank."""
        return self.name != self.parameter


def plan(named: Mapping[str, Tensor], roles: Mapping[str, ParameterRole], config: GridConfig) -> list[Part]:
    """Every stored tensor of a model, each with exactly one format, in the order of `named`.

    named: parameter name -> tensor (on the meta device where only names and shapes matter); roles: same keys.
    """
    assert named.keys() == roles.keys(), (
        f"parameters without a role, or roles without one: {named.keys() ^ roles.keys()}"
    )
    parts = [part for name, tensor in named.items() for part in _parts(name, tensor, roles[name], config)]
    assert len({part.name for part in parts}) == len(parts), "two stored tensors have one name"
    stored = sum(part.tensor.numel() for part in parts)
    assert stored == sum(tensor.numel() for tensor in named.values()), "a weight is stored twice or never"
    return parts


def plan_shapes(
    shapes: Mapping[str, Sequence[int]], roles: Mapping[str, ParameterRole], config: GridConfig
) -> list[Part]:
    """`plan` from shapes alone, for forecasts: the tensors are empty ones on the meta device."""
    named = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    return plan(named, roles, config)


def matrix_grid(matrix: str, config: GridConfig) -> Grid:
    """The grid of the matrices called `matrix` ("q", "up", ...) inside a bank."""
    assert matrix in _SIGMA_CLASS, f"matrix {matrix!r} belongs to no class of quant.grid.sigma"
    return _grid(config.matrix_bits, config.clip, _SIGMA_CLASS[matrix], config)


def method_of(part: Part, config: QuantConfig) -> str:
    """The file of quant/methods that rounds `part`, or "float16". A table without a tap is rounded to
    nearest."""
    if part.grid is None:
        return "float16"
    name = config.method if part.is_matrix else config.table_method
    return "rtn" if not part.is_matrix and not part.tap and needs_hessians(name) else name


def calibration_taps(parts: Sequence[Part], *, tables: bool = False) -> dict[str, int]:
    """Taps of all matrices -> columns; with `tables` also those of tables that have one (the tied head's, for
    an embedding quantized by GPTQ as in #1394)."""
    tapped = (part for part in parts if part.tap and (part.is_matrix or tables))
    return {part.tap: part.tensor.shape[1] for part in tapped}


def _parts(name: str, tensor: Tensor, role: ParameterRole, config: GridConfig) -> list[Part]:
    if role.kind == "matrix":
        found = matrices(role, tensor)
        kinds = [split for _ in range(role.num_layers) for split, _ in role.splits]
        return [
            Part(view.name, name, kind, matrix_grid(kind, config), view.tap, view.weight)
            for view, kind in zip(found, kinds, strict=True)
        ]
    large = role.num_layers == 0 and tensor.dim() == 2 and tensor.numel() > FLOAT16_MAX_ELEMENTS
    if role.kind == "table" or large:
        assert tensor.dim() == 2, f"table {name} is not a matrix"
        clip = "sigma" if config.clip == "sigma" else "quantile"
        grid = _grid(config.table_bits, clip, "head" if role.bank else "table", config)
        return [Part(name, name, name, grid, role.bank, tensor)]
    return [Part(name, name, "control", None, "", tensor)]


def _grid(bits: int, clip: str, sigma_class: str, config: GridConfig) -> Grid:
    qmax = 2 ** (bits - 1) - 1
    if clip == "sigma":
        return Grid(qmax, clip, sigma=getattr(config.sigma, sigma_class))
    return Grid(qmax, clip, floor=config.floor)
