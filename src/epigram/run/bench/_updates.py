"""The parts of an update, timed on made-up gradients: for the benchmark of a step, and for its own."""

from collections.abc import Callable

import torch
from torch import Tensor

from epigram.optim import cost
from epigram.optim.adamw import AdamW
from epigram.optim.muon import Muon, resolve_dtype
from epigram.run.bench.base import Bench, Work
from epigram.run.setup import Engine

RATE, MOMENTUM = 0.01, 0.95
"""Small steps: after any number of them the weights are still numbers."""


class Updates:
    """Made-up gradients of an engine's parameters for each of its lanes, and what is done with them."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._engine = bench, bench.engine
        self._parameters = list(self._engine.model.parameters())
        self._saved = [1e-3 * torch.randn_like(p) for p in self._parameters]
        self._lanes = [[g.clone() for g in self._saved] for _ in self._engine.lanes]

    def _time(
        self, name: str, work: Callable[[], object], *parts: Work, before: Callable[[], None] | None = None
    ) -> None:
        self._bench.time(name, work, *parts, before=before, queued=True)

    def time_all(self, name: str) -> None:
        """Clipping, the optimizer and the average, as at the end of a step."""
        self._time(name, self._whole, *update_work(self._engine), before=self._reset)

    def time_clip(self) -> None:
        lanes = len(self._engine.lanes)
        name = f"clip: {self._engine.config.gradients.clip}, {lanes} lane{'s' if lanes > 1 else ''}"
        self._time(name, self._clip, *clip_work(self._engine), before=self._reset)

    def time_optimizer(self) -> None:
        self._time("optimizer", self._step, *optimizer_work(self._engine), before=self._give)

    def time_average(self) -> None:
        if self._engine.config.average.mode == "none":
            self._bench.left_out["EMA"] = 'average.mode is "none"'
            return
        self._time("EMA", self._engine.average.update, *average_work(self._engine))

    def time_rules(self) -> None:
        """Muon and AdamW each by itself."""
        named, roles = dict(self._engine.model.named_parameters()), self._engine.model.roles()
        groups = {rule: [g for g in self._engine.optimizer.groups if g.rule == rule] for rule in ("muon", "adamw")}
        config, device = self._engine.config.optim, self._engine.context.device
        rate, momentum, scale = (torch.full((), value, device=device) for value in (RATE, MOMENTUM, 1.0))
        muon = Muon(named, roles, groups["muon"], config.muon, fused=self._engine.optimizer.fused)
        self._time("Muon", lambda: muon.step(rate, momentum, scale), *muon_work(self._engine), before=self._give)
        adamw = AdamW(named, groups["adamw"], config.adamw)
        self._time("AdamW", lambda: adamw.step(rate, scale), *adamw_work(self._engine), before=self._give)
        self._engine.optimizer.zero_grad()

    # -- what is timed ----------------------------------------------------------------------------------------------

    def _whole(self) -> None:
        self._step(self._clip())
        self._engine.average.update()

    def _clip(self) -> Tensor:
        """What clipping leaves to the optimizer as a factor."""
        for lane, gradients in zip(self._engine.lanes, self._lanes, strict=True):
            self._give(gradients)
            self._engine.gradients.add(lane)
        return self._engine.gradients.finish().scale

    def _step(self, scale: Tensor | None = None) -> None:
        self._engine.optimizer.step(RATE, MOMENTUM, scale)
        self._engine.optimizer.zero_grad()

    def _reset(self) -> None:
        """The gradients as they were: clipping again and again would make them vanish."""
        for gradients in self._lanes:
            torch._foreach_copy_(gradients, self._saved)

    def _give(self, gradients: list[Tensor] | None = None) -> None:
        for parameter, gradient in zip(self._parameters, gradients or self._saved, strict=True):
            parameter.grad = gradient


# -- what each part cannot do without --------------------------------------------------------------------------------


def update_work(engine: Engine) -> tuple[Work, ...]:
    """Of clipping, the optimizer and the average, one after the other."""
    return *clip_work(engine), *optimizer_work(engine), *average_work(engine)


def clip_work(engine: Engine) -> tuple[Work, ...]:
    return (Work(bytes=cost.clip_bytes(_num_weights(engine), len(engine.lanes), engine.config.gradients.clip)),)


def optimizer_work(engine: Engine) -> tuple[Work, ...]:
    return *muon_work(engine), *adamw_work(engine)


def muon_work(engine: Engine) -> tuple[Work, ...]:
    roles, banks, config = engine.model.roles(), _banks(engine), engine.config.optim.muon
    flops = cost.muon_flops({name: roles[name] for name in banks}, banks, config.num_iterations)
    momentum_bytes = resolve_dtype(config.momentum_dtype, engine.context.device).itemsize
    return Work(flops=flops), Work(bytes=cost.muon_bytes(_count(banks), momentum_bytes))


def adamw_work(engine: Engine) -> tuple[Work, ...]:
    return (Work(bytes=cost.adamw_bytes(_num_weights(engine) - _count(_banks(engine)))),)


def average_work(engine: Engine) -> tuple[Work, ...]:
    averages = engine.config.average.mode != "none"
    return (Work(bytes=cost.average_bytes(_num_weights(engine))),) if averages else ()


def _num_weights(engine: Engine) -> int:
    return sum(parameter.numel() for parameter in engine.model.parameters())


def _banks(engine: Engine) -> dict[str, tuple[int, ...]]:
    roles = engine.model.roles()
    return {n: tuple(p.shape) for n, p in engine.model.named_parameters() if roles[n].kind == "matrix"}


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())
