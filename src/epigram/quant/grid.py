"""The grid that a row of weights is rounded to: weight[r, c] is about code[r, c] * step[r].

Codes are integers in -qmax..qmax; a step is stored as float16. A clip policy chooses the steps:

- "search": five clips a row, the 0.999, 0.9995, 0.9999 and 0.99999 quantiles of |w| and its maximum, never
  below `floor`; step = clip / qmax. The quantizer keeps the clip with the least squared error of the whole
  matrix (parameter-golf #64 and #414; as published in #1212, floor from #493). The floor is the operating
  point: with floor 1 almost every trained row has the step 1 / qmax.
- "max": the last of these clips alone.
- "sigma": step = k * std(row) / qmax, no floor and no search (#1394, #1586). k trades size for accuracy
  directly: about b - log2(k) + 1.05 bits a weight, b the bits of the grid. A row whose values are nearly equal, far
  from zero, is clipped at twice their mean, or at the largest.
- "quantile" (tables only, #1212): the 0.9999984 quantile of |w|, with the same floor.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from epigram.errors import UserError

SEARCH_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
TABLE_QUANTILE = 0.9999984
CLIP_POLICIES = ("search", "max", "sigma")
_SMALLEST_HALF = 2.0**-24  # the least positive float16; a step below it would be stored as zero
_FINE_STEP = 0.1  # in standard deviations: up to here the entropy is that of the density, to 0.001 bits
_SMALLEST_NORMAL_HALF = 2.0**-14
_LARGEST_HALF = 65504.0


@dataclass(frozen=True, kw_only=True)
class SigmaConfig:
    """Clip in standard deviations of a row, by class of tensor, for the clip policy "sigma".

    attention, mlp: of the matrices; 7 is what the floor of "search" amounts to in #1212, and later, larger models use
    12.85 and 13. head: of the embedding that is also the output matrix, whose errors reach the logits directly: 20 cost
    0.029 nats on a #1212 model, 5 costs 0.003. table: of embeddings that are only looked up; 20 cost nothing.
    """

    attention: float = 7.0
    mlp: float = 7.0
    head: float = 5.0
    table: float = 20.0

    def __post_init__(self) -> None:
        bad = {name: value for name, value in asdict(self).items() if not 0.1 <= value <= 1000}
        if bad:
            raise UserError(f"quant.grid.sigma wants numbers from 0.1 to 1000 (3 to 20 are useful), got {bad}")


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Bits and clips of the weights that are stored as integers.

    clip: see the top of this file. floor: least clip, in units of the weight, unless clip is "sigma"; 0:
    none.
    """

    matrix_bits: int = 6
    table_bits: int = 8
    clip: str = "search"
    floor: float = 1.0
    sigma: SigmaConfig = field(default_factory=SigmaConfig)

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise UserError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        for key in ("matrix_bits", "table_bits"):
            if not 2 <= getattr(self, key) <= 8:
                yield f"quant.grid.{key} must be 2 to 8, got {getattr(self, key)}"
        if self.clip not in CLIP_POLICIES:
            yield f"quant.grid.clip must be one of {', '.join(CLIP_POLICIES)}, got {self.clip!r}"
        if not 0 <= self.floor < math.inf:
            yield f"quant.grid.floor must be 0 (none) or positive, got {self.floor}"


@dataclass(frozen=True)
class Grid:
    """The grid of one class of tensors: `qmax`, the clip policy, and the numbers that the policy reads."""

    qmax: int
    clip: str
    floor: float = 0.0
    sigma: float = 0.0

    @property
    def bits(self) -> int:
        return (self.qmax + 1).bit_length()

    def candidates(self, weight: Tensor) -> Tensor:
        """Steps to try: (..., rows, cols) float32 -> (..., candidates, rows) float32.

        They are float16 values, except with "quantile": the published int8 tables are rounded with the step
        in float32 and only stored in float16.
        """
        if self.clip == "sigma":
            # about the row's mean, population form: a table of one column has no other
            step = weight.std(dim=-1, correction=0) * (self.sigma / self.qmax)
            least = torch.minimum(2 * weight.mean(dim=-1).abs(), weight.abs().amax(dim=-1)) / self.qmax
            return storable(torch.maximum(step, least)[..., None, :])
        magnitude = weight.abs()
        if self.clip == "max":
            clips = magnitude.amax(dim=-1)[..., None, :]
        else:
            clips = row_quantiles(magnitude, SEARCH_QUANTILES if self.clip == "search" else (TABLE_QUANTILE,))
        step = clips.clamp_min(self.floor) / self.qmax
        return step.clamp_min(_SMALLEST_HALF) if self.clip == "quantile" else storable(step)

    def codes(self, weight: Tensor, step: Tensor) -> Tensor:
        """Nearest codes, ties to even, as float32: (..., rows, cols) and (..., rows) -> (..., rows, cols)."""
        return torch.round(weight / step[..., None]).clamp(-self.qmax, self.qmax)

    def at_floor(self, scale: Tensor) -> Tensor:
        """Which stored steps are that of the floor: (..., rows) float16 -> (..., rows) bool."""
        if self.clip == "sigma" or self.floor == 0:
            return torch.zeros_like(scale, dtype=torch.bool)
        step = storable(torch.full((), self.floor, device=scale.device) / self.qmax)
        return scale.to(torch.float32) == step

    def without_search(self) -> "Grid":
        """The grid with one candidate; for "search" its row maximum, which is the published choice where the
        floor is active (all five clips are equal there)."""
        return Grid(self.qmax, "max" if self.clip == "search" else self.clip, self.floor, self.sigma)


def storable(step: Tensor) -> Tensor:
    """`step` (float32, positive) rounded to the nearest float16 that is positive and finite; stays float32.

    The same as a cast to float16 and back, which a compiler may leave out of a fused kernel as pointless;
    rounding the bits cannot be left out, so fake quantization sees exactly the exported grid.
    """
    step = step.clamp(_SMALLEST_HALF, _LARGEST_HALF)
    bits = step.view(torch.int32)
    odd = (bits >> 13) & 1  # 13 of float32's 23 fraction bits go; ties to even
    normal = ((bits + 0xFFF + odd) & ~0x1FFF).view(torch.float32)
    subnormal = torch.round(step / _SMALLEST_HALF) * _SMALLEST_HALF
    return torch.where(step < _SMALLEST_NORMAL_HALF, subnormal, normal)


def row_quantiles(magnitude: Tensor, quantiles: tuple[float, ...]) -> Tensor:
    """Quantiles near 1 of each row, linear interpolation: (..., rows, cols) -> (..., quantiles, rows).

    Equal to `torch.quantile(magnitude, q, dim=-1)`, up to torch 2.13 bit for bit, but by a top-k instead of a sort
    and without its limit of 16 M elements.
    """
    cols = magnitude.shape[-1]
    ranks = [float(torch.tensor(q, dtype=torch.float32) * (cols - 1)) for q in quantiles]  # as published
    lowest = min(math.floor(rank) for rank in ranks)
    top = magnitude.topk(cols - lowest, dim=-1).values  # top[..., i] has rank cols - 1 - i
    rows = []
    for rank in ranks:
        below, above = top[..., cols - 1 - math.floor(rank)], top[..., cols - 1 - math.ceil(rank)]
        rows.append(torch.lerp(below, above, rank - math.floor(rank)))
    return torch.stack(rows, dim=-2)


def gaussian_bits(step: float, qmax: int) -> float:
    """Order-0 entropy in bits of a standard normal number rounded to multiples of `step` within +-qmax.

    The forecast of a size: with "sigma" step = k / qmax; with an active floor step = floor / qmax /
    std(weights).
    """
    edges = [(code + 0.5) * step / math.sqrt(2) for code in range(-qmax, qmax)]
    cdf = [0.0, *(0.5 * (1 + math.erf(edge)) for edge in edges), 1.0]
    masses = (high - low for low, high in itertools.pairwise(cdf))
    return -sum(mass * math.log2(mass) for mass in masses if mass > 0)


def step_bits(step: float) -> float:
    """`gaussian_bits` of codes without a clip, for any step > 0: log2(sqrt(2 pi e) / step) while that is fine."""
    if step <= _FINE_STEP:
        return math.log2(math.sqrt(2 * math.pi * math.e) / step)
    return gaussian_bits(step, math.ceil(9 / step))  # beyond nine deviations there is nothing


def gaussian_step(bits: float) -> float:
    """The step at which the codes of a standard normal number, without a clip, have so many `bits` > 0: the inverse of
    `step_bits`, by bisection where the step is coarse."""
    fine = math.sqrt(2 * math.pi * math.e) / 2**bits
    if fine <= _FINE_STEP:
        return fine
    low, high = _FINE_STEP, 20.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if step_bits(middle) > bits else (low, middle)
    return low
