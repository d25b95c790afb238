"""All layers as one autograd function, so that what one layer ends with and the next begins with is one pass.

Forward, a layer is five products (see `epigram.kernels.products`), attention, and two small kernels for its heads. The
product that ends the MLP also mixes the next layer's stream. Backward, the mix needs no pass of its own either:

- own * x, with x = y + hidden @ downᵀ: the gradient d of what enters the next layer goes through (own * down) and own * y
  as it is, and the gradient of `own` is that of own * y, a sum beside a product, plus the rows of (dᵀ hidden) * down.
- only where x also goes elsewhere (a skip, or kept for the head) its gradient is written out: `branch_back`.
- first * x0: the gradients of all layers stay until the end, where one kernel adds them up: `fan_in`.

Weight gradients are computed beside the main line on a second stream: they fill its gaps.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epigram.kernels._triton.heads import AttentionRecord, attention_backward, attention_forward
from epigram.kernels._triton.residual import branch_back, correction_of, enter_first, fan_in, rstd_of_squares
from epigram.kernels.products.base import Products
from epigram.kernels.trunk import Layer, Shape

_TENSORS = ("own", "first", "qkv", "out", "gain", "value", "up", "down")  # of a layer, and the coefficient of its skip
_PER_LAYER = len(_TENSORS) + 1
_LAG = 2  # layers that the second stream may be behind before the first one waits for it


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


class _Beside:
    """Runs work on a second stream of the device; on other devices at once.

    What the work reads stays alive until the main stream has waited for it, at most _LAG layers later.
    """

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reading: list[tuple[Tensor, ...]] = []
        self._behind: deque[tuple[torch.cuda.Event, list[tuple[Tensor, ...]]]] = deque()

    def run(self, work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """work(*tensors)."""
        if self._stream is None:
            return work(*tensors)
        self._stream.wait_stream(self._main)
        with torch.cuda.stream(self._stream):
            result = work(*tensors)
        self._reading.append(tensors)
        return result

    def end_layer(self, most_behind: int = _LAG) -> None:
        """Let the main stream wait for all but the newest layers' work."""
        if self._stream is None:
            return
        event = torch.cuda.Event()
        event.record(self._stream)
        self._behind.append((event, self._reading))
        self._reading = []
        while len(self._behind) > most_behind:
            event, _ = self._behind.popleft()
            self._main.wait_event(event)


class _Trunk(torch.autograd.Function):
    """See `epigram.kernels.trunk.trunk`. Arguments: x0, value, the setting, and the tensors of each layer in turn."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, value: Tensor | None, setting: _Setting, *tensors: Tensor | None) -> Any:
        layers, products, keep = setting.layers, setting.products, setting.keep
        (batch, length, width), count = x0.shape, len(layers)
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
        entered = torch.empty(len(layers), *flat0.shape, dtype=x0.dtype, device=x0.device)
        skips = {layer.skip[0]: index for index, layer in enumerate(layers) if layer.skip is not None}
        beside = _Beside(x0.device)
        found: list[dict[str, Tensor | None]] = [{} for _ in layers]
        d_extra: Tensor | None = None
        for index in reversed(range(len(layers))):
            layer, own = layers[index], None
            attention, mlp = records.pop()
            if index == len(layers) - 1:
                g = grad.reshape(-1, width).contiguous()
            elif index in setting.sources:
                taker = skips.get(index)
                kept = grad_kept.reshape(-1, width) if index == setting.kept and grad_kept is not None else None
                g, sums = branch_back(
                    entered[index + 1],
                    layers[index + 1].own,
                    None if taker is None else entered[taker],
                    None if taker is None else layers[taker].skip[1],
                    kept,
                    outputs.pop(index),
                )
                found[index + 1]["own"] = sums[0]
                if taker is not None:
                    found[taker]["skip"] = sums[1]
            else:
                g, own = entered[index + 1], layers[index + 1].own
            down = layer.down if own is None else (layer.down * own[:, None]).to(layer.down.dtype)
            d_pre, sums = products.down_back(g, down, mlp.pre, mlp.rstd, setting.shape.slope)
            grown = beside.run(_outer, g, mlp.hidden)
            found[index]["up"] = beside.run(_outer, d_pre, mlp.y)
            dy, own_sums = products.back(d_pre, layer.up, g, mlp.y, correction_of(sums, mlp.rstd, width), own)
            if own is None:
                found[index]["down"] = grown
            else:
                found[index]["down"] = beside.run(_rows_times, grown, own)
                found[index + 1]["own"] = beside.run(_row_products, own_sums, grown, layer.down)
            found[index]["out"] = beside.run(_outer, dy, attention.seen)
            back = attention_backward(dy, attention, layer, extra, setting.shape)
            products.back(back.packed, layer.qkv, dy, attention.entering, back.correction, to=entered[index])
            found[index]["qkv"] = beside.run(_outer, back.packed, attention.entering)
            found[index]["gain"] = back.gain
            if back.value is not None:
                found[index]["value"] = beside.run(_outer, back.value, extra)
                more = back.value @ layer.value
                d_extra = more if d_extra is None else d_extra.add_(more)
            beside.end_layer()
        firsts = torch.stack([layer.first for layer in layers])
        d_x0, d_firsts = fan_in(entered, firsts, flat0)
        beside.end_layer(most_behind=0)
        for index, gradients in enumerate(found):
            gradients["first"] = d_firsts[index]
        flat = [gradients.get(name) for gradients in found for name in (*_TENSORS, "skip")]
        return d_x0.view(x0.shape), None if d_extra is None else d_extra.view(value.shape), None, *flat


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.T @ right


def _rows_times(matrix: Tensor, factors: Tensor) -> Tensor:
    return (matrix * factors[:, None]).to(matrix.dtype)


def _row_products(start: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return start + (left.float() * right).sum(1)


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
    """See `epigram.kernels.trunk`; without layers' `carry`, and `last` only where no gradient is wanted."""
    assert all(layer.carry is None for layer in layers)
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
