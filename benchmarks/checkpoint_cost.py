"""What background checkpoints cost one process: `python benchmarks/checkpoint_cost.py [RECIPE] [--seconds 40]`.

Takes real steps on made-up tokens in pairs of blocks of equally many steps. At the start of one block of each pair the
whole state is copied to the host and a checkpoint of it is written while the steps go on; the order changes from pair
to pair, so that a drift of the clock cancels. What a checkpoint costs is the difference of the blocks' times. Prints a
line for each pair, and at the end the ratio of step times with a checkpoint every `--every-s` seconds to those without
any, how long the copy kept the host, and one line of JSON. The goal: a ratio below 1.01 at one a minute.

    python benchmarks/checkpoint_cost.py h100
    python benchmarks/checkpoint_cost.py smoke --seconds 5 --block-s 1      (any CPU)
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from prepared import prepared, say, steps_ms

from epigram.dist.context import open_context
from epigram.run.checkpoint import Saver, forecast_bytes
from epigram.run.setup import state_of

STATE = {"step": 0, "times_s": [], "trained_s": 0.0, "loader": {}, "facts": {}}
FEWEST_PAIRS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="h100")
    parser.add_argument("--every-s", type=float, default=60.0)
    parser.add_argument("--block-s", type=float, default=5.0, help="A checkpoint should be written within it.")
    parser.add_argument("--seconds", type=float, default=40.0, help="What the steps together take, about.")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    copies_s, waits_s, costs_s, steps = [], [], [], []
    with open_context(options.device) as context, tempfile.TemporaryDirectory() as folder:
        engine, batches = prepared(options.recipe, options.overrides, context)
        saver = Saver(context)
        saver.save(Path(folder), 0, state_of(engine), STATE, 2)  # allocates the memory that later ones use again
        saver.wait()
        count = max(2, round(1000 * options.block_s / steps_ms(engine, batches, 2)))

        def block_s(saving: bool) -> float:
            start_s = time.perf_counter()
            if saving:
                saver.save(Path(folder), len(copies_s), state_of(engine), STATE, 2)
                copies_s.append(time.perf_counter() - start_s)
            steps_ms(engine, batches, count)
            found = time.perf_counter() - start_s
            if saving:
                start_s = time.perf_counter()
                saver.wait()
                waits_s.append(time.perf_counter() - start_s)
            return found

        start_s = time.monotonic()
        while len(costs_s) < FEWEST_PAIRS or time.monotonic() - start_s < options.seconds:
            order = (False, True) if len(costs_s) % 2 == 0 else (True, False)
            found = {saving: block_s(saving) for saving in order}
            costs_s.append(found[True] - found[False])
            steps.append(1000 * found[False] / count)
            say(f"pair {len(costs_s)}: {count} steps of {steps[-1]:.3f} ms; a checkpoint costs {costs_s[-1]:.3f} s")
        saver.close()
        num_bytes = forecast_bytes(state_of(engine))
    cost_s = statistics.median(costs_s)
    result = {
        "recipe": options.recipe, "device": str(context.device), "checkpoint_bytes": num_bytes,
        "every_s": options.every_s, "step_ms": statistics.median(steps), "costs_s": costs_s,
        "ratio": 1 + cost_s / options.every_s, "copy_ms": 1000 * max(copies_s), "unfinished_s": max(waits_s),
    }  # fmt: skip
    print(f"a checkpoint costs {cost_s:.3f} s: ratio {result['ratio']:.4f} at one in {options.every_s:g} s")
    print(f"{num_bytes:,} bytes; the copy kept the host {result['copy_ms']:.1f} ms")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
