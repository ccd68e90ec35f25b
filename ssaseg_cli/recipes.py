"""The commands of `ssaseg recipes`: list, show and copy recipes, and explain their keys."""

from itertools import groupby
from pathlib import Path

import click

from ssaseg.cli.completion import complete_sections, names_of
from ssaseg.cli.console import fit_lines, terminal_width
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo


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
    """Print the names of the recipes, grouped by data set.

    \b
    Example:
      ssaseg recipes list
    """
    from ssaseg.recipes import list_recipes, recipe_file, recipe_text

    groups = [list(group) for _, group in groupby(list_recipes(), key=lambda name: name.partition("-")[0])]
    for group in groups:
        if group != groups[0]:
            echo()
        for name in group:
            first_line = recipe_text(recipe_file(name)).partition("\n")[0]
            line = f"{name:{max(map(len, group))}}  {first_line.lstrip('# ')}"
            echo(fit_lines(line, terminal_width()).rstrip())


@recipes.command()
@click.argument("name", shell_complete=names_of("recipes", files=True))
def show(name: str) -> None:
    """Print the text of a recipe.

    `ssaseg train NAME --print-config` prints all keys, with the values that come from defaults and other recipes.

    \b
    Example:
      ssaseg recipes show demo
    """
    from ssaseg.recipes import recipe_file, recipe_text

    echo(recipe_text(recipe_file(name)), nl=False)


@recipes.command()
@click.argument("name", shell_complete=names_of("recipes", files=True))
@click.argument("destination", type=click.Path(path_type=Path), required=False)
def copy(name: str, destination: Path | None) -> None:
    """Copy a recipe, for you to change.

    DESTINATION is NAME.yaml in the current directory by default. It must end in .yaml or .yml, and must not exist yet.
    The copy is a single file: it includes the recipes that NAME extends.

    \b
    Example:
      ssaseg recipes copy demo my.yaml
    """
    from ssaseg.recipes import standalone_text

    destination = destination or Path(f"{Path(name).stem}.yaml")
    if destination.suffix not in (".yaml", ".yml"):
        raise CommandError(f"{destination}: the file of a recipe must end in .yaml or .yml\nuse {destination}.yaml")
    text = standalone_text(name)
    try:
        file = destination.open("x", encoding="utf-8")  # "x": never replaces a file that a user has edited
    except FileExistsError:
        raise CommandError(f"{destination}: already exists\ngive another DESTINATION, or remove the file") from None
    except FileNotFoundError:
        raise CommandError(
            f"{destination}: there is no folder {destination.parent}\nmake it first, or give another DESTINATION"
        ) from None
    try:
        with file:
            file.write(text)
    except OSError as error:  # a full disk: half a recipe would block the next attempt
        destination.unlink()
        raise OSError(error.errno, error.strerror, str(destination)) from None
    echo(f"wrote {destination}; run it with `ssaseg train {destination}`")


@recipes.command()
@click.argument("section", required=False, shell_complete=complete_sections)
def keys(section: str | None) -> None:
    """Print all keys that a recipe may have.

    Prints the allowed values, the default and the meaning of each key. SECTION limits this to one section or one key.
    The full output is the page docs/recipe.md.

    \b
    Example:
      ssaseg recipes keys
      ssaseg recipes keys optim
    """
    from ssaseg.cli.recipe_page import recipe_page, section_page

    echo(fit_lines(section_page(section) if section else recipe_page(), terminal_width()), nl=False)
