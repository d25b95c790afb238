"""Which update rule, learning rate and weight decay each parameter gets, from its role alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from epigram.errors import UserError
from epigram.optim.adamw import AdamWConfig, AdamWOverride
from epigram.optim.base import Group, Part
from epigram.optim.muon import MuonConfig
from epigram.roles import ParameterRole


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of the two update rules."""

    muon: MuonConfig
    adamw: AdamWConfig


def assign(
    named: Mapping[str, nn.Parameter], roles: Mapping[str, ParameterRole], config: OptimConfig
) -> tuple[Group, ...]:
    """Put every parameter into exactly one group, or every layer of it where its layers differ.

    Matrices go to Muon and tables to AdamW's "token". A control tensor stacked by layer is split between
    "scalar early" and "scalar late" (layer >= num_layers // 2), any other belongs to "scalar early"; matrices
    are split likewise. Empty groups are left out. Raises UserError for an override of a parameter that AdamW
    does not have. Source: parameter-golf #1130, #1212.
    """
    assert named.keys() == roles.keys(), sorted(named.keys() ^ roles.keys())
    _check_overrides(roles, config.adamw.overrides)
    overrides = {override.parameter: override for override in config.adamw.overrides}
    groups = _groups(config)
    parts: dict[Group, list[Part]] = {group: [] for group in groups.values()}
    for name, role in roles.items():
        for base, part in _places(name, role):
            parts.setdefault(_overridden(groups[base], overrides.get(name)), []).append(part)
    assigned = tuple(replace(group, parts=tuple(members)) for group, members in parts.items() if members)
    assert_partition(named, assigned)
    return assigned


def assert_partition(named: Mapping[str, nn.Parameter], groups: Sequence[Group]) -> None:
    """Assert that each parameter, or each layer of it, is in exactly one group; name those that are not."""
    parts: dict[str, list[Part]] = {name: [] for name in named}
    for group in groups:
        for part in group.parts:
            assert part.name in parts, f"group {group.name!r} holds {part.name}, which is no parameter"
            parts[part.name].append(part)
    wrong = [name for name in named if not _covered_once(parts[name], named[name])]
    assert not wrong, f"not in exactly one optimizer group: {', '.join(wrong)}"


def _covered_once(parts: Sequence[Part], parameter: nn.Parameter) -> bool:
    if any(part.layers is None for part in parts):
        return len(parts) == 1
    layers = sorted(layer for part in parts if part.layers for layer in range(*part.layers))
    return parameter.dim() > 0 and layers == list(range(parameter.shape[0]))


def _groups(config: OptimConfig) -> dict[str, Group]:
    muon, adamw = config.muon, config.adamw
    scalar_decay = adamw.weight_decay_scalar
    groups = [
        Group(name="muon early", rule="muon", lr=muon.lr_early, weight_decay=muon.weight_decay),
        Group(name="muon late", rule="muon", lr=muon.lr_late, weight_decay=muon.weight_decay),
        Group(name="token", rule="adamw", lr=adamw.lr_token, weight_decay=adamw.weight_decay_token),
        Group(name="scalar early", rule="adamw", lr=adamw.lr_scalar_early, weight_decay=scalar_decay),
        Group(name="scalar late", rule="adamw", lr=adamw.lr_scalar_late, weight_decay=scalar_decay),
    ]
    return {group.name: group for group in groups}


def _places(name: str, role: ParameterRole) -> list[tuple[str, Part]]:
    """The groups, by name, that share parameter `name`, and what each gets."""
    if role.kind == "table":
        return [("token", Part(name))]
    family = "muon" if role.kind == "matrix" else "scalar"
    if not role.num_layers:
        assert role.kind == "control", name
        return [(f"{family} early", Part(name))]
    half = role.num_layers // 2
    halves = [(f"{family} early", (0, half)), (f"{family} late", (half, role.num_layers))]
    return [(group, Part(name, layers)) for group, layers in halves if layers[0] < layers[1]]


def _overridden(group: Group, override: AdamWOverride | None) -> Group:
    if override is None:
        return group
    return replace(
        group,
        name=f"{group.name}, {override.parameter}",
        lr=group.lr * override.lr_scale,
        weight_decay=override.weight_decay,
    )


def _check_overrides(roles: Mapping[str, ParameterRole], overrides: Sequence[AdamWOverride]) -> None:
    known = [name for name, role in roles.items() if role.kind != "matrix"]
    wrong = [override.parameter for override in overrides if override.parameter not in known]
    if wrong:
        raise UserError(
            f"adamw.overrides names {', '.join(wrong)}, which AdamW does not train in this model: "
            f"choose among {', '.join(known)}, or remove the override"
        )
