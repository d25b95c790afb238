"""Low-rank additions to products, another one for each row of a batch: what a document teaches while it is scored.

Targets in a layer: "q", "k" and "v", added to these, from the normalised stream; "out" and "mlp", from what the
sublayer reads, normalised, to what it adds to the stream.

They are of the plain kernels; the fused ones do not know them. Source: parameter-golf #1530.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class LowRank(NamedTuple):
    """a (B, r, in) and b (B, out, r), the output's scale in b: x (B, T, in) gives (B, T, out), row by row."""

    a: Tensor
    b: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x @ self.a.mT.to(x.dtype)) @ self.b.mT.to(x.dtype)


class Lora(NamedTuple):
    """layers: of each layer, by target (see the module). head: added to the logits before they are capped."""

    layers: tuple[Mapping[str, LowRank], ...]
    head: LowRank | None


def plus(x: Tensor, lora: Mapping[str, LowRank] | None, target: str, source: Tensor) -> Tensor:
    """x, and what `target` adds to it, computed from `source`."""
    if lora is None or target not in lora:
        return x
    return x + lora[target](source).view(x.shape)
