"""All layers as one autograd function, so that what one layer ends with and the next begins with is one pass.

Forward, a layer is five products (see `epigram.kernels.products`), attention, and two small kernels for its heads. The
product that ends the MLP also mixes the next layer's stream. Backward, the mix needs no pass of its own either:

- own * x, with x = y + hidden @ downᵀ: the gradient d of what enters the next layer goes through (own * down) and
  own * y as it is; the gradient of `own` is that of own * y, a sum beside a product, plus sums of (dᵀ hidden) * down.
- only where x also goes elsewhere (a skip, or kept for the head) its gradient is written out, by `fan_in`.
- first * x0: the gradients of a few layers wait for each other, so that one call of `fan_in` adds them up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epigram.kernels._triton.heads import AttentionRecord, attention_backward, attention_forward
from epigram.kernels._triton.residual import correction_of, enter_first, fan_in, rstd_of_squares
from epigram.kernels.products.base import Products
from epigram.kernels.trunk import Layer, Shape

_TENSORS = ("own", "first", "qkv", "out", "gain", "value", "up", "down")  # of a layer, and the coefficient of its skip
_TOGETHER = 3  # layers whose gradients of x0 are added up in one pass


class _Setting(NamedTuple):
    """What is no tensor."""

    layers: tuple[Layer, ...]
    shape: Shape
    kept: int
    last: int | None
    products: Products
    keep: bool

    @property
    def sources(self) -> set[int]:
        """Layers whose output goes further than to the next layer."""
        return {layer.skip[0] for layer in self.layers if layer.skip is not None} | {self.kept}


class _MlpRecord(NamedTuple):
    y: Tensor
    rstd: Tensor
    pre: Tensor
    hidden: Tensor


class _Trunk(torch.autograd.Function):
    """See `epigram.kernels.trunk.trunk`. Arguments: x0, value, the setting, and the tensors of each layer in turn."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, value: Tensor | None, setting: _Setting, *tensors: Tensor | None) -> Any:
        layers, products, keep = setting.layers, setting.products, setting.keep
        batch, width, count = x0.shape[0], x0.shape[2], len(layers)
        flat0 = x0.reshape(-1, width)
        extra = None if value is None else value.reshape(-1, value.shape[-1])
        entering, rstd = enter_first(flat0, layers[0].first)
        outputs: dict[int, Tensor] = {}
        records: list[tuple[AttentionRecord | None, _MlpRecord]] = []
        for index, layer in enumerate(layers):
            is_last = index == count - 1
            own_last = setting.last if is_last else None
            y, rstd, record = attention_forward(
                entering, rstd, layer, extra, setting.shape, products, batch, own_last, keep
            )
            pre, hidden = products.up(y, layer.up, rstd, setting.shape.slope, keep)
            if keep:
                assert pre is not None
                records.append((record, _MlpRecord(y, rstd, pre, hidden)))
            if is_last:
                x, _ = products.added(hidden, layer.down, y, False)
                break
            following = layers[index + 1]
            streams = [(following.first, flat0)]
            if following.skip is not None:
                streams.append((following.skip[1], outputs[following.skip[0]]))
            assert following.own is not None
            entering, output, squares = products.mixed(
                hidden, layer.down, y, following.own, streams, index in setting.sources
            )
            if output is not None:
                outputs[index] = output
            rstd = rstd_of_squares(squares, width)
        if keep:
            ctx.save_for_backward(x0, value)
            ctx.setting, ctx.records, ctx.outputs = setting, records, outputs
        ctx.set_materialize_grads(False)
        x = x.view(batch, -1, width)
        return (x, outputs[setting.kept].view(x0.shape)) if setting.kept >= 0 else x

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_kept: Tensor | None = None) -> tuple[Tensor | None, ...]:
        (x0, value), setting = ctx.saved_tensors, ctx.setting
        layers, products, width = setting.layers, setting.products, x0.shape[-1]
        records, outputs = ctx.records, ctx.outputs
        ctx.records = ctx.outputs = None
        flat0 = x0.reshape(-1, width)
        extra = None if value is None else value.reshape(-1, value.shape[-1])
        entered: dict[int, Tensor] = {}  # gradients of what enters each layer, as long as somebody needs them
        d_x0: Tensor | None = None
        waiting: list[int] = []  # layers whose gradient of x0 is not yet added
        taken_by = {layer.skip[0]: index for index, layer in enumerate(layers) if layer.skip is not None}
        found: list[dict[str, Tensor | None]] = [{} for _ in layers]
        d_extra: Tensor | None = None
        for index in reversed(range(len(layers))):
            layer, own = layers[index], None
            attention, mlp = records.pop()
            if index == len(layers) - 1:
                g = grad.reshape(-1, width).contiguous()
            elif index in setting.sources:
                taker = taken_by.get(index)
                following, coefficients = [entered[index + 1]], [layers[index + 1].own]
                if taker is not None:
                    following.append(entered[taker])
                    coefficients.append(layers[taker].skip[1])
                kept = grad_kept.reshape(-1, width) if index == setting.kept and grad_kept is not None else None
                g, sums = fan_in(following, coefficients, outputs.pop(index), kept)
                found[index + 1]["own"] = sums[0]
                if taker is not None:
                    found[taker]["skip"] = sums[1]
            else:
                g, own = entered[index + 1], layers[index + 1].own
            dy, found[index]["up"], found[index]["down"], d_own = _mlp_backward(g, own, layer, mlp, setting)
            if own is not None:
                found[index + 1]["own"] = d_own
            found[index]["out"] = dy.T @ attention.seen
            back = attention_backward(dy, attention, layer, extra, setting.shape)
            entered[index], _ = products.back(back.packed, layer.qkv, dy, attention.entering, back.correction)
            found[index]["qkv"] = back.packed.T @ attention.entering
            found[index]["gain"] = back.gain
            if back.value is not None and extra is not None:
                found[index]["value"] = back.value.T @ extra
                more = back.value @ layer.value
                d_extra = more if d_extra is None else d_extra.add_(more)
            waiting.append(index)
            if len(waiting) == _TOGETHER or index == 0:
                coefficients = [layers[i].first for i in waiting]
                d_x0, sums = fan_in([entered[i] for i in waiting], coefficients, flat0, d_x0)
                for i, d_first in zip(waiting, sums.unbind(0), strict=True):
                    found[i]["first"] = d_first
                waiting = []
            needed = {*waiting, index, *(taker for source, taker in taken_by.items() if source < index)}
            entered = {i: entered[i] for i in entered.keys() & needed}
        assert d_x0 is not None
        flat = [gradients.get(name) for gradients in found for name in (*_TENSORS, "skip")]
        return d_x0.view(x0.shape), None if d_extra is None else d_extra.view(value.shape), None, *flat


def _mlp_backward(
    g: Tensor, own: Tensor | None, layer: Layer, record: _MlpRecord, setting: _Setting
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of y, up, down and own, from that of the layer's output x, or with `own` from that of own * x."""
    products, down = setting.products, layer.down
    scaled_down = down if own is None else (down * own[:, None]).to(down.dtype)
    d_pre, sums = products.down_back(g, scaled_down, record.pre, record.rstd, setting.shape.slope)
    d_down, d_up = g.T @ record.hidden, d_pre.T @ record.y
    dy, own_sums = products.back(d_pre, layer.up, g, record.y, correction_of(sums, record.rstd, g.shape[1]), own)
    if own is None:
        return dy, d_up, d_down, None
    assert own_sums is not None
    return dy, d_up, (d_down * own[:, None]).to(down.dtype), own_sums + (d_down.float() * down).sum(1)


def trunk(
    x0: Tensor,
    layers: Sequence[Layer],
    value: Tensor | None,
    shape: Shape,
    *,
    products: Products,
    kept: int = -1,
    last: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `epigram.kernels.trunk`; without layers' `carry` and `lora`, and `last` only where no gradient is wanted."""
    assert all(layer.carry is None and layer.lora is None for layer in layers)
    taken = [layer.skip[0] for layer in layers if layer.skip is not None]
    assert len(set(taken)) == len(taken), "the backward pass gives an output to one skip at most"
    tensors = [
        tensor
        for layer in layers
        for tensor in (*(getattr(layer, name) for name in _TENSORS), layer.skip[1] if layer.skip else None)
    ]
    # Inside an autograd function it cannot be asked any more whether a gradient is wanted.
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x0, value, *tensors))
    setting = _Setting(tuple(layers), shape, kept, last, products, keep)
    result = _Trunk.apply(x0.contiguous(), value, setting, *tensors)
    return result if kept >= 0 else (result, None)
