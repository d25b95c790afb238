"""From the gradients of several lanes to the one that the optimizer sees.

A lane is a part of a step's batch with its own sequence length. Its loss is the mean over its own tokens, and
its gradient counts with a weight that depends on the lane alone, never on the process that computes it. A
process that runs several lanes runs them in turn:

    for lane in my_lanes:
        losses += [loss(lane)]
        losses[-1].backward()
        gradients.add(lane)
    gathered = gradients.finish(losses)
    optimizer.step(lr_multiplier, momentum, gathered.scale, arriving=gathered.arriving)

What clipping multiplies the gradients with is left to the optimizer as a number on the device, so that with one lane
a process reads them for their norm and writes nothing. Nothing here waits for the device.

Several processes send, in this order: everything that is no bank of matrices, with losses and norms of lanes, in one
small message that all sum up; then each bank, the largest first, of which a process gets the sum of its own layers
alone. The banks are still under way when `finish` returns, unless the average is to be clipped: then their norms are
known, and summed up by a message of one number.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from epigram.dist import collectives
from epigram.dist.collectives import Message
from epigram.dist.context import Context
from epigram.dist.share import Share
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
    """What `finish` says beside the gradients, as device tensors, the same in every process.

    norm: 0-dim, before clipping: with clip "lane" the mean of the lanes' norms, else that of the average over all
    lanes. scale: 0-dim float32; the average is `.grad` times it. losses, norms: (lanes,) float32, of all lanes of the
    step, whatever is clipped: a gradient that is not finite shows where it is from. arriving: what brings `.grad` of
    the banks that several processes share, by name.
    """

    norm: Tensor
    scale: Tensor
    losses: Tensor
    norms: Tensor
    arriving: dict[str, Message]


class LaneGradients:
    """Collects lanes' gradients of `named` into their weighted average in `.grad`.

    lane_weights: of all lanes of a step, whichever process runs them. banks: the parameters whose layers the processes
    of `context` share. The object is used again for each step.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        *,
        clip: str,
        max_norm: float,
        lane_weights: Sequence[float],
        banks: Sequence[str] = (),
        context: Context | None = None,
    ) -> None:
        assert clip in CLIPS
        assert max_norm > 0
        self._named = dict(named)
        self._clip = clip
        self._max_norm = max_norm
        self._weights = tuple(lane_weights)
        self._context = context or Context()
        by_size = sorted(banks, key=lambda name: -named[name].numel())  # the largest first, else as named
        self._shares = {name: Share(len(named[name]), self._context.rank, self._context.world_size) for name in by_size}
        # Where layers do not divide by processes: room for the gradient and the zeros that make up for it.
        self._padded = {
            name: torch.zeros((share.padded_rows, *named[name].shape[1:]), device=named[name].device)
            for name, share in self._shares.items()
            if share.padded_rows != share.num_rows
        }
        self._sum: dict[str, Tensor] = {}
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
            torch._foreach_add_(list(self._sum.values()), gradients, alpha=factor)
        else:
            first = torch._foreach_mul(gradients, factor) if lent else gradients
            self._sum, self._factor = dict(zip(self._named, first, strict=True)), 1.0 if lent else factor
        for parameter in self._named.values():
            parameter.grad = None

    @torch.no_grad()
    def finish(self, losses: Sequence[Tensor] = ()) -> Gathered:
        """Put the average over all lanes of all processes, up to a scale, into `.grad`.

        losses: 0-dim, of the lanes that were added, in that order; without them they count as 0. With clip "global" the
        scale is what clips the average. What several processes share is in `.grad` when its message in `arriving`, if
        there is one, was waited for, and then only in the layers that are this process's own.
        """
        assert self._lanes, "no lane was added"
        assert self._context.has_peers or len(self._lanes) == len(self._weights), "lanes are missing"
        lanes = torch.stack([self._of_lanes(losses), self._of_lanes(self._norms)])
        arriving = self._send(lanes) if self._context.has_peers else {}
        # Without clipping of lanes nothing is put off any more, since the weights sum to 1.
        factor = self._factor
        scale = factor if isinstance(factor, Tensor) else torch.full((), factor, device=lanes.device)
        norm = lanes[1].mean() if self._clip == "lane" else self._norm_of_average(arriving)
        if self._clip == "global":
            scale = _clip_factor(norm, self._max_norm)
        for name, parameter in self._named.items():
            parameter.grad = self._sum[name]
        self._sum, self._factor, self._lanes, self._norms = {}, 1.0, [], []
        return Gathered(norm, scale, lanes[0], lanes[1], arriving)

    def _of_lanes(self, values: Sequence[Tensor]) -> Tensor:
        """(lanes,): the values of this process's lanes in their places, 0 for all others."""
        own = dict(zip(self._lanes, values, strict=bool(values)))
        zero = self._norms[0].new_zeros(())
        return torch.stack([own.get(lane, zero) for lane in range(len(self._weights))])

    def _send(self, lanes: Tensor) -> dict[str, Message]:
        """Sum everything up over the processes; what is no bank, and `lanes`, is there on return."""
        small = [gradient for name, gradient in self._sum.items() if name not in self._shares]
        if not self._is_settled:
            torch._foreach_mul_(small, self._factor)
        first = collectives.begin_sum(self._context, [*small, lanes])
        arriving = {name: collectives.begin_scatter(self._context, self._settled(name)) for name in self._shares}
        self._factor = 1.0
        first.wait()
        return arriving

    def _settled(self, name: str) -> Tensor:
        """The sum of a bank, multiplied with what was put off, and zeros up to a number of layers that divides."""
        gradient, whole = self._sum[name], self._padded.get(name)
        if whole is None:
            return gradient if self._is_settled else gradient.mul_(self._factor)
        self._sum[name] = whole[: len(gradient)]
        torch.mul(gradient, self._factor, out=self._sum[name])
        return whole

    def _norm_of_average(self, arriving: Mapping[str, Message]) -> Tensor:
        """L2 norm of what all processes have together, 0-dim: of all layers, and once of what each of them has."""
        own = [] if not self._context.is_main else [g for name, g in self._sum.items() if name not in self._shares]
        for name, share in self._shares.items():
            if name in arriving:
                arriving[name].wait()
            if share.num_own:
                own.append(share.of(self._sum[name]))
        norm = total_norm(own) if own else self._norms[0].new_zeros(())
        if not self._context.has_peers:
            return norm
        return collectives.summed(self._context, norm.square()).sqrt()

    @property
    def _is_settled(self) -> bool:
        return not isinstance(self._factor, Tensor) and self._factor == 1.0

    def _settle(self) -> None:
        """Multiply the sum with what was put off."""
        if not self._is_settled:
            torch._foreach_mul_(list(self._sum.values()), self._factor)
            self._factor = 1.0


def total_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm over all elements of all tensors, 0-dim, by one multi-tensor pass."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def _clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    return (max_norm / (norm + _NORM_EPS)).clamp(max=1.0)
