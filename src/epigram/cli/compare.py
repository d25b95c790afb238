"""`epigram compare`: several seeds a side, and whether the difference is more than chance."""

from pathlib import Path
from typing import Any

import click

from epigram.cli.options import finish, json_option


class _Several(click.Command):
    """Lets --against take several folders, as shells expand a pattern: every word up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        taking = False
        for word in args:
            if word == "--against":
                taking = True
            elif word.startswith("-"):
                taking = False
                spread.append(word)
            else:
                spread += ["--against", word] if taking else [word]
        if args and args[-1] == "--against":
            spread.append("--against")  # click says that its value is missing
        return super().parse_args(ctx, spread)


@click.command("compare", cls=_Several)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--against", multiple=True, type=click.Path(path_type=Path), metavar="RUN...", help="The runs of the other side."
)
@click.option("--record", type=float, metavar="NATS", help="Mean nats a token of a published record to test against.")
@click.option("--metric", type=click.Choice(["bpb", "nats"]), default="bpb", show_default=True,
              help="Bits per byte, or nats a token (one tokenizer only).")  # fmt: skip
@click.option(
    "--alpha",
    type=click.FloatRange(0, 0.5, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="One-sided p below which a side is called better.",
)
@json_option()
def command(
    runs: tuple[Path, ...],
    against: tuple[Path, ...],
    record: float | None,
    metric: str,
    alpha: float,
    as_json: bool,
) -> None:
    """Compare the scores of the runs in the folders RUN with those --against, one run a seed.

    \b
    For example: epigram compare runs/new-1 runs/new-2 --against runs/old-1 runs/old-2
    """
    from epigram.run.compare import compare_runs

    found = compare_runs(runs, against, metric=metric, alpha=alpha, record_nats=record)
    click.echo(f"scored: {found['scored']}")
    for name, side in found["sides"].items():
        _print_side(name, side)
    for note in found["notes"]:
        click.echo(f"note: {note}", err=True)
    click.echo(found["sentence"])
    finish(found, as_json)


def _print_side(name: str, side: dict[str, Any]) -> None:
    click.echo(f"{name}:")
    for row in side["runs"]:
        click.echo(f"  {row['run']}  seed {row['seed']}  {row['val_bpb']:.5f} bpb  {row['val_nats']:.5f} nats")
    spread = "" if side["sd"] is None else f"  sd {side['sd']:.5f}"
    click.echo(f"  mean {side['mean']:.5f}{spread}")
