"""What a user says about a file that does not say it itself: `--classes` and `--protocol`."""

from pathlib import Path
from typing import Any

from ssaseg.cli.errors import CommandError
from ssaseg.cli.weights.classes import requested_classes
from ssaseg.datasets.classnames import read_names
from ssaseg.files.text import describe, printable
from ssaseg.recipes import load_recipe

RECIPES = (".yaml", ".yml")  # a file of names in YAML is not taken for one


def stated_metadata(classes: str | None, protocol: str | None) -> dict[str, Any]:
    """Metadata of `--classes` and `--protocol`; empty without both.

    classes: a published data set or a recipe, which also say mean, std and protocol; a file of names; or names
    separated by commas. protocol: a recipe, whose test section, mean, std and range count before those of `classes`.
    Raises CommandError for names that are none of these, and RecipeError.
    """
    found: dict[str, Any] = {}
    if classes is not None:
        path = Path(classes)
        is_names = path.suffix.lower() not in RECIPES and path.is_file()
        found |= _names(path) if is_names else requested_classes(classes)
    if protocol is not None:
        recipe = load_recipe(protocol)
        data = recipe.data
        found |= {
            "mean": list(data.mean),
            "std": list(data.std),
            "range": None if data.range is None else list(data.range),
            "protocol": recipe.test.model_dump(mode="json"),
        }
    return found


def _names(path: Path) -> dict[str, Any]:
    """Classes and colours in a file of names, one for each class from 0 on. Raises CommandError for another file."""
    try:
        found = read_names(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"--classes {path}: cannot be read ({printable(describe(error))})") from None
    ids = sorted(found.names.keys() - found.ignored)
    if not ids or ids != list(range(len(ids))):
        raise CommandError(
            f"--classes {path}: names of the classes {ids[:8]}\nexpected a name for each class from 0 without gaps"
        )
    colours = [found.colours.get(each) for each in ids]
    palette = None if None in colours else [list(each) for each in colours if each is not None]
    return {"classes": [found.names[each] for each in ids], "palette": palette}
