"""Whether disk and memory have room for a run: asked before training, not found out in it."""

import math
import shutil
from pathlib import Path

from epigram.config import Config
from epigram.errors import UserError
from epigram.model.config import ModelConfig
from epigram.run import checkpoint
from epigram.run.choices import tokens_at_a_time
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


def token_memory_bytes(model: ModelConfig) -> int:
    """Memory that forward and backward take on a CPU for each token that is computed at a time, roughly."""
    layer = _VALUES_OF_WIDTH * model.model_dim + _VALUES_OF_MLP * model.mlp_dim
    return 4 * (_VALUES_OF_LOGITS * model.vocab_size + model.num_layers * layer)


def check_memory(config: Config, device_type: str) -> None:
    """Raises UserError where a step would fill the machine's memory: systems then stall, or kill a process without a
    word. CUDA has a limit of its own, and says when it is reached."""
    most = tokens_at_a_time(config.run.micro_tokens, device_type)
    at_a_time = max(lane.num_tokens // lane.parts(most) for lane in config.flat_lanes)
    available, needed = memory_bytes(), at_a_time * token_memory_bytes(config.model)
    if device_type == "cuda" or available is None or needed <= available:
        return
    longest = config.context_len
    smaller = f"set run.micro_tokens={at_a_time // 2} or less (a lane is computed in parts of whole sequences)"
    if at_a_time <= longest:
        smaller = "make the lane's seq_len shorter (a sequence is computed whole)"
    raise UserError(
        f"{at_a_time:,} tokens at a time take about {math.ceil(needed / 1e9)} GB of memory without a CUDA GPU, and "
        f"this machine has {available / 1e9:.0f}: {smaller}, or take a smaller recipe, such as demo"
    )
