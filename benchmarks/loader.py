"""Time the training loader: `python benchmarks/loader.py DATA [--steps N] [--processes 8] [--tokens-per-s 2e6]`.

Prints a table and one line of JSON. "prepare" is the work of a step: drawing, reading, widening to int64. "wait"
is what a caller waits for a step that was prepared in the background while it computed for `--compute-ms`.

The last figures are those of a training run at full speed: as many processes as it has, each taking the steps of its
own lanes of `pr1212` at the pace at which all together train on so many tokens a second, and doing nothing in between.
So all processor time of a process is the loader's: `cpu` is its share of one core. A step stalls where its windows are
more than a twentieth of the step late.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

from epigram.data.dataset import open_data
from epigram.data.lanes import Lane
from epigram.data.loader import Loader
from epigram.data.plan import plan_lanes

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


PR1212 = "pr1212: 5 x (36 x 2048) + 3 x (10 x 6144)"
STALL = 0.05  # of a step


def one_rank(data: Path, rank: int, world_size: int, steps: int, step_s: float, start: Any, results: Any) -> None:
    """What one process of a run does; puts its share of a core, its longest and median wait, and its stalls."""
    lanes = RECIPES[PR1212]
    mine = plan_lanes([float(lane.num_tokens) for lane in lanes], world_size).ranks[rank]
    with Loader(open_data(data).split("train"), lanes, seed=0, prefetch=2, lane_indices=mine) as loader:
        for _ in range(3):
            loader.next_step()
        start.wait()
        waits, cpu_s, start_s = [], time.process_time(), time.perf_counter()
        for step in range(1, steps + 1):
            time.sleep(max(start_s + step * step_s - time.perf_counter(), 0.0))
            asked_s = time.perf_counter()
            loader.next_step()
            waits.append(time.perf_counter() - asked_s)
        cpu = (time.process_time() - cpu_s) / (time.perf_counter() - start_s)
    results.put((rank, cpu, max(waits), statistics.median(waits), sum(wait > STALL * step_s for wait in waits)))


def whole_run(data: Path, world_size: int, steps: int, tokens_per_s: float) -> dict[str, Any]:
    """All ranks at once, at the pace of training."""
    step_s = sum(lane.num_tokens for lane in RECIPES[PR1212]) / tokens_per_s
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(world_size), context.Queue()
    ranks = [
        context.Process(target=one_rank, args=(data, rank, world_size, steps, step_s, start, results))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    rows = sorted(results.get(timeout=steps * step_s + 300) for _ in ranks)
    for process in ranks:
        process.join()
    for rank, cpu, longest, median, stalls in rows:
        print(
            f"rank {rank}   cpu {cpu:6.2%} of a core   wait {1e3 * median:6.3f} ms, longest {1e3 * longest:7.3f} ms   "
            f"{stalls} of {steps} steps stalled"
        )
    return {
        "processes": world_size,
        "tokens_per_s": tokens_per_s,
        "step_ms": round(1e3 * step_s, 1),
        "steps": steps,
        "cpu_share_of_a_core": [round(cpu, 4) for _, cpu, *_ in rows],
        "longest_wait_ms": round(1e3 * max(longest for _, _, longest, *_ in rows), 3),
        "median_wait_ms": round(1e3 * statistics.median(median for *_, median, _ in rows), 3),
        "stalls": sum(stalls for *_, stalls in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--compute-ms", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--tokens-per-s", type=float, default=2e6)
    arguments = parser.parse_args()
    shards = open_data(arguments.data).split("train")
    results: dict[str, Any] = {}
    for name, lanes in RECIPES.items():
        with Loader(shards, lanes, seed=0, prefetch=0) as loader:
            prepare_ms = median_ms(loader, arguments.steps, 0.0)
        with Loader(shards, lanes, seed=0, prefetch=2) as loader:
            wait_ms = median_ms(loader, arguments.steps, arguments.compute_ms / 1e3)
        results[name] = {"prepare_ms": round(prepare_ms, 3), "wait_ms": round(wait_ms, 3)}
        print(f"{name:44} prepare {prepare_ms:7.2f} ms   wait {wait_ms:7.3f} ms")
    results["run"] = whole_run(arguments.data, arguments.processes, arguments.steps, arguments.tokens_per_s)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
