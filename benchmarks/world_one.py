"""What the distributed code costs one process: `python benchmarks/world_one.py [RECIPE] [--seconds 30]`.

One process takes steps in turn without messages and with them: then every gradient is reduced, scattered and gathered,
every loss summed and the clock agreed on as if there were others, over a process group of one (NCCL and gloo on CUDA,
gloo on a CPU). Pairs of blocks, each in the opposite order of the one before, so that a drift of the clock cancels.
Prints a line for each pair, and at the end the median of their ratios and one line of JSON. The goal: below 1.01.

    python benchmarks/world_one.py h100
    python benchmarks/world_one.py smoke --seconds 5      (any CPU)
"""

import argparse
import json
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from prepared import prepared, say, steps_ms

from epigram.dist.context import Context, pick_device

BLOCK_S, FEWEST_PAIRS = 1.0, 2


class Talker(Context):
    """A process that communicates although it is alone, while `talks`."""

    talks: ClassVar[bool] = False

    @property
    def has_peers(self) -> bool:
        return self.talks


def open_group(device: torch.device) -> None:
    """A process group of one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="h100")
    parser.add_argument("--seconds", type=float, default=30.0, help="What the steps together take, about.")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    context = Talker(device=pick_device(options.device))
    open_group(context.device)
    engine, batches = prepared(options.recipe, options.overrides, context)

    def block_ms(talks: bool, count: int) -> float:
        Talker.talks = talks
        found = steps_ms(engine, batches, count)
        Talker.talks = False
        return found

    block_ms(True, 2)  # opens the connections
    count = max(2, round(1000 * BLOCK_S / block_ms(False, 2)))
    pairs: list[tuple[float, float]] = []
    start_s = time.monotonic()
    while len(pairs) < FEWEST_PAIRS or time.monotonic() - start_s < options.seconds:
        order = (False, True) if len(pairs) % 2 == 0 else (True, False)
        found = {talks: block_ms(talks, count) for talks in order}
        pairs.append((found[False], found[True]))
        say(f"pair {len(pairs)}: {count} steps of {found[False]:.3f} ms without messages, {found[True]:.3f} with them")
    dist.destroy_process_group()
    ratio = statistics.median(talking / silent for silent, talking in pairs)
    silent_ms, talking_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"without messages {silent_ms:.3f} ms a step, with them {talking_ms:.3f}: median ratio {ratio:.4f}")
    print(json.dumps({"recipe": options.recipe, "device": str(context.device), "steps_of_a_block": count,
                      "pairs_ms": pairs, "ratio": ratio}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
