"""Attention through `torch.nn.functional.scaled_dot_product_attention`: every device and precision.

A window much shorter than the sequence is served in blocks: queries of block i (as long as the window) see keys of
blocks i-1 and i only, so that time and memory grow with T * window instead of T * T.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from epigram.attention.base import Request, band_mask, expand_heads


def check(request: Request) -> str | None:
    """Serves every request."""
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """See `epigram.attention.base`."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    if window >= num_keys:
        window = 0
    if window and num_queries == num_keys and num_keys >= 2 * window:
        return _banded(q, k, v, window)
    if not window and num_queries == num_keys:
        return _call(q, k, v, None, causal=True)
    if not window and num_queries == 1:
        return _call(q, k, v, None, causal=False)
    return _call(q, k, v, band_mask(num_queries, num_keys, window, q.device), causal=False)


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    # The grouped form of CPU kernels takes the slow generic path; repeating the heads is cheaper there.
    if q.device.type == "cpu":
        k, v = expand_heads(k, q.shape[2]), expand_heads(v, q.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Blocks of `window` positions as a batch; the first block gets a block of keys that nobody may see."""
    batch, length, num_heads, head_dim = q.shape
    num_blocks = -(-length // window)
    padding = num_blocks * window - length
    q = F.pad(q, (0, 0, 0, 0, 0, padding)).view(batch * num_blocks, window, num_heads, head_dim)

    def with_previous(x: Tensor) -> Tensor:
        blocks = F.pad(x, (0, 0, 0, 0, window, padding)).view(batch, num_blocks + 1, window, *x.shape[2:])
        return torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2).flatten(0, 1)

    visible = band_mask(window, 2 * window, window, q.device).expand(num_blocks, window, 2 * window)
    before_start = torch.zeros(num_blocks, 1, 2 * window, dtype=torch.bool, device=q.device)
    before_start[0, :, :window] = True
    mask = (visible & ~before_start).unsqueeze(1).repeat(batch, 1, 1, 1)  # (B * blocks, 1, w, 2w)
    out = _call(q, with_previous(k), with_previous(v), mask, causal=False)
    return out.reshape(batch, num_blocks * window, num_heads, head_dim)[:, :length]
