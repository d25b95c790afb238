"""`epigram describe`: what a recipe is and costs, before it runs."""

from pathlib import Path

import click

from epigram.cli.options import finish, json_option, set_option


@click.command("describe")
@click.argument("recipe", default="demo")
@set_option()
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(min=1), help="Processes to share the lanes.")
@click.option("--list", "only_list", is_flag=True, help="List the recipes of the package instead.")
@click.option(
    "--past",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Correct the forecast of bytes by what this finished run came to (repeatable).",
)
@click.option("--toml", "as_toml", is_flag=True,
              help="Print every setting with its value instead, as a file to change and to train.")  # fmt: skip
@json_option()
def command(
    recipe: str,
    overrides: tuple[str, ...],
    gpus: int,
    only_list: bool,
    past: tuple[Path, ...],
    as_toml: bool,
    as_json: bool,
) -> None:
    """Show parameters, bytes against the cap, operations, lanes and schedules of RECIPE.

    A recipe of your own: epigram describe demo --toml > mine.toml, then epigram train mine.toml
    """
    from epigram.config import load_recipe, recipe_names, to_tree
    from epigram.run.describe import describe, print_description

    if as_json and (only_list or as_toml):
        raise click.UsageError("--json goes with neither --list nor --toml, which print something else")
    if only_list:
        for name in recipe_names():
            click.echo(f"{name:10} {load_recipe(name).summary}")
        return
    if as_toml:
        import tomli_w

        click.echo(tomli_w.dumps(to_tree(load_recipe(recipe, overrides))), nl=False)
        return
    description = describe(load_recipe(recipe, overrides), gpus, past)
    print_description(description)
    finish(description, as_json)
