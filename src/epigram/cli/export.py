"""`epigram export`: the steps after training alone."""

from pathlib import Path

import click

from epigram.cli.options import data_option, device_option, finish, json_option, set_option, tell_run


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@data_option(required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the new result; by default RUN/export-N.")
@set_option()
@device_option()
@json_option()
def command(
    run: Path, data_path: str | None, out: Path | None, overrides: tuple[str, ...], device: str, as_json: bool
) -> None:
    """Average, calibrate, quantize, pack and score the last checkpoint of RUN again, with other settings.

    For example: epigram export runs/a --set quant.method=rtn --set artifact.codec=brotli
    """
    from epigram.run.job import export_job

    result = export_job(run, data_path=data_path, out=out, overrides=overrides, device=device)
    tell_run(result)
    finish(result, as_json)
