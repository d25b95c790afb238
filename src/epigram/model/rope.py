"""Rotary position embedding on the first channels of each head.

Positions are always float32: bfloat16 cannot count beyond 256.
"""

import torch
from torch import Tensor

from epigram.model.config import ModelConfig


def rotary_base(config: ModelConfig, seq_len: int) -> float:
    """The base for a window of `seq_len` tokens.

    With "ntk" scaling it is rotary_base up to rotary_reference_len and grows by (seq_len / reference) ** (d / (d - 2))
    beyond, d = rotary_dim, so the same weights see other rotations at other lengths (parameter-golf #1212).
    """
    if config.rotary_scaling == "none" or seq_len <= config.rotary_reference_len:
        return config.rotary_base
    growth = seq_len / config.rotary_reference_len
    return config.rotary_base * growth ** (config.rotary_dim / (config.rotary_dim - 2))


def rotary_tables(
    config: ModelConfig,
    start: int,
    num_positions: int,
    rope_len: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """cos and sin, each (num_positions, 1, rotary_dim / 2) in `dtype`, for positions from `start` on.

    None when the model has no rotary channels. `rope_len` chooses the base.
    """
    if not config.rotary_dim:
        return None
    half = config.rotary_dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=device) * (-2.0 / config.rotary_dim)
    frequency = rotary_base(config, rope_len) ** exponent
    position = torch.arange(start, start + num_positions, dtype=torch.float32, device=device)
    angle = torch.outer(position, frequency)[:, None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate channel j with channel j + rotary_dim / 2 of each head of x (B, T, heads, D); the others pass."""
    if tables is None:
        return x
    cos, sin = tables
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)
