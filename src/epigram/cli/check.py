"""`epigram check`: is this record folder valid?"""

from pathlib import Path

import click

from epigram.cli.options import SECONDS, finish, json_option


@click.command("check")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--record", metavar="NATS|FOLDER", help="A record to beat: its mean nats a token, or its folder.")
@click.option("--execute", is_flag=True,
              help="Run train_gpt.py too: foreign code, with a time limit and connections refused.")  # fmt: skip
@click.option("--cap", default=16_000_000, show_default=True, type=click.IntRange(min=1), help="Bytes allowed.")
@click.option("--train-limit", default=600.0, show_default=True, type=SECONDS, help="Seconds allowed for training.")
@click.option("--score-limit", default=600.0, show_default=True, type=SECONDS, help="Seconds allowed for scoring.")
@json_option()
@click.pass_context
def command(
    ctx: click.Context,
    folder: Path,
    record: str | None,
    execute: bool,
    cap: int,
    train_limit: float,
    score_limit: float,
    as_json: bool,
) -> None:
    """Check the record folder FOLDER, made by epigram submit or by anybody.

    Files and fields, bytes of every seed, times, log against README against JSON, calibration, imports, the
    conditions on the score as far as the artifacts can be probed, and significance. Exit code 0 if nothing is an
    error, else 1.
    """
    from epigram.run.submission.check import check, print_check
    from epigram.run.submission.rules.limits import Limits

    limits = Limits(cap_bytes=cap, train_s=train_limit, score_s=score_limit)
    result = check(folder, limits=limits, against=record, run_script=execute)
    print_check(result)
    finish(result, as_json)
    ctx.exit(0 if result["valid"] else 1)
