"""The norm, and the one that reads a weighted sum of streams.

Legend: B sequences, T positions, D model width; a stream is (B, T, D), a coefficient (D,) float32.
"""

import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 2.0**-23
"""Stated, not left to the framework: the epsilon of bfloat16 would crush the small initial embeddings."""

Streams = tuple[Tensor, ...]
Coefficients = tuple[Tensor | None, ...]


def mix_norm(streams: Streams, coefficients: Coefficients) -> Tensor:
    """The sum of coefficient * stream, divided by its root mean square: (B, T, D). A coefficient of None is one."""
    total: Tensor | None = None
    for stream, coefficient in zip(streams, coefficients, strict=True):
        part = stream if coefficient is None else coefficient.to(stream.dtype) * stream
        total = part if total is None else total + part
    assert total is not None
    return norm(total)


def norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last axis; no weights."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)
