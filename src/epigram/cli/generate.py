"""`epigram generate`: text from a model."""

from pathlib import Path

import click

from epigram.cli.options import device_option


@click.command("generate")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="Text to continue; empty for the beginning of a document.")
@click.option("--tokens", "num_tokens", default=200, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the most likely token each time.")
@click.option("--top-k", default=0, show_default=True, help="Choose among so many most likely tokens; 0 for all.")
@click.option("--top-p", default=1.0, show_default=True, help="Choose among the tokens that make up this probability.")
@click.option("--seed", default=0, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text (repeatable).")
@device_option()
def command(
    model: Path,
    prompt: str,
    num_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: tuple[str, ...],
    device: str,
) -> None:
    """Continue a prompt with MODEL (a packed file, a run folder or a checkpoint), as it is written."""
    from epigram.run.api import load

    pieces = load(model, device).stream(
        prompt, num_tokens, stop=stop, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    click.echo(prompt, nl=False)
    for text in pieces:
        click.echo(text, nl=False)
    click.echo()
