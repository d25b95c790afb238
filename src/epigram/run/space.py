"""Whether disk and memory have room for a run: asked before training, not found out in it."""

import math
import shutil
from pathlib import Path

from epigram.config import Config
from epigram.errors import UserError
from epigram.run import checkpoint
from epigram.run.machine import memory_bytes

_LOG_BYTES = 16_000_000  # log, metrics, samples, clock

_VALUES_OF_LOGITS, _VALUES_OF_WIDTH, _VALUES_OF_MLP = 3, 15, 5
"""Float32 values that a token's forward and backward keep on a CPU, for each entry of the vocabulary, and in each layer
for each channel of the stream and of the MLP. By two measurements of peak memory with two sizes of lanes, uncompiled:
115 kB a token of `demo` (117 by these), 761 kB of `h100` (749)."""


def needed_bytes(config: Config, checkpoint_bytes: int, existing: int = 0) -> int:
    """What the run will add to the disk at most, from now on.

    existing: complete checkpoints that are there already (of a run that is resumed); new ones replace them.
    """
    run, every_s = config.run, config.run.checkpoint_every_s
    written = 1 + (int(config.budget.optimize_s / every_s) if every_s else 0)
    # One more than is kept: a new checkpoint is complete before the oldest goes.
    most = min(written, max(run.checkpoint_keep + 1 - existing, 1)) if run.checkpoint_keep else written
    return most * checkpoint_bytes + config.artifact.cap_bytes + _LOG_BYTES


def check_room(folder: Path, config: Config, parts: checkpoint.Parts) -> None:
    """Raises UserError when the disk of the run folder is too small for the run."""
    num_bytes = checkpoint.forecast_bytes(parts)
    needed = needed_bytes(config, num_bytes, len(checkpoint.complete(folder)))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {free:,} bytes free, and the run needs {needed:,} (a checkpoint takes "
            f"{num_bytes:,}): make room, or set run.checkpoint_keep or run.checkpoint_every_s otherwise"
        )


def lane_memory_bytes(config: Config) -> int:
    """Memory that forward and backward of the largest lane take on a CPU, roughly."""
    model = config.model
    layer = _VALUES_OF_WIDTH * model.model_dim + _VALUES_OF_MLP * model.mlp_dim
    values = _VALUES_OF_LOGITS * model.vocab_size + model.num_layers * layer
    return 4 * values * max(lane.num_tokens for lane in config.flat_lanes)


def check_memory(config: Config, device_type: str) -> None:
    """Raises UserError where a recipe for GPUs would fill the machine's memory: systems then stall, or kill a process
    without a word. CUDA has a limit of its own, and says when it is reached."""
    available, needed = memory_bytes(), lane_memory_bytes(config)
    if device_type == "cuda" or available is None or needed <= available:
        return
    lane = max(config.flat_lanes, key=lambda lane: lane.num_tokens)
    raise UserError(
        f"a lane of {lane.num_seqs} x {lane.seq_len} tokens takes about {math.ceil(needed / 1e9)} GB of memory without "
        f"a CUDA GPU, and this machine has {available / 1e9:.0f}: the recipe {config.recipe} is for GPUs, demo is for "
        "a CPU; or set smaller lanes (lanes.0.num_seqs)"
    )
