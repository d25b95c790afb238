"""Whether the disk has room for all that a run will write: asked before training, not found out in it."""

import shutil
from pathlib import Path

from epigram.config import Config
from epigram.errors import UserError
from epigram.run import checkpoint

_LOG_BYTES = 16_000_000  # log, metrics, samples, clock


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
