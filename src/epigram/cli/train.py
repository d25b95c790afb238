"""`epigram train`: the main job."""

from pathlib import Path

import click

from epigram.cli.options import data_option, device_option, finish, json_option, set_option, tell_run


@click.command("train")
@click.argument("recipe", required=False)
@data_option(required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder; by default runs/RECIPE-DATE-TIME.")
@set_option()
@click.option("--seed", type=int, help="The recipe's seed replaced.")
@click.option("--until", type=click.Choice(["train", "export"]), default="export", show_default=True,
              help="Where to stop: after the last step, or at the scored artifact.")  # fmt: skip
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with this run folder from its last checkpoint.")
@click.option("--gpus", type=click.IntRange(min=1), help="Start this many processes, one a GPU (as torchrun would).")
@device_option()
@json_option()
def command(
    recipe: str | None,
    data_path: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    seed: int | None,
    until: str,
    resume: Path | None,
    gpus: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Train RECIPE within its budget, then average, calibrate, quantize, pack, and score the packed file.

    RECIPE is one of the package (epigram describe --list; by default demo) or a .toml file. Without --data the recipe
    learns from the text that every Python carries: the language reference and the docstrings of the standard library.
    """
    if resume and (recipe or out):
        raise click.UsageError("--resume goes on with a run's own recipe in its own folder: leave out RECIPE and --out")
    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    if gpus and gpus > 1:
        from epigram.run.launch import launch

        launch(gpus, None if resume else recipe or "demo", overrides)
        return
    from epigram.run.job import run_job
    from epigram.run.submission.bundle import reserve_warning

    result = run_job(
        recipe or "demo",
        data_path=data_path,
        out=out,
        overrides=overrides,
        until=until,
        resume=resume,
        device=device,
        warn=reserve_warning,
    )
    tell_run(result)
    finish(result, as_json)
