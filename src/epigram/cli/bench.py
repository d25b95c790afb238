"""`epigram bench`: how fast this machine is at the parts of a run, and how fast it could be."""

from pathlib import Path

import click

from epigram.cli.options import device_option, finish, set_option


@click.command("bench")
@click.argument("benchmark")
@click.option("--recipe", help="A recipe or a .toml file; by default h100 on a CUDA device and smoke elsewhere.")
@set_option()
@click.option("--repeats", type=click.IntRange(min=1), help="Timed calls of each; by default the benchmark's own.")
@device_option()
@click.option("--profile", type=click.Path(path_type=Path), metavar="DIR",
              help="Write a trace and tables of kernels into this new folder.")  # fmt: skip
@click.option("--method", "methods", multiple=True, help="Of score: blocks, sliding or streaming (repeatable).")
@click.option("--seq-len", type=click.IntRange(min=1), help="Of score: tokens in a window.")
@click.option("--stride", type=click.IntRange(min=1), help="Of score: tokens between windows of method sliding.")
@click.option("--codec", "codecs", multiple=True, help="Of pack: only this codec (repeatable); brotli takes a minute.")
@click.option("--json", "as_json", is_flag=True, help="Print the line of JSON alone, without the tables.")
def command(
    benchmark: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    repeats: int | None,
    device: str,
    profile: Path | None,
    methods: tuple[str, ...],
    seq_len: int | None,
    stride: int | None,
    codecs: tuple[str, ...],
    as_json: bool,
) -> None:
    """Time BENCHMARK on made-up tokens: step, lanes, attention, mlp, optimizer, score or pack.

    Prints a table and, as its last line, the same as JSON. Every time stands beside a floor: the least that this
    machine would need, from the copy and the product that it is measured at in the same command.
    """
    from epigram.run.bench.base import Options
    from epigram.run.benchmark import benchmark as run

    options = Options(profile=profile, methods=methods, seq_len=seq_len, stride=stride, codecs=codecs)
    result = run(
        benchmark,
        recipe=recipe,
        overrides=overrides,
        repeats=repeats,
        device=device,
        options=options,
        show=not as_json,
    )
    finish(result, as_json=True)
