"""Recipes: a YAML file sets everything, except the code, that decides the numbers of a training.

A recipe may extend others. It is checked against the schema when it is read. `key=value` arguments change single keys.
"""

import itertools
import json
import os
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
    HERE,
    LIST,
    Layer,
    RecipeError,
    apply_overrides,
    read_recipe,
    recipe_file,
    recipe_text,
    shipped_recipes,
)
from ssaseg.recipes.schema import Recipe, Test

__all__ = [
    "HERE",
    "Recipe",
    "RecipeError",
    "Test",
    "dump_recipe",
    "list_recipes",
    "load_recipe",
    "parse_protocol",
    "parse_recipe",
    "recipe_file",
    "recipe_text",
    "standalone_text",
]


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), known: Known | None = None) -> Recipe:
    """Read a shipped recipe or a file, resolve `extends`, apply `key=value` arguments, and check the result.

    Args:
        name_or_path: the name of a shipped recipe, such as "demo", or the path of a YAML file.
        overrides: arguments such as "optim.lr=1e-3", "train.amp=off", "augment.crop=[360,480]".
        known: facts about a network with its classifier, `ssaseg.models.facts`: losses, options and groups are then
            checked too. Needed where the recipe is to be trained.

    Raises:
        RecipeError: the recipe cannot be read or is not valid. The message has at most three lines.
    """
    path = recipe_file(name_or_path)
    if path.parent == FOLDER and path.stem.startswith("_"):
        raise RecipeError(
            f"{name_or_path}: this recipe is only a base for other recipes; it cannot be run\n"
            f"write `extends: {path.stem}` in your own file; {LIST}"
        )
    layer = read_recipe(path)
    layer.values.setdefault("name", path.stem)
    return _check(apply_overrides(layer, overrides), name_or_path, known)


def parse_recipe(data: Mapping[str, Any], source: str) -> Recipe:
    """Check a complete recipe that is already a mapping, such as the recipe in a checkpoint.

    Args:
        data: the mapping. Keys of `raw_to_train` may be text, as parsed from JSON.
        source: where the recipe comes from: the error message starts with it. Its stem is the default of `name`.

    Raises:
        RecipeError: the recipe is not valid. The message has at most three lines.
    """
    return _check(Layer({"name": Path(source).stem, **_current(data)}, {}), source)


def _current(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stored recipe with the losses' weights where they are now: checkpoints of before have them in `distill`."""
    distill = data.get("distill")
    if not isinstance(distill, Mapping) or "weights" not in distill:
        return data
    kept = {key: value for key, value in distill.items() if key != "weights"}
    loss = data.get("loss", {})
    loss = {**loss, "weights": distill["weights"]} if isinstance(loss, Mapping) else loss
    return {**data, "distill": kept, "loss": loss}


class _Protocol(Section):
    """A `test` section alone, inside a mapping, so that its errors name the same keys as those of a recipe."""

    test: Test


def parse_protocol(data: Mapping[str, Any], source: str) -> Test:
    """Check a test-time protocol alone, such as a checkpoint's. Missing keys get their defaults.

    Args:
        data: the mapping, like a recipe's `test` section.
        source: where the protocol comes from: the error message starts with it.

    Raises:
        RecipeError: the protocol is not valid. The message has at most three lines.
    """
    try:
        return _Protocol.model_validate({"test": data}).test
    except ValidationError as error:
        raise RecipeError(explain(error, source, {})) from None


def dump_recipe(recipe: Recipe, after_data: str | None = None) -> str:
    """The recipe as YAML text with all keys and without `extends`. It can be run; loading it gives an equal recipe.

    after_data: comments to write below the section `data`, which is then without the keys that its data set does not
    use.
    """
    values = recipe.model_dump()
    if after_data is None:
        return _dump(values)
    values["data"] = {key: value for key, value in values["data"].items() if recipe.data.uses(key)}
    place = list(values).index("data") + 1
    first, rest = (dict(part) for part in (list(values.items())[:place], list(values.items())[place:]))
    return _dump(first) + after_data + _dump(rest)


def standalone_text(name_or_path: str) -> str:
    """The recipe as the text of a single file, without `name`: the name is then that of the new file.

    If the recipe extends no other, this is its text, with comments; otherwise its header and all its keys. The folder
    of the file is written in the place of `${recipe_dir}`, as the text may be stored in another folder.
    """
    path = recipe_file(name_or_path)
    recipe = load_recipe(name_or_path)
    text = recipe_text(path).replace(HERE, json.dumps(os.path.abspath(path.parent), ensure_ascii=False)[1:-1])
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
    """Writes lists on one line, no anchors, and quotes around text that YAML 1.2 would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, None)
_Dumper.add_representer(
    tuple, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)
