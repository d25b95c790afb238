"""Adapters that learn a document while it is scored, for many documents side by side. Source: parameter-golf #1530.

The rows of a batch are documents. Each row's adapters see that row alone: gradients are of the sum over rows, and AdamW
works element by element, so a document's scores do not depend on those beside it, but for rounding. (Which counts: with
a small eps AdamW takes a whole step where a gradient is nothing but rounding.)
"""

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epigram.evaluation.adapt_config import LoraConfig
from epigram.kernels.lora import Lora, LowRank

_SEED = 0  # of the first factors, which are the same for every document


class LoraLoss(Protocol):
    """The model with adapters: (B, T) inputs and targets to the nats (B, T), or (B, last) of the last ones.

    Gradients are asked for without `last` only: not every attention backend has them for fewer queries than keys.
    """

    def __call__(
        self, inputs: Tensor, targets: Tensor, /, *, rope_len: int, lora: Lora, last: int | None = None
    ) -> Tensor: ...


class LoraAdapter:
    """Low-rank adapters for up to `config.num_documents` documents at a time.

    shapes: (in, out) of each target's product. nll: see `LoraLoss`; no weight of it may want a gradient. seq_len: of
    the score, for rotary positions.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        num_layers: int,
        nll: LoraLoss,
        config: LoraConfig,
        seq_len: int,
        device: torch.device,
    ) -> None:
        self._nll, self._config, self._seq_len, self._num_layers = nll, config, seq_len, num_layers
        generator = torch.Generator().manual_seed(_SEED)
        self._first: dict[str, Tensor] = {}  # (layers, r, in)
        self._widths: dict[str, int] = {}
        for target in config.targets:
            fan_in, self._widths[target] = shapes[target]
            count = 1 if target == "head" else num_layers
            drawn = torch.rand(count, config.rank, fan_in, generator=generator)
            self._first[target] = ((2 * drawn - 1) / math.sqrt(fan_in)).to(device)
        self._a: dict[str, Tensor] = {}  # (layers, documents, r, in)
        self._b: dict[str, Tensor] = {}  # (layers, documents, out, r)

    def begin(self, num_documents: int) -> None:
        """So many new documents: everything is forgotten."""
        config = self._config
        for target, first in self._first.items():
            count, rank, fan_in = first.shape
            start = first[:, None].expand(count, num_documents, rank, fan_in)
            self._a[target] = start.clone().requires_grad_()
            zeros = first.new_zeros(count, num_documents, self._widths[target], rank)
            self._b[target] = zeros.requires_grad_()
        self._optimizer = torch.optim.AdamW(
            [*self._a.values(), *self._b.values()],
            lr=config.lr,
            betas=(float(config.beta1), float(config.beta2)),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def factors(self, num_rows: int) -> Lora:
        """The adapters of the first `num_rows` documents."""
        scale = self._config.alpha / self._config.rank
        pairs = {t: (self._a[t][:, :num_rows], scale * self._b[t][:, :num_rows]) for t in self._a}
        layers = tuple(
            {target: LowRank(a[layer], b[layer]) for target, (a, b) in pairs.items() if target != "head"}
            for layer in range(self._num_layers)
        )
        head = pairs.get("head")
        return Lora(layers, None if head is None else LowRank(head[0][0], head[1][0]))

    @torch.enable_grad()
    def learn(self, tokens: NDArray[np.uint16], num_new: int) -> None:
        """One step on the last `num_new` of `tokens` (rows, T + 1), for the first so many documents.

        All of them are scored, the last ones just now; the ones before are their context.
        """
        if self._config.lr == 0:
            return
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._first[self._config.targets[0]].device)
        lora = self.factors(len(tokens))
        nats = self._nll(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), rope_len=self._seq_len, lora=lora)
        self._optimizer.zero_grad(set_to_none=True)
        nats[:, -num_new:].mean(dim=1).sum().backward()
        self._optimizer.step()
