"""What enters the stream: token embedding, what is added to it, normalised and smeared; and scaled weights.

Legend: B sequences, T positions, V vocabulary, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from epigram.kernels.residual import norm


def enter(
    tokens: Tensor,
    embed: Tensor,
    extra: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype,
    reset_id: int = -1,
) -> Tensor:
    """The stream (B, T, D) in `dtype` of tokens (B, T) int64: rms norm of embed[token] + extra, then `smear`.

    embed: (V, D) float32. extra: (B, T, D) in `dtype`. gate: (D,) float32 from 0 to 1. reset_id: the token that the
    gate sees nothing before, -1 for none.
    """
    x = F.embedding(tokens, embed).to(dtype)
    x = norm(x if extra is None else x + extra)
    return x if gate is None else smear(x, gate, None, None if reset_id < 0 else tokens == reset_id)


def smear(x: Tensor, gate: Tensor, before: Tensor | None, starts: Tensor | None = None) -> Tensor:
    """(1 - gate) x_t + gate x_{t-1}. Source: parameter-golf #162.

    x (B, T, D); `before` (B, 1, D) is the input at the position before the first, None (zeros) at a start. starts:
    (B, T) bool, other positions with zeros before them.
    """
    gate = gate.to(x.dtype)
    before = torch.zeros_like(x[:, :1]) if before is None else before
    old = torch.cat([before, x[:, :-1]], dim=1)
    old = old if starts is None else old.masked_fill(starts[..., None], 0.0)
    return (1 - gate) * x + gate * old


def look_up(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """table[token] in `dtype`: (B, T) int and (V, D) float32 -> (B, T, D)."""
    return F.embedding(tokens, table).to(dtype)


def scaled(bank: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A bank of matrices (layers, rows, cols) in `dtype`, each row times its factor of `scale` (layers, rows).

    A factor on a product's output is a factor on its weights' rows: there it costs nothing per token.
    """
    return bank.to(dtype) if scale is None else (bank * scale.unsqueeze(-1)).to(dtype)
