"""Packs a model so that it fits its cap: if it comes out too large, the steps of all classes grow by one factor.

What sets the steps is quant.grid.sigma, or with other clips the floor where it is reached. A wider step leaves fewer
bits a weight, about log2 of the factor (see quant/grid.py), so the first guess is nearly right, and a line between a
size that fits and one that does not finds the next. Quantizing again counts as training: no try is begun for which the
time left would not do, by what those before took.
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
from epigram.quant.grid import SigmaConfig, gaussian_step, step_bits
from epigram.quant.quantize import Stored, quantize_model
from epigram.quant.report import QuantReport
from epigram.run.weights import pack

MAX_TRIES = 6  # quantizing and packing a 16 MB model takes seconds each time
_CLOSE = 0.003  # of the cap: what is left unused is worth less than another try
_AIM = 0.001  # of the cap, below it: a guess is off by about as much, and one that is over is worth nothing
_LARGEST_FACTOR = 16.0  # four bits a weight fewer: a model that does not fit then has too many parameters
_FIRST_STEP = 1.01  # the least growth of a guess
_SLOWER = 1.25  # than the slowest try before: what the next one may take at most
_SURE, _SURE_OF_REST = 0.005, 0.15  # of the cap, and of the bytes to lose: how far below a guess that must fit aims


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The file that was written. factor: by which quant.grid's sigma and floor were multiplied; 1 as configured.
    quantize_s: spent on quantizing again, in seconds, which counts as training. trials: files written. not_shrunk: why
    it is over its cap although the recipe wants it shrunk, and what to do; "" where it is not."""

    sizes: SizeReport
    report: QuantReport
    factor: float
    quantize_s: float
    trials: int
    not_shrunk: str = ""


@dataclass(frozen=True, kw_only=True)
class Try:
    """What steps times `factor` came to. total_bytes: with the code of the recipe. classes: number of codes and bits of
    each, for every class of matrices. took_s: to quantize."""

    factor: float
    total_bytes: int
    classes: tuple[tuple[int, float], ...]
    took_s: float


@dataclass(frozen=True, kw_only=True)
class Search:
    """best: the least factor found that fits the cap. tries: all but the plain one. no_time: for another one."""

    best: Try | None
    tries: tuple[Try, ...]
    no_time: bool = False


def pack_to_fit(
    path: Path,
    config: Config,
    model: GPT,
    hessians: dict[str, Tensor],
    first: tuple[Stored, QuantReport],
    tokenizer: Tokenizer,
    provenance: dict[str, Any],
    transform: str = "",
    *,
    first_s: float = 0.0,
    left_s: float = math.inf,
) -> Packed:
    """Write the artifact at `path`, shrunk to the cap if the recipe's policy (artifact.over_cap) says so.

    first: `model` quantized as configured, which took `first_s`. hessians: by tap, as they were for that. left_s: that
    quantizing again may take. A model that fits is written as it is; one that fits at no factor is written as
    configured, over its cap.
    """
    named, roles = {name: p.detach() for name, p in model.named_parameters()}, model.roles()
    trial = path.with_suffix(".trial")
    kept: list[tuple[SizeReport, QuantReport]] = []

    def attempt(factor: float) -> Try:
        start_s = time.perf_counter()
        stored, report = quantize_model(named, roles, hessians, widened(config.quant, factor))
        took_s = time.perf_counter() - start_s
        sizes = pack(trial, config, stored, tokenizer, provenance, transform)
        if cap_check(config, sizes.total_bytes).fits:  # by a smaller factor than any before
            os.replace(trial, path)
            kept.append((sizes, report))
        return _as_try(config, sizes, factor, took_s)

    sizes = pack(path, config, first[0], tokenizer, provenance, transform)
    packed = Packed(sizes=sizes, report=first[1], factor=1.0, quantize_s=0.0, trials=1)
    if cap_check(config, sizes.total_bytes).fits or config.artifact.over_cap == "fail":
        return packed
    found = search(attempt, _as_try(config, sizes, 1.0, first_s), config.artifact.cap_bytes, left_s)
    trial.unlink(missing_ok=True)
    packed = replace(packed, quantize_s=sum(one.took_s for one in found.tries), trials=1 + len(found.tries))
    if found.best is None:
        return replace(packed, not_shrunk=_why_not(found, config.artifact.cap_bytes, left_s))
    sizes, report = kept[-1]
    return replace(packed, factor=found.best.factor, sizes=sizes, report=report)


def search(attempt: Callable[[float], Try], plain: Try, cap_bytes: int, left_s: float) -> Search:
    """Factors from 1 up, tried until one fits `cap_bytes` and leaves next to nothing of it unused.

    plain: of factor 1, over the cap. left_s: that all tries together may take; none is begun that could take longer.
    """
    tries: list[Try] = []
    below, low, best, spent_s = None, plain, None, 0.0  # the two last ones over the cap, and the one that fits
    while len(tries) < MAX_TRIES:
        next_s = _SLOWER * max([one.took_s for one in tries] or [plain.took_s])
        if spent_s + next_s > left_s:
            return Search(best=best, tries=tuple(tries), no_time=True)
        is_last = spent_s + 2 * next_s > left_s or len(tries) == MAX_TRIES - 1
        found = attempt(_between(low, best, cap_bytes) if best else _beyond(below, low, cap_bytes, is_last))
        tries.append(found)
        spent_s += found.took_s
        if found.total_bytes <= cap_bytes:
            best = found
            if cap_bytes - found.total_bytes <= _CLOSE * cap_bytes:
                break
        elif found.factor >= _LARGEST_FACTOR:
            break
        else:
            below, low = low, found
    return Search(best=best, tries=tuple(tries))


def _between(over: Try, fits: Try, cap_bytes: int) -> float:
    """Where a line through both, bytes over the factor's logarithm, comes to what is aimed at."""
    # Not at the ends, where nothing would be learned.
    share = (over.total_bytes - (1 - _AIM) * cap_bytes) / (over.total_bytes - fits.total_bytes)
    return over.factor * (fits.factor / over.factor) ** min(max(share, 0.05), 0.95)


def _beyond(before: Try | None, over: Try, cap_bytes: int, must_fit: bool) -> float:
    """A factor at which what is `over` should fit: by how Gaussian weights lose bits, and by how much less than they
    these lost from `before` to `over`, where not all steps grow, or tails are heavy."""
    aim = (1 - _AIM) * cap_bytes
    if must_fit:
        aim = (1 - _SURE) * cap_bytes - _SURE_OF_REST * (over.total_bytes - cap_bytes)
    as_expected = 1.0
    if before is not None:
        expected = _gaussian_loss(_steps(before), over.factor / before.factor)
        noise = _CLOSE * cap_bytes  # sizes are smooth but for about as much: small differences say little
        as_expected = min(max((before.total_bytes - over.total_bytes + noise) / (expected + noise), 0.01), 1.0)
    steps = _steps(over)
    low, high = _FIRST_STEP, _LARGEST_FACTOR / over.factor
    for _ in range(20):
        middle = math.sqrt(low * high)
        fits = over.total_bytes - as_expected * _gaussian_loss(steps, middle) <= aim
        low, high = (low, middle) if fits else (middle, high)
    return min(over.factor * high, _LARGEST_FACTOR)


def _steps(one: Try) -> list[tuple[int, float, float]]:
    """Number of codes, bits, and the step at which Gaussian weights have as many, of each class."""
    return [(num_codes, bits, gaussian_step(bits)) for num_codes, bits in one.classes if bits > 0]


def _gaussian_loss(steps: list[tuple[int, float, float]], growth: float) -> float:
    """Bytes that Gaussian weights of these `_steps` lose when all steps grow so much."""
    return sum(num_codes * (bits - step_bits(growth * step)) for num_codes, bits, step in steps) / 8


def _as_try(config: Config, sizes: SizeReport, factor: float, took_s: float) -> Try:
    return Try(
        factor=factor,
        total_bytes=cap_check(config, sizes.total_bytes).total_bytes,
        classes=tuple((size.num_codes, size.bits_per_weight) for size in sizes.by_class().values()),
        took_s=took_s,
    )


def _why_not(found: Search, cap_bytes: int, left_s: float) -> str:
    """Why nothing fits, and what to do."""
    if not found.tries:
        return (
            f"{max(left_s, 0):.1f} s of budget.train_s were left, too few to quantize once more with wider steps: "
            "raise budget.calibrate_s, or quant.grid.sigma.attention and .mlp"
        )
    last = found.tries[-1]
    still = f"with steps {last.factor:.4g} times as wide it would still be {last.total_bytes - cap_bytes:,} bytes over"
    if found.no_time:
        return f"{still}, and there was no time for another try: raise budget.calibrate_s, or quant.grid.sigma.mlp"
    return f"{still}: shrink the model, export with another codec, or raise artifact.cap_bytes"


def cap_check(config: Config, artifact_bytes: int) -> CapCheck:
    """This artifact and the recipe's code against the recipe's cap."""
    part = config.artifact
    return CapCheck(artifact_bytes=artifact_bytes, code_bytes=part.code_bytes, cap_bytes=part.cap_bytes)


def widened(config: QuantConfig, factor: float) -> QuantConfig:
    """The same with every sigma of the grid, none above the largest that is allowed, and its floor times `factor`."""
    sigma = SigmaConfig(**{name: min(value * factor, 1000.0) for name, value in asdict(config.grid.sigma).items()})
    return replace(config, grid=replace(config.grid, sigma=sigma, floor=config.grid.floor * factor))
