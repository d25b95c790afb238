"""One layer: attention, then MLP, each reading a normalised view of the stream and adding to it.

Pure functions of tensors, so that a layer can be compiled once and reused, and read on one screen.
Legend: B sequences, T positions, D model width, H query heads, K key/value heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from epigram.attention.base import Attend
from epigram.model.cache import Cache
from epigram.model.config import NORM_EPS, ModelConfig
from epigram.model.rope import rotate


class LayerWeights(NamedTuple):
    """The parameters of layer `layer` in the compute precision.

    qkv (H*d + 2*K*d, D), out (D, H*d), up (mlp, D), down (D, mlp); attn_scale, mlp_scale (D,); resid_mix (2, D);
    q_gain (H,); resid_lambda (2,) or None.
    """

    layer: int
    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    attn_scale: Tensor
    mlp_scale: Tensor
    resid_mix: Tensor
    q_gain: Tensor
    resid_lambda: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one forward shares between its layers."""

    config: ModelConfig
    dtype: torch.dtype
    rotary: tuple[Tensor, Tensor] | None
    attend: Attend
    attend_window: Attend
    cache: Cache | None
    tap: Callable[[str, Tensor], None] | None
    transform: Callable[[str, Tensor], Tensor] | None

    def see(self, name: str, x: Tensor) -> None:
        """Show the input of product `name` to the tap, if there is one."""
        if self.tap is not None:
            self.tap(name, x)


def block(x: Tensor, x0: Tensor, w: LayerWeights, value: Tensor | None, run: Pass) -> Tensor:
    """The stream (B, T, D) after layer w.layer; x0 is the stream before the first layer.

    value: (B, T, K*d) value embedding of this layer, or None.
    """
    x = w.resid_mix[0] * x + w.resid_mix[1] * x0
    attended = attention(_layer_norm(x, w.layer, run.config), w, value, run)
    x = _carried(x, w, 0) + w.attn_scale * attended
    transformed = mlp(_layer_norm(x, w.layer, run.config), w, run)
    return _carried(x, w, 1) + w.mlp_scale * transformed


def attention(h: Tensor, w: LayerWeights, value: Tensor | None, run: Pass) -> Tensor:
    """Grouped causal attention over the normalised stream h (B, T, D) -> (B, T, D)."""
    c, i = run.config, w.layer
    run.see(f"layers.{i}.qkv", h)
    q, k, v = F.linear(h, w.qkv).split([c.query_dim, c.kv_dim, c.kv_dim], dim=-1)
    v = v if value is None else v + value
    q, k, v = (x.unflatten(-1, (-1, c.head_dim)) for x in (q, k, v))  # (B, T, heads, d)
    q = rotate(_head_norm(q), run.rotary) * w.q_gain[:, None]
    k = rotate(_head_norm(k), run.rotary)
    z = _attend(q, k, v, i, run)
    if i in c.xsa_layers:
        z = exclude_own_value(z, v)
    z = z.flatten(-2)
    run.see(f"layers.{i}.out", z)
    return F.linear(z, w.out)


def mlp(h: Tensor, w: LayerWeights, run: Pass) -> Tensor:
    """Up, leaky square, down: (B, T, D) -> (B, T, D)."""
    run.see(f"layers.{w.layer}.up", h)
    hidden = F.leaky_relu(F.linear(h, w.up), run.config.mlp_slope).square()
    run.see(f"layers.{w.layer}.down", hidden)
    return F.linear(hidden, w.down)


def exclude_own_value(z: Tensor, v: Tensor) -> Tensor:
    """Remove from each head's output its part along the token's own value vector (XSA, arXiv 2603.09078).

    z (B, T, H, d), v (B, T, K, d). The value is normalised with a floor of 1e-12 on its length.
    """
    own = F.normalize(v, dim=-1, eps=1e-12).unsqueeze(-2)  # (B, T, K, 1, d)
    grouped = z.unflatten(2, (v.shape[2], -1))  # (B, T, K, H // K, d)
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(2, 3)


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: int, run: Pass) -> Tensor:
    window = run.config.layer_window(layer)
    if run.cache is not None:
        k, v = run.cache.layers[layer].append(k, v)
        window = run.cache.windows[layer]
    return (run.attend_window if run.config.layer_window(layer) else run.attend)(q, k, v, window)


def _carried(x: Tensor, w: LayerWeights, sublayer: int) -> Tensor:
    return x if w.resid_lambda is None else w.resid_lambda[sublayer] * x


def _layer_norm(x: Tensor, layer: int, config: ModelConfig) -> Tensor:
    h = F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)
    return h * (layer + 1) ** -0.5 if config.depth_scale else h


def _head_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)
