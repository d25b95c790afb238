"""Triton kernels of `epigram.kernels.front`: the normalised embedding is made anew in the backward pass, not stored."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epigram.kernels._triton.launch import num_programs, tile
from epigram.kernels.residual import NORM_EPS


@triton.jit
def _embedded(tokens, embed, extra, rows, mask, width, columns, dtype: tl.constexpr, HAS_EXTRA: tl.constexpr):
    """Rows of embedding plus extra, rounded like the stream."""
    token = tl.load(tokens + rows, mask=mask, other=0)
    both = mask[:, None] & (columns < width)[None, :]
    x = tl.load(embed + token.to(tl.int64)[:, None] * width + columns[None, :], mask=both, other=0.0)
    x = x.to(dtype).to(tl.float32)
    if HAS_EXTRA:
        x += tl.load(extra + rows[:, None] * width + columns[None, :], mask=both, other=0.0).to(tl.float32)
    return x.to(dtype).to(tl.float32)


@triton.jit
def _enter_kernel(
    tokens, embed, extra, gate, out, rstd_out, num_rows, length, width,
    eps: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_GATE: tl.constexpr, RESET: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """RESET: the token with nothing before it, -1 for none."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    here = rows < num_rows
    dtype: tl.constexpr = out.dtype.element_ty
    x = _embedded(tokens, embed, extra, rows, here, width, columns, dtype, HAS_EXTRA)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    x *= rstd[:, None]
    if HAS_GATE:
        share = tl.load(gate + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
        follows = here & (rows % length > 0)
        if RESET >= 0:
            follows &= tl.load(tokens + rows, mask=here, other=0) != RESET
        old = _embedded(tokens, embed, extra, rows - 1, follows, width, columns, dtype, HAS_EXTRA)
        old *= tl.rsqrt(tl.sum(old * old, 1) / width + eps)[:, None]
        x = (1.0 - share) * x + share * old
    mask = here[:, None] & (columns < width)[None, :]
    tl.store(out + rows[:, None] * width + columns[None, :], x.to(dtype), mask=mask)
    tl.store(rstd_out + rows, rstd, mask=here)


@triton.jit
def _enter_backward_kernel(
    grad_out, tokens, embed, extra, gate, rstd, grad_in, sums, num_rows, length, width, num_tiles,
    HAS_EXTRA: tl.constexpr, HAS_GATE: tl.constexpr, RESET: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    dtype: tl.constexpr = grad_in.dtype.element_ty
    share = tl.zeros((WIDTH,), tl.float32)[None, :]
    if HAS_GATE:
        share = tl.load(gate + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    for index in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        rows = (index * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        here = rows < num_rows
        mask = here[:, None] & inside[None, :]
        at = rows[:, None] * width + columns[None, :]
        scale = tl.load(rstd + rows, mask=here, other=0.0)[:, None]
        x = _embedded(tokens, embed, extra, rows, here, width, columns, dtype, HAS_EXTRA) * scale
        grad = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_GATE:
            followed = here & (rows % length < length - 1)
            if RESET >= 0:
                followed &= tl.load(tokens + rows + 1, mask=followed, other=0) != RESET
            later = tl.load(grad_out + at + width, mask=mask & followed[:, None], other=0.0).to(tl.float32)
            total += x * (later - grad)
            grad = (1.0 - share) * grad + share * later
        grad = scale * (grad - x * (tl.sum(grad * x, 1) / width)[:, None])
        tl.store(grad_in + at, grad.to(dtype), mask=mask)
    if HAS_GATE:
        tl.store(sums + tl.program_id(0) * width + columns, tl.sum(total, 0), mask=inside)


@triton.jit
def _scatter_kernel(grad, tokens, table, num_rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    here = rows < num_rows
    mask = here[:, None] & (columns < width)[None, :]
    token = tl.load(tokens + rows, mask=here, other=0).to(tl.int64)
    part = tl.load(grad + rows[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(table + token[:, None] * width + columns[None, :], part, mask=mask)


@triton.jit
def _scaled_kernel(bank, scale, out, num_rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    factor = tl.load(scale + rows, mask=rows < num_rows, other=0.0)[:, None]
    tl.store(out + at, (tl.load(bank + at, mask=mask, other=0.0) * factor).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _scaled_backward_kernel(
    grad, bank, scale, grad_bank, grad_scale, num_rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    here = rows < num_rows
    mask = here[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(scale + rows, mask=here, other=0.0)[:, None]
    tl.store(grad_bank + at, g * factor, mask=mask)
    weight = tl.load(bank + at, mask=mask, other=0.0)
    tl.store(grad_scale + rows, tl.sum(g * weight, 1), mask=here)


class _Enter(torch.autograd.Function):
    """See `epigram.kernels.front.enter`."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        embed: Tensor,
        extra: Tensor | None,
        gate: Tensor | None,
        dtype: torch.dtype,
        reset_id: int,
    ) -> Tensor:
        batch, length = tokens.shape
        width, num_rows = embed.shape[1], tokens.numel()
        out = torch.empty(batch, length, width, dtype=dtype, device=embed.device)
        rstd = torch.empty(num_rows, dtype=torch.float32, device=embed.device)
        tokens = tokens.contiguous()
        rows, wide = tile(width)
        _enter_kernel[(triton.cdiv(num_rows, rows),)](
            tokens, embed, extra, gate, out, rstd, num_rows, length, width, eps=NORM_EPS,
            HAS_EXTRA=extra is not None, HAS_GATE=gate is not None, RESET=reset_id, ROWS=rows, WIDTH=wide,
            num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(tokens, embed, extra, gate, rstd)
        ctx.reset_id = reset_id
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, embed, extra, gate, rstd = ctx.saved_tensors
        width, num_rows = embed.shape[1], tokens.numel()
        grad = grad.contiguous()
        grad_in = torch.empty_like(grad)
        rows, wide = tile(width)
        num_tiles = triton.cdiv(num_rows, rows)
        programs = num_programs(grad.device, 4, num_tiles)
        sums = torch.empty(programs, width, dtype=torch.float32, device=grad.device)
        _enter_backward_kernel[(programs,)](
            grad, tokens, embed, extra, gate, rstd, grad_in, sums, num_rows, tokens.shape[1], width, num_tiles,
            HAS_EXTRA=extra is not None, HAS_GATE=gate is not None, RESET=ctx.reset_id, ROWS=rows, WIDTH=wide,
            num_warps=4,
        )  # fmt: skip
        d_gate = sums.sum(0) if gate is not None else None
        return None, scatter(grad_in, tokens, embed), grad_in if extra is not None else None, d_gate, None, None


def enter(
    tokens: Tensor,
    embed: Tensor,
    extra: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype,
    reset_id: int = -1,
) -> Tensor:
    """See `epigram.kernels.front`."""
    extra = None if extra is None else extra.contiguous()
    result: Tensor = _Enter.apply(tokens, embed, extra, gate, dtype, reset_id)
    return result


def scatter(grad: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
    """Sum of the rows of `grad` (tokens, D) by token, float32 (V, D): the gradient of a table that was looked up."""
    found = torch.zeros_like(table)
    width = table.shape[1]
    rows, wide = tile(width)
    num_rows = tokens.numel()
    _scatter_kernel[(triton.cdiv(num_rows, rows),)](
        grad, tokens, found, num_rows, width, ROWS=rows, WIDTH=wide, num_warps=4
    )
    return found


class _LookUp(torch.autograd.Function):
    """See `epigram.kernels.front.look_up`; the gradient stays in the compute precision until it is summed."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tokens.contiguous(), table)
        return torch.nn.functional.embedding(tokens, table.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, table = ctx.saved_tensors
        return None, scatter(grad.contiguous(), tokens, table), None


def look_up(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """See `epigram.kernels.front`."""
    result: Tensor = _LookUp.apply(tokens, table, dtype)
    return result


class _Scaled(torch.autograd.Function):
    """See `epigram.kernels.front.scaled`, with a factor for each row."""

    @staticmethod
    def forward(ctx: Any, bank: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty_like(bank, dtype=dtype)
        rows, wide = tile(bank.shape[-1])
        scale = scale.contiguous()
        _scaled_kernel[(triton.cdiv(scale.numel(), rows),)](
            bank, scale, out, scale.numel(), bank.shape[-1], ROWS=rows, WIDTH=wide, num_warps=4
        )
        ctx.save_for_backward(bank, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bank, scale = ctx.saved_tensors
        d_bank, d_scale = torch.empty_like(bank), torch.empty_like(scale)
        rows, wide = tile(bank.shape[-1])
        _scaled_backward_kernel[(triton.cdiv(scale.numel(), rows),)](
            grad.contiguous(), bank, scale, d_bank, d_scale, scale.numel(), bank.shape[-1],
            ROWS=rows, WIDTH=wide, num_warps=4,
        )  # fmt: skip
        return d_bank, d_scale, None


def scaled(bank: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `epigram.kernels.front`."""
    if scale is None:
        return bank.to(dtype)
    result: Tensor = _Scaled.apply(bank, scale, dtype)
    return result
