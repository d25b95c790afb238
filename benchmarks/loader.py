"""Time the training loader: `python benchmarks/loader.py DATA [--steps N]`.

Prints a table and one line of JSON. "prepare" is the work of a step: drawing, reading, widening to int64. "wait"
is what a caller waits for a step that was prepared in the background while it computed for `--compute-ms`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from epigram.data.dataset import open_data
from epigram.data.lanes import Lane
from epigram.data.loader import Loader

RECIPES = {
    "one lane of 36 x 2048": (Lane(seq_len=2048, num_seqs=36),),
    "one lane of 10 x 6144": (Lane(seq_len=6144, num_seqs=10),),
    "pr1212: 5 x (36 x 2048) + 3 x (10 x 6144)": (Lane(seq_len=2048, num_seqs=36),) * 5
    + (Lane(seq_len=6144, num_seqs=10),) * 3,
}


def median_ms(loader: Loader, steps: int, compute_s: float) -> float:
    """Median time of `next_step`, in ms, with a pause before each as if the caller computed."""
    loader.next_step()
    times = []
    for _ in range(steps):
        time.sleep(compute_s)
        start_s = time.perf_counter()
        loader.next_step()
        times.append(time.perf_counter() - start_s)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--compute-ms", type=float, default=60.0)
    arguments = parser.parse_args()
    shards = open_data(arguments.data).split("train")
    results = {}
    for name, lanes in RECIPES.items():
        with Loader(shards, lanes, seed=0, prefetch=0) as loader:
            prepare_ms = median_ms(loader, arguments.steps, 0.0)
        with Loader(shards, lanes, seed=0, prefetch=2) as loader:
            wait_ms = median_ms(loader, arguments.steps, arguments.compute_ms / 1e3)
        results[name] = {"prepare_ms": round(prepare_ms, 3), "wait_ms": round(wait_ms, 3)}
        print(f"{name:44} prepare {prepare_ms:7.2f} ms   wait {wait_ms:7.3f} ms")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
