"""Watches the loss and gradient of every step: what is not finite, or a spike, does not reach the weights.

The device decides, before the update and without asking the host: `verdict` is 0 where a step is to be left out, and
an update with a scale of 0 changes nothing. The host learns of it some steps later and says, by the recipe, whether the
run goes on. Spikes are measured against the median of losses that were surely known, so that a resumed or repeated run
decides alike.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from epigram.attention.base import TOO_MANY_DOCUMENTS
from epigram.config import GuardConfig
from epigram.data.lanes import Lane
from epigram.errors import UserError

HOST_AHEAD = 2
"""Steps that the host may queue before it waits for the device."""

_FEWEST = 10  # losses that make a median


class DivergedError(UserError):
    """The loss or the gradient is no finite number any more, or leaps."""


class Measured:
    """What a step says of itself: a float32 tensor on the device, and these numbers of it on the host.

    loss: mean over all lanes. norm: of the gradient before clipping, as the recipe clips: the mean over the lanes, or
    that of the average. applied: whether the update was made. losses, norms: of each lane.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.loss, self.norm, applied, *rest = values
        self.applied = applied != 0
        self.losses, self.norms = rest[: len(rest) // 2], rest[len(rest) // 2 :]


def verdict(losses: Tensor, norms: Tensor, norm: Tensor, limit: float) -> Tensor:
    """1 if a step may change the weights, else 0; 0-dim float32.

    losses, norms: (lanes,) of all lanes; norm: 0-dim; all of them must be finite. limit: largest mean loss.
    """
    finite = torch.isfinite(losses).all() & torch.isfinite(norms).all() & torch.isfinite(norm)
    return (finite & (losses.mean() <= limit)).float()


class Guard:
    """The host's side: which loss is a spike, what was left out so far, and when that is too much.

    skipped: steps left out. isolated: the model keeps documents apart, which attention may have no room for.
    """

    def __init__(self, config: GuardConfig, lanes: Sequence[Lane], *, isolated: bool = False) -> None:
        self._config, self._lanes, self._isolated = config, tuple(lanes), isolated
        self._losses: list[tuple[int, float]] = []
        self.skipped = 0

    def limit(self, step: int) -> float:
        """The largest loss with which `step` may change the weights."""
        return math.inf if self._config.spike_action == "warn" else self._spike(step)

    def look(self, step: int, measured: Measured) -> str | None:
        """Take in what a step measured, in the order of steps; returns what is worth a line in the log.

        Raises DivergedError when the run must not go on.
        """
        spike = self._spike(step)
        if measured.applied:
            self._remember(step, measured.loss)
            if measured.loss <= spike:
                return None
            return f"warning: step {step + 1} {self._leap(measured, spike)}"
        self.skipped += 1
        finite = math.isfinite(measured.loss) and all(map(math.isfinite, (*measured.norms, measured.norm)))
        what = self._leap(measured, spike) if finite else self._not_finite(measured)
        stop = self.skipped > self._config.max_skips or (finite and self._config.spike_action == "stop")
        if not stop:
            return f"warning: step {step + 1} {what}: left out, {self.skipped} of at most {self._config.max_skips}"
        if finite and self._config.spike_action == "stop":
            way_on = 'go on past such steps (guard.spike_action = "skip" with guard.max_skips, or "warn")'
        else:
            way_on = "allow some such steps (guard.max_skips)"
        crowded = f"; or {TOO_MANY_DOCUMENTS}: then set run.attention=flex or sdpa"
        raise DivergedError(
            f"step {step + 1} {what}; the update was not made: lower the learning rates (optim.muon.lr_early, lr_late, "
            f"optim.adamw.lr_token), look for damaged data, or {way_on}"
            + (crowded if self._isolated and math.isnan(measured.loss) else "")
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to decide alike, in plain values."""
        return {"skipped": self.skipped, "losses": [list(pair) for pair in self._losses]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.skipped = state["skipped"]
        self._losses = [(step, loss) for step, loss in state["losses"]]

    def _spike(self, step: int) -> float:
        """A loss above this is a spike in `step`."""
        if not self._config.spike_factor:
            return math.inf
        known = step - HOST_AHEAD - 1  # the last step whose loss is surely read when `step` begins
        losses = [loss for at, loss in self._losses if known - self._config.spike_window < at <= known]
        enough = min(_FEWEST, self._config.spike_window)
        return self._config.spike_factor * median(losses) if len(losses) >= enough else math.inf

    def _remember(self, step: int, loss: float) -> None:
        if self._config.spike_factor:
            self._losses.append((step, loss))
            del self._losses[: -self._config.spike_window - HOST_AHEAD - 1]

    def _leap(self, measured: Measured, spike: float) -> str:
        times = self._config.spike_factor * measured.loss / spike
        return f"gave a loss of {measured.loss:.4f}, {times:.2f} times the median of the last steps"

    def _not_finite(self, measured: Measured) -> str:
        bad = [
            f"lane {index} ({lane.num_seqs} x {lane.seq_len} tokens: loss {loss}, gradient norm {norm})"
            for index, (lane, loss, norm) in enumerate(zip(self._lanes, measured.losses, measured.norms, strict=True))
            if not (math.isfinite(loss) and math.isfinite(norm))
        ]
        where = f" in {', '.join(bad)}" if bad else ""
        return f"gave a loss of {measured.loss} and a gradient norm of {measured.norm}{where}"
