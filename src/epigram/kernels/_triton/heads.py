"""Triton kernels of `epigram.kernels.heads`.

A row is one head of one token. Queries and keys are overwritten inside the packed tensor: what the backward pass needs
of them it finds in their final values, since the rotation keeps lengths and a gain divides out. (A gain of exactly
zero would leave no trace of its head, whose gradient is then zero; no config begins and no optimizer step lands there.)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from epigram.kernels._triton.launch import tile
from epigram.kernels._triton.residual import correction_of, rstd_of_squares
from epigram.kernels.heads import HeadCounts, Rotary
from epigram.kernels.products.base import Products
from epigram.kernels.residual import NORM_EPS
from epigram.kernels.trunk import Layer, Shape


@triton.jit
def _turn(x, partner, cos, sin, columns, HALF: tl.constexpr, BACK: tl.constexpr):
    """Rotation of rows x; `partner` holds for each channel the one it is rotated with, cos is one elsewhere."""
    sign = tl.where(columns < HALF, 1.0, -1.0)
    if BACK:
        sign = -sign
    return x * cos + partner * sin * sign[None, :]


@triton.jit
def _split(num_rows, length, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Of the rows of this program: token, head, position of the token in its sequence, whether there is such a row.

    Divided as 32-bit numbers by a constant: in 64 bits the divisions took longer than all the rest of these kernels.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = rows // HEADS
    return tokens.to(tl.int64), rows % HEADS, tokens % length, rows < num_rows


@triton.jit
def _angles(cos_table, sin_table, positions, columns, mask, HALF: tl.constexpr):
    turned = mask & (columns < 2 * HALF)[None, :]
    at = positions[:, None] * HALF + (columns % HALF)[None, :]
    cos = tl.load(cos_table + at, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_table + at, mask=turned, other=0.0).to(tl.float32)
    return cos, sin, turned


@triton.jit
def _turn_kernel(
    packed, cos_table, sin_table, gain, rstd_out, out, num_rows, length, first, num_turned, stride, out_stride,
    head_dim,
    eps: tl.constexpr, TURN: tl.constexpr, GAIN: tl.constexpr, IN_PLACE: tl.constexpr, COPIES: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Heads `first` to first + HEADS of the packed tensor: normalised and turned (TURN), or as they are.

    out gets each head COPIES times side by side; IN_PLACE, it is where the head itself lies.
    """
    columns = tl.arange(0, WIDTH)
    tokens, heads, positions, inside = _split(num_rows, length, HEADS, ROWS)
    mask = inside[:, None] & (columns < head_dim)[None, :]
    base = packed + (tokens * stride + (first + heads) * head_dim)[:, None]
    x = tl.load(base + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if TURN:
        rstd = tl.rsqrt(tl.sum(x * x, 1) / head_dim + eps)
        x *= rstd[:, None]
        if HALF > 0:
            cos, sin, turned = _angles(cos_table, sin_table, positions, columns, mask, HALF)
            other = tl.where(columns < HALF, columns + HALF, columns - HALF)
            partner = tl.load(base + other[None, :], mask=turned, other=0.0).to(tl.float32) * rstd[:, None]
            x = _turn(x, partner, cos, sin, columns, HALF, False)
        tl.store(rstd_out + tokens * num_turned + first + heads, rstd, mask=inside)
    if GAIN:
        x *= tl.load(gain + heads, mask=inside, other=1.0).to(tl.float32)[:, None]
    if IN_PLACE:
        tl.debug_barrier()  # every partner is read before anything is overwritten
    for copy in tl.static_range(COPIES):
        to = out + (tokens * out_stride + (heads * COPIES + copy) * head_dim)[:, None] + columns[None, :]
        tl.store(to, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_of_copies(source, at, mask, head_dim, COPIES: tl.constexpr):
    total = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
    for copy in tl.static_range(1, COPIES):
        total += tl.load(source + at + copy * head_dim, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _turn_back_kernel(
    grad_in, views, cos_table, sin_table, gain, rstd_heads, rstd_rows, out, dots, num_rows, length, first, num_turned,
    stride, grad_stride, view_stride, head_dim,
    GAIN: tl.constexpr, COPIES: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Heads `first` to first + HEADS of the packed tensor, queries (with a gain) or keys.

    views: finished heads, and grad_in their gradients, each COPIES times side by side. out gets rstd_rows (of the
    token) times the gradient of the product, dots the gradient times the head before its gain.
    """
    columns = tl.arange(0, WIDTH)
    tokens, heads, positions, inside = _split(num_rows, length, HEADS, ROWS)
    mask = inside[:, None] & (columns < head_dim)[None, :]
    seen = views + (tokens * view_stride + heads * COPIES * head_dim)[:, None]
    source = grad_in + (tokens * grad_stride + heads * COPIES * head_dim)[:, None]
    scale = tl.load(rstd_heads + tokens * num_turned + first + heads, mask=inside, other=0.0)
    scale *= tl.load(rstd_rows + tokens, mask=inside, other=0.0)
    at = columns[None, :]
    grad = _sum_of_copies(source, at, mask, head_dim, COPIES)
    view = tl.load(seen + at, mask=mask, other=0.0).to(tl.float32)
    if GAIN:
        factor = tl.load(gain + heads, mask=inside, other=1.0).to(tl.float32)
        inverse = tl.where(factor == 0.0, 0.0, 1.0 / factor)[:, None]
        view *= inverse
        dot = tl.sum(grad * view, 1)
        tl.store(dots + tokens * HEADS + heads, dot, mask=inside)
        grad *= factor[:, None]
        dot = (dot * factor / head_dim)[:, None]
    else:
        dot = (tl.sum(grad * view, 1) / head_dim)[:, None]
    x = grad - view * dot
    if HALF > 0:
        cos, sin, turned = _angles(cos_table, sin_table, positions, columns, mask, HALF)
        at = tl.where(columns < HALF, columns + HALF, columns - HALF)[None, :]
        grad = _sum_of_copies(source, at, turned, head_dim, COPIES)
        view = tl.load(seen + at, mask=turned, other=0.0).to(tl.float32)
        if GAIN:
            grad *= factor[:, None]
            view *= inverse
        x = _turn(x, grad - view * dot, cos, sin, columns, HALF, True)
    to = out + (tokens * stride + (first + heads) * head_dim)[:, None] + columns[None, :]
    tl.store(to, (x * scale[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _value_back_kernel(
    grad_in, grad_more, values, extra, rstd, out, total_out, sums, num_rows, width, stride, grad_stride, value_stride,
    first,
    HEAD_DIM: tl.constexpr, COPIES: tl.constexpr, MORE: tl.constexpr, EXTRA: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows are tokens, columns the values of all heads. sums: gradient times the values that come from the product."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = rows < num_rows
    mask = inside[:, None] & (columns < width)[None, :]
    own = rows[:, None] * width + columns[None, :]
    at = rows[:, None] * stride + first + columns[None, :]
    source = grad_in + rows[:, None] * grad_stride
    spread = columns // HEAD_DIM * (COPIES * HEAD_DIM) + columns % HEAD_DIM
    grad = _sum_of_copies(source, spread[None, :], mask, HEAD_DIM, COPIES)
    if MORE:
        grad += tl.load(grad_more + own, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(values + rows[:, None] * value_stride + spread[None, :], mask=mask, other=0.0).to(tl.float32)
    if EXTRA:
        value -= tl.load(extra + own, mask=mask, other=0.0).to(tl.float32)
        tl.store(total_out + own, grad.to(total_out.dtype.element_ty), mask=mask)
    tl.store(sums + rows, tl.sum(grad * value, 1), mask=inside)
    scale = tl.load(rstd + rows, mask=inside, other=0.0)
    tl.store(out + at, (grad * scale[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _exclude_kernel(
    z, v, out, num_rows, head_dim, v_stride, v_step,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, WIDTH)
    tokens, heads, _, inside = _split(num_rows, 1, HEADS, ROWS)
    mask = inside[:, None] & (columns < head_dim)[None, :]
    own = (tokens * v_stride + heads // GROUPS * v_step)[:, None] + columns[None, :]
    value = tl.load(v + own, mask=mask, other=0.0).to(tl.float32)
    value *= (1.0 / tl.maximum(tl.sqrt(tl.sum(value * value, 1)), 1e-12))[:, None]
    at = ((tokens * HEADS + heads) * head_dim)[:, None] + columns[None, :]
    x = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    x -= tl.sum(x * value, 1)[:, None] * value
    tl.store(out + at, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _exclude_backward_kernel(
    grad_out, z, v, dz, dv, num_rows, head_dim, v_stride, v_step,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A row is one key/value head of one token, with the GROUPS query heads that read it."""
    columns = tl.arange(0, WIDTH)
    tokens, heads, _, inside = _split(num_rows, 1, KV_HEADS, ROWS)
    rows = tokens * KV_HEADS + heads
    mask = inside[:, None] & (columns < head_dim)[None, :]
    own = (tokens * v_stride + heads * v_step)[:, None] + columns[None, :]
    value = tl.load(v + own, mask=mask, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(value * value, 1))
    inverse = 1.0 / tl.maximum(length, 1e-12)
    value *= inverse[:, None]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for group in tl.static_range(GROUPS):
        at = ((rows * GROUPS + group) * head_dim)[:, None] + columns[None, :]
        grad = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        along = tl.sum(grad * value, 1)[:, None]
        tl.store(dz + at, (grad - along * value).to(dz.dtype.element_ty), mask=mask)
        total -= tl.sum(x * value, 1)[:, None] * grad + along * x
    # Below the floor the length is a constant, so nothing is projected out.
    along = tl.where(length > 1e-12, tl.sum(total * value, 1), 0.0)
    total = (total - along[:, None] * value) * inverse[:, None]
    tl.store(dv + (rows * head_dim)[:, None] + columns[None, :], total.to(dv.dtype.element_ty), mask=mask)


def _finish_heads(
    packed: Tensor, counts: HeadCounts, rotary: Rotary, gain: Tensor, spread: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """q, k, v from `packed` (B, T, channels), and 1 / rms of queries and keys, (B, T, H + K) float32.

    They lie in `packed`, or with `spread`, keys and values once for each query head, in a tensor of their own.
    """
    batch, length, stride = packed.shape
    num_heads, num_kv_heads, head_dim = counts
    num_turned = num_heads + num_kv_heads
    rstd = torch.empty(batch, length, num_turned, dtype=torch.float32, device=packed.device)
    cos, sin = _flat(rotary)
    rows, wide = tile(head_dim)

    def finish(out: Tensor, first: int, count: int, copies: int, turn: bool) -> None:
        num_rows = batch * length * count
        _turn_kernel[(triton.cdiv(num_rows, rows),)](
            packed, cos, sin, gain, rstd, out, num_rows, length, first, num_turned, stride, out.stride(1), head_dim,
            eps=NORM_EPS, TURN=turn, GAIN=first == 0, IN_PLACE=not spread, COPIES=copies, HALF=_half(rotary),
            HEADS=count, ROWS=rows, WIDTH=wide, num_warps=4,
        )  # fmt: skip

    q, k, v = counts.split(packed)
    copies = 1
    if spread:
        q, k, v = torch.empty(3, batch, length, num_heads, head_dim, dtype=packed.dtype, device=packed.device)
        copies = num_heads // num_kv_heads
        finish(v, num_turned, num_kv_heads, copies, False)
    finish(q, 0, num_heads, 1, True)
    finish(k, num_heads, num_kv_heads, copies, True)
    return (q, k, v), rstd


def _turn_back(
    gradients: tuple[Tensor, Tensor], views: tuple[Tensor, Tensor], counts: HeadCounts, rotary: Rotary, gain: Tensor,
    rstd_heads: Tensor, rstd: Tensor, out: Tensor,
) -> Tensor:  # fmt: skip
    """Fill queries and keys of `out`, the gradient of the product's packed result times rstd; returns that of gain.

    views: finished queries and keys.
    """
    batch, length, stride = out.shape
    num_heads, num_kv_heads, head_dim = counts
    cos, sin = _flat(rotary)
    rows, wide = tile(head_dim)
    dots = torch.empty(batch * length, num_heads, dtype=torch.float32, device=out.device)
    parts = zip(gradients, views, (0, num_heads), (num_heads, num_kv_heads), strict=True)
    for grad, view, first, count in parts:
        num_rows = batch * length * count
        _turn_back_kernel[(triton.cdiv(num_rows, rows),)](
            grad, view, cos, sin, gain, rstd_heads, rstd, out, dots, num_rows, length, first,
            num_heads + num_kv_heads, stride, grad.stride(1), view.stride(1), head_dim, GAIN=first == 0,
            COPIES=grad.shape[2] // count, HALF=_half(rotary), HEADS=count, ROWS=rows, WIDTH=wide, num_warps=4,
        )  # fmt: skip
    return dots.sum(0)


def _value_back(
    grad: Tensor, more: Tensor | None, v: Tensor, extra: Tensor | None, rstd: Tensor, out: Tensor, counts: HeadCounts
) -> tuple[Tensor, Tensor | None]:
    """Fill the values of `out`; returns sums (N, 1) of gradient times value of the product, and with `extra` (N, K d),
    the values' other part, the gradient that it gets."""
    width = counts.num_kv_heads * counts.head_dim
    num_rows, stride = out.shape[0] * out.shape[1], out.shape[2]
    sums = torch.empty(num_rows, 1, dtype=torch.float32, device=out.device)
    total = None if extra is None else torch.empty_like(extra)
    rows, wide = tile(width)
    _value_back_kernel[(triton.cdiv(num_rows, rows),)](
        grad, more, v, extra, rstd, out, total, sums, num_rows, width, stride, grad.stride(1), v.stride(1),
        stride - width, HEAD_DIM=counts.head_dim, COPIES=grad.shape[2] // counts.num_kv_heads, MORE=more is not None,
        EXTRA=extra is not None, ROWS=rows, WIDTH=wide, num_warps=4,
    )  # fmt: skip
    return sums, total


def _exclude(z: Tensor, v: Tensor) -> Tensor:
    num_heads, head_dim = z.shape[-2:]
    rows, wide = tile(head_dim)
    num_rows = z.numel() // head_dim
    out = torch.empty_like(z)
    _exclude_kernel[(triton.cdiv(num_rows, rows),)](
        z, v, out, num_rows, head_dim, v.stride(1), v.stride(2),
        HEADS=num_heads, GROUPS=num_heads // v.shape[-2], ROWS=rows, WIDTH=wide, num_warps=4,
    )  # fmt: skip
    return out


def _exclude_backward(grad: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of z and v."""
    num_kv_heads, head_dim = v.shape[-2:]
    rows, wide = tile(head_dim)
    num_rows = v.shape[0] * v.shape[1] * num_kv_heads
    dz, dv = torch.empty_like(z), v.new_empty(v.shape)
    _exclude_backward_kernel[(triton.cdiv(num_rows, rows),)](
        grad, z, v, dz, dv, num_rows, head_dim, v.stride(1), v.stride(2),
        KV_HEADS=num_kv_heads, GROUPS=z.shape[-2] // num_kv_heads, ROWS=rows, WIDTH=wide, num_warps=4,
    )  # fmt: skip
    return dz, dv


class AttentionRecord(NamedTuple):
    """What the backward pass needs of a layer's attention. inner: q, k, v and z with their own graph."""

    entering: Tensor
    rstd: Tensor
    rstd_heads: Tensor
    inner: tuple[Tensor, Tensor, Tensor, Tensor]
    seen: Tensor


def attention_forward(
    x: Tensor, rstd: Tensor, layer: Layer, value: Tensor | None, shape: Shape, products: Products,
    batch: int, last: int | None, keep: bool,
) -> tuple[Tensor, Tensor, AttentionRecord | None]:  # fmt: skip
    """(y, rstd of y, record): y = x + attention(norm(x)), rows (N, D); see `epigram.kernels.trunk`.

    Attention keeps a graph of its own, whichever backend it is. Without `keep` nothing is recorded; only then may
    `last` be given.
    """
    assert last is None or not keep, "the last positions alone are for scoring"
    width, counts = x.shape[1], shape.counts
    rows = products.scaled(x, layer.qkv, rstd)
    if layer.value is not None and value is not None:
        rows[:, -layer.value.shape[0] :].addmm_(value, layer.value.T)
    packed = rows.view(batch, -1, rows.shape[1])
    spread = keep and getattr(layer.attend, "equal_heads", False)
    heads, rstd_heads = _finish_heads(packed, counts, shape.rotary, layer.gain, spread)
    start = 0 if last is None else packed.shape[1] - last
    q, k, v = (part.detach().requires_grad_(keep) for part in heads)
    with torch.set_grad_enabled(keep):
        z = layer.attend(q[:, start:] if start else q, k, v, layer.window)
    seen = z.detach().contiguous()
    if layer.exclude:
        seen = _exclude(seen, _dense_batches(_own_values(v, counts)[:, start:]))
    seen = seen.view(-1, counts.num_heads * counts.head_dim)
    old = x if last is None else x.view(batch, -1, width)[:, start:].reshape(-1, width).contiguous()
    y, squares = products.added(seen, layer.out, old, True)
    assert squares is not None
    record = AttentionRecord(x, rstd, rstd_heads, (q, k, v, z), seen) if keep else None
    return y, rstd_of_squares(squares, width), record


class AttentionGradients(NamedTuple):
    """packed: of the result of the product that makes the heads, times rstd, rows (N, channels). correction: see
    `epigram.kernels.products.base`. gain: (H,). value: of the result of the layer's value weights, or None.
    """

    packed: Tensor
    correction: Tensor
    gain: Tensor
    value: Tensor | None


def attention_backward(
    grad: Tensor, record: AttentionRecord, layer: Layer, value: Tensor | None, shape: Shape
) -> AttentionGradients:
    """From the gradient of y (rows) back to the product that made the packed heads."""
    q, k, v, z = record.inner
    counts = shape.counts
    dz, more = (grad @ layer.out).view(z.shape), None
    if layer.exclude:
        dz, more = _exclude_backward(dz, z.detach().contiguous(), _own_values(v, counts))
    dq, dk, dv = (_rows_contiguous(part) for part in torch.autograd.grad(z, (q, k, v), dz))
    out = grad.new_empty(*q.shape[:2], layer.qkv.shape[0])
    views = q.detach(), k.detach()
    gain = _turn_back((dq, dk), views, counts, shape.rotary, layer.gain, record.rstd_heads, record.rstd, out)
    other = value @ layer.value.T if layer.value is not None and value is not None else None
    sums, d_other = _value_back(dv, more, v.detach(), other, record.rstd, out, counts)
    # The norms of queries and keys leave next to nothing of their gradients along themselves (their epsilon's share:
    # 1e-5 where a head's root mean square is 0.1, 1e-3 at 0.01): the values alone count.
    correction = correction_of(sums, record.rstd, record.entering.shape[1])
    return AttentionGradients(out.view(-1, out.shape[-1]), correction, gain, d_other)


def _own_values(v: Tensor, counts: HeadCounts) -> Tensor:
    """Each value head once, (B, T, K, d), as a view."""
    return v.detach()[:, :, :: v.shape[2] // counts.num_kv_heads]


def _dense_batches(x: Tensor) -> Tensor:
    """(B, T, heads, d) of which one distance leads from token to token, also from one sequence to the next."""
    good = x.stride(-1) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if good else _laid_out(x)


def _rows_contiguous(x: Tensor) -> Tensor:
    """The same with heads that lie side by side."""
    return _dense_batches(x) if x.stride(-2) == x.shape[-1] else _laid_out(x)


def _laid_out(x: Tensor) -> Tensor:
    """A copy, every stride of it the product of the sizes behind: contiguous() leaves axes of one entry as they are."""
    return x.clone(memory_format=torch.contiguous_format)


def _flat(rotary: Rotary) -> tuple[Tensor | None, Tensor | None]:
    """Both tables as (T, R / 2), or twice None."""
    if rotary is None:
        return None, None
    cos, sin = (table.reshape(-1, table.shape[-1]).contiguous() for table in rotary)
    return cos, sin


def _half(rotary: Rotary) -> int:
    return 0 if rotary is None else rotary[0].shape[-1]
