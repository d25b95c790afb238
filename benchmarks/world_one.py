"""What the distributed code costs one process: `python benchmarks/world_one.py [RECIPE] [--rounds 3] [--steps 40]`.

Two processes are started on the same device one after the other, again and again: one takes steps without a process
group, the other, as torchrun starts a single rank, with one (NCCL and gloo on CUDA, gloo on a CPU), the gradients and
losses of every step summed over it and the clock agreed on. Prints the median step of both, their ratio and one line of
JSON. The goal: a ratio below 1.01.

    python benchmarks/world_one.py h100
    python benchmarks/world_one.py smoke --rounds 2 --steps 3      (any CPU)
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def take_steps(options: argparse.Namespace) -> None:
    """In a process of its own: step times in ms, as a line of JSON."""
    import torch.distributed as dist
    from checkpoint_cost import PLAN, prepared

    from epigram.dist.context import Context, pick_device
    from epigram.run.decision import agree
    from epigram.run.setup import Engine
    from epigram.run.signals import Requests
    from epigram.run.train import compute_step

    context = Context(device=pick_device(options.device))
    if options.child == "group":
        import torch

        from epigram.dist import collectives

        if context.device.type == "cuda":
            torch.cuda.set_device(context.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if context.device.type == "cuda" else "gloo")

        engine, batches = prepared(options.recipe, options.overrides, context)
        # One process that communicates as if there were others: every message goes through the group's backend.
        context = engine.context = Context(world_size=2, device=context.device)
        Engine.reduce = lambda self: partial(collectives.sum_, context)  # type: ignore[method-assign]
    else:
        engine, batches = prepared(options.recipe, options.overrides, context)
    times_ms = []
    for _ in range(options.steps):
        context.synchronize()
        start_s = time.perf_counter()
        for _ in range(2):
            agree(context, 0.0, Requests())
            compute_step(engine, batches, PLAN)
        context.synchronize()
        times_ms.append(500 * (time.perf_counter() - start_s))
    print(json.dumps(times_ms))
    if dist.is_initialized():
        dist.destroy_process_group()


def child(kind: str, arguments: list[str]) -> list[float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--child", kind],
        stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **(group if kind == "group" else {})},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="h100")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="Pairs of steps that a process times.")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--child", choices=("plain", "group"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        take_steps(options)
        return 0
    medians: dict[str, list[float]] = {"plain": [], "group": []}
    for _ in range(options.rounds):
        for kind, found in medians.items():
            found.append(statistics.median(child(kind, sys.argv[1:])))
    plain_ms, group_ms = (statistics.median(found) for found in medians.values())
    print(f"without a process group {plain_ms:.3f} ms a step, with {group_ms:.3f}: ratio {group_ms / plain_ms:.4f}")
    print(json.dumps({"recipe": options.recipe, "plain_ms": medians["plain"], "group_ms": medians["group"],
                      "ratio": group_ms / plain_ms}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
