"""`epigram data`: published shards to a folder, text to a data folder, and a data folder under scrutiny."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

_ALLOW = "Accept a validation split that is not the published one; every score made with it will say so."


@click.group("data", help="Fetch, build and check folders of tokenized text.")
def command() -> None:
    pass


@command.command("fetch")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="The folder to fill; by default data/NAME.")
@click.option("--shards", type=int, help="Training shards of 100 million tokens (200 MB); by default 80.")
@click.option("--revision", help="Commit or branch of the repository; by default its newest.")
@click.option("--allow-other-validation", is_flag=True, help=_ALLOW)
@click.option("--json", "as_json", is_flag=True, help="End with the record of what was fetched in one line of JSON.")
def fetch_command(name: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Download published FineWeb shards: sp1024, sp2048, sp4096 or sp8192.

    Goes on where an earlier call ended; every file is verified by length, header, tokens and hash. The settings
    of the hub's own library count: HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT.
    """
    from epigram.data.fetch import fetch

    result = fetch(name, out or Path("data") / name, **options)
    for note in result.notes:
        click.echo(f"note: {note}")
    record = result.fetched
    shards = [file for file in record.files if file.startswith("fineweb_train_")]
    tokens = sum(record.files[file].tokens for file in shards)
    click.echo(f"validation: {record.validation.text}")
    click.echo(f"{result.path}: {len(shards)} training shards, {tokens:,} tokens: use it with --data {result.path}")
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(record)))


@command.command("build")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The data folder to write.")
@click.option("--val", "val_sources", multiple=True, metavar="SOURCE", help="Validation text; may be repeated.")
@click.option("--tokenizer", "tokenizer_file", type=click.Path(path_type=Path), help="A SentencePiece .model to use.")
@click.option("--vocab-size", type=int, help="Pieces of the tokenizer that is trained; by default 1024.")
@click.option(
    "--normalization",
    type=click.Choice(["identity", "nmt_nfkc"]),
    help="How the trained tokenizer changes text; by default identity, which keeps every byte.",
)
@click.option("--val-fraction", type=float, help="Share of the documents held out, without --val; by default 0.05.")
@click.option("--shard-tokens", default=100_000_000, show_default=True, help="Tokens of a full shard.")
@click.option("--field", metavar="NAME", help="Field or column that holds the text of a record; by default text.")
@click.option("--transform", default="", metavar="NAME", help="Of text before it is tokenized: caseops, or none.")
@click.option("--min-chars", default=0, show_default=True, help="Leave out shorter documents.")
@click.option(
    "--language", default="", metavar="CODE", help="Leave out documents in other languages than this, e.g. en."
)
@click.option(
    "--dedup",
    type=click.Choice(["none", "exact", "near"]),
    default="none",
    show_default=True,
    help="Leave out repeated documents (exact), and those of train that are nearly like one of val too (near).",
)
@click.option("--near-threshold", type=float, help="Share of common word sequences that is near; by default 0.7.")
@click.option("--workers", type=int, help="Processes; by default one a core, up to four.")
@click.option("--seed", default=0, show_default=True, help="Decides which documents are held out.")
@click.option("--replace", is_flag=True, help="Replace a data folder of other text or settings that --out holds.")
@click.option("--json", "as_json", is_flag=True, help="End with the manifest in one line of JSON.")
def build_command(
    sources: tuple[str, ...],
    out: Path,
    as_json: bool,
    min_chars: int,
    language: str,
    dedup: str,
    near_threshold: float | None,
    **options: Any,
) -> None:
    """Build a data folder from text.

    SOURCE is a text file, a folder, .jsonl (also .gz, .zst), .csv, .tsv, .parquet, hf://OWNER/NAME[@REVISION][/FOLDER]
    for a dataset on the hub, or the word stdlib: the documentation that every Python carries. A text file is cut into
    documents at paragraph ends; in a folder each file is one. An interrupted build is gone on with.
    """
    from epigram.data.build import build
    from epigram.data.clean import Cleaning

    cleaning = Cleaning(min_chars=min_chars, language=language, dedup=dedup, near_threshold=near_threshold)
    built = build(sources, out, cleaning=cleaning, **options)
    for note in built.notes:
        click.echo(f"note: {note}")
    _show(built.manifest)
    click.echo(f"built {out}: use it with --data {out}")
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(built.manifest), ensure_ascii=False))


@command.command("check")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tokenizer", "tokenizer_file", type=click.Path(path_type=Path), help="For a folder without a manifest.")
@click.option("--allow-other-validation", is_flag=True, help=_ALLOW)
@click.option("--json", "as_json", is_flag=True, help="End with the findings in one line of JSON.")
def check_command(folder: Path, tokenizer_file: Path | None, allow_other_validation: bool, as_json: bool) -> None:
    """Verify every hash, header, token and byte of a data FOLDER.

    Ends with code 1 when something is wrong with it.
    """
    from epigram.data.check import check

    findings = check(folder, tokenizer_file, allow_other_validation=allow_other_validation)
    errors = sum(finding.is_error for finding in findings)
    for finding in findings:
        click.echo(f"{'error' if finding.is_error else 'warning'}: {finding.text}")
    click.echo(f"{folder}: {'all is well' if not errors else f'{errors} errors'}")
    if as_json:
        click.echo(json.dumps({"errors": errors, "findings": [dataclasses.asdict(found) for found in findings]}))
    sys.exit(1 if errors else 0)


def _show(manifest: Any) -> None:
    """A table of the splits."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"tokenizer of {manifest.tokenizer.vocab_size:,} pieces, {manifest.tokenizer.normalization}")
    for heading in ("split", "documents", "tokens", "bytes", "bytes/token", "shards"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, split in manifest.splits.items():
        table.add_row(
            name,
            f"{split.documents:,}",
            f"{split.tokens:,}",
            f"{split.normalized_bytes:,}",
            f"{split.normalized_bytes / split.tokens:.3f}",
            f"{len(split.shards)}",
        )
    Console().print(table)
