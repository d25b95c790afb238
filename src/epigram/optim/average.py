"""Averages of the weights over training, which replace them at its end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from epigram.optim.base import not_among, outside, refuse, restore


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """mode: "ema" or "none". In parameter-golf #1212: decay 0.997 a step, from the start, without warm-up.

    start_step: number of updates during which the average only follows the weights. decay_warmup: after n
    averaged steps the decay is at most (1 + n) / (10 + n), so that a short run forgets its beginning.
    """

    mode: str
    decay: float = 0.997
    start_step: int = 0
    decay_warmup: bool = False

    def __post_init__(self) -> None:
        problems = not_among("average.mode", self.mode, MODES)
        problems += outside("average.decay", self.decay, 0, 1)
        if self.mode != "none" and self.decay == 1:
            problems.append("average.decay = 1 takes nothing in and would leave the initial weights: set it below 1")
        problems += outside("average.start_step", self.start_step, 0)
        refuse(problems)


class Average(Protocol):
    """What every mode offers. `update` is `set_weight`, on the host, and `apply`, the same launches each time.

    names: of the weights to take in, all by default: an update may be applied in parts. applied: 0-dim float32 on the
    device, 0 if the step left the weights as they were; then the average stays too.
    """

    def update(self, applied: Tensor | None = None) -> None: ...
    def set_weight(self, applied: Tensor | None = None) -> None: ...
    def apply(self, names: Sequence[str] | None = None) -> None: ...
    def copy_to(self) -> None: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Ema:
    """Exponential moving average of `params` in float32, started from their values, without bias correction.

    After each step average <- decay * average + (1 - decay) * weight, as one multi-tensor operation, which reads
    1 - decay from the device.
    """

    def __init__(
        self, params: Mapping[str, Tensor], decay: float, *, start_step: int = 0, decay_warmup: bool = False
    ) -> None:
        assert 0 <= decay <= 1
        assert params
        self._params = dict(params)
        self._averages = {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in params.items()}
        self._num_updates = torch.zeros((), dtype=torch.int64)  # on the host: nothing on the device needs it
        self._decay = decay
        self._start_step = start_step
        self._decay_warmup = decay_warmup
        device = next(iter(self._averages.values())).device
        self._minus_weight = torch.zeros((), dtype=torch.float32, device=device)

    def update(self, applied: Tensor | None = None) -> None:
        """Take in the weights after a step."""
        self.set_weight(applied)
        self.apply()

    def set_weight(self, applied: Tensor | None = None) -> None:
        """First half of an update: count it, and put what the weights count for where `apply` reads it."""
        averaged_steps = int(self._num_updates) - self._start_step
        self._num_updates += 1
        decay = self._decay
        if averaged_steps < 0:
            decay = 0.0
        elif self._decay_warmup:
            decay = min(decay, (1 + averaged_steps) / (10 + averaged_steps))
        self._minus_weight.fill_(decay - 1.0)
        if applied is not None:
            self._minus_weight.mul_(applied)

    @torch.no_grad()
    def apply(self, names: Sequence[str] | None = None) -> None:
        """Second half of an update, what a CUDA graph may record."""
        taken = self._params if names is None else names
        # A step of SGD with learning rate -weight and weight decay -1 is average += weight * (w - average), and
        # unlike torch's multi-tensor lerp it takes its factor from the device.
        torch._fused_sgd_(
            [self._averages[name] for name in taken],
            [self._params[name].detach().float() for name in taken],
            [],
            weight_decay=-1.0,
            momentum=0.0,
            lr=self._minus_weight,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )

    @torch.no_grad()
    def copy_to(self) -> None:
        """Overwrite the weights with the average, rounded to each weight's dtype."""
        weights = [tensor.detach() for tensor in self._params.values()]
        torch._foreach_copy_(weights, list(self._averages.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """All state as a flat dict of live tensors: clone what has to outlast the next step."""
        return {"num_updates": self._num_updates, **{f"average.{k}": v for k, v in self._averages.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in; UserError, and nothing changed, when names, shapes or dtypes differ."""
        restore(self.state_dict(), state, "this average of the weights")


class NoAverage:
    """Mode "none": the weights stand for themselves."""

    def update(self, applied: Tensor | None = None) -> None:
        """Nothing to take in."""

    def set_weight(self, applied: Tensor | None = None) -> None:
        """Nothing to count."""

    def apply(self, names: Sequence[str] | None = None) -> None:
        """Nothing to take in."""

    def copy_to(self) -> None:
        """The weights already are what they should be."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises UserError when there is a state: it belongs to a run that averages."""
        restore({}, state, "a run without averaging")


MODES = ("ema", "none")


def average_of(params: Mapping[str, Tensor], config: AverageConfig) -> Average:
    """The average of `params` that `config` asks for."""
    if config.mode == "none":
        return NoAverage()
    return Ema(params, config.decay, start_step=config.start_step, decay_warmup=config.decay_warmup)
