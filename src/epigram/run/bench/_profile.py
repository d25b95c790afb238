"""Runs something under torch's profiler and says where its time went."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.run.bench._kernels import Breakdown, break_down
from epigram.run.bench.base import Bench, in_turn
from epigram.run.train import UPDATE

TRACE, TABLE, NUMBERS = "trace.json", "kernels.txt", "kernels.json"
STEPS = 3


def prepare_folder(folder: Path) -> None:
    """Make the folder of a profile. Raises UserError when it holds one already, or cannot be one."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--profile {folder} is a file: name a folder")
    if taken := [name for name in (TRACE, TABLE, NUMBERS) if (folder / name).exists()]:
        raise UserError(f"{folder} already holds {', '.join(taken)}: choose another folder for --profile")
    folder.mkdir(parents=True, exist_ok=True)


def profile_steps(work: Callable[[], Any], median_ms: float, context: Context, folder: Path) -> Breakdown:
    """Time by kind of `STEPS` calls of `work`, which takes `median_ms`; leaves the trace in `folder`."""
    _record(work, context, 1)  # starting to trace takes time, which no step should show
    recorded = _record(work, context, STEPS)
    recorded.export_chrome_trace(str(folder / TRACE))
    with (folder / TRACE).open(encoding="utf-8") as file:
        found = break_down(json.load(file)["traceEvents"], STEPS, UPDATE)
    return replace(found, unprofiled_ms=median_ms)


def profile_rows(bench: Bench, folder: Path) -> Breakdown:
    """The same of all that was timed, one after the other."""
    rows, works = zip(*bench.to_profile, strict=True)
    total_ms = sum(row.timing.median_ms for row in rows)
    return profile_steps(partial(in_turn, *works), total_ms, bench.engine.context, folder)


def _record(work: Callable[[], Any], context: Context, steps: int) -> profile:
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.device.type == "cuda" else [])]
    with profile(activities=kinds) as recorded:
        for _ in range(steps):
            work()
        context.synchronize()
    return recorded
