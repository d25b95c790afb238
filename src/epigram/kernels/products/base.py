"""Matrix products that finish their result before it leaves the chip: what the fused sublayers are made of.

A product is one file in this folder with `check(device_type, capability, dims)`, which says why it cannot serve (None
when it can), and the six functions below. Rows are tokens, all matrices two-dimensional with contiguous rows, sums in
float32. N tokens; `rstd` and `correction` are (N,) float32, one factor for each token. Where a function also gives sums
over the columns of each row, they come as partial sums (N, parts) float32, to be added up by the next small kernel.

    scaled(a, weight, rstd)                   rstd * (a @ weightᵀ)
    added(a, weight, c, squares)              a @ weightᵀ + c; and with `squares` the sums of its squares
    up(a, weight, rstd, slope, keep)          p = rstd * (a @ weightᵀ), and its leaky square; without `keep` no p
    down_back(grad, weight, p, rstd, slope)   g = (grad @ weight) * (leaky square)'(p): rstd * g, and the sums of g * p
    back(a, weight, c, y, correction, own)    a @ weight + own * c + correction * y; with `own` (columns,) also the
                                              sums of c * y over rows
    mixed(a, weight, c, own, streams, keep)   x = a @ weightᵀ + c, and own * x + sum of coefficient * stream with the
                                              sums of its squares; streams: one or two pairs (coefficient, stream);
                                              without `keep` no x

They hold all that an RMS norm needs. Its view h = rstd * y is never written: rstd multiplies the rows of a product.
Its backward pass, rstd * (dh - h * mean(dh * h)), needs the mean of dh * h = (dp @ weight) * h, which is the mean of
dp * (h @ weightᵀ) = dp * p: known before dh is, so that `back` completes the gradient. Source: the norm and residual
epilogues of quack, parameter-golf #1105 and #1072 for those of the MLP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

PACKAGE = "epigram.kernels.products"


@dataclass(frozen=True, kw_only=True)
class Dims:
    """What kernels must know of a model to say whether they can serve it: its widths, the precision, whether its
    streams carry learned factors (residual lambdas)."""

    widths: tuple[int, ...]
    dtype: torch.dtype
    carries: bool = False


class Products(Protocol):
    """The module of a product; see above."""

    def check(self, device_type: str, capability: tuple[int, int] | None, dims: Dims) -> str | None: ...
    def scaled(self, a: Tensor, weight: Tensor, rstd: Tensor) -> Tensor: ...
    def added(self, a: Tensor, weight: Tensor, c: Tensor, squares: bool) -> tuple[Tensor, Tensor | None]: ...
    def up(self, a: Tensor, weight: Tensor, rstd: Tensor, slope: float, keep: bool) -> tuple[Tensor | None, Tensor]: ...
    def down_back(
        self, grad: Tensor, weight: Tensor, p: Tensor, rstd: Tensor, slope: float
    ) -> tuple[Tensor, Tensor]: ...
    def back(
        self, a: Tensor, weight: Tensor, c: Tensor, y: Tensor, correction: Tensor, own: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]: ...
    def mixed(
        self, a: Tensor, weight: Tensor, c: Tensor, own: Tensor, streams: Sequence[tuple[Tensor, Tensor]], keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]: ...
