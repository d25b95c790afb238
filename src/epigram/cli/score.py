"""`epigram score`: bits per byte of a model on held-out text."""

from pathlib import Path
from typing import Any

import click

from epigram.cli.options import data_option, device_option, finish, json_option, set_option


@click.command("score")
@click.argument("model", type=click.Path(path_type=Path))
@data_option(required=True,
             help_="A data folder (epigram data build), of which --split is scored, or a text file or folder of text, "
             "all of which is scored.")  # fmt: skip
@click.option("--method", "methods", multiple=True, help="blocks, sliding or streaming (repeatable); by default all.")
@click.option("--seq-len", type=click.IntRange(min=1), help="Tokens in a window; by default the training context.")
@click.option("--stride", type=click.IntRange(min=1),
              help="Tokens between windows of method sliding; by default an eighth of a window.")  # fmt: skip
@click.option("--segment-tokens", type=click.IntRange(min=1),
              help="Tokens of a segment of method streaming; by default 262,144.")  # fmt: skip
@click.option("--overlap", type=click.IntRange(min=0),
              help="Windows that each segment reads again of the one before it; by default 2.")  # fmt: skip
@click.option(
    "--max-tokens", type=click.IntRange(min=0), default=0, help="Score only so many tokens, from the start; 0: all."
)
@click.option("--split", default="val", show_default=True, help="Split of the data folder.")
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=65_536,
    show_default=True,
    help="Tokens in a forward: speed, not score.",
)
@click.option("--probe", is_flag=True, help="First put the scorer and the model to the test; fail if either cheats.")
@click.option("--adapt", type=click.Choice(["sgd", "lora"]),
              help="Score besides while the model learns from what is scored: all weights, chunk by chunk, or adapters "
              "of each document; by default beside method sliding alone.")  # fmt: skip
@set_option("Change one setting of --adapt or the time it may take, e.g. --set score.adapt.sgd.lr=0.001 or "
            "--set budget.score_s=600 (repeatable).")  # fmt: skip
@device_option()
@json_option()
def command(
    model: Path,
    data_path: str,
    methods: tuple[str, ...],
    seq_len: int | None,
    stride: int | None,
    segment_tokens: int | None,
    overlap: int | None,
    max_tokens: int,
    split: str,
    batch_tokens: int,
    probe: bool,
    adapt: str | None,
    overrides: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Score MODEL (a packed file, a run folder or a checkpoint) on a split of the data folder --data, or on a text."""
    from epigram.config import parse_adapt
    from epigram.errors import UserError
    from epigram.evaluation.windows import StreamingConfig
    from epigram.run.score import score_model

    settings, limit_s = parse_adapt(adapt or "none", overrides)
    asked = {*methods, "sliding"} if adapt else set(methods)  # none: all methods
    for option, given, reader in (
        ("--stride", stride, "sliding"),
        ("--segment-tokens", segment_tokens, "streaming"),
        ("--overlap", overlap, "streaming"),
    ):
        if given is not None and asked and reader not in asked:
            raise UserError(f"{option}: only method {reader} reads that; add --method {reader}, or leave it out")
    told: dict[str, Any] = {"segment_tokens": segment_tokens, "overlap": overlap}
    result = score_model(
        model,
        data_path,
        methods=methods,
        seq_len=seq_len,
        stride=stride,
        streaming=StreamingConfig(**{name: value for name, value in told.items() if value is not None}),
        split=split,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        device=device,
        with_probes=probe,
        adapt=settings,
        limit_s=limit_s,
    )
    finish(result, as_json)
