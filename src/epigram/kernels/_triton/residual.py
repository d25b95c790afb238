"""Triton kernels of `epigram.kernels.residual`: each stream is read once and written once.

Rows are tokens. A program takes a few of them at a time; in the backward pass it takes many such tiles in turn, and
keeps the sums over tokens that the coefficients' gradients need in registers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epigram.kernels._triton.launch import num_programs, padded, tile
from epigram.kernels.residual import NORM_EPS, Coefficients, Streams

_MOST_STREAMS = 3


@triton.jit
def _coefficient(pointer, columns, inside, present: tl.constexpr):
    if present:
        return tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.full(columns.shape, 1.0, tl.float32)


@triton.jit
def _mix_kernel(
    s0, s1, s2, c0, c1, c2, x_out, h_out, rstd_out, num_rows, width,
    eps: tl.constexpr, COUNT: tl.constexpr, HAS0: tl.constexpr, HAS1: tl.constexpr, HAS2: tl.constexpr,
    WRITE_X: tl.constexpr, WRITE_H: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    mask = (rows < num_rows)[:, None] & inside[None, :]
    at = rows[:, None] * width + columns[None, :]
    x = tl.load(s0 + at, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = s0.dtype.element_ty
    if HAS0:
        x *= _coefficient(c0, columns, inside, HAS0)[None, :]
    if COUNT > 1:
        x += tl.load(s1 + at, mask=mask, other=0.0).to(tl.float32) * _coefficient(c1, columns, inside, HAS1)[None, :]
    if COUNT > 2:
        x += tl.load(s2 + at, mask=mask, other=0.0).to(tl.float32) * _coefficient(c2, columns, inside, HAS2)[None, :]
    x = x.to(dtype).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    if WRITE_X:
        tl.store(x_out + at, x.to(dtype), mask=mask)
    if WRITE_H:
        tl.store(h_out + at, (x * rstd[:, None]).to(dtype), mask=mask)
    tl.store(rstd_out + rows, rstd, mask=rows < num_rows)


@triton.jit
def _mix_backward_kernel(
    grad_in, h, rstd, s0, s1, s2, c0, c1, c2, d0, d1, d2, sums, num_rows, width, num_tiles,
    COUNT: tl.constexpr, HAS0: tl.constexpr, HAS1: tl.constexpr, HAS2: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """grad_in: of the normalised view h."""
    program, step = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    sum0 = tl.zeros((ROWS, WIDTH), tl.float32)
    sum1 = tl.zeros((ROWS, WIDTH), tl.float32)
    sum2 = tl.zeros((ROWS, WIDTH), tl.float32)
    w0 = _coefficient(c0, columns, inside, HAS0)[None, :]
    w1 = _coefficient(c1, columns, inside, HAS1)[None, :]
    w2 = _coefficient(c2, columns, inside, HAS2)[None, :]
    for index in range(program, num_tiles, step):
        rows = (index * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < num_rows)[:, None] & inside[None, :]
        at = rows[:, None] * width + columns[None, :]
        grad = tl.load(grad_in + at, mask=mask, other=0.0).to(tl.float32)
        view = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
        grad = scale[:, None] * (grad - view * (tl.sum(grad * view, 1) / width)[:, None])
        if HAS0:
            sum0 += grad * tl.load(s0 + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(d0 + at, (grad * w0).to(d0.dtype.element_ty), mask=mask)
        if COUNT > 1:
            if HAS1:
                sum1 += grad * tl.load(s1 + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(d1 + at, (grad * w1).to(d1.dtype.element_ty), mask=mask)
        if COUNT > 2:
            if HAS2:
                sum2 += grad * tl.load(s2 + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(d2 + at, (grad * w2).to(d2.dtype.element_ty), mask=mask)
    base = sums + program * COUNT * width + columns
    if HAS0:
        tl.store(base, tl.sum(sum0, 0), mask=inside)
    if HAS1:
        tl.store(base + width, tl.sum(sum1, 0), mask=inside)
    if HAS2:
        tl.store(base + 2 * width, tl.sum(sum2, 0), mask=inside)


@triton.jit
def _finish_kernel(
    parts, rstd, out, num_rows, num_parts, width, eps: tl.constexpr, CORRECT: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """From partial sums of each row: 1 / rms, or with CORRECT the factor -rstd^2 * mean of a norm's gradient."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PARTS)
    inside = rows < num_rows
    mask = inside[:, None] & (columns < num_parts)[None, :]
    part = tl.load(parts + rows[:, None] * num_parts + columns[None, :], mask=mask, other=0.0)
    mean = tl.sum(part, 1) / width
    if CORRECT:
        scale = tl.load(rstd + rows, mask=inside, other=0.0)
        tl.store(out + rows, -scale * scale * mean, mask=inside)
    else:
        tl.store(out + rows, tl.rsqrt(mean + eps), mask=inside)


def _finish(parts: Tensor, rstd: Tensor | None, width: int) -> Tensor:
    num_rows, num_parts = parts.shape
    out = torch.empty(num_rows, dtype=torch.float32, device=parts.device)
    rows = 256
    _finish_kernel[(triton.cdiv(num_rows, rows),)](
        parts, rstd, out, num_rows, num_parts, width,
        eps=NORM_EPS, CORRECT=rstd is not None, ROWS=rows, PARTS=padded(num_parts), num_warps=4,
    )  # fmt: skip
    return out


def rstd_of_squares(squares: Tensor, width: int) -> Tensor:
    """1 / rms of rows of `width` from partial sums of their squares (N, parts): (N,)."""
    return _finish(squares, None, width)


def correction_of(products: Tensor, rstd: Tensor, width: int) -> Tensor:
    """What a row of a norm is multiplied with in its gradient: -rstd^2 * mean(dh * h), from partial sums of dh * h."""
    return _finish(products, rstd, width)


def _mix_forward(
    streams: Streams, coefficients: Coefficients, x: Tensor | None, h: Tensor | None, rstd: Tensor
) -> None:
    width = streams[0].shape[-1]
    num_rows = streams[0].numel() // width
    rows, wide = tile(width)
    pad = [None] * (_MOST_STREAMS - len(streams))
    _mix_kernel[(triton.cdiv(num_rows, rows),)](
        *streams, *pad, *coefficients, *pad, x, h, rstd, num_rows, width,
        eps=NORM_EPS, COUNT=len(streams), **_has(coefficients), WRITE_X=x is not None, WRITE_H=h is not None,
        ROWS=rows, WIDTH=wide, num_warps=4,
    )  # fmt: skip


def _mix_backward(
    grad: Tensor, h: Tensor, rstd: Tensor, streams: list[Tensor | None], coefficients: list[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients of the streams and of the coefficients; a stream is needed only where it has a coefficient."""
    count, width = len(streams), grad.shape[-1]
    num_rows = grad.numel() // width
    gradients = [torch.empty_like(grad) for _ in range(count)]
    rows, wide = tile(width)
    num_tiles = triton.cdiv(num_rows, rows)
    programs = num_programs(grad.device, 4, num_tiles)
    sums = torch.empty(programs, count, width, dtype=torch.float32, device=grad.device)
    pad = [None] * (_MOST_STREAMS - count)
    _mix_backward_kernel[(programs,)](
        grad, h, rstd, *streams, *pad, *coefficients, *pad, *gradients, *pad, sums, num_rows, width, num_tiles,
        COUNT=count, **_has(coefficients), ROWS=rows, WIDTH=wide, num_warps=4,
    )  # fmt: skip
    total = sums.sum(0)
    return gradients, [total[i] if c is not None else None for i, c in enumerate(coefficients)]


def _has(coefficients: Coefficients | list[Tensor | None]) -> dict[str, bool]:
    return {f"HAS{i}": i < len(coefficients) and coefficients[i] is not None for i in range(_MOST_STREAMS)}


def _needed(streams: Streams, coefficients: Coefficients) -> list[Tensor | None]:
    return [s if c is not None else None for s, c in zip(streams, coefficients, strict=True)]


def enter_first(x0: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """coefficient * x0 for rows (N, D), and 1 / rms of the result, (N,)."""
    x = torch.empty_like(x0)
    rstd = torch.empty(x0.shape[0], dtype=torch.float32, device=x0.device)
    _mix_forward((x0,), (coefficient,), x, None, rstd)
    return x, rstd


@triton.jit
def _fan_in_kernel(
    g0, g1, g2, c0, c1, c2, x, so_far, out, sums, num_rows, width, num_tiles,
    COUNT: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = c0 * g0 + c1 * g1 + c2 * g2 + so_far; sums of each gradient times x over the rows of each program."""
    program, step = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    sum0 = tl.zeros((ROWS, WIDTH), tl.float32)
    sum1 = tl.zeros((ROWS, WIDTH), tl.float32)
    sum2 = tl.zeros((ROWS, WIDTH), tl.float32)
    w0 = _coefficient(c0, columns, inside, True)[None, :]
    w1 = _coefficient(c1, columns, inside, COUNT > 1)[None, :]
    w2 = _coefficient(c2, columns, inside, COUNT > 2)[None, :]
    for index in range(program, num_tiles, step):
        rows = (index * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < num_rows)[:, None] & inside[None, :]
        at = rows[:, None] * width + columns[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(g0 + at, mask=mask, other=0.0).to(tl.float32)
        sum0 += grad * value
        total = grad * w0
        if COUNT > 1:
            grad = tl.load(g1 + at, mask=mask, other=0.0).to(tl.float32)
            sum1 += grad * value
            total += grad * w1
        if COUNT > 2:
            grad = tl.load(g2 + at, mask=mask, other=0.0).to(tl.float32)
            sum2 += grad * value
            total += grad * w2
        if MORE:
            total += tl.load(so_far + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
    base = sums + program * COUNT * width + columns
    tl.store(base, tl.sum(sum0, 0), mask=inside)
    if COUNT > 1:
        tl.store(base + width, tl.sum(sum1, 0), mask=inside)
    if COUNT > 2:
        tl.store(base + 2 * width, tl.sum(sum2, 0), mask=inside)


def fan_in(
    gradients: Sequence[Tensor], coefficients: Sequence[Tensor], x: Tensor, so_far: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradient of a stream x, rows (N, D), that goes up to three ways, and the coefficients' gradients (count, D).

    It is so_far + sum of coefficient * gradient: each gradient is that of a stream to which coefficient * x was added.
    """
    count, (num_rows, width) = len(gradients), x.shape
    assert 0 < count <= _MOST_STREAMS
    out = torch.empty_like(x)
    rows, wide = tile(width)
    num_tiles = triton.cdiv(num_rows, rows)
    programs = num_programs(x.device, 2, num_tiles)
    sums = torch.empty(programs, count, width, dtype=torch.float32, device=x.device)
    pad = [None] * (_MOST_STREAMS - count)
    _fan_in_kernel[(programs,)](
        *gradients, *pad, *coefficients, *pad, x, so_far, out, sums, num_rows, width, num_tiles,
        COUNT=count, MORE=so_far is not None, ROWS=rows, WIDTH=wide, num_warps=4,
    )  # fmt: skip
    return out, sums.sum(0)


class _MixNorm(torch.autograd.Function):
    """See `epigram.kernels.residual.mix_norm`. Arguments: how many streams, the streams, the coefficients."""

    @staticmethod
    def forward(ctx: Any, count: int, *arguments: Any) -> Tensor:
        streams, coefficients = arguments[:count], arguments[count:]
        h = torch.empty_like(streams[0])
        rstd = torch.empty(h.numel() // h.shape[-1], dtype=torch.float32, device=h.device)
        _mix_forward(streams, coefficients, None, h, rstd)
        ctx.save_for_backward(h, rstd, *_needed(streams, coefficients), *coefficients)
        ctx.count = count
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, rstd, *rest = ctx.saved_tensors
        streams, coefficients = rest[: ctx.count], rest[ctx.count :]
        gradients, found = _mix_backward(grad.contiguous(), h, rstd, streams, coefficients)
        return None, *gradients, *found


def mix_norm(streams: Streams, coefficients: Coefficients) -> Tensor:
    """See `epigram.kernels.residual`; up to three streams."""
    assert len(streams) <= _MOST_STREAMS
    result: Tensor = _MixNorm.apply(len(streams), *(s.contiguous() for s in streams), *coefficients)
    return result
