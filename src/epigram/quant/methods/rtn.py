"""Round to nearest: the baseline, the format of embeddings, and the oracle of fake quantization."""

import torch
from torch import Tensor

from epigram.quant.grid import Grid
from epigram.quant.methods.base import Outcome, pack

NEEDS_HESSIANS = False


@torch.no_grad()
def quantize(weights: Tensor, hessians: Tensor | None, grid: Grid, config: object = None) -> Outcome:
    """Round each weight by itself; of several clips keep the one with the least squared error of a whole
    matrix.

    weights: (n, rows, cols) float32, finite. `hessians` and `config` are not read.
    """
    candidates = grid.candidates(weights)  # (n, candidates, rows)
    step = candidates[:, 0]
    codes = grid.codes(weights, step)
    if candidates.shape[1] > 1:
        least = _squared_error(weights, codes, step)
        for other in candidates.unbind(1)[1:]:
            other_codes = grid.codes(weights, other)
            error = _squared_error(weights, other_codes, other)
            better = error < least
            least = torch.minimum(least, error)
            step = torch.where(better[:, None], other, step)
            codes = torch.where(better[:, None, None], other_codes, codes)
    return Outcome(pack(codes, step, grid.qmax), [0.0] * len(weights))


def _squared_error(weights: Tensor, codes: Tensor, step: Tensor) -> Tensor:
    """Sum over each matrix: (n, rows, cols) -> (n,)."""
    return torch.addcmul(weights, codes, step[..., None], value=-1).square().sum(dim=(1, 2))
