"""`epigram report`: one page about one or several runs."""

import json
from pathlib import Path

import click


@click.command(name="report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="File to write. Default: report.html in the run's folder, or in the current one for several runs.",
)
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
def command(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Write one self-contained HTML page with curves, tables and samples of the runs in the folders RUN.

    Works on runs of any state: one that was killed, ran out of disk or is still going is shown as far as it
    came.
    """
    from epigram.run.report.build import build

    if out is None:
        out = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    found = build(runs, out)
    for run in found:
        for problem in run.problems:
            click.echo(f"{run.name}: {problem}", err=True)
    if as_json:
        problems = {run.name: list(run.problems) for run in found}
        print(json.dumps({"report": str(out), "runs": [run.name for run in found], "problems": problems}))
    else:
        click.echo(f"report: {out} ({len(found)} run{'s' if len(found) > 1 else ''})")
