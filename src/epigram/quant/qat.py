"""Train on the grid that will be exported: straight-through fake quantization of the banks (late QAT).

In parameter-golf #1212 the late QAT never acted: its flag lived in a layer class that the banks do not pass
through (and in #315 the compiler had folded the flag away). Here it is a function of the bank that the
model's forward receives, so it cannot miss a matrix.
"""

import torch
from torch import Tensor

from epigram.quant.grid import Grid, GridConfig
from epigram.quant.policy import matrix_grid


def fake_quantize(bank: Tensor, splits: tuple[tuple[str, int], ...], config: GridConfig) -> Tensor:
    """`bank` (layers, rows, cols) as its round-to-nearest export would be read back; same shape and dtype.

    splits: (matrix name, rows) along axis 1, as in the bank's role. Clip policy "search" uses the row
    maximum, which is what the search finds wherever the floor is active; "max" and "sigma" are the exported
    grid itself.

    The gradient is the identity, also where a code is clipped: a clipped weight that got no gradient could
    never come back (with the floor or k near 7 hardly any is clipped). No data-dependent Python, so
    `torch.compile` takes it whole.
    """
    assert sum(rows for _, rows in splits) == bank.shape[1], "splits do not cover the bank's rows"
    grids = [matrix_grid(matrix, config).without_search() for matrix, _ in splits]
    weight = bank.detach().float()
    if len(set(grids)) == 1:
        rounded = _round(weight, grids[0])
    else:
        pieces = weight.split([rows for _, rows in splits], dim=1)
        rounded = torch.cat([_round(piece, grid) for piece, grid in zip(pieces, grids, strict=True)], dim=1)
    # + 0 in value and the identity in gradient; adding (rounded - weight) to the bank would not be exact
    return rounded.to(bank.dtype) + (bank - bank.detach())


def _round(weight: Tensor, grid: Grid) -> Tensor:
    step = grid.candidates(weight)[..., 0, :]
    return grid.codes(weight, step) * step[..., None]
