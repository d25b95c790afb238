"""A model's parameters in small: every kind of role, unequal splits, scalars, per-layer control tensors."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from epigram.optim.adamw import AdamWConfig
from epigram.optim.groups import OptimConfig
from epigram.optim.muon import MuonConfig
from epigram.roles import ParameterRole

sys.path.insert(0, str(Path(__file__).parent))

LAYERS = 5  # odd, so that early (2) and late (3) differ in number


def _bank(bank: str, *splits: tuple[str, int]) -> ParameterRole:
    return ParameterRole(kind="matrix", num_layers=LAYERS, bank=bank, splits=splits)


_LAYERED = ParameterRole(kind="control", num_layers=LAYERS)
_SINGLE = ParameterRole(kind="control")
_TABLE = ParameterRole(kind="table")

ROLES_AND_SHAPES = {
    "banks.qkv": (_bank("qkv", ("q", 16), ("k", 8), ("v", 8)), (LAYERS, 32, 16)),
    "banks.out": (_bank("out", ("out", 16)), (LAYERS, 16, 16)),
    "banks.up": (_bank("up", ("up", 40)), (LAYERS, 40, 16)),
    "banks.down": (_bank("down", ("down", 16)), (LAYERS, 16, 40)),
    "embed": (_TABLE, (64, 16)),
    "bigram.proj": (_SINGLE, (16, 4)),
    "backout": (_SINGLE, ()),
    "skip.weight": (_SINGLE, (2, 16)),
    "attn_scale": (_LAYERED, (LAYERS, 16)),
    "resid_mix": (_LAYERED, (LAYERS, 2, 16)),
}


@dataclass
class Small:
    """Parameters, their roles, and gradients on demand."""

    named: dict[str, nn.Parameter]
    roles: dict[str, ParameterRole]

    def fill_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    def clone(self) -> "Small":
        return Small({name: nn.Parameter(p.detach().clone()) for name, p in self.named.items()}, dict(self.roles))


@pytest.fixture
def small() -> Small:
    generator = torch.Generator().manual_seed(7)
    named = {
        name: nn.Parameter(torch.randn(shape, generator=generator)) for name, (_, shape) in ROLES_AND_SHAPES.items()
    }
    return Small(named, {name: role for name, (role, _) in ROLES_AND_SHAPES.items()})


@pytest.fixture
def config() -> OptimConfig:
    return OptimConfig(
        muon=MuonConfig(lr_early=0.024, lr_late=0.019, weight_decay=0.04),
        adamw=AdamWConfig(
            lr_token=0.022,
            lr_scalar_early=0.020,
            lr_scalar_late=0.038,
            weight_decay_token=0.04,
            weight_decay_scalar=0.03,
        ),
    )
