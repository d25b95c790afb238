"""`epigram doctor`: what this machine has and which paths a run would take."""

import json
from pathlib import Path

import click

_SIGNS = {"ok": ("+", "green"), "note": ("-", "yellow"), "problem": ("!", "red")}


@click.command(name="doctor")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder that runs would be written to.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines.")
def command(out: Path | None, as_json: bool) -> None:
    """Say what this machine has (GPU, kernels, compiler, disk), which paths a run would take, and what to
    mend.

    Ends with exit code 1 when something is found that makes runs fail.
    """
    from epigram.run.doctor import examine

    findings = examine(out)
    problems = sum(finding.status == "problem" for finding in findings)
    if as_json:
        print(json.dumps({"problems": problems, "findings": [finding.as_dict() for finding in findings]}))
    else:
        part = ""
        for finding in findings:
            if finding.part != part:
                part = finding.part
                click.secho(f"\n{part}", bold=True)
            sign, colour = _SIGNS[finding.status]
            click.echo(f"  {click.style(sign, fg=colour)} {finding.name:<24} {finding.value}")
            if finding.advice:
                click.echo(f"    {'':<24} {finding.advice}")
        click.echo(f"\n{problems} problem(s)" if problems else "\nNo problem found.")
    if problems:
        raise click.exceptions.Exit(1)
