"""A lane's forward and backward as one launch: a CUDA graph for each shape and phase of a run.

Fused kernels are over faster than the host can launch them one by one (on an H100 48.5 ms of kernels take 56 ms to
launch), and a graph replays all launches at once, on the memory that they had when they were recorded. So

- what changes from step to step, the tokens and the exponent of the entropy weighting, is copied into tensors that
  never move;
- loss and gradients lie in the same place after each replay. The loss is copied out of it, the gradients are lent: they
  are put into `.grad` as they are, and the next replay of any graph overwrites them. Whoever needs them longer copies
  them, see `LaneGradients.add`;
- all graphs share one pool of memory. That is right because lanes run one after the other on one stream and nothing
  of a replay but its gradients is read after it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Work = Callable[[], list[Tensor]]
"""Launches always the same and returns what is to be read."""

Capture = Callable[[Work], tuple[list[Tensor], Callable[[], None]]]
"""Records what a work launches: its results, undefined until the replay, which is returned with them, computes them."""

Lane = Callable[[Tensor, Tensor | None], Tensor]
"""Tokens (num_seqs, seq_len + 1) and the exponent on the device -> the loss, 0-dim; leaves gradients in `.grad`."""


class Key(NamedTuple):
    """What a graph is recorded for. shape: of the tokens. quantized: the phase of quantization-aware training."""

    shape: tuple[int, ...]
    quantized: bool


class CudaCapture:
    """Records CUDA graphs that share a pool of memory, so they must not run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> tuple[list[Tensor], Callable[[], None]]:
        """See `Capture`. The work runs once before it is recorded, to compile kernels and set up libraries."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that prepares data, may go on to allocate page-locked memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = work()
        return results, graph.replay


class LaneGraph:
    """Forward and backward of a lane, recorded.

    tokens: (num_seqs, seq_len + 1) int64 on the device, exponent: 0-dim float32 or None; any values of the shapes that
    will be used. `parameters` have no gradient before, and none after.
    """

    def __init__(
        self,
        capture: Capture,
        lane: Lane,
        parameters: Sequence[nn.Parameter],
        tokens: Tensor,
        exponent: Tensor | None,
    ) -> None:
        self._parameters = tuple(parameters)
        self._tokens = tokens.clone()
        self._exponent = None if exponent is None else exponent.clone()

        def work() -> list[Tensor]:
            loss = lane(self._tokens, self._exponent)
            return [loss, *self._take_gradients()]

        (self._loss, *self._gradients), self._replay = capture(work)

    def __call__(self, tokens: Tensor, exponent: Tensor | None) -> Tensor:
        """The loss, 0-dim; the gradients are lent to `.grad`. tokens may be on the host."""
        self._tokens.copy_(tokens, non_blocking=True)
        if self._exponent is not None:
            assert exponent is not None
            self._exponent.copy_(exponent)
        self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss.clone()

    def _take_gradients(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        assert all(gradient is not None for gradient in gradients), "a parameter got no gradient"
        return [gradient for gradient in gradients if gradient is not None]
