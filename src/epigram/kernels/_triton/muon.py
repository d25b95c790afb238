"""Momentum and update of weight matrices: the kernels of `kernels/muon.py`.

A program owns a square tile of one matrix. Where `update` is transposed the tile is transposed on the way, so that
both sides of memory are read and written in rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from epigram.kernels.muon import ROW_EPS

_TILE = 64  # a side
_ROWS_AT_ONCE, _COLS_AT_ONCE = 8, 256  # for the norms of rows


def num_tiles(num_rows: int, num_cols: int) -> int:
    """Programs of a matrix, each of which gives one partial sum of squares."""
    return triton.cdiv(num_rows, _TILE) * triton.cdiv(num_cols, _TILE)


def nesterov(
    gradient: Tensor,
    buffer: Tensor,
    update: Tensor,
    squares: Tensor,
    momentum: Tensor,
    scale: Tensor,
    *,
    normalize: bool,
) -> None:
    """See `epigram.kernels.muon`."""
    count, num_rows, num_cols = gradient.shape
    assert buffer.shape == update.shape == gradient.shape
    num_programs = num_tiles(num_rows, num_cols)
    assert squares.shape == (count, num_programs) and squares.is_contiguous()
    sizes = num_rows, num_cols, *gradient.stride(), *buffer.stride()
    row_norms = None
    if normalize:
        row_norms = torch.empty((count, num_rows), dtype=torch.float32, device=gradient.device)
        grid = triton.cdiv(num_rows, _ROWS_AT_ONCE), count
        _row_norms[grid](gradient, buffer, row_norms, momentum, scale, *sizes, _ROWS_AT_ONCE, _COLS_AT_ONCE)
    _nesterov[(num_programs, count)](
        gradient, buffer, update, squares, row_norms, momentum, scale, *sizes, *update.stride(), ROW_EPS, _TILE
    )


def descend(weight: Tensor, update: Tensor, decay: Tensor, rate: Tensor) -> None:
    """See `epigram.kernels.muon`."""
    count, num_rows, num_cols = weight.shape
    assert update.shape == weight.shape and decay.shape == rate.shape == (count,)
    assert decay.stride(0) == rate.stride(0) == 1
    grid = num_tiles(num_rows, num_cols), count
    _descend[grid](weight, update, decay, rate, num_rows, num_cols, *weight.stride(), *update.stride(), _TILE)


@triton.jit
def _nesterov(
    gradient,
    buffer,
    update,
    squares,
    row_norms,
    momentum,
    scale,
    num_rows,
    num_cols,
    gradient_matrix,
    gradient_row,
    gradient_col,
    buffer_matrix,
    buffer_row,
    buffer_col,
    update_matrix,
    update_row,
    update_col,
    eps,
    TILE: tl.constexpr,
):
    matrix, rows, cols, inside = _tile(num_rows, num_cols, TILE)
    mu, s = tl.load(momentum), tl.load(scale)
    gradient += matrix * gradient_matrix + rows * gradient_row + cols * gradient_col
    buffer += matrix * buffer_matrix + rows * buffer_row + cols * buffer_col
    m, u = _step(gradient, buffer, inside, mu, s)
    tl.store(buffer, m, mask=inside)
    if row_norms is not None:
        norms = tl.load(row_norms + matrix * num_rows + rows, mask=rows < num_rows, other=1.0)
        u /= tl.maximum(norms, eps)
    u = u.to(update.dtype.element_ty)
    tl.store(update + matrix * update_matrix + rows * update_row + cols * update_col, u, mask=inside)
    rounded = u.to(tl.float32)
    tl.store(squares + matrix * tl.num_programs(0) + tl.program_id(0), tl.sum(rounded * rounded))


@triton.jit
def _row_norms(
    gradient,
    buffer,
    row_norms,
    momentum,
    scale,
    num_rows,
    num_cols,
    gradient_matrix,
    gradient_row,
    gradient_col,
    buffer_matrix,
    buffer_row,
    buffer_col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Norms of the rows of the update that `_nesterov` will compute; nothing is stored but them."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    matrix = tl.program_id(1).to(tl.int64)
    mu, s = tl.load(momentum), tl.load(scale)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, num_cols, COLS):
        cols = start + tl.arange(0, COLS)[None, :]
        inside = (rows[:, None] < num_rows) & (cols < num_cols)
        g = gradient + matrix * gradient_matrix + rows[:, None] * gradient_row + cols * gradient_col
        b = buffer + matrix * buffer_matrix + rows[:, None] * buffer_row + cols * buffer_col
        _, u = _step(g, b, inside, mu, s)
        total += tl.sum(u * u, axis=1)
    tl.store(row_norms + matrix * num_rows + rows, tl.sqrt(total), mask=rows < num_rows)


@triton.jit
def _descend(
    weight,
    update,
    decay,
    rate,
    num_rows,
    num_cols,
    weight_matrix,
    weight_row,
    weight_col,
    update_matrix,
    update_row,
    update_col,
    TILE: tl.constexpr,
):
    matrix, rows, cols, inside = _tile(num_rows, num_cols, TILE)
    weight += matrix * weight_matrix + rows * weight_row + cols * weight_col
    u = tl.load(update + matrix * update_matrix + rows * update_row + cols * update_col, mask=inside)
    w = tl.load(weight, mask=inside)
    tl.store(weight, tl.load(decay + matrix) * w + tl.load(rate + matrix) * u.to(tl.float32), mask=inside)


@triton.jit
def _tile(num_rows, num_cols, TILE: tl.constexpr):
    """This program's matrix, and its rows (TILE, 1), columns (1, TILE) and mask."""
    across = tl.cdiv(num_cols, TILE)
    index = tl.program_id(0)
    rows = (index // across * TILE + tl.arange(0, TILE))[:, None]
    cols = (index % across * TILE + tl.arange(0, TILE))[None, :]
    return tl.program_id(1).to(tl.int64), rows, cols, (rows < num_rows) & (cols < num_cols)


@triton.jit
def _step(gradient, buffer, inside, mu, s):
    """New momentum in the buffer's dtype, and the Nesterov update from it in float32."""
    g = tl.where(s == 0.0, 0.0, s * tl.load(gradient, mask=inside, other=0.0))
    m = (g + mu * tl.load(buffer, mask=inside, other=0.0).to(tl.float32)).to(buffer.dtype.element_ty)
    return m, g + mu * m.to(tl.float32)
