"""What the optimizer's parts share: groups of parameters, checks of settings, strict restoring of state."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from epigram.dist.share import copy_in
from epigram.errors import UserError


class Part(NamedTuple):
    """A whole parameter (`layers` is None), or layers first..stop-1 of one whose axis 0 is the layer."""

    name: str
    layers: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """This part of `tensor`, which has the parameter's shape, as a view."""
        return tensor if self.layers is None else tensor[self.layers[0] : self.layers[1]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameter parts that share an update rule, a base learning rate and a decoupled weight decay."""

    name: str
    rule: Literal["muon", "adamw"]
    lr: float
    weight_decay: float
    parts: tuple[Part, ...] = ()


def outside(name: str, value: float, low: float, high: float = math.inf) -> list[str]:
    """[an error sentence] when setting `name` is no finite number in low..high, else []."""
    if math.isfinite(value) and low <= value <= high:
        return []
    allowed = f"{low} or more" if high == math.inf else f"between {low} and {high}"
    return [f"{name} = {value} is out of range: choose a number {allowed}"]


def not_among(name: str, value: str, choices: Iterable[str]) -> list[str]:
    """[an error sentence] when setting `name` is none of `choices`, else []."""
    choices = list(choices)
    return [] if value in choices else [f"{name} = {value!r} does not exist: choose one of {', '.join(choices)}"]


def refuse(problems: list[str]) -> None:
    """Raise one UserError that holds all `problems`, if there are any."""
    if problems:
        raise UserError("; ".join(problems))


@torch.no_grad()
def restore(state: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy `saved` into the live tensors of `state` in place, on whatever device they are.

    Of a tensor that several processes share, see `epigram.dist.share`, each takes its part out of the whole.
    All or nothing: raises UserError naming every missing, extra or differently shaped or typed tensor, and
    then nothing has been changed. `what` names the owner of the state in that message.
    """
    problems = [f"{name} is missing" for name in state.keys() - saved.keys()]
    problems += [f"{name} is not part of it" for name in saved.keys() - state.keys()]
    for name in state.keys() & saved.keys():
        have, want = saved[name], state[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(f"{name} is {have.dtype} {tuple(have.shape)} instead of {want.dtype} {tuple(want.shape)}")
    if problems:
        raise UserError(
            f"the saved state does not fit {what} ({'; '.join(sorted(problems))}): resume with the recipe, "
            "settings and kind of device that it was saved with"
        )
    for name, tensor in state.items():
        copy_in(tensor, saved[name])
