"""What background checkpoints cost: `python benchmarks/checkpoint_cost.py [RECIPE] [--every-s 60] [--seconds 180]`.

Takes real steps on made-up tokens, in blocks of `--every-s` seconds. At the start of every second block the whole state
is copied to the host and a checkpoint of it is written while the steps go on. Prints the mean step of both kinds of
blocks, their ratio, how long the copy kept the host, and one line of JSON. The goal: a ratio below 1.01 at one a
minute.

    python benchmarks/checkpoint_cost.py h100 --every-s 60 --seconds 240
    python benchmarks/checkpoint_cost.py smoke --every-s 2 --seconds 8 --set run.compile=off      (any CPU)
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from epigram.config import load_recipe
from epigram.dist.context import Context, open_context
from epigram.run.checkpoint import Saver, forecast_bytes
from epigram.run.setup import Engine, build_engine, state_of
from epigram.run.train import StepPlan, compute_step
from epigram.run.warmup import lane_shapes, made_up_tokens, prepare_lane

PLAN = StepPlan(step=0, elapsed_s=0.0, progress=0.0, lr_multiplier=0.1, momentum=0.9, gamma=0.1, qat=False)
STATE = {"step": 0, "times_s": [], "trained_s": 0.0, "loader": {}, "facts": {}}


def prepared(recipe: str, overrides: list[str], context: Context) -> tuple[Engine, list]:
    """An engine whose lanes are compiled and recorded, and tokens for its lanes."""
    engine = build_engine(load_recipe(recipe, overrides), context)
    if engine.capture is not None:
        for lane in lane_shapes(engine):
            prepare_lane(engine, lane, None)
    batches = [made_up_tokens(engine, engine.config.flat_lanes[lane]) for lane in engine.lanes]
    for _ in range(3):
        compute_step(engine, batches, PLAN)
    context.synchronize()
    return engine, batches


def steps_for(engine: Engine, batches: list, seconds: float) -> tuple[int, float]:
    """Steps taken and the seconds that they took, with the host two steps ahead at most, as in training."""
    start_s, count = time.perf_counter(), 0
    while time.perf_counter() - start_s < seconds:
        for _ in range(2):
            compute_step(engine, batches, PLAN)
        engine.context.synchronize()
        count += 2
    return count, time.perf_counter() - start_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="h100")
    parser.add_argument("--every-s", type=float, default=60.0)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    totals = {False: [0, 0.0], True: [0, 0.0]}
    copies_s, waits_s = [], []
    with open_context(options.device) as context, tempfile.TemporaryDirectory() as folder:
        engine, batches = prepared(options.recipe, options.overrides, context)
        saver = Saver(context)
        saver.save(Path(folder), 0, state_of(engine), STATE, 2)  # allocates the memory that later ones use again
        saver.wait()
        for block in range(max(2, round(options.seconds / options.every_s))):
            saving = block % 2 == 1
            start_s = time.perf_counter()
            if saving:
                saver.save(Path(folder), block, state_of(engine), STATE, 2)
                copies_s.append(time.perf_counter() - start_s)
            count, took_s = steps_for(engine, batches, options.every_s)
            totals[saving][0] += count
            totals[saving][1] += took_s + (copies_s[-1] if saving else 0.0)
            start_s = time.perf_counter()
            saver.wait()
            waits_s.append(time.perf_counter() - start_s)
        saver.close()
        num_bytes = forecast_bytes(state_of(engine))
    without_ms, with_ms = (1000 * seconds / count for count, seconds in totals.values())
    found = {
        "recipe": options.recipe, "device": str(context.device), "checkpoint_bytes": num_bytes,
        "every_s": options.every_s, "step_ms": without_ms, "step_ms_saving": with_ms, "ratio": with_ms / without_ms,
        "copy_ms": 1000 * max(copies_s), "unfinished_s": max(waits_s),
    }  # fmt: skip
    print(f"without checkpoints {without_ms:.3f} ms a step, with {with_ms:.3f}: ratio {found['ratio']:.4f}")
    print(f"{num_bytes:,} bytes; the copy kept the host {found['copy_ms']:.1f} ms")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
