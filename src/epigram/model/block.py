"""One layer: attention, then MLP, each reading a normalised view of the stream and adding to it.

Legend: B sequences, T positions, D model width, H query heads, K key/value heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from epigram.attention.base import Attend
from epigram.kernels.base import Kernels
from epigram.kernels.heads import AttentionSpec, AttentionWeights, HeadCounts, Rotary
from epigram.kernels.mlp import See
from epigram.model.cache import Cache
from epigram.model.config import ModelConfig


class LayerWeights(NamedTuple):
    """The weights of layer `layer`, matrices in the compute precision with the layer's scales in them.

    attention: see there. up (mlp, D), down (D, mlp); resid_lambda (2,) or None.
    """

    layer: int
    attention: AttentionWeights
    up: Tensor
    down: Tensor
    resid_lambda: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one forward shares between its layers. value: (B, T, E), what some layers' values get on top."""

    config: ModelConfig
    dtype: torch.dtype
    rotary: Rotary
    attend: Attend
    attend_window: Attend
    kernels: Kernels
    value: Tensor | None
    cache: Cache | None
    tap: Callable[[str, Tensor], None] | None

    def see(self, name: str, x: Tensor) -> None:
        """Show the input of product `name` to the tap, if there is one."""
        if self.tap is not None:
            self.tap(name, x)


def block(x: Tensor, rstd: Tensor | None, w: LayerWeights, run: Pass, last: int | None = None) -> Tensor:
    """The stream (B, T, D) after layer w.layer; x is the stream that enters it, rstd its 1 / rms if that is known.

    last: go on with the last positions only, T is then their number.
    """
    more = _seen(w.layer, run)
    value = run.value if w.attention.extra is not None else None
    spec = attention_spec(w.layer, run)
    x, rstd = run.kernels.add_attention(x, _carried(x, w, 0), rstd, w.attention, value, spec, last, **more)
    return run.kernels.add_mlp(x, _carried(x, w, 1), rstd, w.up, w.down, run.config.mlp_slope, **more)


def attention_spec(layer: int, run: Pass) -> AttentionSpec:
    """How layer `layer` attends."""
    c = run.config
    window = c.layer_window(layer)
    attend = run.attend_window if window else run.attend
    if run.cache is not None:
        attend, window = _remembering(attend, run.cache, layer), run.cache.windows[layer]
    counts = HeadCounts(c.num_heads, c.num_kv_heads, c.head_dim)
    return AttentionSpec(counts, run.rotary, attend, window, layer in c.xsa_layers)


def _seen(layer: int, run: Pass) -> dict[str, See]:
    """For a tap, which only the plain kernels serve, the argument that shows it this layer's products."""
    return {} if run.tap is None else {"see": lambda name, x: run.see(f"layers.{layer}.{name}", x)}


def _remembering(attend: Attend, cache: Cache, layer: int) -> Attend:
    """`attend` over all keys and values that the cache holds, the new ones included."""

    def attend_all(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return attend(q, *cache.layers[layer].append(k, v), window)

    return attend_all


def _carried(x: Tensor, w: LayerWeights, sublayer: int) -> Tensor:
    return x if w.resid_lambda is None else w.resid_lambda[sublayer].to(x.dtype) * x
