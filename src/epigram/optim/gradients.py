"""From the gradients of several lanes to the one that the optimizer sees.

A lane is a part of a step's batch with its own sequence length. Its loss is the mean over its own tokens, and
its gradient counts with a weight that depends on the lane alone, never on the process that computes it. A
process that runs several lanes runs them in turn:

    for lane in my_lanes:
        loss(lane).backward()
        gradients.add(lane)
    norms, scale = gradients.finish(all_reduce_sum)
    optimizer.step(lr_multiplier, momentum, scale)

What clipping multiplies the gradients with is left to the optimizer as a number on the device, so that with one lane
a process reads them for their norm and writes nothing. Nothing here waits for the device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from epigram.optim.base import not_among, refuse

CLIPS = ("lane", "global", "none")
LANE_WEIGHTS = ("equal", "tokens")

_NORM_EPS = 1e-6  # as in torch's own clipping


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """How lanes' gradients are clipped and averaged. In parameter-golf #1212: "lane", 0.3, "equal".

    clip: "lane" limits each lane's gradient before averaging, "global" the average, "none" neither. max_norm:
    L2 norm over all parameters. lane_weight: "equal" or "tokens" (every token counts the same).
    """

    clip: str
    max_norm: float
    lane_weight: str

    def __post_init__(self) -> None:
        problems = not_among("clip", self.clip, CLIPS)
        problems += not_among("lane_weight", self.lane_weight, LANE_WEIGHTS)
        if not (math.isfinite(self.max_norm) and self.max_norm > 0):
            problems.append(f'max_norm = {self.max_norm} is not positive: for no clipping set clip = "none"')
        refuse(problems)


def lane_weights(lane_tokens: Sequence[int], mode: str) -> list[float]:
    """Weight of each lane's gradient in the average, from the tokens of each lane; they sum to 1."""
    assert mode in LANE_WEIGHTS
    assert all(tokens > 0 for tokens in lane_tokens)
    if mode == "equal":
        return [1 / len(lane_tokens)] * len(lane_tokens)
    return [tokens / sum(lane_tokens) for tokens in lane_tokens]


class Gathered(NamedTuple):
    """What `finish` says beside the gradients, as device tensors.

    norms: float32, before clipping: with clip "lane" one of each lane that this process added, in that order,
    else one of the average over all lanes. scale: 0-dim float32; the average is `.grad` times it. lane_norms: of the
    lanes that this process added, in that order, whatever is clipped: a gradient that is not finite shows where it is
    from.
    """

    norms: Tensor
    scale: Tensor
    lane_norms: Tensor

    @property
    def finite(self) -> Tensor:
        """0-dim bool: whether all norms are finite, and so every gradient that they were taken of."""
        return torch.isfinite(self.norms).all() & torch.isfinite(self.lane_norms).all()


class LaneGradients:
    """Collects lanes' gradients of `named` into their weighted average in `.grad`.

    lane_weights: of all lanes of a step, whichever process runs them. The object is used again for each step.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], *, clip: str, max_norm: float, lane_weights: Sequence[float]
    ) -> None:
        assert clip in CLIPS
        assert max_norm > 0
        self._named = dict(named)
        self._clip = clip
        self._max_norm = max_norm
        self._weights = tuple(lane_weights)
        self._sum: list[Tensor] = []
        self._factor: Tensor | float = 1.0  # what the sum is still to be multiplied with
        self._lanes: list[int] = []
        self._norms: list[Tensor] = []

    @torch.no_grad()
    def add(self, lane: int, *, lent: bool = False) -> None:
        """Take the gradient that lane `lane`'s backward pass left in `.grad`, which is then empty again.

        The first lane's tensors become the sum, and are scaled only when something is added to them. lent: they will be
        overwritten by the next lane's backward pass; then the sum gets tensors of its own.
        """
        assert lane not in self._lanes, f"lane {lane} was added twice"
        missing = [name for name, p in self._named.items() if p.grad is None]
        assert not missing, f"lane {lane} gave no gradient for {', '.join(missing)}"
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        self._lanes.append(lane)
        factor: Tensor | float = self._weights[lane]
        norm = total_norm(gradients)
        self._norms.append(norm)
        if self._clip == "lane":
            factor = _clip_factor(norm, self._max_norm) * factor
        if self._sum:
            self._settle()
            if isinstance(factor, Tensor):  # torch adds with a factor only if that is known to the host
                torch._foreach_mul_(gradients, factor)
                factor = 1.0
            torch._foreach_add_(self._sum, gradients, alpha=factor)
        elif lent:
            self._sum, self._factor = list(torch._foreach_mul(gradients, factor)), 1.0
        else:
            self._sum, self._factor = gradients, factor
        for parameter in self._named.values():
            parameter.grad = None

    @torch.no_grad()
    def finish(self, reduce: Callable[[list[Tensor]], None] | None = None) -> Gathered:
        """Put the average over all lanes of all processes, up to a scale, into `.grad`.

        reduce: sums a list of tensors over the processes, in place; None where this process ran all lanes.
        With clip "global" the scale is what clips the average.
        """
        assert self._lanes, "no lane was added"
        assert reduce is not None or len(self._lanes) == len(self._weights), "lanes are missing"
        if reduce is not None:
            self._settle()
            reduce(self._sum)
        # Without clipping of lanes nothing is put off any more, since the weights sum to 1.
        factor = self._factor
        scale = factor if isinstance(factor, Tensor) else torch.full((), factor, device=self._sum[0].device)
        lane_norms = norms = torch.stack(self._norms)
        if self._clip != "lane":
            norms = total_norm(self._sum)[None]
        if self._clip == "global":
            scale = _clip_factor(norms[0], self._max_norm)
        for parameter, gradient in zip(self._named.values(), self._sum, strict=True):
            parameter.grad = gradient
        self._sum, self._factor, self._lanes, self._norms = [], 1.0, [], []
        return Gathered(norms, scale, lane_norms)

    def _settle(self) -> None:
        """Multiply the sum with what was put off."""
        if isinstance(self._factor, Tensor) or self._factor != 1.0:
            torch._foreach_mul_(self._sum, self._factor)
            self._factor = 1.0


def total_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm over all elements of all tensors, 0-dim, by one multi-tensor pass."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def _clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    return (max_norm / (norm + _NORM_EPS)).clamp(max=1.0)
