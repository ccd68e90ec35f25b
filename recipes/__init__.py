"""Recipes: one YAML file says everything that decides a training's numbers.

A recipe may extend others and is checked against the schema when it is read; `key=value` words change single keys.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ssaseg.recipes.classifier import Known, check_classifier
from ssaseg.recipes.fields import Section
from ssaseg.recipes.messages import explain
from ssaseg.recipes.reading import (
    FLOAT,
    FOLDER,
    LIST,
    Layer,
    RecipeError,
    apply_overrides,
    read_recipe,
    recipe_file,
    shipped_recipes,
)
from ssaseg.recipes.schema import Recipe, Test

__all__ = [
    "Recipe",
    "RecipeError",
    "Test",
    "dump_recipe",
    "list_recipes",
    "load_recipe",
    "parse_protocol",
    "parse_recipe",
    "recipe_file",
    "standalone_text",
]


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), known: Known | None = None) -> Recipe:
    """Read a shipped recipe or a file, resolve `extends`, apply `key=value` words, and check the result.

    Args:
        name_or_path: a shipped name such as "demo", or the path of a YAML file.
        overrides: words such as "optim.lr=1e-3", "train.amp=off", "augment.crop=[360,480]".
        known: the facts of a network with its classifier, `ssaseg.models.facts`: losses, options and groups are then
            checked too. It is needed where the recipe is to be trained.

    Raises:
        RecipeError: anything that is wrong, in at most three lines.
    """
    path = recipe_file(name_or_path)
    if path.parent == FOLDER and path.stem.startswith("_"):
        raise RecipeError(
            f"{name_or_path}: a base for recipes to extend, not one to run\n"
            f"write `extends: {path.stem}` in a file of your own; {LIST}"
        )
    layer = read_recipe(path)
    layer.values.setdefault("name", path.stem)
    return _check(apply_overrides(layer, overrides), name_or_path, known)


def parse_recipe(data: Mapping[str, Any], source: str) -> Recipe:
    """Check a resolved recipe that is already a mapping, such as the one inside a checkpoint.

    Args:
        data: the mapping; as parsed from JSON, keys of `raw_to_train` may be text.
        source: where it comes from; opens the error message, and its stem is the name where none is given.

    Raises:
        RecipeError: anything that is wrong, in at most three lines.
    """
    return _check(Layer({"name": Path(source).stem, **_current(data)}, {}), source)


def _current(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stored recipe with the losses' weights where they are now: checkpoints of before have them in `distill`."""
    distill = data.get("distill")
    if not isinstance(distill, Mapping) or "weights" not in distill:
        return data
    kept = {key: value for key, value in distill.items() if key != "weights"}
    return {**data, "distill": kept, "loss": {**data.get("loss", {}), "weights": distill["weights"]}}


class _Protocol(Section):
    """A `test` section by itself; as part of a mapping, its errors name keys as a recipe's do."""

    test: Test


def parse_protocol(data: Mapping[str, Any], source: str) -> Test:
    """Check a test-time protocol by itself, such as a checkpoint's; keys that are missing have their defaults.

    Args:
        data: the mapping, as a recipe's `test` section.
        source: where it comes from; opens the error message.

    Raises:
        RecipeError: anything that is wrong, in at most three lines.
    """
    try:
        return _Protocol.model_validate({"test": data}).test
    except ValidationError as error:
        raise RecipeError(explain(error, source, {})) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every key and no `extends`: it runs as it is, and loads back equal."""
    return _dump(recipe.model_dump())


def standalone_text(name_or_path: str) -> str:
    """The recipe as one file that needs no other and takes the name of the file it is written to.

    That is the file itself, comments and all; where it extends others, its header and all keys.
    """
    path = recipe_file(name_or_path)
    text = path.read_text(encoding="utf-8")
    recipe = load_recipe(name_or_path)
    if not re.search(r"^extends\b", text, flags=re.MULTILINE):
        return text
    header = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    return f"{header}\n{_dump(recipe.model_dump(exclude={'name'}))}"


def list_recipes() -> list[str]:
    """Names of the shipped recipes that can be run."""
    return shipped_recipes()


def _check(layer: Layer, source: str, known: Known | None = None) -> Recipe:
    try:
        recipe = Recipe.model_validate(layer.values)
    except ValidationError as error:
        raise RecipeError(explain(error, source, layer.places)) from None
    check_classifier(recipe, known, source, layer.places)
    return recipe


def _dump(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Lists on one line, no anchors, and text that YAML 1.2 would read as a number in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, None)
_Dumper.add_representer(
    tuple, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)
