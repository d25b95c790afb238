"""Batched products with an addend, optionally of a symmetric result: the kernel of `kernels/symmetric.py`."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from epigram.kernels.symmetric import FROBENIUS_EPS


class Tiles(NamedTuple):
    """What one program computes: rows x cols of the result, `depth` of the sum at a time."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int


_LARGE = Tiles(128, 128, 64, num_warps=8, num_stages=3)
# A small matrix has too few large tiles to occupy the GPU.
_SMALL = Tiles(64, 64, 64, num_warps=4, num_stages=4)
_FLOAT32 = Tiles(64, 64, 32, num_warps=4, num_stages=2)  # these operands lie in registers: more would spill
_LARGE_FROM = 512  # rows


def tiles_of(num_rows: int, dtype: torch.dtype) -> Tiles:
    """The tiles for results with `num_rows` rows."""
    if dtype == torch.float32:
        return _FLOAT32
    return _LARGE if num_rows >= _LARGE_FROM else _SMALL


def product(
    left: Tensor,
    right: Tensor,
    addend: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    squares: Tensor | None = None,
    power: int = 1,
    symmetric: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """(alpha left right + beta addend) / (sqrt(sum of squares) + eps) ** power, in the dtype of `left`.

    left (n, rows, depth), right (n, depth, cols), addend and result (n, rows, cols); squares (n, parts) float32.
    symmetric: the caller knows that the result is, so half of it is computed.
    """
    n, num_rows, depth = left.shape
    num_cols = right.shape[2]
    assert right.shape == (n, depth, num_cols)
    assert addend is None or addend.shape == (n, num_rows, num_cols)
    assert squares is None or (squares.shape[0] == n and squares.dtype == torch.float32 and squares.stride(1) == 1)
    assert left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16, torch.float32), left.dtype
    # The interpreter multiplies the bit patterns of bfloat16 as if they were integers.
    interpreted = triton.knobs.runtime.interpret
    assert not (interpreted and left.dtype == torch.bfloat16), "no bfloat16 products in Triton's interpreter"
    tiles = tiles or tiles_of(num_rows, left.dtype)
    assert not symmetric or (num_rows == num_cols and tiles.rows == tiles.cols)
    # Laid out like the operand that it replaces: a transposed view stays one.
    out = torch.empty_like(addend) if addend is not None else left.new_empty((n, num_rows, num_cols))
    down, across = triton.cdiv(num_rows, tiles.rows), triton.cdiv(num_cols, tiles.cols)
    parts = 0 if squares is None else squares.shape[1]
    _product[(down * (down + 1) // 2 if symmetric else down * across, n)](
        left,
        right,
        addend,
        out,
        squares,
        num_rows,
        num_cols,
        depth,
        parts,
        *left.stride(),
        *right.stride(),
        *(addend.stride() if addend is not None else (0, 0, 0)),
        *out.stride(),
        0 if squares is None else squares.stride(0),
        alpha,
        beta,
        FROBENIUS_EPS,
        power,
        symmetric,
        num_rows % tiles.rows == 0 and num_cols % tiles.cols == 0 and depth % tiles.depth == 0,
        triton.next_power_of_2(max(parts, 1)),
        tiles.rows,
        tiles.cols,
        tiles.depth,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


@triton.jit
def _product(
    left,
    right,
    addend,
    out,
    squares,
    num_rows,
    num_cols,
    depth,
    parts,
    left_matrix,
    left_row,
    left_col,
    right_matrix,
    right_row,
    right_col,
    addend_matrix,
    addend_row,
    addend_col,
    out_matrix,
    out_row,
    out_col,
    squares_matrix,
    alpha,
    beta,
    eps,
    POWER: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN: tl.constexpr,  # all sizes are multiples of the tiles: no masks
    PARTS: tl.constexpr,  # the power of two from `parts`
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    index = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    if SYMMETRIC:
        i, j = _lower_tile(index)
    else:
        across = tl.cdiv(num_cols, COLS)
        i, j = index // across, index % across
    rows, cols, inner = i * ROWS + tl.arange(0, ROWS), j * COLS + tl.arange(0, COLS), tl.arange(0, DEPTH)
    left_tile = left + matrix * left_matrix + rows[:, None] * left_row + inner[None, :] * left_col
    right_tile = right + matrix * right_matrix + inner[:, None] * right_row + cols[None, :] * right_col
    acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            x, y = tl.load(left_tile), tl.load(right_tile)
        else:
            here = start + inner < depth
            x = tl.load(left_tile, mask=(rows[:, None] < num_rows) & here[None, :], other=0.0)
            y = tl.load(right_tile, mask=here[:, None] & (cols[None, :] < num_cols), other=0.0)
        acc = tl.dot(x, y, acc, input_precision="ieee")
        left_tile += DEPTH * left_col
        right_tile += DEPTH * right_row
    inside = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    acc *= alpha
    if addend is not None:
        addend_tile = addend + matrix * addend_matrix + rows[:, None] * addend_row + cols[None, :] * addend_col
        if EVEN:
            acc += beta * tl.load(addend_tile).to(tl.float32)
        else:
            acc += beta * tl.load(addend_tile, mask=inside, other=0.0).to(tl.float32)
    if squares is not None:
        part = tl.arange(0, PARTS)
        norm = tl.sqrt(tl.sum(tl.load(squares + matrix * squares_matrix + part, mask=part < parts, other=0.0))) + eps
        acc *= 1.0 / (norm if POWER == 1 else norm * norm)
    result = acc.to(out.dtype.element_ty)
    out += matrix * out_matrix
    out_tile = out + rows[:, None] * out_row + cols[None, :] * out_col
    if EVEN:
        tl.store(out_tile, result)
    else:
        tl.store(out_tile, result, mask=inside)
    if SYMMETRIC and i != j:
        mirrored = out + cols[None, :] * out_row + rows[:, None] * out_col
        if EVEN:
            tl.store(mirrored, result)
        else:
            tl.store(mirrored, result, mask=inside)


@triton.jit
def _lower_tile(index):
    """Row and column (column <= row) of tile `index`, counted row by row through the lower triangle."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) / 2.0).to(tl.int32)
    # The square root may be off by a rounding.
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2
