"""The update with everything but the reading of gradients as one launch: a CUDA graph.

A graph replays the launches that it recorded, on the same memory. All state lies in tensors that never move, and
what changes from step to step (learning rate, momentum, scale of the gradients, weight of the average) is read from
the device. Only gradients move: a backward pass puts them where it finds room. So the part that reads them, AdamW and
Muon's momentum, is launched as usual, and the graph holds what follows: Newton-Schulz, the weights, their average.
That needs no copy of the gradients, and leaves some fifteen launches of about seventy.

It takes work from the host and the gaps from between the kernels, which helps where the host is late. Nothing else
depends on this file.
"""

import torch
from torch import Tensor

from epigram.optim.average import Average
from epigram.optim.optimizer import Optimizer


class CapturedUpdate:
    """Calls `optimizer.step` and `average.update`, from the second call on mostly as a CUDA graph.

    The first call compiles and allocates what the update needs, the second captures: both belong into the warm-up
    before any clock runs. State may be restored afterwards, in place. On a CPU nothing is captured.
    """

    def __init__(self, optimizer: Optimizer, average: Average) -> None:
        self._optimizer = optimizer
        self._average = average
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, lr_multiplier: float, momentum: float, scale: Tensor | None = None) -> None:
        """One step from the gradients in `.grad`; arguments as those of `Optimizer.step`."""
        self._optimizer.set_rates(lr_multiplier, momentum, scale)
        self._average.set_weight()
        self._optimizer.absorb()
        if self._warm and self._graph is None and self._optimizer.device.type == "cuda":
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, and runs nothing
                self._apply()
        if self._graph is None:
            self._apply()
            self._warm = True
        else:
            self._graph.replay()

    def _apply(self) -> None:
        self._optimizer.apply()
        self._average.apply()
