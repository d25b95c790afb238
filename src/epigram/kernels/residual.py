"""Where streams meet: a weighted sum over channels; and the norm that reads a stream.

Legend: B sequences, T positions, D model width; a stream is (B, T, D), a coefficient (D,) float32.
"""

import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 2.0**-23
"""Stated, not left to the framework: the epsilon of bfloat16 would crush the small initial embeddings."""

Streams = tuple[Tensor, ...]
Coefficients = tuple[Tensor | None, ...]


def mix(streams: Streams, coefficients: Coefficients) -> tuple[Tensor, Tensor | None, Streams]:
    """(x, rstd, streams): x = sum of coefficient * stream; and the streams again.

    A coefficient of None stands for one. rstd: 1 / rms of x over its channels, (B * T,) float32, for the sublayer that
    reads x next, or None where nobody needs it. Whoever uses a stream a second time should use the one that is
    returned: a fused version then adds both gradients in the pass that it makes anyway.
    """
    total: Tensor | None = None
    for stream, coefficient in zip(streams, coefficients, strict=True):
        part = stream if coefficient is None else coefficient.to(stream.dtype) * stream
        total = part if total is None else total + part
    assert total is not None
    return total, None, streams


def mix_norm(streams: Streams, coefficients: Coefficients) -> Tensor:
    """The normalised view of `mix`, (B, T, D)."""
    return norm(mix(streams, coefficients)[0])


def norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last axis; no weights."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)
