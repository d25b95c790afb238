"""`epigram submit`: a record folder from finished runs."""

from pathlib import Path

import click

from epigram.cli.options import finish, json_option


@click.command("submit")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The record folder, new or empty.")
@click.option("--author", required=True, help="Name of who hands it in.")
@click.option("--github-id", required=True, help="GitHub name of who hands it in.")
@click.option("--name", default="", help="Name of the entry; by default the recipe's.")
@click.option("--blurb", default="", help="A sentence about it; by default the recipe's summary.")
@click.option("--track", type=click.Choice(["track_10min_16mb", "track_non_record_16mb"]), default="track_10min_16mb",
              show_default=True, help="The folder of parameter-golf that it is meant for.")  # fmt: skip
@click.option("--date", default="", help="YYYY-MM-DD; by default today.")
@click.option("--record", type=float, metavar="NATS", help="Mean nats a token of the record that it should beat.")
@click.option("--form", type=click.Choice(["packed", "readable"]), default="packed", show_default=True,
              help="Of train_gpt.py: compressed, or with every module as it is written.")  # fmt: skip
@click.option("--artifacts/--no-artifacts", default=True, show_default=True, help="Put the packed models beside it.")
@json_option()
def command(
    runs: tuple[Path, ...],
    out: Path,
    author: str,
    github_id: str,
    name: str,
    blurb: str,
    track: str,
    date: str,
    record: float | None,
    form: str,
    artifacts: bool,
    as_json: bool,
) -> None:
    """Write a record folder from the finished runs RUN, one a seed, all of one recipe.

    It holds train_gpt.py (the package and the recipe in one file), a README with tables made from the logs,
    submission.json, a log and the artifact of each seed, and requirements.txt.
    """
    from epigram.run.submission.folder import About, submit

    about = About(
        author=author, github_id=github_id, name=name, blurb=blurb, track=track, date=date, record_nats=record
    )
    found = submit(runs, out, about, form=form, artifacts=artifacts)
    click.echo(
        f"{out}: val_bpb {found['val_bpb']:.6f} over {len(found['seeds'])} seed(s), {found['bytes_code']:,} bytes of "
        f"code + {found['bytes_model']:,} = {found['bytes_total']:,} of {found['bytes_cap']:,}"
    )
    click.echo(f"next: epigram check {out} --execute")
    finish({"folder": str(out), **found}, as_json)
