"""Each parameter in exactly one group, with the rates of the published table."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from epigram.errors import UserError
from epigram.optim.adamw import AdamWOverride
from epigram.optim.base import Part
from epigram.optim.groups import OptimConfig, assert_partition, assign
from epigram.roles import ParameterRole


def test_groups_of_every_role(small, config: OptimConfig) -> None:
    groups = {group.name: group for group in assign(small.named, small.roles, config)}
    members = {name: set(group.parts) for name, group in groups.items()}
    banks = ["banks.qkv", "banks.out", "banks.up", "banks.down"]
    stacked = ["attn_scale", "resid_mix"]
    assert members == {
        "muon early": {Part(name, (0, 2)) for name in banks},
        "muon late": {Part(name, (2, 5)) for name in banks},
        "token": {Part("embed")},
        "scalar early": {Part("bigram.proj"), Part("backout"), Part("skip.weight")}
        | {Part(name, (0, 2)) for name in stacked},
        "scalar late": {Part(name, (2, 5)) for name in stacked},
    }
    rates = {name: (group.rule, group.lr, group.weight_decay) for name, group in groups.items()}
    assert rates == {
        "muon early": ("muon", 0.024, 0.04),
        "muon late": ("muon", 0.019, 0.04),
        "token": ("adamw", 0.022, 0.04),
        "scalar early": ("adamw", 0.020, 0.03),
        "scalar late": ("adamw", 0.038, 0.03),
    }


def test_every_element_belongs_to_one_group(small, config: OptimConfig) -> None:
    count = {name: torch.zeros(p.shape) for name, p in small.named.items()}
    for group in assign(small.named, small.roles, config):
        for part in group.parts:
            part.of(count[part.name]).add_(1)
    assert all(tensor.eq(1).all() for tensor in count.values())


def test_partition_names_what_is_wrong(small, config: OptimConfig) -> None:
    groups = assign(small.named, small.roles, config)
    by_name = {group.name: group for group in groups}
    without_table = [group for group in groups if group.name != "token"]
    with pytest.raises(AssertionError, match=r"exactly one optimizer group: embed$"):
        assert_partition(small.named, without_table)
    with pytest.raises(AssertionError, match=r"exactly one optimizer group: attn_scale, resid_mix$"):
        assert_partition(small.named, [group for group in groups if group.name != "scalar late"])
    token = by_name["token"]
    twice = replace(token, parts=(*token.parts, Part("backout"), Part("banks.up", (1, 3))))
    with pytest.raises(AssertionError, match=r"group: banks\.up, backout$"):
        assert_partition(small.named, [*without_table, twice])
    with pytest.raises(AssertionError, match="ghost, which is no parameter"):
        assert_partition(small.named, [*groups, replace(token, parts=(Part("ghost"),))])


def test_one_layer_is_late(config: OptimConfig) -> None:
    named = {"scale": nn.Parameter(torch.ones(1, 4))}
    roles = {"scale": ParameterRole(kind="control", num_layers=1)}
    (group,) = assign(named, roles, config)
    assert (group.name, group.parts) == ("scalar late", (Part("scale", (0, 1)),))


def test_parameter_without_role_is_refused(small, config: OptimConfig) -> None:
    del small.roles["backout"]
    with pytest.raises(AssertionError, match="backout"):
        assign(small.named, small.roles, config)


def _with_overrides(config: OptimConfig, *overrides: AdamWOverride) -> OptimConfig:
    return replace(config, adamw=replace(config.adamw, overrides=overrides))


def test_override_scales_both_halves_and_sets_decay(small, config: OptimConfig) -> None:
    override = AdamWOverride(parameter="resid_mix", lr_scale=5.0, weight_decay=0.0)
    groups = assign(small.named, small.roles, _with_overrides(config, override))
    found = {group.parts: (group.lr, group.weight_decay) for group in groups if "resid_mix" in group.name}
    assert found == {
        (Part("resid_mix", (0, 2)),): (0.020 * 5, 0.0),
        (Part("resid_mix", (2, 5)),): (0.038 * 5, 0.0),
    }


@pytest.mark.parametrize("name", ["no_such", "banks.up"])
def test_override_of_what_adamw_does_not_train_is_an_error(small, config: OptimConfig, name: str) -> None:
    override = AdamWOverride(parameter=name, lr_scale=5.0, weight_decay=0.0)
    with pytest.raises(UserError, match=rf"{name}, which AdamW does not train.*choose among embed"):
        assign(small.named, small.roles, _with_overrides(config, override))
