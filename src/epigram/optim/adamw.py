"""AdamW for everything that is no weight matrix: embedding tables, gates, scales and small projections.

The arithmetic is torch's fused multi-tensor kernel, one call a group. It is called as torch.optim calls it, without
the sorting by device and dtype around it, which costs the host more than the kernel costs the device. A control
tensor that stacks its layers on axis 0 may belong to two groups with different learning rates: each takes its slice
as a view, so nothing is copied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epigram.optim.base import Group, outside, refuse


@dataclass(frozen=True, kw_only=True)
class AdamWOverride:
    """Other rates for one parameter: its group's learning rate times `lr_scale`, and its own `weight_decay`.

    The residual lambdas of parameter-golf #1130 have lr_scale 5 and weight_decay 0.
    """

    parameter: str
    lr_scale: float
    weight_decay: float

    def __post_init__(self) -> None:
        name = f"adamw.overrides of {self.parameter!r}"
        refuse(
            outside(f"lr_scale in {name}", self.lr_scale, 0) + outside(f"weight_decay in {name}", self.weight_decay, 0)
        )


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """Settings of AdamW. In parameter-golf #1212: lr_token 0.022, lr_scalar_early 0.020, lr_scalar_late
    0.038, both weight decays 0.04.

    lr_token: of the tables. lr_scalar_late: of the layers from num_layers // 2 of per-layer control tensors;
    lr_scalar_early: of all other control tensors. Weight decay is decoupled (times the learning rate) and
    pulls every tensor of its kind to zero, scales and gains included.
    """

    lr_token: float
    lr_scalar_early: float
    lr_scalar_late: float
    weight_decay_token: float
    weight_decay_scalar: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    overrides: tuple[AdamWOverride, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        for name in ("lr_token", "lr_scalar_early", "lr_scalar_late", "weight_decay_token", "weight_decay_scalar"):
            problems += outside(f"adamw.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            problems += outside(f"adamw.{name}", getattr(self, name), 0, 0.999999)
        problems += outside("adamw.eps", self.eps, 1e-30, 1)
        names = [override.parameter for override in self.overrides]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems += [f"adamw.overrides names {name!r} twice: keep one" for name in twice]
        refuse(problems)


class AdamW:
    """AdamW over the parts of `groups`, moments in float32. names: of the parameters."""

    def __init__(self, named: Mapping[str, nn.Parameter], groups: Sequence[Group], config: AdamWConfig) -> None:
        self._config = config
        self._groups = tuple(groups)
        parts = [part for group in groups for part in group.parts]
        self._parameters = {part.name: named[part.name] for part in parts}
        self.names = tuple(self._parameters)
        self._exp_avg = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._exp_avg_sq = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        device = next(iter(self._parameters.values())).device if parts else torch.device("cpu")
        # The kernel wants a count of steps for every tensor, on its device.
        self._steps = torch.zeros(len(parts), dtype=torch.float32, device=device)
        self._lrs = torch.tensor([group.lr for group in groups], dtype=torch.float32, device=device)
        # Apple's ignored both scale and omission without a word (torch pull request 186360).
        self._kernel_scales = device.type != "mps"

    def state(self) -> dict[str, Tensor]:
        """The live moments of each parameter and the step counts, (parts,)."""
        moments = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}
        state = {f"{moment}.{name}": tensor for moment, named in moments.items() for name, tensor in named.items()}
        return {"steps": self._steps, **state}

    @torch.no_grad()
    def step(self, lr_multiplier: Tensor, scale: Tensor) -> None:
        """Update the parameters from their gradients times `scale`, which become that product; none with a scale of 0.

        Both arguments: 0-dim float32 tensor on the parameters' device.
        """
        gradients = self._gradients()
        if not gradients:
            return
        if self._kernel_scales:
            # It divides, as is usual in training with a scaled loss.
            scaling = {"grad_scale": scale.reciprocal(), "found_inf": (scale == 0).float()}
            self._steps += 1 - scaling["found_inf"]
        elif scale == 0:  # which waits for the device
            return
        else:
            scaling = {}
            torch._foreach_mul_(list(gradients.values()), scale)
            self._steps += 1
        lrs = (self._lrs * lr_multiplier).unbind()
        counts = self._steps.split([len(group.parts) for group in self._groups])
        for group, lr, steps in zip(self._groups, lrs, counts, strict=True):
            torch._fused_adamw_(
                [part.of(self._parameters[part.name].detach()) for part in group.parts],
                [part.of(gradients[part.name]) for part in group.parts],
                [part.of(self._exp_avg[part.name]) for part in group.parts],
                [part.of(self._exp_avg_sq[part.name]) for part in group.parts],
                [],
                list(steps.unbind()),
                lr=lr,
                beta1=self._config.beta1,
                beta2=self._config.beta2,
                weight_decay=group.weight_decay,
                eps=self._config.eps,
                amsgrad=False,
                maximize=False,
                **scaling,
            )

    def _gradients(self) -> dict[str, Tensor]:
        gradients = {name: parameter.grad for name, parameter in self._parameters.items()}
        missing = [name for name, gradient in gradients.items() if gradient is None]
        assert not missing, f"no gradient for {', '.join(missing)}"
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}
