"""Heads: how queries and keys are finished, and what is taken out of the outputs.

Legend: B sequences, T positions, H query heads, K key/value heads, d head size, R rotated channels. Packed heads are
(B, T, (H + 2 K) d): the queries of all heads, then the keys, then the values.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from epigram.kernels.residual import norm

Rotary = tuple[Tensor, Tensor] | None
"""cos and sin of the rotary angles, each (T, 1, R / 2); None without rotated channels."""

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""q, k, v, window -> out: an attention backend, see `epigram.attention.base`."""


class HeadCounts(NamedTuple):
    """Query heads, key/value heads, channels of each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Packed heads as views q (B, T, H, d), k and v (B, T, K, d)."""
        q, k, v = packed.unflatten(-1, (-1, self.head_dim)).split(
            [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=-2
        )
        return q, k, v


def turn(x: Tensor, rotary: Rotary) -> Tensor:
    """Heads (B, T, heads, d) divided by their root mean square and rotated."""
    return rotate(norm(x), rotary)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate channel j with channel j + R / 2 of each head of x (B, T, heads, d); the others pass."""
    if rotary is None:
        return x
    cos, sin = rotary
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)


def exclude_own_value(z: Tensor, v: Tensor) -> Tensor:
    """Remove from each head's output its part along the token's own value vector (XSA, arXiv 2603.09078).

    z (B, T, H, d), v (B, T, K, d). The value is normalised with a floor of 1e-12 on its length.
    """
    own = F.normalize(v, dim=-1, eps=1e-12).unsqueeze(-2)  # (B, T, K, 1, d)
    grouped = z.unflatten(2, (v.shape[2], -1))  # (B, T, K, H // K, d)
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(2, 3)
