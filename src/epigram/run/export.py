"""From trained weights to a scored file: calibrate, quantize, pack, read back, score.

Calibration and quantization belong to the training budget; packing and scoring have their own limits.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epigram.config import Config
from epigram.data.dataset import DataFolder
from epigram.dist import collectives
from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.model.generate import Sampling, sample_batch
from epigram.model.gpt import GPT
from epigram.progress import Progress
from epigram.quant.calibrate import CalibrationConfig, CalibrationSource, HessianCollector, refuse_held_out
from epigram.quant.config import needs_hessians
from epigram.quant.policy import calibration_taps, plan
from epigram.quant.quantize import Stored, quantize_model
from epigram.quant.report import QuantReport
from epigram.run.api import silent_ids
from epigram.run.choices import attention_for_eager
from epigram.run.fit import cap_check
from epigram.run.record import scoring_s

BATCH_TOKENS = 65_536  # of a calibration forward
_SELF_BATCH = 64  # sequences that the model writes at once


@dataclass(frozen=True)
class Quantized:
    """Tensors of the artifact, what quantization cost, where its statistics come from, how long it took, and the
    Hessians, by tap, for quantizing again."""

    stored: Stored
    report: QuantReport
    source: CalibrationSource
    calibrate_s: float
    quantize_s: float
    hessians: dict[str, Tensor]


def quantize(model: GPT, config: Config, data: DataFolder, context: Context) -> Quantized:
    """Calibrate on this model and quantize it; the windows are shared out over the ranks, the Hessians summed."""
    start_s = time.perf_counter()
    hessians: dict[str, Tensor] = {}
    source = CalibrationSource(kind="none")
    named, roles = {name: p.detach() for name, p in model.named_parameters()}, model.roles()
    if config.quant.needs_hessians:
        hessians = calibrate(model, config, calibration_batches(model, config, data, context), context)
        source = config.quant.calibration.provenance()
    context.synchronize()
    calibrated_s = time.perf_counter()
    num_weights = sum(p.numel() for p in named.values())
    with Progress("quantize", num_weights, "weights", shown=context.is_main) as bar:
        stored, report = quantize_model(named, roles, hessians, config.quant, bar.advance)
    context.synchronize()
    return Quantized(stored, report, source, calibrated_s - start_s, time.perf_counter() - calibrated_s, hessians)


def taps(model: GPT, config: Config) -> dict[str, int]:
    """What calibration looks at -> its columns."""
    parts = plan(dict(model.named_parameters()), model.roles(), config.quant.grid)
    return calibration_taps(parts, tables=needs_hessians(config.quant.table_method))


def calibrate(model: GPT, config: Config, batches: Iterable[Tensor], context: Context) -> dict[str, Tensor]:
    """Hessians by tap over all ranks' `batches`; this rank's share of the windows is (B, seq_len) int64 a batch."""
    collector = HessianCollector(context.device, taps(model, config))
    with (
        torch.no_grad(),
        attention_for_eager(model, context),
        Progress("calibrate", config.quant.calibration.num_windows, "windows", shown=context.is_main) as bar,
    ):
        for windows in batches:
            model(windows.to(context.device), tap=collector.tap)
            bar.advance(len(windows) * context.world_size)
    return collector.finish(partial(collectives.summed, context) if context.world_size > 1 else None)


def calibration_batches(model: GPT, config: Config, data: DataFolder, context: Context) -> Iterator[Tensor]:
    """This rank's share of the calibration windows, (B, seq_len) int64 a batch: training text, or the model's own."""
    settings = config.quant.calibration
    make = _own_text if settings.source == "self" else _training_windows
    yield from make(model, data, settings, context)


def _training_windows(model: GPT, data: DataFolder, settings: CalibrationConfig, context: Context) -> Iterator[Tensor]:
    num_windows, seq_len = settings.num_windows, settings.seq_len
    shards = data.split("train")
    refuse_held_out(shard.path for shard in shards)
    rooms = np.array([max(len(shard.tokens) - seq_len + 1, 0) for shard in shards])
    if not rooms.any():
        raise UserError(
            f"no training shard holds {seq_len} tokens to calibrate on: set quant.calibration.seq_len lower"
        )
    random = np.random.default_rng(settings.seed)
    chosen = random.choice(len(shards), size=num_windows, p=rooms / rooms.sum())
    starts = (random.random(num_windows) * rooms[chosen]).astype(np.int64)
    mine = range(context.rank, num_windows, context.world_size)
    size = max(BATCH_TOKENS // seq_len, 1)
    for first in range(0, len(mine), size):
        rows = [shards[chosen[i]].tokens[starts[i] : starts[i] + seq_len] for i in mine[first : first + size]]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def _own_text(model: GPT, data: DataFolder, settings: CalibrationConfig, context: Context) -> Iterator[Tensor]:
    """Batches are dealt to the ranks, each with a seed of its own: the text is the same for any number of ranks."""
    banned = silent_ids(data.tokenizer)
    for first in range(context.rank * _SELF_BATCH, settings.num_windows, context.world_size * _SELF_BATCH):
        count = min(_SELF_BATCH, settings.num_windows - first)
        sampling = Sampling(temperature=settings.temperature, seed=settings.seed * 1_000_003 + first)
        yield torch.cat(list(sample_batch(model, count, settings.seq_len, sampling, banned=banned)), dim=1)


def left_to_quantize_s(config: Config, result: dict[str, Any]) -> float:
    """Seconds of the training budget that training, calibration and quantization left; without end where the clock
    is not the wall's."""
    if config.budget.clock != "wall":
        return math.inf
    return config.budget.train_s - (result["train_s"] + result["calibrate_s"] + result["quantize_s"])


def over_budget(config: Config, result: dict[str, Any]) -> list[str]:
    """What a finished run exceeded, in sentences; empty when it kept to all its limits."""
    found = []
    if (left_s := left_to_quantize_s(config, result)) < 0:
        found.append(
            f"training, calibration and quantization took {config.budget.train_s - left_s:.1f} s of "
            f"{config.budget.train_s:.1f} s: raise budget.calibrate_s or lower quant.calibration.num_windows"
        )
    check = cap_check(config, result["total_bytes"] - config.artifact.code_bytes)
    if not check.fits:
        advice = (
            "raise quant.grid.sigma.mlp and .attention, or let them be raised "
            '(artifact.over_cap = "shrink"), shrink the model, or export with another codec'
        )
        found.append(f"artifact and code take too many bytes: {check}: {result.get('not_shrunk', advice)}")
    scored_s, stopped = scoring_s(result), result.get("adapt_stopped")
    if scored_s > config.budget.score_s:
        without_it_s = scored_s - result.get("adapt_stopped_s", 0.0)
        advice = ": raise score.stride" if without_it_s > config.budget.score_s else ""  # else the next line has one
        if advice and result.get("paths", {}).get("compile") == "on":
            advice += ", or set run.compile=off, since what compiling for a score takes counts"
        found.append(f"scoring took {scored_s:.1f} s of {config.budget.score_s:.1f} s{advice}")
    if stopped:
        found.append(stopped)
    return found
