"""Packs a model so that it fits its cap: if it comes out too large, the steps of all classes grow by one factor.

What sets the steps is quant.grid.sigma, or with other clips the floor where it is reached. A wider step leaves fewer
bits a weight, about log2 of the factor (see quant/grid.py), so the first guess is nearly right and a few bisections in
the logarithm of the factor close on the smallest one that fits.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from epigram.artifact.report import SizeReport
from epigram.artifact.size import CapCheck
from epigram.config import Config
from epigram.data.tokenizer import Tokenizer
from epigram.model.gpt import GPT
from epigram.quant.config import QuantConfig
from epigram.quant.grid import SigmaConfig
from epigram.quant.quantize import Stored, quantize_model
from epigram.quant.report import QuantReport
from epigram.run.weights import pack

MAX_TRIALS = 8  # quantizing and packing a 16 MB model takes seconds each time
_CLOSE = 0.002  # of the cap: what is left unused is worth less than another trial
_LARGEST_FACTOR = 16.0  # four bits a weight fewer: a model that does not fit then has too many parameters
_FIRST_STEP = 1.01  # the least growth of the first guess


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The file that was written. factor: by which quant.grid's sigma and floor were multiplied; 1 as configured.
    quantize_s: spent on quantizing again, in seconds, which counts as training. trials: files written."""

    sizes: SizeReport
    report: QuantReport
    factor: float
    quantize_s: float
    trials: int


def pack_to_fit(
    path: Path,
    config: Config,
    model: GPT,
    hessians: dict[str, Tensor],
    first: tuple[Stored, QuantReport],
    tokenizer: Tokenizer,
    provenance: dict[str, Any],
    transform: str = "",
) -> Packed:
    """Write the artifact at `path`, shrunk to the cap if the recipe's policy (artifact.over_cap) says so.

    first: `model` quantized as configured. hessians: by tap, as they were for that. A model that fits is written as it
    is; one that fits at no factor is written as configured, over its cap.
    """
    named, roles = {name: p.detach() for name, p in model.named_parameters()}, model.roles()
    trial = path.with_suffix(".trial")
    spent_s = 0.0

    def attempt(factor: float) -> tuple[SizeReport, QuantReport]:
        nonlocal spent_s
        start_s = time.perf_counter()
        stored, report = quantize_model(named, roles, hessians, widened(config.quant, factor))
        spent_s += time.perf_counter() - start_s
        return pack(trial, config, stored, tokenizer, provenance, transform), report

    sizes = pack(path, config, first[0], tokenizer, provenance, transform)
    packed = Packed(sizes=sizes, report=first[1], factor=1.0, quantize_s=0.0, trials=1)
    if cap_check(config, sizes.total_bytes).fits or config.artifact.over_cap == "fail":
        return packed
    best, trials = _search(config, sizes, attempt, lambda: os.replace(trial, path))
    trial.unlink(missing_ok=True)
    packed = replace(packed, quantize_s=spent_s, trials=1 + trials)
    return packed if best is None else replace(packed, factor=best[0], sizes=best[1], report=best[2])


def _search(
    config: Config,
    sizes: SizeReport,
    attempt: Callable[[float], tuple[SizeReport, QuantReport]],
    keep: Callable[[], None],
) -> tuple[tuple[float, SizeReport, QuantReport] | None, int]:
    """The smallest factor found that fits, with its sizes, and the number of attempts; `keep` is called for each file
    that becomes the best."""
    margin = cap_check(config, sizes.total_bytes).margin_bytes
    assert margin is not None and margin < 0
    low, best = 1.0, None
    factor = min(max(2 ** (-8 * margin / max(sizes.num_codes, 1)), _FIRST_STEP), _LARGEST_FACTOR)
    for trials in range(1, MAX_TRIALS + 1):
        found, report = attempt(factor)
        left = cap_check(config, found.total_bytes).margin_bytes
        assert left is not None
        if left >= 0:
            keep()
            best = (factor, found, report)
            if left <= _CLOSE * config.artifact.cap_bytes:
                return best, trials
        elif factor >= _LARGEST_FACTOR:
            return None, trials
        else:
            low = factor
        # Until something fits, the step doubles in the logarithm.
        factor = math.sqrt(low * best[0]) if best else min(low * low, _LARGEST_FACTOR)
    return best, MAX_TRIALS


def cap_check(config: Config, artifact_bytes: int) -> CapCheck:
    """This artifact and the recipe's code against the recipe's cap."""
    part = config.artifact
    return CapCheck(artifact_bytes=artifact_bytes, code_bytes=part.code_bytes, cap_bytes=part.cap_bytes)


def widened(config: QuantConfig, factor: float) -> QuantConfig:
    """The same with every sigma of the grid, none above the largest that is allowed, and its floor times `factor`."""
    sigma = SigmaConfig(**{name: min(value * factor, 1000.0) for name, value in asdict(config.grid.sigma).items()})
    return replace(config, grid=replace(config.grid, sigma=sigma, floor=config.grid.floor * factor))
