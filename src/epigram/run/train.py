"""The training loop: one screen, everything else a call."""

import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from epigram.data.lanes import Lane
from epigram.errors import StoppedError, UserError
from epigram.model.gpt import BankTransform
from epigram.optim import schedule
from epigram.optim.base import restore
from epigram.optim.gradients import Gathered
from epigram.run import checkpoint
from epigram.run.budget import CLOCK_FILE, WallClock, not_counted, write_clock
from epigram.run.decision import agree
from epigram.run.drift import check_replicas
from epigram.run.graphs import Key
from epigram.run.guard import Measured, verdict
from epigram.run.pace import Pace
from epigram.run.record import RunRecord
from epigram.run.setup import Engine, Session, random_state, restore_random, state_of
from epigram.run.signals import listening
from epigram.run.weights import ARTIFACT

UPDATE = "epigram update"
"""In a profile, the range in which gradients become new weights: what is launched there is the optimizer's."""

_PACE_KNOWN = 10
"""Steps after which their time tells how many there will be."""

_SILENT_S = 15.0
"""Seconds without a line after which a step is told although run.log_every does not ask for it: a recipe's number of
steps that is a few seconds on the machine that it was made for may be minutes on another."""

_FACTS = ("recipe", "seed", "parameters", "data", "transform", "forecast_bytes", "setup_s", "warmup_s")
"""Of the result, for a later export."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What the schedules say for one step. progress: share of the training time that is over.

    loss_limit: the largest loss with which the step may change the weights.
    """

    step: int
    elapsed_s: float
    progress: float
    lr_multiplier: float
    momentum: float
    gamma: float
    qat: bool
    loss_limit: float = math.inf


def plan_step(session: Session, elapsed_s: float) -> StepPlan:
    """The schedules' values at this step: a function of the step, the agreed clock and the losses so far."""
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
        loss_limit=session.guard.limit(session.step),
    )


def train(session: Session, record: RunRecord, validate: Callable[[], dict[str, float]]) -> None:
    """Take steps until the time or the number of steps is over; the averages are not yet put in place.

    Afterwards session.trained_s is what counts against the budget, to the end of the last step on the device.

    validate: scores the current weights; it runs outside the clock.
    Raises DivergedError when a loss or a gradient is not finite, DriftError when the processes' weights differ, and
    StoppedError, after a checkpoint, when a signal ended the run.
    """
    run, watch = session.config.run, WallClock()
    pace = Pace[StepPlan](session.context.device, _watcher(session, record), session.step, session.trained_s)
    session.clock.start(session.trained_s)
    watch.start(session.trained_s)
    next_checkpoint_s: float | None = None
    told_s, first_step = session.trained_s, session.step

    def checkpoint_now() -> None:
        pace.drain()  # what the device has not done yet does count
        session.trained_s = watch.elapsed_s(session.step)
        with not_counted(session.clock, watch):
            save_checkpoint(session, record)

    with listening() as requests:
        while True:
            decision = agree(session.context, session.clock.elapsed_s(session.step), requests)
            if decision.stop:
                record.log("told to stop: writing a checkpoint; told again, it ends at once")
                checkpoint_now()
                _stop(session, record, decision.stop)
            if decision.checkpoint:
                requests.checkpoint = False
                checkpoint_now()
                record.log(f"checkpoint of step {session.step} begun, as a signal asked")
            if _is_over(session, decision.elapsed_s):
                if session.step == first_step > 0:
                    record.log("the training of this run is complete: what follows it is done again")
                break
            _warn_of_shortfalls(session, record, decision.elapsed_s)
            if run.val_every and session.step % run.val_every == 0:
                pace.drain()
                with not_counted(session.clock, watch):
                    record.validation(step=session.step, elapsed_s=decision.elapsed_s, **validate())
            if session.step == first_step and record.writes:  # whoever loads the run would get the model of before
                (record.folder / ARTIFACT).unlink(missing_ok=True)
            session.times_s.append(decision.elapsed_s)
            plan = plan_step(session, decision.elapsed_s)
            measured = train_step(session, plan)
            session.step += 1
            pace.push(plan, measured)
            if run.log_every and _is_told(session, watch, told_s):
                pace.drain()
                record.step(**_log_line(session, pace, watch))
                told_s = watch.elapsed_s(session.step)
            if run.check_every and session.step % run.check_every == 0:
                check_replicas(session.context, dict(session.model.named_parameters()), session.step)
            if next_checkpoint_s is None:
                next_checkpoint_s = decision.elapsed_s + run.checkpoint_every_s
            elif run.checkpoint_every_s and decision.elapsed_s >= next_checkpoint_s:
                next_checkpoint_s = decision.elapsed_s + run.checkpoint_every_s
                checkpoint_now()
            if session.saver.failed:
                _settle(session, record)
    pace.drain()
    session.trained_s = watch.elapsed_s(session.step)
    if run.check_every:
        check_replicas(session.context, dict(session.model.named_parameters()), session.step)


def train_step(session: Session, plan: StepPlan) -> Tensor:
    """One step over this process's lanes; returns what `Measured` reads, as a device tensor."""
    return compute_step(session, session.loader.next_step(), plan)


def compute_step(engine: Engine, batches: Sequence[Tensor], plan: StepPlan) -> Tensor:
    """A step on given tokens, int64 (num_seqs, seq_len + 1) on the host for each of this process's lanes.

    Returns what `Measured` reads, as a device tensor. Where a loss or a gradient is not finite, or the loss above the
    plan's limit, nothing changes but what is returned.
    """
    gamma, transform = gamma_of(engine, plan.gamma), engine.quantized if plan.qat else None
    losses = []
    for lane, batch in zip(engine.lanes, batches, strict=True):
        losses.append(lane_step(engine, batch, gamma, transform))
        with record_function(UPDATE):
            engine.gradients.add(lane, lent=engine.lends_gradients)
    with record_function(UPDATE):
        gathered = engine.gradients.finish(losses)
        measured = measure(gathered, plan.loss_limit)
        applied = measured[2]
        scale = torch.where(applied != 0, gathered.scale, 0.0)
        # What is updated is averaged at once: while other weights are still on their way.
        engine.average.set_weight(applied)
        engine.optimizer.step(
            plan.lr_multiplier, plan.momentum, scale, arriving=gathered.arriving, done=engine.average.apply
        )
        engine.optimizer.zero_grad()
    return measured


def measure(gathered: Gathered, limit: float) -> Tensor:
    """What `Measured` reads, the same in every process: it knows all lanes' losses and norms before the update."""
    applied = verdict(gathered.losses, gathered.norms, gathered.norm, limit)
    return torch.cat([torch.stack([gathered.losses.mean(), gathered.norm, applied]), gathered.losses, gathered.norms])


def lane_step(engine: Engine, batch: Tensor, gamma: Tensor | None, transform: BankTransform | None) -> Tensor:
    """Forward and backward of a lane: its gradients go to `.grad`, its loss is returned, 0-dim.

    A lane of this shape and phase that is recorded is replayed; see `epigram.run.graphs`.
    """
    graph = engine.graphs.get(Key(tuple(batch.shape), transform is not None))
    if graph is not None:
        return graph(batch, gamma)
    return forward_backward(engine, batch.to(engine.context.device, non_blocking=True), gamma, transform)


def forward_backward(engine: Engine, tokens: Tensor, gamma: Tensor | None, transform: BankTransform | None) -> Tensor:
    """`lane_step` on tokens on the device, launched kernel by kernel.

    A lane of more tokens than are computed at a time is computed in equal parts, whose gradients add up in `.grad`: its
    loss is a mean over tokens, so that is the lane's gradient.
    """
    parts = Lane(num_seqs=tokens.shape[0], seq_len=tokens.shape[1] - 1).parts(engine.most_tokens)
    losses = []
    for part in tokens.chunk(parts):
        loss = engine.lane_loss(part[:, :-1], part[:, 1:], gamma, engine.config.loss.mile_floor, transform)
        loss = loss / parts if parts > 1 else loss
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum() if parts > 1 else losses[0]


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
        "skipped_steps": session.guard.skipped,
    }


def save_checkpoint(session: Session, record: RunRecord) -> None:
    """Begin to write all that a resumed run or an export needs; every process hands in its part.

    That the checkpoint before this one could not be written is a warning in the log: the run goes on.
    """
    _settle(session, record)
    known = {key: record.result[key] for key in _FACTS if key in record.result}
    state = {
        "step": session.step,
        "times_s": session.times_s,
        "trained_s": session.trained_s,
        "loader": session.loader.state_dict(),
        "guard": session.guard.state_dict(),
        "facts": known | figures(session),
    }
    parts = {**state_of(session), "random": random_state(session.context.device)}
    if record.writes:
        record.attempt(CLOCK_FILE, partial(write_clock, record.folder, session.times_s))
    session.saver.save(record.folder, session.step, parts, state, session.config.run.checkpoint_keep)


def resume(session: Session, saved: checkpoint.Checkpoint) -> None:
    """Put a checkpoint's state into a freshly built session. Raises UserError when it is that of another recipe."""
    session.loader.load_state_dict(saved.state["loader"])
    restore(session.model.state_dict(), saved.part("model"), "this model")
    session.optimizer.load_state_dict(saved.part("optimizer"))
    session.average.load_state_dict(saved.part("average"))
    session.guard.load_state_dict(saved.state["guard"])
    restore_random(saved.part("random"), session.context.device)
    session.step, session.times_s = saved.state["step"], list(saved.state["times_s"])
    session.trained_s = saved.state["trained_s"]


def is_complete(session: Session) -> bool:
    """Whether a session that `resume` has put together has no step left to take. `train` starts the clock anew."""
    session.clock.start(session.trained_s)
    return _is_over(session, session.clock.elapsed_s(session.step))


def _is_over(session: Session, elapsed_s: float) -> bool:
    limit = session.config.budget.max_steps
    return elapsed_s >= session.config.budget.optimize_s or (limit > 0 and session.step >= limit)


def _is_told(session: Session, watch: WallClock, told_s: float) -> bool:
    """Whether the step just taken gets a line; told_s: when the last one had."""
    step = session.step
    return step <= 10 or step % session.config.run.log_every == 0 or watch.elapsed_s(step) - told_s >= _SILENT_S


def _warn_of_shortfalls(session: Session, record: RunRecord, elapsed_s: float) -> None:
    """As soon as the number of steps is known, and at no other step: a run that is resumed does not say it again.

    Those of the whole budget count, as they do in the schedules, even if budget.max_steps ends the run before.
    """
    budget = session.config.budget
    if session.step == 0 and budget.steps:
        num_steps = budget.steps
    elif session.step == _PACE_KNOWN and not budget.steps and elapsed_s > 0:
        num_steps = round(session.step * budget.optimize_s / elapsed_s)
    else:
        return
    for line in schedule.shortfalls(session.config.schedule, num_steps):
        record.log(f"warning: {line}")


def _settle(session: Session, record: RunRecord) -> None:
    """Wait for the checkpoint that is being written; that it could not be is told, and no reason to stop training."""
    try:
        session.saver.wait()
    except UserError as error:
        record.log(f"warning: {error}; training goes on")


def _stop(session: Session, record: RunRecord, number: int) -> None:
    session.saver.wait()
    by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    raise StoppedError(
        number,
        f"stopped by {by} after step {session.step}, whose checkpoint is complete: go on with "
        f"epigram train --resume {record.folder}",
    )


def _watcher(session: Session, record: RunRecord) -> Callable[[StepPlan, Measured], None]:
    def look(plan: StepPlan, measured: Measured) -> None:
        if line := session.guard.look(plan.step, measured):
            record.log(line)

    return look


def _log_line(session: Session, pace: Pace[StepPlan], watch: WallClock) -> dict[str, Any]:
    assert pace.latest is not None
    plan, measured = pace.latest
    elapsed_s = session.clock.elapsed_s(session.step)
    tokens = session.step * session.config.tokens_per_step
    recent = pace.step_s(watch.elapsed_s(session.step), session.step)
    return {
        "step": session.step,
        "elapsed_s": elapsed_s if math.isfinite(elapsed_s) else plan.elapsed_s,
        "train_loss": measured.loss,
        "lr": plan.lr_multiplier,
        "momentum": plan.momentum,
        "gamma": plan.gamma,
        "grad_norm": measured.norm,
        "tokens": tokens,
        "tokens_per_s": session.config.tokens_per_step / recent if recent else 0.0,
        "step_ms": 1000 * recent,
        "phase": "qat" if plan.qat else "train",
    }
