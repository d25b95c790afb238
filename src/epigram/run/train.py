"""The training loop: one screen, everything else a call."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from epigram.dist import collectives
from epigram.errors import UserError
from epigram.model.gpt import BankTransform
from epigram.optim import schedule
from epigram.optim.base import restore
from epigram.run import checkpoint
from epigram.run.budget import WallClock, not_counted, write_clock
from epigram.run.graphs import Key
from epigram.run.record import RunRecord
from epigram.run.setup import Engine, Session, state_of

UPDATE = "epigram update"
"""In a profile, the range in which gradients become new weights: what is launched there is the optimizer's."""

_HOST_AHEAD = 2  # steps that the host may queue before it waits for the device
_FACTS = (
    "recipe",
    "seed",
    "parameters",
    "data",
    "transform",
    "forecast_bytes",
    "warmup_s",
)  # of the result, for a later export


class DivergedError(UserError):
    """The loss or the gradient is no finite number any more."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What the schedules say for one step. progress: share of the training time that is over."""

    step: int
    elapsed_s: float
    progress: float
    lr_multiplier: float
    momentum: float
    gamma: float
    qat: bool


def plan_step(session: Session, elapsed_s: float) -> StepPlan:
    """The schedules' values at this step: a pure function of the step and the agreed clock."""
    config, budget_s = session.config.schedule, session.config.budget.optimize_s
    multiplier = schedule.lr_multiplier(elapsed_s, session.step, budget_s, config)
    return StepPlan(
        step=session.step,
        elapsed_s=elapsed_s,
        progress=elapsed_s / budget_s,
        lr_multiplier=multiplier,
        momentum=schedule.muon_momentum(session.step, config),
        gamma=schedule.mile_gamma(elapsed_s / budget_s, config),
        qat=schedule.qat_active(multiplier, session.step, config),
    )


def train(session: Session, record: RunRecord, validate: Callable[[], dict[str, float]]) -> None:
    """Take steps until the time or the number of steps is over; the averages are not yet put in place.

    Afterwards session.trained_s is what counts against the budget, to the end of the last step on the device.

    validate: scores the current weights; it runs outside the clock.
    Raises DivergedError when a loss or a gradient is not finite.
    """
    run, pace, watch = session.config.run, _Pace(session), WallClock()
    session.clock.start(session.trained_s)
    watch.start(session.trained_s)
    next_checkpoint_s = session.clock.elapsed_s(session.step) + run.checkpoint_every_s
    while not _is_over(session, elapsed_s := session.clock.elapsed_s(session.step)):
        if run.val_every and session.step % run.val_every == 0:
            pace.drain()  # what the device has not done yet does count
            with not_counted(session.clock, watch):
                record.validation(step=session.step, elapsed_s=elapsed_s, **validate())
        session.times_s.append(elapsed_s)
        plan = plan_step(session, elapsed_s)
        measured = train_step(session, plan)
        session.step += 1
        pace.push(plan, measured)
        if run.log_every and (session.step % run.log_every == 0 or session.step <= 10):
            pace.drain()
            record.step(**_log_line(session, pace, watch))
        if run.checkpoint_every_s and elapsed_s >= next_checkpoint_s:
            next_checkpoint_s += run.checkpoint_every_s
            pace.drain()
            session.trained_s = watch.elapsed_s(session.step)
            with not_counted(session.clock, watch):
                save_checkpoint(session, record)
    pace.drain()
    session.trained_s = watch.elapsed_s(session.step)


def train_step(session: Session, plan: StepPlan) -> Tensor:
    """One step over this process's lanes; returns (loss, gradient norm), means over all lanes, as a device tensor."""
    return compute_step(session, session.loader.next_step(), plan)


def compute_step(engine: Engine, batches: Sequence[Tensor], plan: StepPlan) -> Tensor:
    """A step on given tokens, int64 (num_seqs, seq_len + 1) on the host for each of this process's lanes."""
    gamma, transform = gamma_of(engine, plan.gamma), engine.quantized if plan.qat else None
    losses = []
    for lane, batch in zip(engine.lanes, batches, strict=True):
        losses.append(lane_step(engine, batch, gamma, transform))
        with record_function(UPDATE):
            engine.gradients.add(lane, lent=engine.lends_gradients)
    with record_function(UPDATE):
        gathered = engine.gradients.finish(engine.reduce())
        engine.optimizer.step(plan.lr_multiplier, plan.momentum, gathered.scale)
        engine.optimizer.zero_grad()
        engine.average.update()
    measured = torch.stack([torch.stack(losses).mean(), gathered.norms.mean()])
    collectives.sum_(engine.context, [measured])  # so that every rank sees a loss that is not finite in the same step
    return measured / engine.context.world_size


def lane_step(engine: Engine, batch: Tensor, gamma: Tensor | None, transform: BankTransform | None) -> Tensor:
    """Forward and backward of a lane: its gradients go to `.grad`, its loss is returned, 0-dim.

    A lane of this shape and phase that is recorded is replayed; see `epigram.run.graphs`.
    """
    graph = engine.graphs.get(Key(tuple(batch.shape), transform is not None))
    if graph is not None:
        return graph(batch, gamma)
    return forward_backward(engine, batch.to(engine.context.device, non_blocking=True), gamma, transform)


def forward_backward(engine: Engine, tokens: Tensor, gamma: Tensor | None, transform: BankTransform | None) -> Tensor:
    """`lane_step` on tokens on the device, launched kernel by kernel."""
    loss = engine.lane_loss(tokens[:, :-1], tokens[:, 1:], gamma, engine.config.loss.mile_floor, transform)
    loss.backward()
    return loss.detach()


def gamma_of(engine: Engine, gamma: float) -> Tensor | None:
    """The exponent of the entropy weighting as the loss takes it; None where the recipe does not weight."""
    return torch.full((), gamma, device=engine.context.device) if engine.config.schedule.mile_peak else None


def figures(session: Session) -> dict[str, Any]:
    """What a result says of the training so far."""
    return {
        "train_s": round(session.trained_s, 3),
        "steps": session.step,
        "tokens": session.step * session.config.tokens_per_step,
        "step_ms": round(1000 * session.trained_s / max(session.step, 1), 3),
    }


def save_checkpoint(session: Session, record: RunRecord) -> None:
    """Write all that a resumed run or an export needs; only rank 0 writes. Raises UserError when it cannot."""
    if session.context.is_main:
        known = {key: record.result[key] for key in _FACTS if key in record.result}
        state = {
            "step": session.step,
            "times_s": session.times_s,
            "trained_s": session.trained_s,
            "loader": session.loader.state_dict(),
            "facts": known | figures(session),
        }
        checkpoint.save(record.folder, session.step, state_of(session), state, session.config.run.checkpoint_keep)
        write_clock(record.folder, session.times_s)


def resume(session: Session, saved: checkpoint.Checkpoint) -> None:
    """Put a checkpoint's state into a freshly built session. Raises UserError when it is that of another recipe."""
    session.loader.load_state_dict(saved.state["loader"])
    restore(session.model.state_dict(), saved.part("model"), "this model")
    session.optimizer.load_state_dict(saved.part("optimizer"))
    session.average.load_state_dict(saved.part("average"))
    session.step, session.times_s = saved.state["step"], list(saved.state["times_s"])
    session.trained_s = saved.state["trained_s"]


def _is_over(session: Session, elapsed_s: float) -> bool:
    limit = session.config.budget.max_steps
    return elapsed_s >= session.config.budget.optimize_s or (limit > 0 and session.step >= limit)


def _log_line(session: Session, pace: "_Pace", watch: WallClock) -> dict[str, Any]:
    plan, loss, norm = pace.latest
    elapsed_s = session.clock.elapsed_s(session.step)
    tokens = session.step * session.config.tokens_per_step
    recent = pace.step_s(watch.elapsed_s(session.step), session.step)
    return {
        "step": session.step,
        "elapsed_s": elapsed_s if math.isfinite(elapsed_s) else plan.elapsed_s,
        "train_loss": loss,
        "lr": plan.lr_multiplier,
        "momentum": plan.momentum,
        "gamma": plan.gamma,
        "grad_norm": norm,
        "tokens": tokens,
        "tokens_per_s": session.config.tokens_per_step / recent if recent else 0.0,
        "step_ms": 1000 * recent,
        "phase": "qat" if plan.qat else "train",
    }


class _Pace:
    """Keeps the host at most two steps ahead of the device, and reads each step's numbers without making it wait."""

    def __init__(self, session: Session) -> None:
        self._cuda = session.context.device.type == "cuda"
        self._queue: deque[tuple[StepPlan, Tensor, torch.cuda.Event | None]] = deque()
        self.latest: tuple[StepPlan, float, float] = (plan_step(session, 0.0), math.nan, math.nan)
        self._last = (session.step, session.trained_s)

    def push(self, plan: StepPlan, measured: Tensor) -> None:
        """`measured` of this step is on its way."""
        event = None
        if self._cuda:
            host = torch.empty(measured.shape, dtype=measured.dtype, pin_memory=True)
            measured = host.copy_(measured, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._queue.append((plan, measured, event))
        while len(self._queue) > _HOST_AHEAD:
            self._pop()

    def drain(self) -> None:
        """Wait until every step is done."""
        while self._queue:
            self._pop()

    def step_s(self, trained_s: float, step: int) -> float:
        """Mean seconds that a step really took since the last call; `step` has grown."""
        last_step, last_s = self._last
        self._last = (step, trained_s)
        return (trained_s - last_s) / (step - last_step)

    def _pop(self) -> None:
        plan, measured, event = self._queue.popleft()
        if event is not None:
            event.synchronize()
        loss, norm = measured.tolist()
        self.latest = (plan, loss, norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"step {plan.step + 1} gave a loss of {loss} and a gradient norm of {norm}: lower the learning rates "
                "(optim.muon.lr_early, lr_late) or look for damaged data"
            )
