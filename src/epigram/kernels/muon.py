"""The elementwise passes of Muon around its products, each of which reads and writes every value once when fused.

Shapes: `count` matrices of one split of a bank, (count, rows, cols), as strided views; `update` is a slice of a batch,
in the batch's dtype, a transposed view where the batch holds the matrices transposed.
"""

import torch
from torch import Tensor

ROW_EPS = 1e-7


def nesterov(
    gradient: Tensor,
    buffer: Tensor,
    update: Tensor,
    squares: Tensor,
    momentum: Tensor,
    scale: Tensor,
    *,
    normalize: bool = False,
    fused: bool,
) -> None:
    """m <- mu m + s g in place in `buffer`, then update <- s g + mu m; momentum (mu), scale (s): 0-dim float32.

    With a scale of 0 the gradient counts as 0, also where it is not finite.

    normalize: divide each row of the update by its norm. squares: (count, `num_parts`) float32, contiguous, is filled
    so that each row sums up to the squared Frobenius norm of one update, as rounded to its dtype. Source of the order
    of operations: Jordan's Muon.
    """
    if fused:
        from epigram.kernels._triton import muon

        muon.nesterov(gradient, buffer, update, squares, momentum, scale, normalize=normalize)
        return
    scaled = (gradient * scale).masked_fill_(scale == 0, 0.0)
    torch.addcmul(scaled, buffer, momentum, out=buffer)
    torch.addcmul(scaled, buffer, momentum, out=update)
    if normalize:
        update.copy_(normalize_rows(update))
    squares.copy_(square_sums(update))


def num_parts(num_rows: int, num_cols: int, *, fused: bool) -> int:
    """In how many parts `nesterov` gives the square of a norm; the same for a matrix and its transpose."""
    if fused:
        from epigram.kernels._triton import muon

        return muon.num_tiles(num_rows, num_cols)
    return 1


def descend(weight: Tensor, update: Tensor, decay: Tensor, rate: Tensor, *, fused: bool) -> None:
    """weight <- decay weight + rate update, in place; decay and rate: (count,) float32, one of each matrix."""
    if fused:
        from epigram.kernels._triton import muon

        muon.descend(weight, update, decay, rate)
        return
    weight.mul_(decay[:, None, None]).addcmul_(update, rate[:, None, None])


def normalize_rows(matrices: Tensor) -> Tensor:
    """Each row of (n, rows, cols) divided by its L2 norm: MuonEq-R, done before orthogonalisation.

    Rows are those of the weight as the model stores it: call it before transposing. Source: parameter-golf #1217.
    """
    norm = torch.linalg.vector_norm(matrices, dim=-1, keepdim=True, dtype=_at_least_float32(matrices.dtype))
    return matrices / norm.clamp_min(ROW_EPS).to(matrices.dtype)


def square_sums(matrices: Tensor) -> Tensor:
    """(n, 1): the squared Frobenius norm of each of (n, rows, cols), summed in float32 at least."""
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), dtype=_at_least_float32(matrices.dtype))
    return norms.square_()[:, None]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
