"""What the methods share: the form of their result, and float32 products that really are float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from epigram.errors import UserError
from epigram.quantized import QuantizedTensor


class Outcome(NamedTuple):
    """Quantized matrices of a batch, and the damping each needed relative to mean(diag H) (0: uses no
    Hessian)."""

    tensors: list[QuantizedTensor]
    damping: list[float]


class HessianError(UserError):
    """Matrix `index` of a batch has a Hessian that stays indefinite whatever the damping."""

    def __init__(self, index: int, damping: float) -> None:
        super().__init__(f"its Hessian is not positive definite even with damping {damping:g}")
        self.index = index


def pack(codes: Tensor, step: Tensor, qmax: int) -> list[QuantizedTensor]:
    """(n, rows, cols) integral codes and (n, rows) steps -> n quantized matrices."""
    assert step.shape == codes.shape[:2]
    integers, scales = codes.to(torch.int8), step.to(torch.float16)
    return [QuantizedTensor(*pair, qmax) for pair in zip(integers, scales, strict=True)]


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products without TF32 or bfloat16 inside, whatever the training chose; restores the choice."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
