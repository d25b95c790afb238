"""`epigram describe`: what a recipe is and costs, before it runs."""

import click

from epigram.cli.options import finish, json_option, set_option


@click.command("describe")
@click.argument("recipe", default="demo")
@set_option()
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(min=1), help="Processes to share the lanes.")
@click.option("--list", "only_list", is_flag=True, help="List the recipes of the package instead.")
@json_option()
def command(recipe: str, overrides: tuple[str, ...], gpus: int, only_list: bool, as_json: bool) -> None:
    """Show parameters, bytes against the cap, operations, lanes and schedules of RECIPE."""
    from epigram.config import load_recipe, recipe_names
    from epigram.run.describe import describe, print_description

    if only_list:
        for name in recipe_names():
            click.echo(f"{name:10} {load_recipe(name).summary}")
        return
    description = describe(load_recipe(recipe, overrides), gpus)
    print_description(description)
    finish(description, as_json)
