"""Losses of one recipe and seed in several ways of computing: `python -m benchmarks.loss_curves run --data DATA`.

`fast` is what the machine would choose by itself, `plain` has every fast path off (torch's own operators one by one,
scaled_dot_product_attention, the plain optimizer), `float32` is plain in single precision: how far `plain` is from it
is what bfloat16 does by itself, and no fast path may be further away. Each way is a run of `epigram train` of its own;
their losses go to a JSON file each, as soon as the run is over. `draw` makes the figure and a table of distances.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from epigram.config import load_recipe

PLAIN = ['run.kernels="plain"', 'run.compile="off"', 'run.cuda_graphs="off"', 'run.attention="sdpa"']
WAYS = {"fast": [], "plain": PLAIN, "float32": [*PLAIN, 'run.precision="float32"']}
EVERY = 5  # steps between points of the figure
LATE = 50  # steps at the end over which distances are averaged


def settings(recipe: str, steps: int) -> list[str]:
    """A step of one lane of each kind, at the highest rates to the end, every loss logged."""
    steps_only = ['budget.clock="steps"', f"budget.steps={steps}", f"budget.max_steps={steps}"]
    return [
        *steps_only,
        "schedule.min_lr=1",
        "schedule.qat_threshold=0",
        *(f"lanes.{index}.count=1" for index in range(len(load_recipe(recipe).lanes))),
        "run.log_every=1",
        "run.val_every=0",
    ]


def run(way: str, recipe: str, data: str | None, steps: int, out: Path, work: Path) -> None:
    """Train, and keep the losses."""
    chosen = [*settings(recipe, steps), *WAYS[way]]
    command = [sys.executable, "-m", "epigram", "train", recipe, "--until", "train", "--out", str(work / way)]
    command += ["--data", data] if data else []
    command += [part for text in chosen for part in ("--set", text)]
    start_s = time.perf_counter()
    subprocess.run(command, check=True)
    losses = [row["train_loss"] for row in _rows(work / way / "metrics.jsonl") if row.get("phase") == "train"]
    environment = json.loads((work / way / "environment.json").read_text("utf-8"))
    environment.pop("command")  # of this machine's folders; `settings` say the rest
    record = {"way": way, "recipe": recipe, "settings": chosen, "machine": environment, "losses": losses}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{way}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(f"{way}: {len(losses)} steps, {losses[0]:.4f} to {losses[-1]:.4f}, {time.perf_counter() - start_s:.0f} s")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def distances(losses: dict[str, list[float]], base: str) -> dict[str, tuple[float, float]]:
    """Of each way to `base`, over the last steps: mean difference, mean absolute difference, in nats."""
    late = {way: values[-LATE:] for way, values in losses.items()}
    found = {}
    for way, values in late.items():
        gaps = [a - b for a, b in zip(values, late[base], strict=True)]
        found[way] = statistics.fmean(gaps), statistics.fmean(map(abs, gaps))
    return found


def draw(folder: Path) -> None:
    """loss-curves.svg beside the JSON files, and their distances printed as a table."""
    from benchmarks.evidence.plots import Drawing, Point, save

    records = {way: json.loads((folder / f"{way}.json").read_text("utf-8")) for way in WAYS}
    losses = {way: record["losses"] for way, record in records.items()}
    series = {w: [Point(x=i + 1, y=values[i]) for i in range(0, len(values), EVERY)] for w, values in losses.items()}
    title = f"{records['fast']['recipe']}: losses of the first steps, one seed"
    save(Drawing(title=title, x_label="step", y_label="loss, nats", series=series), folder / "loss-curves.svg")
    print(f"| last {LATE} steps | mean difference to float32 | mean absolute difference |\n|---|---|---|")
    for way, (mean, size) in distances(losses, "float32").items():
        print(f"| {way} | {mean:+.5f} | {size:.5f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=["run", "draw"])
    parser.add_argument("--data", help="by default the text that comes with the package")
    parser.add_argument("--recipe", default="pr1212")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("docs/results/loss-curves"))
    parser.add_argument("--work", type=Path, default=Path("runs/loss-curves"))
    arguments = parser.parse_args()
    if arguments.job == "draw":
        draw(arguments.out)
        return
    for way in arguments.ways:
        run(way, arguments.recipe, arguments.data, arguments.steps, arguments.out, arguments.work)


if __name__ == "__main__":
    main()
