"""Kill a run again and again: `python benchmarks/kill_soak.py [--kills 20] [--steps 60] [--seed 0] [--set KEY=VALUE]`.

A run of recipe smoke that nobody kills goes by the wall clock. Others replay its clock, with a checkpoint every few
steps; they are killed with SIGKILL at random moments, some of them while a checkpoint is being written, and resumed
until they are over. The last checkpoints are compared bit by bit, and every resume must begin at the last complete one.
Prints a line for each kill and one line of JSON; the exit code is 1 when anything differs.

Processes are forked from one that has imported everything, so that a start costs a fraction of a second.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "run"))

from epigram.run.budget import CLOCK_FILE
from epigram.run.checkpoint import complete, load

EVERY_STEPS = 3
PARENT = multiprocessing.get_context("forkserver")


def settings(steps: int) -> list[str]:
    """Of the run that nobody kills."""
    return ["budget.clock=wall", "budget.steps=0", f"budget.max_steps={steps}", "run.log_every=1", "run.val_every=0"]


def replaying(whole: Path, steps: int) -> list[str]:
    """Of the runs that are killed: the clock of `whole`, and a checkpoint every few of its steps."""
    times_s = np.fromfile(whole / CLOCK_FILE, "<f8")
    every_s = float(times_s[-1] - times_s[0]) / steps * EVERY_STEPS
    return [*settings(steps), "budget.clock=replay", f"budget.replay={whole}", f"run.checkpoint_every_s={every_s}"]


def work(data: str, run: str, settings: list[str], resume: bool) -> None:
    """What a forked process does: the run from its start, or from its last checkpoint."""
    import torch

    from epigram.run.job import run_job

    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stdout
    os.dup2(sys.stdout.fileno(), 2)
    if resume:
        run_job("", resume=Path(run), until="train", device="cpu")
    else:
        run_job("smoke", data_path=data, out=Path(run), overrides=settings, until="train", device="cpu")


def start(data: Path, run: Path, settings: list[str], resume: bool) -> Any:
    process = PARENT.Process(target=work, args=(str(data), str(run), settings, resume))
    process.start()
    return process


def step_of(run: Path) -> int:
    """The step of the last complete checkpoint; 0 before the first."""
    found = complete(run)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def wait_for(process: Any, happened: Callable[[], bool]) -> None:
    """Until `happened()`, or the process has ended, or a minute is over."""
    deadline_s = time.monotonic() + 60.0
    while process.is_alive() and time.monotonic() < deadline_s and not happened():
        time.sleep(0.001)


def kill_somewhere(process: Any, run: Path, draw: random.Random) -> str:
    """SIGKILL after the next checkpoint or in the midst of its writing; returns which."""
    before, writing = step_of(run), draw.random() < 0.5
    if writing:
        folder = run / "checkpoints"
        wait_for(process, lambda: folder.is_dir() and any(p.name.startswith(".writing") for p in folder.iterdir()))
        time.sleep(draw.uniform(0.0, 0.01))
    else:
        wait_for(process, lambda: step_of(run) > before)
        time.sleep(draw.uniform(0.0, 0.15))
    if not process.is_alive():
        return "over"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = any((run / "checkpoints").glob(".writing-*"))
    return "in the midst of writing" if left else "between checkpoints"


def soak(data: Path, folder: Path, kills: int, steps: int, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Kill and resume; raises AssertionError when anything is lost or differs."""
    draw, run, whole = random.Random(seed), folder / "killed", folder / "whole"
    process = start(data, whole, [*settings(steps), *overrides], resume=False)
    process.join()
    assert process.exitcode == 0, "the run that nobody kills did not end well"
    chosen = [*replaying(whole, steps), *overrides]
    counts: dict[str, int] = {}
    done = rounds = 0
    while done < kills:
        if step_of(run) >= steps - EVERY_STEPS:  # nearly over: another run to be killed
            finish(data, run, whole, steps, chosen)
            rounds += 1
            run = folder / f"killed-{rounds}"
        before = step_of(run)
        if (
            not before and run.exists()
        ):  # killed before its first checkpoint: there is nothing to resume, it begins again
            run = folder / f"{run.name}+"
        process = start(data, run, chosen, resume=before > 0)
        where = kill_somewhere(process, run, draw)
        after = step_of(run)
        assert after >= before, f"the checkpoint of step {before} is lost"
        for path in complete(run):
            load(path)  # every one that has its name is whole
        if where != "over":
            done += 1
            counts[where] = counts.get(where, 0) + 1
            print(f"kill {done}: {where}, step {after} of {steps} is safe", flush=True)
    finish(data, run, whole, steps, chosen)
    return {"kills": done, "runs": rounds + 1, "steps": steps, **counts}


def finish(data: Path, run: Path, whole: Path, steps: int, chosen: list[str]) -> None:
    """Resume to the end, and compare with the run that nobody killed."""
    resume = step_of(run) > 0
    if not resume:  # killed before its first checkpoint: it begins again
        run = run.with_name(f"{run.name}+")
    process = start(data, run, chosen, resume=resume)
    process.join()
    assert process.exitcode == 0, f"the resumed run ended with {process.exitcode}"
    left, right = load(run), load(whole)
    assert left.state["step"] == right.state["step"] == steps
    assert left.state["times_s"] == right.state["times_s"]
    assert left.state["loader"] == right.state["loader"]
    assert left.tensors.keys() == right.tensors.keys()
    differing = [name for name in left.tensors if not left.tensors[name].equal(right.tensors[name])]
    assert not differing, f"{len(differing)} tensors differ: {differing[:5]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    from run_helpers import write_text

    from epigram.data.build import build

    PARENT.set_forkserver_preload(["epigram.run.job", "torch.distributed.checkpoint.hf_storage"])
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.txt", 500, seed=0)
        build([folder / "text.txt"], folder / "data", vocab_size=512, val_fraction=0.05, workers=1)
        try:
            found = soak(folder / "data", folder, options.kills, options.steps, options.seed, options.overrides)
        except AssertionError as error:
            print(f"FAILED: {error}")
            return 1
    print(json.dumps({**found, "seconds": round(time.monotonic() - start_s, 1), "identical": True}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
