"""What a parameter is for: the one description that optimizers, quantizers and size forecasts share.

The model states a role for each of its parameters; no other part parses parameter names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ParameterRole:
    """kind: "matrix" is a bank of weight matrices (Muon, int6); "table" an embedding (AdamW, int8); "control" a
    small gate, scale or projection (AdamW, float16).

    num_layers: axis 0 is the layer when positive, with that many layers; 0: the parameter belongs to no layer.
    bank, splits: for a matrix, the bank's name and its row ranges as (matrix name, number of rows); the input of the
    product with layer i is seen by a tap as `layers.{i}.{bank}`. For a table that is also multiplied with (the tied
    head), bank is the name of the tap that sees that product's input.
    """

    kind: Literal["matrix", "table", "control"]
    num_layers: int = 0
    bank: str = ""
    splits: tuple[tuple[str, int], ...] = ()


class MatrixView(NamedTuple):
    """One weight matrix inside a bank: its name, its layer, the tap that sees its input, and the 2-D view."""

    name: str
    layer: int
    tap: str
    weight: Tensor


def matrices(role: ParameterRole, bank: Tensor) -> Iterator[MatrixView]:
    """The (rows, cols) matrices inside `bank` (layers, all rows, cols), as views, layer by layer."""
    assert role.kind == "matrix" and bank.dim() == 3 and bank.shape[0] == role.num_layers
    assert sum(rows for _, rows in role.splits) == bank.shape[1]
    for layer in range(role.num_layers):
        start = 0
        for split, rows in role.splits:
            yield MatrixView(
                f"layers.{layer}.{split}",
                layer,
                f"layers.{layer}.{role.bank}",
                bank[layer, start : start + rows],
            )
            start += rows
