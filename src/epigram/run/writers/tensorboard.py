"""Scalars for TensorBoard, in the folder `tensorboard` of the run (extra `tensorboard`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorboard  # noqa: F401  named first, so that a missing library is reported under its own name
from torch.utils.tensorboard import SummaryWriter

from epigram.run.writers.base import Row, flat, numbers

_COUNTERS = ("step", "elapsed_s")  # axes, not curves


class Writer:
    """Every number of a row as a curve over the step; validation values in a group of their own."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self._writer = SummaryWriter(log_dir=str(folder / "tensorboard"))
        table = "\n".join(f"    {key} = {value}" for key, value in flat(config))
        self._writer.add_text("config", table, 0)

    def write(self, row: Row) -> None:
        """One step."""
        for key, value in numbers(row).items():
            if key not in _COUNTERS:
                group = "validation" if key.startswith("val_") else "training"
                self._writer.add_scalar(f"{group}/{key}", value, int(row.get("step", 0)))

    def close(self, result: Mapping[str, Any]) -> None:
        """The final numbers as scalars at step 0."""
        for key, value in numbers(result).items():
            self._writer.add_scalar(f"result/{key}", value, 0)
        self._writer.close()
