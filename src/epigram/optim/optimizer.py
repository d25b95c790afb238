"""The optimizer of a model: Muon for its weight matrices, AdamW for the rest, one step and one state."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from epigram.dist.collectives import Message
from epigram.dist.context import Context
from epigram.kernels.choice import use_fused
from epigram.optim.adamw import AdamW
from epigram.optim.base import restore
from epigram.optim.groups import OptimConfig, assign
from epigram.optim.muon import Muon
from epigram.roles import ParameterRole


class Optimizer:
    """Updates all parameters of `named` in place; `groups` says which rule and rates each has.

    Parameters are float32 and on one device. The learning rate multiplier, the momentum and the scale of the
    gradients live in device tensors, so that a step neither waits for the host nor changes anything that a
    compiler or a CUDA graph has recorded.

    kernels: who computes Muon, see `kernels.choice`; raises UserError for "fused" where that cannot be. context: with
    its other processes Muon's work and state are shared, see `epigram.optim.muon`.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        roles: Mapping[str, ParameterRole],
        config: OptimConfig,
        *,
        kernels: str = "auto",
        context: Context | None = None,
    ) -> None:
        wrong = [name for name, p in named.items() if p.dtype != torch.float32 or not p.is_contiguous()]
        assert not wrong, f"not float32 and contiguous: {', '.join(wrong)}"
        devices = {parameter.device for parameter in named.values()}
        assert len(devices) == 1, f"parameters on several devices: {devices}"
        self.groups = assign(named, roles, config)
        self._parameters = list(named.values())
        self.device = devices.pop()
        self.fused = use_fused(kernels, self.device)
        muon, adamw = ([group for group in self.groups if group.rule == rule] for rule in ("muon", "adamw"))
        self._muon = Muon(named, roles, muon, config.muon, fused=self.fused, context=context)
        self._adamw = AdamW(named, adamw, config.adamw)
        self._lr_multiplier = torch.zeros((), dtype=torch.float32, device=self.device)
        self._momentum = torch.zeros_like(self._lr_multiplier)
        self._scale = torch.ones_like(self._lr_multiplier)

    def step(
        self,
        lr_multiplier: float,
        momentum: float,
        scale: Tensor | None = None,
        *,
        arriving: Mapping[str, Message] | None = None,
        done: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        """One update from the gradients in `.grad`, which every parameter must have, times `scale`.

        lr_multiplier scales all base learning rates (and with them the weight decay); momentum is Muon's; scale
        is a 0-dim float32 tensor on the parameters' device, such as clipping gives, None being 1. With a scale of
        0 the step changes nothing, not even if the gradients are not finite. The step uses the gradients up:
        afterwards some of them are scaled and some are not.

        arriving: as `LaneGradients.finish` gives it. done: called with the names of parameters as soon as all that
        changes them is queued, while others are under way.
        """
        self.set_rates(lr_multiplier, momentum, scale)
        self.update(arriving, done)

    def set_rates(self, lr_multiplier: float, momentum: float, scale: Tensor | None = None) -> None:
        """First half of a step: put the three numbers where `update` reads them."""
        self._lr_multiplier.fill_(lr_multiplier)
        self._momentum.fill_(momentum)
        if scale is None:
            self._scale.fill_(1.0)
        else:
            self._scale.copy_(scale)
            # A step that is left out decays nothing, and multiplies the momentum by 1.
            left_out = self._scale == 0
            self._lr_multiplier.masked_fill_(left_out, 0.0)
            self._momentum.masked_fill_(left_out, 1.0)

    def update(
        self,
        arriving: Mapping[str, Message] | None = None,
        done: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        """Second half of a step, the same launches each time. AdamW goes first: it waits for no bank."""
        self._adamw.step(self._lr_multiplier, self._scale)
        if done is not None and self._adamw.names:
            done(self._adamw.names)
        self._muon.step(self._lr_multiplier, self._momentum, self._scale, arriving, done)

    def zero_grad(self) -> None:
        """Drop all gradients, so that the next backward pass writes instead of adding."""
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """All state as a flat dict of live tensors: clone what has to outlast the next step.

        What processes share is a DTensor of the whole, so the names and shapes are those of one process.
        """
        parts = {"muon": self._muon.state(), "adamw": self._adamw.state()}
        return {f"{rule}.{name}": tensor for rule, state in parts.items() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved, whole state in; UserError, and nothing changed, when names, shapes or dtypes differ."""
        restore(self.state_dict(), state, "this optimizer")
