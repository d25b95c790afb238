"""Products with finished results, in Triton: any CUDA device from Ampere on, and Triton's interpreter."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from epigram.kernels.products.base import Dims

_TILE_M, _TILE_N, _TILE_K = 128, 128, 64
_WARPS, _STAGES, _GROUP = 4, 3, 16


def check(device_type: str, capability: tuple[int, int] | None, dims: Dims) -> str | None:
    """CUDA from compute capability 8.0 on."""
    if device_type != "cuda" or capability is None or capability < (8, 0):
        return "Triton's products need a CUDA device of compute capability 8.0"
    return None


@triton.jit
def _tile_of(program, num_rows, num_columns, TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr):
    """Programs that run at the same time share rows of one operand and columns of the other: they meet in the cache."""
    tiles_m, tiles_n = tl.cdiv(num_rows, TILE_M), tl.cdiv(num_columns, TILE_N)
    group = program // (GROUP * tiles_n)
    first = group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + program % (GROUP * tiles_n) % size, program % (GROUP * tiles_n) // size


@triton.jit
def _columns_of(vector, columns, num_columns):
    return tl.load(vector + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _product_kernel(
    a, b, d, second, c, y, z, factor, own, first, skip, parts, row_parts, num_rows, num_columns, depth, stride_bk,
    stride_bn, slope, KIND: tl.constexpr, SUMS: tl.constexpr, KEEP: tl.constexpr, OWN: tl.constexpr, SKIP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """d = finished (a (rows, depth) @ b (depth, columns)); KIND names one of the functions of the folder."""
    tile_m, tile_n = _tile_of(tl.program_id(0), num_rows, num_columns, TILE_M, TILE_N, GROUP)
    rows = tile_m * TILE_M + tl.arange(0, TILE_M)
    columns = tile_n * TILE_N + tl.arange(0, TILE_N)
    depths = tl.arange(0, TILE_K)
    # Rows and columns outside wrap around: what they compute is not stored.
    a_at = a + (rows % num_rows).to(tl.int64)[:, None] * depth + depths[None, :]
    b_at = b + depths[:, None] * stride_bk + (columns % num_columns)[None, :] * stride_bn
    x = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in range(tl.cdiv(depth, TILE_K)):
        left = depth - k * TILE_K
        a_tile = tl.load(a_at, mask=(depths < left)[None, :], other=0.0)
        b_tile = tl.load(b_at, mask=(depths < left)[:, None], other=0.0)
        x = tl.dot(a_tile, b_tile, x, input_precision="ieee")
        a_at += TILE_K
        b_at += TILE_K * stride_bk
    inside = rows < num_rows
    mask = inside[:, None] & (columns < num_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    sums = x
    if KIND == "scaled" or KIND == "up":
        x *= tl.load(factor + rows, mask=inside, other=0.0)[:, None]
    if KIND == "up":
        bent = tl.where(x > 0, x, slope * x)
        tl.store(second + at, (bent * bent).to(second.dtype.element_ty), mask=mask)
    if KIND == "added" or KIND == "mixed":
        x += tl.load(c + at, mask=mask, other=0.0).to(tl.float32)
        sums = x * x
    if KIND == "back":
        carried = tl.load(c + at, mask=mask, other=0.0).to(tl.float32)
        view = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        if OWN:
            tl.store(row_parts + tile_m * num_columns + columns, tl.sum(carried * view, 0), mask=columns < num_columns)
            carried *= _columns_of(own, columns, num_columns)
        x += carried + tl.load(factor + rows, mask=inside, other=0.0)[:, None] * view
    if KIND == "mixed":
        entering = x * _columns_of(own, columns, num_columns)
        entering += tl.load(y + at, mask=mask, other=0.0).to(tl.float32) * _columns_of(first, columns, num_columns)
        if SKIP:
            entering += tl.load(z + at, mask=mask, other=0.0).to(tl.float32) * _columns_of(skip, columns, num_columns)
        tl.store(second + at, entering.to(second.dtype.element_ty), mask=mask)
        sums = entering * entering
    if KIND == "down_back":
        p = tl.load(c + at, mask=mask, other=0.0).to(tl.float32)
        x *= tl.where(p > 0, 2.0 * p, 2.0 * slope * slope * p)
        sums = x * p
        x *= tl.load(factor + rows, mask=inside, other=0.0)[:, None]
    if KEEP:
        tl.store(d + at, x.to(d.dtype.element_ty), mask=mask)
    if SUMS:
        num_parts = tl.cdiv(num_columns, TILE_N)
        tl.store(parts + rows * num_parts + tile_n, tl.sum(tl.where(mask, sums, 0.0), 1), mask=inside)


def _run(
    kind: str, a: Tensor, b: Tensor, *, second: Tensor | None = None, c: Tensor | None = None, y: Tensor | None = None,
    z: Tensor | None = None, factor: Tensor | None = None, own: Tensor | None = None, first: Tensor | None = None,
    skip: Tensor | None = None, slope: float = 0.0, sums: bool = False, keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The product, partial sums over columns and partial sums over rows, as far as they are asked for."""
    (num_rows, depth), num_columns = a.shape, b.shape[1]
    tiles_m, tiles_n = triton.cdiv(num_rows, _TILE_M), triton.cdiv(num_columns, _TILE_N)
    d = torch.empty(num_rows if keep else 0, num_columns, dtype=a.dtype, device=a.device)
    parts = torch.empty(num_rows if sums else 0, tiles_n, dtype=torch.float32, device=a.device)
    row_sums = kind == "back" and own is not None
    row_parts = torch.empty(tiles_m if row_sums else 0, num_columns, dtype=torch.float32, device=a.device)
    _product_kernel[(tiles_m * tiles_n,)](
        a, b, d, second, c, y, z, factor, own, first, skip, parts, row_parts, num_rows, num_columns, depth,
        b.stride(0), b.stride(1), slope, KIND=kind, SUMS=sums, KEEP=keep, OWN=own is not None, SKIP=skip is not None,
        TILE_M=_TILE_M, TILE_N=_TILE_N, TILE_K=_TILE_K, GROUP=_GROUP, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return d, parts, row_parts


def scaled(a: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """See the folder's base."""
    return _run("scaled", a, weight.T, factor=rstd)[0]


def added(a: Tensor, weight: Tensor, c: Tensor, squares: bool) -> tuple[Tensor, Tensor | None]:
    """See the folder's base."""
    d, parts, _ = _run("added", a, weight.T, c=c, sums=squares)
    return d, parts if squares else None


def mixed(
    a: Tensor, weight: Tensor, c: Tensor, own: Tensor, streams: Sequence[tuple[Tensor, Tensor]], keep: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See the folder's base."""
    (first, y), (skip, z) = [*streams, (None, None)][:2]
    entering = torch.empty_like(c)
    x, parts, _ = _run(
        "mixed", a, weight.T, second=entering, c=c, y=y, z=z, own=own, first=first, skip=skip, sums=True, keep=keep
    )
    return entering, x if keep else None, parts


def up(a: Tensor, weight: Tensor, rstd: Tensor, slope: float, keep: bool) -> tuple[Tensor | None, Tensor]:
    """See the folder's base."""
    hidden = torch.empty(a.shape[0], weight.shape[0], dtype=a.dtype, device=a.device)
    p, _, _ = _run("up", a, weight.T, second=hidden, factor=rstd, slope=slope, keep=keep)
    return p if keep else None, hidden


def down_back(grad: Tensor, weight: Tensor, p: Tensor, rstd: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """See the folder's base."""
    d, parts, _ = _run("down_back", grad, weight, c=p, factor=rstd, slope=slope, sums=True)
    return d, parts


def back(
    a: Tensor, weight: Tensor, c: Tensor, y: Tensor, correction: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """See the folder's base."""
    d, _, row_parts = _run("back", a, weight, c=c, y=y, factor=correction, own=own)
    return d, None if own is None else row_parts.sum(0)
