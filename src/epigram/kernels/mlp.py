"""The MLP sublayer with its norm and its residual sum.

Legend: B sequences, T positions, D model width, M hidden channels.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from epigram.kernels.residual import norm

See = Callable[[str, Tensor], None]
"""Is shown the name of a product and its input."""


def leaky_square(x: Tensor, slope: float) -> Tensor:
    """x^2 for x > 0, (slope * x)^2 otherwise (parameter-golf #493)."""
    return F.leaky_relu(x, slope).square()


def add_mlp(
    x: Tensor,
    residual: Tensor,
    rstd: Tensor | None,
    up: Tensor,
    down: Tensor,
    slope: float,
    see: See | None = None,
) -> Tensor:
    """residual + leaky_square(norm(x) @ upᵀ) @ downᵀ: x, residual (B, T, D), up (M, D), down (D, M) -> (B, T, D).

    residual: mostly x itself. rstd: 1 / rms of x if it is known already. see: is shown the inputs of "up" and "down".
    """
    h = norm(x)
    hidden = leaky_square(F.linear(h, up), slope)
    if see is not None:
        see("up", h)
        see("down", hidden)
    return residual + F.linear(hidden, down)
