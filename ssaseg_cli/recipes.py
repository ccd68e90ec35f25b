"""The commands of `ssaseg recipes`: each a signature, a docstring with an example, and one call, as in `main`."""

from itertools import groupby
from pathlib import Path

import click

from ssaseg.cli.errors import CommandError


@click.group()
def recipes() -> None:
    """List, show and copy recipes, and explain their keys.

    \b
    Example:
      ssaseg recipes list
      ssaseg recipes keys optim
    """


@recipes.command("list")
def list_command() -> None:
    """Print the recipes' names, by data set.

    \b
    Example:
      ssaseg recipes list
    """
    from ssaseg.recipes import list_recipes, recipe_file

    groups = [list(group) for _, group in groupby(list_recipes(), key=lambda name: name.partition("-")[0])]
    for group in groups:
        if group != groups[0]:
            click.echo()
        for name in group:
            first_line = recipe_file(name).read_text(encoding="utf-8").partition("\n")[0]
            click.echo(f"{name:{max(map(len, group))}}  {first_line.lstrip('# ')}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a recipe as it is written.

    `ssaseg train NAME --print-config` prints every key instead.

    \b
    Example:
      ssaseg recipes show demo
    """
    from ssaseg.recipes import recipe_file

    click.echo(recipe_file(name).read_text(encoding="utf-8"), nl=False)


@recipes.command()
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path), required=False)
def copy(name: str, destination: Path | None) -> None:
    """Copy a recipe to change it.

    DESTINATION is NAME.yaml here by default, ends in .yaml or .yml, and must not exist. The copy is one file, whatever
    NAME extends.

    \b
    Example:
      ssaseg recipes copy demo my.yaml
    """
    from ssaseg.recipes import standalone_text

    destination = destination or Path(f"{Path(name).stem}.yaml")
    if destination.suffix not in (".yaml", ".yml"):
        raise CommandError(f"{destination}: `train` takes only .yaml and .yml for files\nuse {destination}.yaml")
    text = standalone_text(name)
    try:
        file = destination.open("x", encoding="utf-8")  # "x": never over a file somebody has edited
    except FileExistsError:
        raise CommandError(f"{destination}: is there already\ngive another name as DESTINATION, or remove it") from None
    except FileNotFoundError:
        raise CommandError(f"{destination}: no folder {destination.parent}\nmake it first, or name another") from None
    try:
        with file:
            file.write(text)
    except OSError as error:  # a full disk: half a recipe would be in the way of the next try
        destination.unlink()
        raise OSError(error.errno, error.strerror, str(destination)) from None
    click.echo(f"wrote {destination}; run it with `ssaseg train {destination}`")


@recipes.command()
@click.argument("section", required=False)
def keys(section: str | None) -> None:
    """Print every key that a recipe may have.

    With its values, its default and its meaning; of SECTION alone where one is given, or of one key. It is the page
    docs/recipe.md.

    \b
    Example:
      ssaseg recipes keys
      ssaseg recipes keys optim
    """
    from ssaseg.cli.recipe_page import recipe_page, section_page

    click.echo(section_page(section) if section else recipe_page(), nl=False)
