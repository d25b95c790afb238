"""Triton kernels of `epigram.kernels.head`: logits exist in the compute precision only, and a chunk at a time.

For each chunk of tokens: the product with the embedding; one kernel that turns each row of logits into its loss and,
in the same place, its gradient; the two products of the gradient. So the loss and both gradients are complete after
the forward pass, and the backward pass only scales them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epigram.kernels._triton.launch import padded

_CHUNK_ELEMENTS = 1 << 27  # of logits at a time: 256 MiB in bfloat16


@triton.jit
def _row_kernel(
    logits, targets, gamma, out, width, cap, inverse_cap, floor, inverse_tokens,
    HAS_CAP: tl.constexpr, HAS_GAMMA: tl.constexpr, GRADIENT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row of logits: out gets its nats (with GRADIENT, weighted), and the gradient takes the logits' place.

    No element is divided by anything: at 8,192 pieces the arithmetic takes as long as the memory.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    raw = tl.load(logits + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    capped, ratio = raw, 0.0
    if HAS_CAP:
        ratio = 2.0 * tl.sigmoid(raw * (2.0 * inverse_cap)) - 1.0  # tanh
        capped = cap * ratio
    capped = tl.where(inside, capped, float("-inf"))
    highest = tl.max(capped, 0)
    powers = tl.exp(capped - highest)
    total = tl.sum(powers, 0)
    target = tl.load(targets + row)
    nats = tl.log(total) + highest - tl.sum(tl.where(columns == target, capped, 0.0), 0)
    if GRADIENT:
        weight, inverse_total = 1.0, 1.0 / total
        if HAS_GAMMA:
            # -sum p ln p from sums that are there already; the twin's 1e-8 inside the logarithm is at most V * 1e-8.
            entropy = tl.log(total) + highest - tl.sum(powers * tl.where(inside, capped, 0.0), 0) * inverse_total
            certainty = tl.maximum(1.0 - tl.exp(-entropy), 0.0)
            exponent = tl.load(gamma)
            # 0 ** 0 is 1
            power = tl.where(certainty > 0.0, tl.exp(exponent * tl.log(tl.maximum(certainty, 1e-38))), 0.0)
            weight = tl.maximum(tl.where(exponent == 0.0, 1.0, power), floor)
        nats *= weight
        grad = powers * inverse_total - tl.where(columns == target, 1.0, 0.0)
        # The cap's slope only here: until now it would occupy registers.
        grad *= (1.0 - ratio * ratio) * (weight * inverse_tokens)
        tl.store(logits + row * width + columns, grad.to(logits.dtype.element_ty), mask=inside)
    tl.store(out + row, nats)


def _rows(logits: Tensor, targets: Tensor, out: Tensor, cap: float, gamma: Tensor | None, floor: float,
          inverse_tokens: float, gradient: bool) -> None:  # fmt: skip
    rows, width = logits.shape
    wide = padded(width)
    _row_kernel[(rows,)](
        logits, targets, gamma, out, width, cap, 1 / cap if cap > 0 else 0.0, floor, inverse_tokens,
        HAS_CAP=cap > 0, HAS_GAMMA=gamma is not None, GRADIENT=gradient, WIDTH=wide,
        num_warps=4 if wide <= 2048 else 8,
    )  # fmt: skip


def _chunks(x: Tensor, vocab_size: int) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // vocab_size)
    return [slice(start, min(start + size, x.shape[0])) for start in range(0, x.shape[0], size)]


class _HeadLoss(torch.autograd.Function):
    """See `epigram.kernels.head.head_loss`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, embed: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        targets, cap, gamma, floor, needs_graph = arguments
        flat, goals = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
        nats = torch.empty(flat.shape[0], dtype=torch.float32, device=x.device)
        dx = torch.empty_like(flat) if needs_graph else None
        d_embed: Tensor | None = None
        for part in _chunks(flat, embed.shape[0]):
            logits = flat[part] @ embed.T
            _rows(logits, goals[part].contiguous(), nats[part], cap, gamma, floor, 1 / flat.shape[0], True)
            if dx is not None:
                torch.mm(logits, embed, out=dx[part])
                grown = logits.T @ flat[part]
                d_embed = grown.float() if d_embed is None else d_embed.add_(grown)
        if needs_graph:
            ctx.save_for_backward(dx, d_embed)
            ctx.shape = x.shape
        return nats.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, d_embed = ctx.saved_tensors
        scaled = (dx * grad.to(dx.dtype)).view(ctx.shape)
        return scaled, (d_embed * grad).to(dx.dtype), None


def head_loss(x: Tensor, embed: Tensor, targets: Tensor, cap: float, gamma: Tensor | None, floor: float) -> Tensor:
    """See `epigram.kernels.head`."""
    # Inside an autograd function this cannot be asked any more.
    needs_graph = torch.is_grad_enabled() and (x.requires_grad or embed.requires_grad)
    result: Tensor = _HeadLoss.apply(x, embed, (targets, cap, gamma, floor, needs_graph))
    return result


def head_nll(x: Tensor, embed: Tensor, targets: Tensor, cap: float) -> Tensor:
    """See `epigram.kernels.head`; without gradient."""
    flat, goals = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    nats = torch.empty(flat.shape[0], dtype=torch.float32, device=x.device)
    with torch.no_grad():
        for part in _chunks(flat, embed.shape[0]):
            _rows(flat[part] @ embed.T, goals[part].contiguous(), nats[part], cap, None, 0.0, 1.0, False)
    return nats.view(targets.shape)
