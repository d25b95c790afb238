"""An engine that is ready to take steps on made-up tokens, and progress on the way: what these benchmarks share."""

import sys
import time

from torch import Tensor

from epigram.config import load_recipe
from epigram.dist.context import Context
from epigram.run.decision import agree
from epigram.run.setup import Engine, build_engine
from epigram.run.signals import Requests
from epigram.run.train import StepPlan, compute_step
from epigram.run.warmup import lane_shapes, made_up_tokens, prepare_lane

PLAN = StepPlan(step=0, elapsed_s=0.0, progress=0.0, lr_multiplier=0.1, momentum=0.9, gamma=0.1, qat=False)
_START_S = time.monotonic()


def say(words: str) -> None:
    """A line of progress, at once, with the seconds since the start; standard output is for results."""
    print(f"{time.monotonic() - _START_S:6.1f} s  {words}", file=sys.stderr, flush=True)


def prepared(recipe: str, overrides: list[str], context: Context) -> tuple[Engine, list[Tensor]]:
    """An engine whose lanes are compiled and recorded, and tokens for its lanes."""
    tell = say if context.is_main else lambda words: None
    tell(f"building {recipe}")
    engine = build_engine(load_recipe(recipe, overrides), context)
    if engine.capture is not None:
        for lane in lane_shapes(engine):
            tell(f"recording {lane.num_seqs} x {lane.seq_len} tokens")
            prepare_lane(engine, lane, None)
    batches = [made_up_tokens(engine, engine.config.flat_lanes[lane]) for lane in engine.lanes]
    tell("first steps")
    for _ in range(3):
        compute_step(engine, batches, PLAN)
    context.synchronize()
    tell("ready")
    return engine, batches


def steps_ms(engine: Engine, batches: list[Tensor], count: int) -> float:
    """Mean of `count` steps, the clock of each agreed on, with the host two steps ahead at most, as in training."""
    start_s = time.perf_counter()
    for step in range(count):
        agree(engine.context, 0.0, Requests())
        compute_step(engine, batches, PLAN)
        if step % 2:
            engine.context.synchronize()
    engine.context.synchronize()
    return 1000 * (time.perf_counter() - start_s) / count
