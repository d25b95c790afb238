"""A recipe on all GPUs of a machine, measured: `python examples/8xh100/measure.py --data DATA --out FOLDER [PART...]`.

Parts, in this order; all of them unless some are named:

- step: what a step is made of, and each message alone (`benchmarks/several_gpus.py`).
- whole: the recipe as it is for --seconds, exported and scored.
- fewer: --steps steps with all GPUs, half of them, ... and one; how far the losses are apart.
- killed: a run one of whose processes is killed; how long the others live on, and what is said.
- resumed: a run that is told to stop, and goes on with half the GPUs.

Each part writes FOLDER/PART.json and prints it; a part that fails does not stop the others. Runs lie in FOLDER too. The
same works on a CPU with a small recipe:

    python examples/8xh100/measure.py --recipe smoke --gpus 2 --device cpu --steps 8 --seconds 8 \\
        --set budget.calibrate_s=1 --out rehearsal
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MOST_S = 30.0  # from a process's end to that of the last one
QUIET = {"NCCL_NVLS_ENABLE": "0"}  # no NVLink multicast: hosts that are shared may forbid it


class Machine:
    """Starts what the parts need. `options`: see `main`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.out
        self.environment = {**QUIET, **os.environ}

    def train(self, run: str, gpus: int, *settings: str, until: str = "train", resume: bool = False) -> list[str]:
        """The command of a run of the recipe in FOLDER/run."""
        command = [sys.executable, "-m", "epigram", "train", "--gpus", str(gpus), "--until", until]
        if resume:
            return [*command, "--resume", str(self.folder / run), "--device", self.options.device]
        command += [self.options.recipe, "--out", str(self.folder / run), "--device", self.options.device]
        command += ["--data", self.options.data] if self.options.data else []
        return command + [part for s in (*settings, *self.options.overrides) for part in ("--set", s)]

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        print("$", *command, flush=True)
        return subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True)

    def run(self, command: list[str]) -> None:
        """Raises RuntimeError with the last words of a command that fails."""
        process = self.start(command)
        _, said = process.communicate()
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {said.strip()[-500:]}")

    def result(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / run / "result.json").read_text("utf-8"))
        return found

    def losses(self, run: str) -> list[float]:
        lines = (self.folder / run / "metrics.jsonl").read_text("utf-8").splitlines()
        return [row["train_loss"] for row in map(json.loads, lines) if "train_loss" in row]

    def wait_for_steps(self, run: str, process: subprocess.Popen[str]) -> None:
        """Until the run has logged a step. Raises RuntimeError when it ends before."""
        path = self.folder / run / "metrics.jsonl"
        while not (path.exists() and "train_loss" in path.read_text("utf-8")):
            if process.poll() is not None:
                raise RuntimeError(f"the run ended before its first step: {process.communicate()[1].strip()[-500:]}")
            time.sleep(0.2)


def counted(steps: int) -> tuple[str, ...]:
    """Settings of a run of so many steps, at the highest rates to the end, every one logged."""
    only = ("budget.clock=steps", f"budget.steps={steps}", f"budget.max_steps={steps}")
    return *only, "schedule.min_lr=1", "schedule.qat_threshold=0", "run.log_every=1"


def step(machine: Machine) -> dict[str, Any]:
    options, out = machine.options, machine.folder / "several_gpus.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.gpus)]
    command += [str(ROOT / "benchmarks" / "several_gpus.py"), options.recipe, "--out", str(out)]
    command += ["--device", options.device, "--seconds", str(min(options.seconds / 8, 25.0))]
    machine.run(command + [part for s in options.overrides for part in ("--set", s)])
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return found


def whole(machine: Machine) -> dict[str, Any]:
    options = machine.options
    machine.run(machine.train("whole", options.gpus, f"budget.train_s={options.seconds}", until="export"))
    return machine.result("whole")


def fewer(machine: Machine) -> dict[str, Any]:
    """Of each number of GPUs: the loss of the last step, the furthest distance to that of all of them, median ms."""
    found: dict[str, Any] = {}
    gpus, base = machine.options.gpus, None
    while gpus:
        run = f"steps-on-{gpus}"
        machine.run(machine.train(run, gpus, *counted(machine.options.steps)))
        losses = machine.losses(run)
        base = base or losses
        apart = max(abs(a - b) for a, b in zip(losses, base, strict=True))
        result = machine.result(run)
        found[str(gpus)] = {"last_loss": losses[-1], "apart": apart, "step_ms": result.get("step_ms")}
        gpus //= 2
    return found


def killed(machine: Machine) -> dict[str, Any]:
    """Raises RuntimeError when the others live on for longer than MOST_S."""
    process = machine.start(machine.train("killed", machine.options.gpus, *counted(10**6)))
    try:
        machine.wait_for_steps("killed", process)
        time.sleep(machine.options.settle_s)
        last = machine.options.gpus - 1
        pid = next(pid for pid, rank in ranks_of("killed", machine.folder) if rank == last)
        start_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        _, said = process.communicate(timeout=2 * MOST_S)
    finally:
        process.kill()
    took_s = time.monotonic() - start_s
    if took_s > MOST_S:
        raise RuntimeError(f"the others ended only after {took_s:.1f} s")
    words = [line for line in said.splitlines() if line.startswith("epigram:")]
    return {"ended_after_s": round(took_s, 2), "exit_code": process.returncode, "said": words}


def resumed(machine: Machine) -> dict[str, Any]:
    gpus, steps = machine.options.gpus, machine.options.steps
    process = machine.start(machine.train("resumed", gpus, *counted(steps * 100)))
    machine.wait_for_steps("resumed", process)
    time.sleep(machine.options.settle_s)
    start_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=4 * MOST_S)
    stopped_s, before = time.monotonic() - start_s, machine.losses("resumed")
    process = machine.start(machine.train("resumed", max(gpus // 2, 1), resume=True))
    while len(machine.losses("resumed")) < len(before) + steps and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=4 * MOST_S)
    after = machine.losses("resumed")[len(before) :]
    if not after:
        raise RuntimeError("no step was taken after the run went on")
    return {"stopped_after_s": round(stopped_s, 2), "on": max(gpus // 2, 1), "before": before[-5:], "after": after[:5]}


def ranks_of(run: str, folder: Path) -> list[tuple[int, int]]:
    """(pid, rank) of each process of a run, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environment = dict(e.partition(b"=")[::2] for e in (path / "environ").read_bytes().split(b"\0"))
        except OSError:  # another user's, or over by now
            continue
        if str(folder / run).encode() in words and b"RANK" in environment:
            found.append((int(path.name), int(environment[b"RANK"])))
    return found


PARTS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    "step": step, "whole": whole, "fewer": fewer, "killed": killed, "resumed": resumed,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", help="a data folder; by default the text that comes with the package")
    parser.add_argument("--recipe", default="pr1212")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=240.0, help="of training, of the part `whole`")
    parser.add_argument("--steps", type=int, default=100, help="of the parts `fewer` and `resumed`")
    parser.add_argument("--settle-s", type=float, default=5.0, help="after its first step, before a run is disturbed")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="of the recipe, for all parts")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]}: choose of {', '.join(PARTS)}")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    machine, failed = Machine(options), 0
    for name in options.parts or PARTS:
        start_s = time.monotonic()
        try:
            found = PARTS[name](machine)
        except (RuntimeError, subprocess.TimeoutExpired, OSError, StopIteration) as error:
            found, failed = {"failed": str(error) or repr(error)}, failed + 1
        (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(f"{name}, {time.monotonic() - start_s:.0f} s: {json.dumps(found)}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
