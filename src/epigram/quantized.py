"""A matrix in integers: the one form that quantizers write and codecs read."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedTensor:
    """Row-wise symmetric integers; weight[r, c] is about codes[r, c] * scale[r].

    codes: (rows, cols) int8 in -qmax..qmax. scale: (rows,) float16, positive. qmax: 31 for int6, 127 for int8.
    """

    codes: Tensor
    scale: Tensor
    qmax: int

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.int8 and self.codes.dim() == 2
        assert self.scale.dtype == torch.float16 and self.scale.shape == self.codes.shape[:1]

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """(rows, cols) float32: exactly the value that every reader of the artifact computes."""
        return self.codes.to(torch.float32) * self.scale.to(torch.float32)[:, None]
