"""Rotary position embedding on the first channels of each head.

Angles are computed in float64 and rounded once: bfloat16 cannot count beyond 256, and at the hundred-thousandth
position of a stream a float32 angle is wrong by a hundredth.
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
    base = rotary_base(config, rope_len)
    cos, sin = _tables(start, num_positions, config.rotary_dim, base, dtype, device).unbind(0)
    return cos, sin


# Opaque to the compiler, which would otherwise compute powers, cosines and sines anew for each element of every layer's
# q and k: a tenth of a training step on an H100.
@torch.library.custom_op("epigram::rotary_tables", mutates_args=())
def _tables(
    start: int, num_positions: int, rotary_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(2, num_positions, 1, rotary_dim / 2): cosines and sines of position * base ** (-2 j / rotary_dim)."""
    wide = torch.float32 if device.type == "mps" else torch.float64  # Apple's devices have no float64
    exponent = torch.arange(rotary_dim // 2, dtype=wide, device=device) * (-2.0 / rotary_dim)
    position = torch.arange(start, start + num_positions, dtype=wide, device=device)
    angle = torch.outer(position, base**exponent)[:, None, :]
    return torch.stack([angle.cos(), angle.sin()]).to(dtype)


@_tables.register_fake
def _(start: int, num_positions: int, rotary_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(2, num_positions, 1, rotary_dim // 2, dtype=dtype, device=device)
