"""`python -m benchmarks.evidence`: list the experiments, run them, write the page. From the root of the repository."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click

from benchmarks.evidence.plan import PLAN, check, load_plan
from epigram.errors import UserError

RESULTS = Path("docs/results/evidence")

plan_option = click.option("--plan", "plan_path", type=click.Path(path_type=Path), default=PLAN, help="Another plan.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Measure what docs/results.md claims."""


@command.command("list")
@plan_option
@click.option("--done", type=click.Path(path_type=Path), multiple=True, default=[RESULTS], help="Folders with results.")
@click.option("--seconds", type=float, help="Mark where so many seconds of one GPU end.")
def list_cells(plan_path: Path, done: tuple[Path, ...], seconds: float | None) -> None:
    """All cells in the order in which they run, with what each costs in seconds of a GPU."""
    from benchmarks.evidence.runner import found_results

    plan = load_plan(plan_path)
    check(plan)
    results, total_s = found_results(done), 0.0
    for cell in plan.cells:
        before = results.get(cell.name, {})
        finished = before.get("status") == "finished" and before.get("fingerprint") == cell.fingerprint
        if not finished:
            over = seconds is not None and total_s <= seconds < total_s + cell.cost_s
            total_s += cell.cost_s
            if over:
                print(f"--- {seconds:.0f} s ---")
        state = "done" if finished else f"{total_s:7.0f}"
        print(f"{cell.priority:5.1f}  {cell.name:28} {cell.cost_s:5.0f} s {state:>8}  {cell.experiment.claim}")
    for claim in plan.claims:
        of_claim = [cell.cost_s for cell in plan.cells if cell.experiment.claim == claim]
        print(f"{claim:16} {len(of_claim):3} cells {sum(of_claim):7.0f} s")


@command.command("run")
@plan_option
@click.option("--data", "data", multiple=True, metavar="NAME=PATH", help="A data folder of the plan (repeatable).")
@click.option("--seconds", type=float, required=True, help="For all of it; what does not fit is not started.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="Takes results.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/evidence"), show_default=True)
@click.option("--done", type=click.Path(path_type=Path), multiple=True, default=[RESULTS],
              help="Folders with results of before; their cells are not run again.")  # fmt: skip
@click.option("--archive", type=click.Path(path_type=Path), help="Also all results in one .tgz, after every cell.")
@click.option("--only", multiple=True, help="An experiment, a cell or a claim (repeatable).")
@click.option("--gpus", type=click.IntRange(min=1), help="How many of the GPUs; by default all.")
@click.option("--device", default="cuda", show_default=True, help="cuda, or cpu to try it out.")
@click.option("--retry", is_flag=True, help="Also what failed before.")
@click.option("--mix", is_flag=True, help="Also where the group was measured on another kind of GPU.")
@click.option("--keep", is_flag=True, help="Keep runs with checkpoints and models.")
@click.option("--warm", is_flag=True, help="This machine has compiled the kernels already.")
@click.option("--goes-on", is_flag=True, help="Another call follows on this machine: begin what it can finish.")
def run(
    plan_path: Path,
    data: tuple[str, ...],
    seconds: float,
    out: Path,
    work: Path,
    done: tuple[Path, ...],
    archive: Path | None,
    only: tuple[str, ...],
    gpus: int | None,
    device: str,
    retry: bool,
    mix: bool,
    keep: bool,
    warm: bool,
    goes_on: bool,
) -> None:
    """Run what is missing, in order of priority, on every GPU, one cell each at a time.

    Give it half a minute less than what ends the command from outside: it stops its processes, then archives.
    """
    from benchmarks.evidence.runner import Options, execute_plan

    plan = load_plan(plan_path)
    check(plan)
    if wrong := [entry for entry in data if "=" not in entry or not Path(entry.split("=", 1)[1]).exists()]:
        raise UserError(f"--data {wrong[0]} is no NAME=PATH of a folder that is there")
    names = {name for cell in plan.cells for name in (cell.experiment.name, cell.name, cell.experiment.claim)}
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"--only {unknown[0]} is no experiment, cell or claim: see the list")
    kinds = usable_gpus(_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")) if device == "cuda" else {}
    if device == "cuda" and not kinds:
        raise UserError("there is no GPU here: --device cpu tries a plan out")
    options = Options(
        out=out,
        work=work,
        data={name: Path(path).resolve() for name, path in (entry.split("=", 1) for entry in data)},
        seconds=seconds,
        devices=list(kinds)[:gpus] or ["cpu"] * (gpus or 1),
        gpu=next(iter(kinds.values()), "cpu"),
        done=done,
        archive=archive,
        only=only,
        retry=retry,
        mix=mix,
        keep=keep,
        fresh=not warm and device == "cuda",
        goes_on=goes_on,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    summary = execute_plan(plan, options)
    sys.exit(1 if summary.failed else 0)


def usable_gpus(names: list[str], visible: str | None) -> dict[str, str]:
    """Names of GPUs by device, of those that CUDA_VISIBLE_DEVICES leaves, in its order; of all without it."""
    if visible is None:
        return {f"cuda:{i}": name for i, name in enumerate(names)}
    try:
        numbers = [int(part) for part in visible.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: name the GPUs by number here") from None
    return {f"cuda:{i}": names[i] for i in numbers if 0 <= i < len(names)}


def _gpus() -> list[str]:
    """Names of the GPUs, without a context on any."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]


@command.command("worker", hidden=True)
@click.option("--device", required=True)
def worker(device: str) -> None:
    """Import everything, wait for one job on standard input, do it."""
    from benchmarks.evidence.cell import execute, import_kernels
    from benchmarks.evidence.runner import note_failure

    import_kernels()
    line = sys.stdin.readline()
    if not line:
        return
    job = json.loads(line)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    cells = {cell.name: cell for cell in load_plan(Path(job["plan"])).cells}
    folder = Path(job["folder"])
    cell, work = cells[job["cell"]], Path(job["work"])
    try:
        execute(cell, folder, work, job["data"], job["recipe"], device, job["resume"])
    except Exception as error:
        note_failure(folder, f"{type(error).__name__}: {error}")
        raise


@command.command("compile", hidden=True)
@click.option("--device", required=True)
def compile_command(device: str) -> None:
    """Compile what the cells share, into the caches on disk."""
    from benchmarks.evidence.cell import compile_shared

    compile_shared(device)


@command.command("repack", hidden=True)
@click.argument("work", type=click.Path(path_type=Path))
def repack_command(work: Path) -> None:
    """Sizes of a cell's models by other codecs."""
    from benchmarks.evidence.cell import repack

    repack(work)


@command.command("report")
@plan_option
@click.option("--results", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
@click.option("--docs", type=click.Path(path_type=Path), default=Path("docs"), show_default=True)
@click.option("--readme", type=click.Path(path_type=Path), default=Path("README.md"), show_default=True)
def report_command(plan_path: Path, results: Path, docs: Path, readme: Path) -> None:
    """Write tables, comparisons and plots of all results into docs/results.md, and the headline into README.md."""
    from benchmarks.evidence.report import write_pages

    for path in write_pages(load_plan(plan_path), results, docs, readme):
        print(path)


if __name__ == "__main__":
    try:
        command(prog_name="python -m benchmarks.evidence")
    except UserError as error:
        print(f"evidence: {error}", file=sys.stderr)
        sys.exit(2)
