"""A step on several GPUs, taken apart: `torchrun --nproc-per-node N benchmarks/several_gpus.py [RECIPE] --out FILE`.

Steps on made-up tokens, as in training. Measured, and written to FILE as JSON by the first process:

- the step: time, tokens a second, peak memory of each process;
- each lane's forward and backward, on the process that has it;
- how long each process waits for messages in a step: for the first one, which is also the wait for whoever has the
  longer lanes, for the gradients of banks, for the norm of the average where no lane is clipped, and for the updates;
- each collective alone, at the sizes of the banks: time, and GB/s sent by each process;
- the update (all that follows the lanes) with Muon shared, and as it would be with one message of all gradients and
  all of Muon in every process.

With NCCL on CUDA, where times are those between marks in the device's queue, else with gloo. What is measured alone is
queued behind other work, so that no host, however slow at launching kernels, makes a device wait between the marks, and
behind a message, so that no process waits for another to begin. After compilation it takes about as long as --seconds
says.

    torchrun --standalone --nproc-per-node 8 benchmarks/several_gpus.py pr1212 --out eight.json
    torchrun --standalone --nproc-per-node 2 benchmarks/several_gpus.py smoke --out two.json --device cpu
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from prepared import PLAN, prepared, say, steps_ms

from epigram.dist import collectives
from epigram.dist.collectives import Message
from epigram.dist.context import Context, open_context
from epigram.dist.cost import all_reduce_bytes, part_bytes
from epigram.dist.share import Share
from epigram.optim.average import average_of
from epigram.optim.gradients import LaneGradients
from epigram.optim.optimizer import Optimizer
from epigram.run.machine import environment, peak_memory_bytes
from epigram.run.setup import Engine
from epigram.run.train import compute_step, gamma_of, lane_step

FEWEST = 3  # repeats of anything
RATE, MOMENTUM = 0.01, 0.95
LEAD, MOST_LEAD_MS = 1.5, 250.0  # what a device does meanwhile, times what its host needs for launches; at most
PROBE_CYCLES = 1_000_000  # half a millisecond
WAITS = {"sum": "first message", "norm": "norm of the average", "scatter": "gradients of banks",
         "gather": "updates of banks"}  # fmt: skip
"""What is waited for, by the message that brings it."""


class Marks:
    """Pairs of moments in the device's queue, or on a CPU in the host's time."""

    def __init__(self, context: Context) -> None:
        self._context, self._pairs = context, list[tuple[str, Any, Any]]()

    def now(self) -> Any:
        if self._context.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def since(self, start: Any, name: str) -> None:
        self._pairs.append((name, start, self.now()))

    def ms(self) -> dict[str, list[float]]:
        """Every pair's time by name; forgotten afterwards."""
        self._context.synchronize()
        found = defaultdict(list)
        for name, start, end in self._pairs:
            found[name].append(1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end))
        self._pairs.clear()
        return found


def keep_busy(context: Context, ms: float) -> None:
    """Give the device about `ms` to do, while the host goes on; nothing on a CPU, which is its own host."""
    if context.device.type != "cuda":
        return
    # Cycles of the clock that the chip has at the moment, so they are timed first.
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.cuda._sleep(PROBE_CYCLES)
    end.record()
    end.synchronize()
    torch.cuda._sleep(int(PROBE_CYCLES * ms / start.elapsed_time(end)))


def times_ms(context: Context, work: Callable[[], Any], seconds: float) -> list[float]:
    """Of `work`, again and again for about `seconds`, as often in every process; all of them call it.

    On CUDA the time that the device needs for it when all is queued that it consists of; `work` must not wait for the
    device. All processes' devices begin together.
    """
    work()
    context.synchronize()
    start_s = time.perf_counter()
    work()
    launched_s = time.perf_counter() - start_s
    context.synchronize()
    once_s, launched_s = collectives.largest(context, [time.perf_counter() - start_s, launched_s])
    lead_ms = min(1 + LEAD * 1000 * launched_s, MOST_LEAD_MS) if context.device.type == "cuda" else 0.0
    marks, token = Marks(context), torch.zeros((), device=context.device)
    for _ in range(max(FEWEST, min(200, int(seconds / (once_s + lead_ms / 1000))))):
        context.synchronize()  # or the queue fills up, and memory with what is still to be sent
        keep_busy(context, lead_ms)
        collectives.summed(context, token)
        start = marks.now()
        work()
        marks.since(start, "work")
    return marks.ms()["work"]


def of_all(context: Context, values: list[float]) -> list[list[float]]:
    """The values of each process, by rank."""
    return collectives.gathered(context, torch.tensor(values, dtype=torch.float64)).tolist()


def measure_steps(engine: Engine, batches: list[Tensor], seconds: float) -> dict[str, Any]:
    """Blocks of steps, as in training."""
    context = engine.context
    once_ms = collectives.largest(context, [steps_ms(engine, batches, 2)])[0]
    count = max(2, int(1000 * seconds / 5 / once_ms))
    blocks = [collectives.largest(context, [steps_ms(engine, batches, count)])[0] for _ in range(5)]
    step_ms = statistics.median(blocks)
    return {
        "step_ms": step_ms,
        "blocks_ms": blocks,
        "steps_of_a_block": count,
        "tokens_per_step": engine.config.tokens_per_step,
        "tokens_per_s": 1000 * engine.config.tokens_per_step / step_ms,
    }


def measure_lanes(engine: Engine, batches: list[Tensor], seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of each lane; processes measure theirs at the same time."""
    context, gamma = engine.context, gamma_of(engine, PLAN.gamma)
    num_lanes = len(engine.config.flat_lanes)
    own = [0.0] * num_lanes
    for place in range(int(collectives.largest(context, [float(len(engine.lanes))])[0])):
        mine = min(place, len(engine.lanes) - 1)  # who has fewer lanes repeats its last one
        work = partial(lane_step, engine, batches[mine], gamma, None)
        own[engine.lanes[mine]] = statistics.median(times_ms(context, work, seconds / num_lanes))
    engine.optimizer.zero_grad()
    by_rank = of_all(context, own)
    rows = []
    for lane, shape in enumerate(engine.config.flat_lanes):
        rank = max(range(context.world_size), key=lambda r, lane=lane: by_rank[r][lane])
        rows.append({"lane": lane, "rank": rank, "seq_len": shape.seq_len, "num_seqs": shape.num_seqs,
                     "ms": by_rank[rank][lane]})  # fmt: skip
    return rows


def measure_waits(engine: Engine, batches: list[Tensor], count: int, step_ms: float) -> list[dict[str, float]]:
    """How long each process's computing stands still for messages, a step, by what it waits for."""
    context, marks = engine.context, Marks(engine.context)
    kinds: dict[int, str] = {}
    wait, begin = Message.wait, {name: getattr(collectives, f"begin_{name}") for name in ("sum", "scatter", "gather")}

    def begun(name: str, context: Context, sent: Any) -> Message:
        message = begin[name](context, sent)
        # The first message has losses and norms of lanes with it; one number alone is what the norms are summed up by.
        kinds[id(message)] = WAITS["norm" if name == "sum" and sum(t.numel() for t in sent) == 1 else name]
        return message

    def timed(message: Message) -> Tensor:
        start = marks.now()
        result = wait(message)
        if kind := kinds.pop(id(message), None):
            marks.since(start, kind)
        return result

    try:
        Message.wait = timed  # type: ignore[method-assign]
        for name in begin:
            setattr(collectives, f"begin_{name}", partial(begun, name))
        for step in range(count):
            compute_step(engine, batches, PLAN)
            if step % 2:
                context.synchronize()
        found = marks.ms()
    finally:
        Message.wait = wait  # type: ignore[method-assign]
        for name, function in begin.items():
            setattr(collectives, f"begin_{name}", function)
    own = [sum(found.get(name, [])) / count for name in WAITS.values()]
    rows = of_all(context, own)
    return [{**dict(zip(WAITS.values(), row, strict=True)), "share of the step": sum(row) / step_ms} for row in rows]


def measure_collectives(engine: Engine, seconds: float) -> list[dict[str, Any]]:
    """Each collective alone, at the size of each bank: in float32 there, in Muon's precision back."""
    context = engine.context
    if not context.has_peers:
        return []
    roles = engine.model.roles()
    banks = {name: p for name, p in engine.model.named_parameters() if roles[name].kind == "matrix"}
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    rows = []
    for name, bank in banks.items():
        share = Share(len(bank), context.rank, context.world_size)
        whole = torch.zeros((share.padded_rows, *bank.shape[1:]), device=bank.device)
        own = whole[: share.rows_each].to(dtype, copy=True)
        works: dict[str, tuple[Callable[[], Any], Tensor, Callable[[float, int], float]]] = {
            "reduce-scatter": (lambda w=whole: collectives.begin_scatter(context, w).wait(), whole, part_bytes),
            "all-gather": (lambda o=own: collectives.begin_gather(context, o).wait(), whole.to(dtype), part_bytes),
            "all-reduce": (partial(dist.all_reduce, whole), whole, all_reduce_bytes),
        }
        for what, (work, moved, rule) in works.items():
            slowest = collectives.largest(context, [statistics.median(times_ms(context, work, seconds / 12))])[0]
            num_bytes = moved.numel() * moved.element_size()
            sent = rule(num_bytes, context.world_size)
            rows.append(
                {"bank": name, "what": what, "bytes": num_bytes, "ms": slowest, "sent_gb_per_s": sent / slowest / 1e6}
            )
    return rows


def measure_updates(engine: Engine, seconds: float) -> dict[str, float]:
    """All that follows the lanes, one a process, on made-up gradients: as it is, and with nothing shared."""
    context, config = engine.context, engine.config
    named = dict(engine.model.named_parameters())
    saved = {name: 1e-3 * torch.randn_like(p) for name, p in named.items()}
    place = {name: g.clone() for name, g in saved.items()}

    def give() -> None:
        torch._foreach_copy_(list(place.values()), list(saved.values()))
        for name, parameter in named.items():
            parameter.grad = place[name]

    weights = [1 / context.world_size] * context.world_size
    roles = engine.model.roles()
    banks = [name for name, role in roles.items() if role.kind == "matrix"]
    clip, max_norm = config.gradients.clip, config.gradients.max_norm
    gradients = LaneGradients(named, clip=clip, max_norm=max_norm, lane_weights=weights, banks=banks, context=context)

    def shared() -> None:
        give()
        gradients.add(context.rank)
        gathered = gradients.finish()
        engine.average.set_weight()
        engine.optimizer.step(RATE, MOMENTUM, gathered.scale, arriving=gathered.arriving, done=engine.average.apply)

    found = {"shared_ms": max(of_all_medians(context, shared, seconds / 3))}
    alone = LaneGradients(named, clip=clip, max_norm=max_norm, lane_weights=[1.0])
    optimizer = Optimizer(named, roles, config.optim, kernels=config.run.kernels)
    average = average_of(named, config.average)

    def in_full() -> None:
        give()
        collectives.sum_(context, [p.grad for p in named.values() if p.grad is not None])
        alone.add(0)
        optimizer.step(RATE, MOMENTUM, alone.finish().scale)
        average.update()

    found["in_full_ms"] = max(of_all_medians(context, in_full, seconds / 3))
    found["of_it_made_up_gradients_ms"] = max(of_all_medians(context, give, seconds / 6))
    engine.optimizer.zero_grad()
    return found


def of_all_medians(context: Context, work: Callable[[], None], seconds: float) -> list[float]:
    return [row[0] for row in of_all(context, [statistics.median(times_ms(context, work, seconds))])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="h100")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=25.0, help="What the measurements together take, about.")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    with open_context(options.device) as context:
        tell = say if context.is_main else lambda words: None
        if context.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(context.device)
        engine, batches = prepared(options.recipe, options.overrides, context)
        part_s = options.seconds / 5
        result: dict[str, Any] = {"recipe": options.recipe, "overrides": options.overrides,
                                  "processes": context.world_size, "clip": engine.config.gradients.clip}  # fmt: skip
        tell("steps")
        result |= measure_steps(engine, batches, part_s)
        result["peak_memory_bytes"] = [
            row[0] for row in of_all(context, [float(peak_memory_bytes(context.device.type))])
        ]
        tell(f"{result['step_ms']:.3f} ms a step; lanes")
        result["lanes"] = measure_lanes(engine, batches, part_s)
        tell("waiting")
        count = max(FEWEST, min(50, int(1000 * part_s / result["step_ms"])))
        result["waits_ms"] = measure_waits(engine, batches, count, result["step_ms"])
        tell("collectives alone")
        result["collectives"] = measure_collectives(engine, part_s)
        tell("updates")
        result["update"] = measure_updates(engine, part_s)
        result["machine"] = environment(engine.paths)
        if context.is_main:
            options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
            print(json.dumps({key: result[key] for key in ("processes", "step_ms", "tokens_per_s", "update")}))
        tell("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
