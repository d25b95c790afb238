"""The optimizer of a model: Muon for its weight matrices, AdamW for the rest, one step and one state."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from epigram.optim.adamw import AdamW
from epigram.optim.base import restore
from epigram.optim.groups import OptimConfig, assign
from epigram.optim.muon import Muon
from epigram.roles import ParameterRole


class Optimizer:
    """Updates all parameters of `named` in place; `groups` says which rule and rates each has.

    Parameters are float32 and on one device. The learning rate multiplier and the momentum live in device
    tensors, so that a step neither waits for the host nor changes anything that a compiler or a CUDA graph
    has recorded.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], roles: Mapping[str, ParameterRole], config: OptimConfig
    ) -> None:
        wrong = [name for name, p in named.items() if p.dtype != torch.float32 or not p.is_contiguous()]
        assert not wrong, f"not float32 and contiguous: {', '.join(wrong)}"
        devices = {parameter.device for parameter in named.values()}
        assert len(devices) == 1, f"parameters on several devices: {devices}"
        self.groups = assign(named, roles, config)
        self._parameters = list(named.values())
        self._muon = Muon(named, roles, [group for group in self.groups if group.rule == "muon"], config.muon)
        self._adamw = AdamW(named, [group for group in self.groups if group.rule == "adamw"], config.adamw)
        self._lr_multiplier = torch.zeros((), dtype=torch.float32, device=devices.pop())
        self._momentum = torch.zeros_like(self._lr_multiplier)

    def step(self, lr_multiplier: float, momentum: float) -> None:
        """One update from the gradients in `.grad`, which every parameter must have.

        lr_multiplier scales all base learning rates (and with them the weight decay); momentum is Muon's.
        """
        self.set_rates(lr_multiplier, momentum)
        self.update()

    def set_rates(self, lr_multiplier: float, momentum: float) -> None:
        """First half of a step: put both numbers where `update` reads them."""
        self._lr_multiplier.fill_(lr_multiplier)
        self._momentum.fill_(momentum)

    def update(self) -> None:
        """Second half of a step, the same launches each time: what a CUDA graph may record."""
        self._muon.step(self._lr_multiplier, self._momentum)
        self._adamw.step(self._lr_multiplier)

    def zero_grad(self) -> None:
        """Drop all gradients, so that the next backward pass writes instead of adding."""
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """All state as a flat dict of live tensors: clone what has to outlast the next step."""
        parts = {"muon": self._muon.state(), "adamw": self._adamw.state()}
        return {f"{rule}.{name}": tensor for rule, state in parts.items() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in; UserError, and nothing changed, when names, shapes or dtypes differ."""
        restore(self.state_dict(), state, "this optimizer")
