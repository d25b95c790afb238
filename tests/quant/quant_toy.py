"""A model's parameters in small, and inputs whose columns are correlated as those of a network are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from epigram.roles import ParameterRole

LAYERS = 3
COLUMNS = {"qkv": 32, "out": 32, "up": 32, "down": 80}  # of the inputs that a tap shows, by bank


@dataclass
class Toy:
    """Parameters, their roles, and Hessians by tap."""

    named: dict[str, Tensor]
    roles: dict[str, ParameterRole]
    hessians: dict[str, Tensor]


def correlated_inputs(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """(rows, cols) float32: a few directions carry most of the energy, and columns differ in size."""
    directions = torch.randn(cols // 4, cols, generator=generator)
    shared = torch.randn(rows, cols // 4, generator=generator) @ directions
    own = torch.randn(rows, cols, generator=generator)
    return (shared * 0.5 + own) * torch.rand(cols, generator=generator).add(0.1)


def gram(cols: int, generator: torch.Generator) -> Tensor:
    inputs = correlated_inputs(4 * cols, cols, generator)
    return inputs.mT @ inputs


def make_toy() -> Toy:
    generator = torch.Generator().manual_seed(3)

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.14

    def bank(name: str, *splits: tuple[str, int]) -> ParameterRole:
        return ParameterRole(kind="matrix", num_layers=LAYERS, bank=name, splits=splits)

    named = {
        "embed": weights(50, 32),
        "banks.qkv": weights(LAYERS, 64, 32),
        "banks.out": weights(LAYERS, 32, 32),
        "banks.up": weights(LAYERS, 80, 32),
        "banks.down": weights(LAYERS, 32, 80),
        "bigram.embed": weights(70, 8),
        "bigram.proj": weights(32, 8),
        "backout": torch.tensor(0.1),
        "resid_mix": weights(LAYERS, 2, 32),
    }
    roles = {
        "embed": ParameterRole(kind="table", bank="head"),
        "banks.qkv": bank("qkv", ("q", 32), ("k", 16), ("v", 16)),
        "banks.out": bank("out", ("out", 32)),
        "banks.up": bank("up", ("up", 80)),
        "banks.down": bank("down", ("down", 32)),
        "bigram.embed": ParameterRole(kind="table"),
        "bigram.proj": ParameterRole(kind="control"),
        "backout": ParameterRole(kind="control"),
        "resid_mix": ParameterRole(kind="control", num_layers=LAYERS),
    }
    taps = {f"layers.{i}.{name}": cols for i in range(LAYERS) for name, cols in COLUMNS.items()}
    hessians = {tap: gram(cols, generator) for tap, cols in taps.items()}
    return Toy(named, roles, hessians | {"head": gram(32, generator)})
