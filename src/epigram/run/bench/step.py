"""A training step: each lane's forward and backward, the parts of the update, and the whole."""

import time
from functools import partial

import torch

from epigram.run.bench._lane import lane_work, time_lane
from epigram.run.bench._profile import profile_steps
from epigram.run.bench._updates import MOMENTUM, RATE, Updates, update_work
from epigram.run.bench.base import Bench, lane_name
from epigram.run.machine import peak_memory_bytes
from epigram.run.train import StepPlan, compute_step
from epigram.run.warmup import lane_shapes, made_up_tokens, prepare_lane

REPEATS = 20
OPTIONS = frozenset({"profile"})


def run(bench: Bench) -> None:
    """The whole step first: its first call compiles everything, and its peak of memory is that of training."""
    whole, median_ms = _whole_step(bench)
    for lane in bench.lanes():
        time_lane(bench, f"forward + backward, {lane_name(lane)}", lane)
    updates = Updates(bench)
    updates.time_clip()
    updates.time_optimizer()
    updates.time_average()
    if bench.options.profile:
        bench.breakdown = profile_steps(whole, median_ms, bench.engine.context, bench.options.profile)


def _whole_step(bench: Bench) -> tuple[partial, float]:
    engine = bench.engine
    lanes = [engine.config.flat_lanes[i] for i in engine.lanes]
    batches = [made_up_tokens(engine, lane) for lane in lanes]
    step = partial(compute_step, engine, batches, _plan(engine.config.schedule.mile_peak))
    if engine.context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.context.device)
    recorded_s = _record(bench)
    row = bench.time(
        "whole step",
        step,
        *(lane_work(engine, lane) for lane in lanes),
        *update_work(engine),
        amounts={"tokens": sum(lane.num_tokens for lane in lanes)},
    )
    bench.figures["peak_memory_bytes"] = peak_memory_bytes(engine.context.device.type)
    bench.figures["first_step_s"] = recorded_s + (row.timing.first_s or 0.0)
    return step, row.timing.median_ms


def _record(bench: Bench) -> float:
    """Compile and record the lanes where a run would replay them; returns the seconds that it took."""
    start_s = time.perf_counter()
    if bench.engine.capture is not None:
        for lane in lane_shapes(bench.engine):
            prepare_lane(bench.engine, lane, None)
        bench.engine.context.synchronize()
    return time.perf_counter() - start_s


def _plan(gamma: float) -> StepPlan:
    return StepPlan(step=0, elapsed_s=0.0, progress=0.0, lr_multiplier=RATE, momentum=MOMENTUM, gamma=gamma, qat=False)
