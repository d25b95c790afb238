"""Options that several commands share, and how results are printed."""

import json
import math
import shlex
from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Any], Any]


class _Seconds(click.FloatRange):
    """A positive number that is one: a range alone lets NaN pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


SECONDS = _Seconds(min=0, min_open=True)

_DATA_HELP = "A data folder (epigram data build), or a text file or folder of text, which is built first and cached."


def data_option(*, required: bool, help_: str = _DATA_HELP) -> Decorator:
    """--data: a built folder, or text."""
    return click.option(
        "--data",
        "data_path",
        metavar="PATH",
        required=required,
        help=help_,
    )


def device_option() -> Decorator:
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")


def json_option() -> Decorator:
    return click.option("--json", "as_json", is_flag=True, help="End with one line of JSON on standard output.")


def set_option(
    help_: str = "Change one setting of the recipe, e.g. --set budget.train_s=60 (repeatable).",
) -> Decorator:
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help=help_,
    )


def tell_run(result: dict[str, Any]) -> None:
    """Where a run is, and what can be done with it next."""
    if not result:  # of several processes only the first has one
        return
    run = shlex.quote(result["run"])
    if "artifact_bytes" in result:
        next_steps = {
            f'epigram generate {run} --prompt "Once"': "continues a prompt",
            f"epigram report {run}": "writes a page of its curves and tables",
        }
    else:
        next_steps = {f"epigram export {run}": "quantizes, packs and scores what was trained"}
    click.echo(f"\nThe run is in {run}. Next:")
    for line, what in next_steps.items():
        click.echo(f"  {line}  {what}")


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The last line for a program, if it was asked for; of several processes only the first has a result."""
    if as_json and result:
        click.echo(json.dumps(result))
