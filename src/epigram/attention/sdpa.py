"""Attention through `torch.nn.functional.scaled_dot_product_attention`: every device and precision.

Without a window torch chooses among its kernels, cuDNN included where torch finds it faster (the backend `cudnn` takes
it always). A window much shorter than the sequence is served in blocks: queries of block i (as long as the window) see
keys of blocks i-1 and i only, so that time and memory grow with T * window instead of T * T. Documents are kept apart
by a mask for each sequence, B * T * T bytes for full attention: right everywhere, and fast nowhere.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from epigram.attention.base import HALF_PRECISIONS, Request, band_mask, expand_heads, with_documents

# Not cuDNN: given a mask, its backward may return NaN at lengths that leave 64 when divided by 128 (torch issue
# 196678).
_WITH_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class _EvenGradient(torch.autograd.Function):
    """The identity; its gradient is contiguous, with the strides of a new tensor even along axes of size 1."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.reshape(-1).view(grad.shape)


def unmasked(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Full attention, causal among as many queries as keys: (B, Tq, H, D) and (B, Tk, K, D) twice -> (B, Tq, H, D).

    The kernel is given the gradient of its output in one layout. torch keeps a plan of cuDNN's backward for each layout
    of q, k and v, with the strides of the gradient that it was made for, and finds it again without them
    (ATen/native/cudnn/MHA.cpp; gradients of compiled models were wrong with torch 2.11). Before cuDNN 9.5.1 torch laid
    gradients out like the output itself; since then it does so only where neighbours do not lie side by side.
    """
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (_heads_first(x) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)
    return _EvenGradient.apply(out) if out.requires_grad else out


def _heads_first(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    # Views gave wrong values on Apple's devices without a word (torch issue 181133).
    return x.contiguous() if x.device.type == "mps" else x


def check(request: Request) -> str | None:
    """Serves every request."""
    return None


@with_documents
def attend(q: Tensor, k: Tensor, v: Tensor, window: int, reach: Tensor | None) -> Tensor:
    """See `epigram.attention.base`."""
    num_queries = q.shape[1]
    reach = None if reach is None else reach[:, -num_queries:]
    if window and k.shape[1] > num_queries + window:  # keys before every query's window
        k, v = k[:, -(num_queries + window) :], v[:, -(num_queries + window) :]
    num_keys = k.shape[1]
    if window >= num_keys:
        window = 0
    if reach is None and num_queries == num_keys and not window:
        return _call(q, k, v, None, causal=True)
    if window and num_queries >= 2 * window:
        return _banded(q, k, v, window, reach)
    if reach is None and num_queries == 1:  # the keys that are left are all visible
        return _call(q, k, v, None, causal=False)
    return _call(q, k, v, band_mask(num_queries, num_keys, window, q.device, reach), causal=False)


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """mask: (Tq, Tk), or (B, Tq, Tk)."""
    # Only the flash and cuDNN kernels share keys between heads by themselves; elsewhere grouped heads would fall to the
    # generic path, which writes out all logits, and repeating the heads is cheaper.
    shares = q.device.type == "cuda" and mask is None and q.dtype in HALF_PRECISIONS
    if not shares:
        k, v = expand_heads(k, q.shape[2]), expand_heads(v, q.shape[2])
    if mask is None:
        return unmasked(q, k, v, causal=causal)
    q, k, v = (_heads_first(x) for x in (q, k, v))
    mask = mask if mask.dim() == 2 else mask[:, None]
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    with sdpa_kernel(_WITH_MASK):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int, reach: Tensor | None) -> Tensor:
    """Blocks of `window` positions as a batch, with one mask, or one each with `reach`; the first block, with what lies
    before it, alone."""
    length, before = q.shape[1], k.shape[1] - q.shape[1]  # at most `window` keys before the first query
    mask = None
    if before or reach is not None:
        mask = band_mask(window, before + window, window, q.device, None if reach is None else reach[:, :window])
    first = _call(q[:, :window], k[:, : before + window], v[:, : before + window], mask, causal=mask is None)
    k, v = k[:, before:], v[:, before:]
    num_blocks = -(-length // window)
    padding = (0, 0, 0, 0, 0, num_blocks * window - length)  # after the last position; no query sees it

    def blocks(x: Tensor) -> Tensor:
        return F.pad(x, padding).unflatten(1, (num_blocks, window))  # (B, blocks, w, heads, D)

    def with_previous(x: Tensor) -> Tensor:
        return torch.cat([blocks(x)[:, :-1], blocks(x)[:, 1:]], dim=2).flatten(0, 1)

    if reach is not None:
        reach = F.pad(reach, (0, num_blocks * window - length)).unflatten(1, (num_blocks, window))[:, 1:].flatten(0, 1)
    mask = band_mask(window, 2 * window, window, q.device, reach)
    out = _call(blocks(q)[:, 1:].flatten(0, 1), with_previous(k), with_previous(v), mask, causal=False)
    rest = out.unflatten(0, (-1, num_blocks - 1)).flatten(1, 2)
    return torch.cat([first, rest[:, : length - window]], dim=1)
