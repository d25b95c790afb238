"""Score-first adaptation: a model that learns from a text while it is scored, from tokens that are scored already.

The text is taken in chunks. Of each, all windows are scored; then the adapter is handed a copy of the chunk's tokens,
and nothing else: it never holds the text, so a token that is not yet scored cannot reach an update.
Source: parameter-golf #549.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epigram.evaluation.adapt_config import SgdConfig
from epigram.evaluation.windows import WindowPlan


class Adapter(Protocol):
    """Learns from what the scorer releases."""

    def learn(self, tokens: NDArray[np.uint16], chunk: int, num_chunks: int) -> None:
        """`tokens` are scored, all but the first in this chunk. Every process is handed the same."""


def chunks(plan: WindowPlan, chunk_tokens: int) -> list[WindowPlan]:
    """`plan` in parts: a window belongs to the chunk of its first scored target."""
    chunk_of = plan.first_scored // chunk_tokens
    bounds = [0, *(np.flatnonzero(np.diff(chunk_of)) + 1).tolist(), len(plan)]
    return [plan[first:end] for first, end in pairwise(bounds)]


class SgdAdapter:
    """SGD with momentum on rows of the released tokens, shared by the processes, whose gradients are added up.

    parameters: what is changed, in place. loss: mean nats of (B, T) inputs and targets, with gradients. layered: of
    each parameter whether its first dimension counts layers, so that config.frozen_layers holds for it. reduce: adds
    tensors up over the processes, in place; None with one of them.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        config: SgdConfig,
        seq_len: int,
        *,
        layered: Sequence[bool] = (),
        rank: int = 0,
        world_size: int = 1,
        reduce: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        self._parameters, self._loss, self._config, self._seq_len = list(parameters), loss, config, seq_len
        self._rank, self._world_size, self._reduce = rank, world_size, reduce
        self._layered = [p for p, has_layers in zip(parameters, layered, strict=False) if has_layers]
        self._optimizer = torch.optim.SGD(self._parameters, lr=config.lr, momentum=config.momentum)

    def learn(self, tokens: NDArray[np.uint16], chunk: int, num_chunks: int) -> None:
        """See `Adapter`. What is left of the chunk behind its whole rows is not learned."""
        length = min(self._seq_len, len(tokens) - 1)
        num_rows = (len(tokens) - 1) // length
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._parameters[0].device)
        inputs, targets = (ids[shift : shift + num_rows * length].view(num_rows, length) for shift in (0, 1))
        lr = self._config.lr * 0.5 * (1 + math.cos(math.pi * chunk / max(num_chunks - 1, 1)))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for _ in range(self._config.epochs):
            for first in range(0, num_rows, self._config.num_rows):
                rows = slice(first, first + self._config.num_rows)
                self._step(inputs[rows], targets[rows])

    @torch.enable_grad()
    def _step(self, inputs: Tensor, targets: Tensor) -> None:
        self._optimizer.zero_grad()
        own, own_targets = inputs[self._rank :: self._world_size], targets[self._rank :: self._world_size]
        if len(own):
            (self._loss(own, own_targets) * (len(own) / len(inputs))).backward()
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._reduce:
            self._reduce([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        for parameter in self._layered:
            assert parameter.grad is not None
            parameter.grad[: self._config.frozen_layers] = 0
        torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_norm)
        self._optimizer.step()
