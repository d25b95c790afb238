"""The artifact's size before anything is trained: shapes and formats, at the bits a weight that past runs needed.

The table below holds what runs of the shipped recipes measured; runs of a recipe of one's own correct it further
(`past_ratio`).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from epigram import plugin
from epigram.artifact.container import check_declared
from epigram.artifact.size import FLOAT16_BITS, TensorFormat, forecast
from epigram.artifact.table import CODECS, Entry, check_limits, raw_sections
from epigram.config import Config, load_recipe
from epigram.errors import UserError
from epigram.model.gpt import GPT
from epigram.quant.grid import Grid, gaussian_bits
from epigram.quant.policy import Part, plan_shapes
from epigram.run.record import CONFIG, RESULT

# Where a floor decides the step, the size follows the spread of the weights, which weight decay governs: 4.17 bits is
# what the published entry needed (parameter-golf #1212).
_FLOOR_BITS = 4.17
_ROW_MAXIMUM_SIGMAS = 4.0  # the largest weight of a row, where it sets the step
# Bits that a codec stores, by class of matrix, as a share of its own forecast. The columns of `down` differ in spread,
# which only the entropy coder uses: 0.941 after 180 s of `h100`, 0.889 after 150 s of `demo`.
_MEASURED = {("entropy", "down"): 0.94}
_TOKENIZER_BYTES_PER_PIECE = 6.0  # a piece of an English vocabulary, compacted


def forecast_bytes(config: Config, model: GPT) -> int:
    """Bytes of the artifact; `model` may be on the meta device."""
    parts = _planned(config, model)
    tokenizer = int(_TOKENIZER_BYTES_PER_PIECE * config.model.vocab_size) if config.artifact.tokenizer else 0
    return forecast((_format(part, config.artifact.codec) for part in parts), tokenizer_bytes=tokenizer)


def require_carried(config: Config, tokenizer_bytes: int) -> None:
    """Raises UserError for a model that the format is too small for. tokenizer_bytes: of its tokenizer, compacted."""
    with torch.device("meta"):
        model = GPT(config.model)
    entries = [
        Entry(
            name=part.name,
            format="int" if part.grid else "float16",
            shape=tuple(part.tensor.shape),
            qmax=part.grid.qmax if part.grid else 0,
        )
        for part in _planned(config, model)
    ]
    try:
        check_limits(entries)
        check_declared(sum(size for _, size in raw_sections(entries)) + tokenizer_bytes, UserError)
    except UserError as error:
        raise UserError(f"no artifact can carry the model, make it smaller: {error}") from error


def _planned(config: Config, model: GPT) -> list[Part]:
    """What the artifact will hold."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return list(plan_shapes(shapes, model.roles(), config.quant.grid))


@dataclass(frozen=True, kw_only=True)
class PastRatio:
    """Bytes of past artifacts over their forecasts. mean: geometric. low, high: the least and the largest of them."""

    mean: float
    low: float
    high: float
    runs: int


def past_ratio(runs: Sequence[Path]) -> PastRatio:
    """How the forecast did for these finished runs; multiply by `mean` to correct that of a run like them.

    Raises UserError for a folder that holds no finished run, and for one that was shrunk to its cap, whose size says
    nothing about the recipe as written.
    """
    ratios = [_ratio(run) for run in runs]
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    return PastRatio(mean=mean, low=min(ratios), high=max(ratios), runs=len(ratios))


def _ratio(run: Path) -> float:
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is no run folder: it has no {CONFIG}")
    config = load_recipe(str(run / CONFIG))
    try:
        result = json.loads((run / RESULT).read_text("utf-8"))
        size = result["artifact_bytes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run} holds no finished run with an artifact: finish it, or leave it out") from error
    if result.get("shrink_factor", 1.0) != 1.0:
        raise UserError(f"{run} was shrunk to its cap, so its size is that of other settings: leave it out")
    with torch.device("meta"):
        model = GPT(config.model)
    return float(size) / forecast_bytes(config, model)


def _format(part: Part, codec: str) -> TensorFormat:
    shape = tuple(part.tensor.shape)
    if part.grid is None:
        return TensorFormat(shape=shape, bits_per_weight=FLOAT16_BITS)
    bits = plugin.load(CODECS, codec).forecast_bits(_order0_bits(part.grid))
    bits *= _MEASURED.get((codec, part.tensor_class), 1.0)
    # Equal scales, as a floor makes them, take next to nothing.
    return TensorFormat(shape=shape, bits_per_weight=bits, num_scales=0 if part.grid.floor else shape[0])


def _order0_bits(grid: Grid) -> float:
    if grid.clip == "sigma":
        return gaussian_bits(grid.sigma / grid.qmax, grid.qmax)
    return _FLOOR_BITS if grid.floor else gaussian_bits(_ROW_MAXIMUM_SIGMAS / grid.qmax, grid.qmax)
