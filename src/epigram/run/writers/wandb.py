"""Weights & Biases (extra `wandb`); project and mode are its own variables, WANDB_PROJECT and WANDB_MODE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from epigram.errors import UserError
from epigram.run.writers.base import Row, flat


class Writer:
    """One W&B run a training run; its files stay in the run folder."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        try:
            self._run = wandb.init(name=name, dir=str(folder), config=dict(flat(config)))
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases cannot start: {error} (log in by `wandb login`, or set WANDB_MODE=offline)"
            ) from error
        # Training and validation lines of one step arrive separately; an axis of our own lets both be logged.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        """One step."""
        self._run.log({key: value for key, value in row.items() if value is not None})

    def close(self, result: Mapping[str, Any]) -> None:
        """The result becomes the run's summary; a run that failed is marked so."""
        self._run.summary.update(dict(flat(result)))
        self._run.finish(exit_code=0 if result.get("status") == "finished" else 1)
