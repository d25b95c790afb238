"""The layers of the model, from the stream that enters the first to the one that leaves the last.

    enters(i) = own_i * x(i-1) + first_i * x0 + skip_i * x(source_i)      channelwise
    y(i)      = carry_i[0] * enters(i) + attention(norm(enters(i)))
    x(i)      = carry_i[1] * y(i) + mlp(norm(y(i)))

carry are the residual lambdas, two numbers a layer; without them both are 1.

Legend: B sequences, T positions, D model width, H query heads, K key/value heads, d head size, M hidden channels, E
width of what is added to some layers' values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from epigram.kernels.heads import Attend, HeadCounts, Rotary, exclude_own_value, rotate
from epigram.kernels.lora import LowRank, plus
from epigram.kernels.residual import norm

See = Callable[[str, Tensor], None]
"""Is shown the name of a product and its input."""

Linear = Callable[[Tensor, Tensor], Tensor]
"""`F.linear`, or what stands for it: x (..., K), weight (N, K) -> (..., N)."""


class Layer(NamedTuple):
    """One layer: matrices in the compute precision, coefficients in float32.

    own, first (D,): see the module; own is None in the layer that x0 enters. skip: the layer whose output enters
    besides (not the one before), and its coefficient (D,). qkv ((H + 2 K) d, D), out (D, H d), gain (H,), value
    (K d, E) or None. up (M, D), down (D, M). window: of attention, 0 for the whole prefix. exclude: XSA, see
    `exclude_own_value`.
    attend: the attention backend. carry: (2,) factors on the stream in both residual sums, or None. lora: what each row
    of the batch adds by target, see `epigram.kernels.lora`.
    """

    own: Tensor | None
    first: Tensor
    skip: tuple[int, Tensor] | None
    qkv: Tensor
    out: Tensor
    gain: Tensor
    value: Tensor | None
    up: Tensor
    down: Tensor
    attend: Attend
    window: int
    exclude: bool
    carry: Tensor | None = None
    lora: Mapping[str, LowRank] | None = None


class Shape(NamedTuple):
    """What all layers share. slope: see `leaky_square`."""

    counts: HeadCounts
    rotary: Rotary
    slope: float


def trunk(
    x0: Tensor,
    layers: Sequence[Layer],
    value: Tensor | None,
    shape: Shape,
    *,
    kept: int = -1,
    last: int | None = None,
    see: See | None = None,
    linear: Linear = F.linear,
) -> tuple[Tensor, Tensor | None]:
    """(x of the last layer, x of layer `kept` or None), each (B, T, D).

    value: (B, T, E), what `Layer.value` reads. last: of the last layer only so many positions at the end are wanted,
    (B, last, D). see: is shown the inputs of each layer's products, as "layers.{i}.qkv", "out", "up" and "down".
    linear: computes these products.
    """
    outputs: list[Tensor] = []
    for index, layer in enumerate(layers):
        x = _entering(layer, x0, outputs)
        own = last if index == len(layers) - 1 else None
        shown: See | None = None if see is None else _named(see, index)
        x = _attention(x, layer, value, shape, own, shown, linear)
        outputs.append(_mlp(x, layer, shape, shown, linear))
    return outputs[-1], outputs[kept] if kept >= 0 else None


def _entering(layer: Layer, x0: Tensor, outputs: list[Tensor]) -> Tensor:
    x = layer.first.to(x0.dtype) * x0
    if layer.own is not None:
        x = layer.own.to(x0.dtype) * outputs[-1] + x
    if layer.skip is not None:
        source, coefficient = layer.skip
        x = x + coefficient.to(x0.dtype) * outputs[source]
    return x


def _attention(
    x: Tensor, layer: Layer, value: Tensor | None, shape: Shape, last: int | None, see: See | None, linear: Linear
) -> Tensor:
    h = norm(x)
    parts = shape.counts.split(linear(h, layer.qkv))
    q, k, v = (plus(part, layer.lora, name, h) for part, name in zip(parts, "qkv", strict=True))
    if layer.value is not None:
        assert value is not None
        v = v + F.linear(value, layer.value).view(v.shape)
    q, k = rotate(norm(q), shape.rotary) * layer.gain.to(q.dtype)[:, None], rotate(norm(k), shape.rotary)
    start = 0 if last is None else q.shape[1] - last
    z = layer.attend(q[:, start:], k, v, layer.window)
    z = (exclude_own_value(z, v[:, start:]) if layer.exclude else z).flatten(-2)
    if see is not None:
        see("qkv", h)
        see("out", z)
    return plus(_carried(x[:, start:], layer, 0) + linear(z, layer.out), layer.lora, "out", h[:, start:])


def _mlp(x: Tensor, layer: Layer, shape: Shape, see: See | None, linear: Linear) -> Tensor:
    h = norm(x)
    hidden = leaky_square(linear(h, layer.up), shape.slope)
    if see is not None:
        see("up", h)
        see("down", hidden)
    return plus(_carried(x, layer, 1) + linear(hidden, layer.down), layer.lora, "mlp", h)


def leaky_square(x: Tensor, slope: float) -> Tensor:
    """x^2 for x > 0, (slope * x)^2 otherwise (parameter-golf #493)."""
    return F.leaky_relu(x, slope).square()


def _carried(x: Tensor, layer: Layer, sublayer: int) -> Tensor:
    return x if layer.carry is None else layer.carry[sublayer].to(x.dtype) * x


def _named(see: See, layer: int) -> See:
    return lambda name, x: see(f"layers.{layer}.{name}", x)
