"""Muon over several processes against Muon in one: weights, momentum, and what is sent in which order."""

import math

import pytest
import torch
from peers import Peers
from torch import Tensor

from epigram.dist.context import Context
from epigram.dist.share import Share
from epigram.optim.average import Ema
from epigram.optim.gradients import LaneGradients
from epigram.optim.groups import OptimConfig
from epigram.optim.optimizer import Optimizer

STEPS = 4
WORLD_SIZES = [2, 3, 4, 8]  # of five layers: parts of 3, 2 and 1, with one, two, none and three places to fill


def matrices_of(small) -> list[str]:
    return [name for name, role in small.roles.items() if role.kind == "matrix"]


class Run:
    """Steps of one process, which has the lanes rank, rank + world_size, ... of as many as the largest run has."""

    def __init__(self, small, config: OptimConfig, context: Context, clip: str) -> None:
        self.small, self.context = small.clone(), context
        self.lanes = range(context.rank, max(WORLD_SIZES), context.world_size)
        self.banks = matrices_of(small)
        self.gradients = LaneGradients(
            self.small.named, clip=clip, max_norm=3.0, lane_weights=[1 / max(WORLD_SIZES)] * max(WORLD_SIZES),
            banks=self.banks, context=context,
        )  # fmt: skip
        self.optimizer = Optimizer(self.small.named, self.small.roles, config, context=context)
        self.average = Ema(self.small.named, 0.75)
        self.done: list[str] = []

    def step(self, step: int) -> None:
        for lane in self.lanes:
            self.small.fill_gradients(100 * step + lane)
            self.gradients.add(lane)
        gathered = self.gradients.finish()
        self.average.set_weight()
        self.done.clear()
        self.optimizer.step(1.0 - 0.1 * step, 0.9, gathered.scale, arriving=gathered.arriving, done=self._complete)
        self.optimizer.zero_grad()

    def _complete(self, names) -> None:
        self.done += names
        self.average.apply(names)

    def weights(self) -> dict[str, Tensor]:
        averages = {f"average.{name}": t for name, t in self.average.state_dict().items()}
        return {**{name: p.detach().clone() for name, p in self.small.named.items()}, **averages}

    def momentum(self) -> dict[str, Tensor]:
        return {name: self.optimizer._muon._momentum[name] for name in self.banks}


def close(left: Tensor, right: Tensor, name: str) -> None:
    distance = torch.linalg.vector_norm((left - right).double())
    assert distance <= 1e-5 * torch.linalg.vector_norm(right.double()), name


@pytest.mark.parametrize("clip", ["lane", "global", "none"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_several_are_one(small, config: OptimConfig, world_size: int, clip: str, monkeypatch) -> None:
    alone = Run(small, config, Context(), clip)
    for step in range(STEPS):
        alone.step(step)
    peers = Peers(monkeypatch, world_size)

    def one(context: Context) -> Run:
        run = Run(small, config, context, clip)
        for step in range(STEPS):
            run.step(step)
        return run

    runs = peers.run(one)
    expected = alone.weights()
    for name, tensor in runs[0].weights().items():
        close(tensor, expected[name], name)
        assert all(run.weights()[name].equal(tensor) for run in runs), f"{name} differs between processes"
    for name, momentum in alone.momentum().items():
        parts = [run.momentum()[name] for run in runs]
        assert [len(part) for part in parts] == [Share(5, rank, world_size).num_own for rank in range(world_size)]
        close(torch.cat(parts), momentum, f"momentum of {name}")


def test_the_same_messages_in_the_same_order_everywhere(small, config: OptimConfig, monkeypatch) -> None:
    """The small one, banks by size, then the updates of each batch, the largest first: however many lanes one has."""
    peers = Peers(monkeypatch, 3)
    peers.run(lambda context: Run(small, config, context, "lane").step(0))
    others = sum(p.numel() for name, p in small.named.items() if small.roles[name].kind != "matrix")
    banks = [("scatter", 6 * rows * cols) for rows, cols in ((40, 16), (16, 40), (32, 16), (16, 16))]
    gathers = [
        ("gather", 2 * short * long) for short, long in ((16, 40), (16, 40), (16, 16), (16, 16), (8, 16), (8, 16))
    ]
    assert peers.sent == [[("sum", others + 2 * 8), *banks, *gathers]] * 3


def test_a_step_that_is_left_out_changes_nothing_anywhere(small, config: OptimConfig, monkeypatch) -> None:
    """Also where the gradients are not numbers, in the rows of other processes and in one's own."""
    peers = Peers(monkeypatch, 2)
    runs = peers.run(lambda context: left_out(Run(small, config, context, "lane")))
    for before, after in runs:
        assert [name for name in before if not before[name].equal(after[name])] == []


def left_out(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All state before and after a step whose scale is 0, with gradients of one process that are not numbers."""

    def everything() -> dict[str, Tensor]:
        momentum = {f"momentum.{name}": t for name, t in run.momentum().items()}
        return {name: t.clone() for name, t in ({n: p.detach() for n, p in run.small.named.items()} | momentum).items()}

    run.step(0)
    before = everything()
    for lane in run.lanes:
        for parameter in run.small.named.values():
            parameter.grad = torch.full(parameter.shape, math.nan if run.context.rank == 1 else 1.0)
        run.gradients.add(lane)
    gathered = run.gradients.finish()
    assert not bool(gathered.norm.isfinite()), "every process sees it"
    run.optimizer.step(1.0, 0.9, torch.zeros(()), arriving=gathered.arriving)
    return before, everything()


def test_every_parameter_is_done_once_and_banks_as_their_last_matrix_is(small, config: OptimConfig) -> None:
    run = Run(small, config, Context(), "lane")
    run.step(0)
    assert sorted(run.done) == sorted(small.named)
    assert run.done[-4:] == ["banks.up", "banks.down", "banks.out", "banks.qkv"]
