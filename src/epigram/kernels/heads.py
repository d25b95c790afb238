"""The attention sublayer with its norm and its residual sum.

Legend: B sequences, T positions, H query heads, K key/value heads, d head size, R rotated channels. Packed heads are
(B, T, (H + 2 K) d): the queries of all heads, then the keys, then the values.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from epigram.kernels.mlp import See
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


class AttentionWeights(NamedTuple):
    """qkv ((H + 2 K) d, D); out (D, H d); gain (H,) float32; extra (K d, E): what the values get from elsewhere."""

    qkv: Tensor
    out: Tensor
    gain: Tensor
    extra: Tensor | None


class AttentionSpec(NamedTuple):
    """What of attention is no tensor of the layer. exclude: XSA, see `exclude_own_value`."""

    counts: HeadCounts
    rotary: Rotary
    attend: Attend
    window: int
    exclude: bool


def add_attention(
    x: Tensor,
    residual: Tensor,
    rstd: Tensor | None,
    weights: AttentionWeights,
    extra: Tensor | None,
    spec: AttentionSpec,
    last: int | None = None,
    see: See | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, rstd of y): y = residual + attention(norm(x)), all (B, T, D).

    residual: mostly x itself. rstd: 1 / rms of x if it is known already; that of y for the next sublayer, or None.
    extra: (B, T, E), read by weights.extra, or None. last: only so many positions at the end ask, and T is their number
    in y. see: is shown the inputs of "qkv" and "out".
    """
    h = norm(x)
    q, k, v = spec.counts.split(F.linear(h, weights.qkv))
    if extra is not None and weights.extra is not None:
        v = v + F.linear(extra, weights.extra).view(v.shape)
    q, k = turn(q, spec.rotary) * weights.gain.to(q.dtype)[:, None], turn(k, spec.rotary)
    first = 0 if last is None else q.shape[1] - last
    z = spec.attend(q[:, first:], k, v, spec.window)
    z = (exclude_own_value(z, v[:, first:]) if spec.exclude else z).flatten(-2)
    if see is not None:
        see("qkv", h)
        see("out", z)
    return residual[:, first:] + F.linear(z, weights.out), None


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
