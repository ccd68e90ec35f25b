"""The keys of a recipe, read from its schema; writes the file that `help_tables` reads."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ssaseg.cli.help_tables import TABLES
from ssaseg.cli.recipe_page import ONE_OF, OWN_NAME, Key, KeyGroup
from ssaseg.cli.weights.known import KNOWN
from ssaseg.datasets import list_datasets
from ssaseg.datasets.conventions import CONVENTIONS
from ssaseg.datasets.labels import list_label_spaces
from ssaseg.datasets.published import LAYOUTS
from ssaseg.files.writing import write_atomic
from ssaseg.models import CLASSIFIERS, list_mask_models, list_models
from ssaseg.recipes import Recipe
from ssaseg.recipes.resuming import FREE_KEYS

JsonSchema = Mapping[str, Any]


def collect() -> dict[str, Any]:
    """The tables as they should be.

    keys: `read_schema`. free_keys: what a resumed run may change. classifiers: for each the note, the losses by name,
    each with its default weight and meaning, and the options by name, each with its default and meaning. conventions:
    for each of annotation tools, its name and what it is. datasets, label_spaces, networks, masks, weights: names of
    published data sets, of their classes, of networks, mask methods and published weights.
    """
    classifiers = {
        name: {
            "note": kind.NOTE,
            "losses": {loss: [each.weight, each.meaning] for loss, each in kind.LOSSES.items()},
            "options": {option: [each.default, each.meaning] for option, each in kind.OPTIONS.items()},
        }
        for name, kind in CLASSIFIERS.items()
    }
    conventions = {each.kind: each.what for each in CONVENTIONS}
    return {
        "classifiers": classifiers,
        "conventions": conventions,
        "datasets": list(LAYOUTS),
        "label_spaces": list_label_spaces(),
        "networks": list_models(),
        "masks": list_mask_models(),
        "weights": list(KNOWN),
        "free_keys": sorted(FREE_KEYS),
        "keys": read_schema(),
    }


def write() -> None:
    """Writes the file again."""
    write_atomic(TABLES, (json.dumps(collect(), indent=1, ensure_ascii=False) + "\n").encode())


def read_schema() -> list[KeyGroup]:
    """All sections of a recipe: the top level first, and each section before those inside it."""
    schema = Recipe.model_json_schema()
    groups: dict[str, KeyGroup] = {}
    for name, section in _sections(schema, schema["$defs"], ""):
        title = section["title"]
        if title in groups:  # data.train and data.val have the same keys, which are printed once
            groups[title] = groups[title]._replace(names=(*groups[title].names, name))
            continue
        required = section.get("required", ())
        keys = tuple(_key(name, key, field, key in required) for key, field in section["properties"].items())
        groups[title] = KeyGroup((name,), " ".join(section["description"].split()), keys)
    return list(groups.values())


def _sections(section: JsonSchema, definitions: JsonSchema, name: str) -> Iterator[tuple[str, JsonSchema]]:
    """Dotted name and schema of a section and of all sections inside it."""
    yield name, section
    for key, field in section["properties"].items():
        reference, below = _reference(field)
        if reference:
            yield from _sections(definitions[reference], definitions, f"{name}.{key}{below}".lstrip("."))


def _reference(field: JsonSchema) -> tuple[str, str]:
    """If a field's value is a section: its name in the schema and what stands before its keys' names; else "", ""."""
    kinds = [field, *field.get("anyOf", ()), *field.get("allOf", ())]
    mapped = [kind["additionalProperties"] for kind in kinds if isinstance(kind.get("additionalProperties"), dict)]
    for below, several in (("", kinds), (f".{OWN_NAME}", mapped)):
        for kind in several:
            if "$ref" in kind:
                return kind["$ref"].rpartition("/")[2], below
    return "", ""


def _key(section: str, key: str, field: JsonSchema, required: bool) -> Key:
    name = f"{section}.{key}".lstrip(".")
    reference, below = _reference(field)
    if name == "name":  # `load_recipe` sets it
        default = "default: the file's stem"
    elif name == "train.steps":  # a check across keys requires it
        default = "**required**, or train.epochs"
    elif required:
        default = "**required**"
    elif reference and field["default"]:
        default = "default: the defaults of its keys"
    else:
        value = field["default"]
        default = f"default `{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"
    values = _looked_up(name) or _values(field)
    return Key(name, values, default, field["description"], f"{name}{below}" if reference else "")


def _looked_up(name: str) -> str:
    """Values of the keys that are plain text in the schema and that a command looks up in a table; "" for others."""
    tables = {"model.name": list_models(), "model.classifier": sorted(CLASSIFIERS), "data.dataset": list_datasets()}
    if name == "model.options":
        return f"mapping of {OWN_NAME} to a value"
    return f"{ONE_OF}{', '.join(tables[name])}" if name in tables else ""


def _values(kind: JsonSchema) -> str:
    """The values that a JSON schema allows, as text."""
    if "anyOf" in kind:
        return " or ".join(map(_values, kind["anyOf"]))
    if "$ref" in kind or "allOf" in kind:
        return "section"
    if "const" in kind or "enum" in kind:
        values = kind.get("enum") or [kind["const"]]
        return f"{ONE_OF if len(values) > 1 else ''}{', '.join(map(str, values))}"
    word = kind["type"]
    if word in ("integer", "number"):
        return _range(word, kind)
    if word == "array" and "prefixItems" in kind:
        return f"[{', '.join(map(_values, kind['prefixItems']))}]"
    if word == "array":
        return f"list of {_values(kind['items']).replace(ONE_OF, '')}"
    if word == "object":
        return f"mapping of {OWN_NAME} to {_values(kind['additionalProperties'])}"
    return {"null": "null", "boolean": "true or false", "string": "text"}[word]


def _range(word: str, kind: JsonSchema) -> str:
    """`number`, `number > 0`, `0 <= number < 1`."""
    signs = {"minimum": "<=", "exclusiveMinimum": "<", "maximum": "<=", "exclusiveMaximum": "<"}
    low, high = (
        [(kind[key], signs[key]) for key in signs if key in kind and end in key.lower()] for end in ("min", "max")
    )
    if low and not high:
        ((bound, sign),) = low
        return f"{word} {sign.replace('<', '>')} {bound}"
    before = "".join(f"{bound} {sign} " for bound, sign in low)
    return f"{before}{word}" + "".join(f" {sign} {bound}" for bound, sign in high)
