"""All keys of a recipe on one page, `docs/recipe.md`. It is written from the schema, so that the two always agree.

The page is Markdown that is readable on a terminal, too: a key and its values on one line, its meaning on the next.
"""

import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ssaseg.cli.errors import CommandError
from ssaseg.recipes import Recipe
from ssaseg.recipes.resuming import FREE_KEYS

JsonSchema = Mapping[str, Any]

WIDTH = 110  # characters of a line

WHOLE: Any = {"break_on_hyphens": False, "break_long_words": False}

ONE_OF = "one of "

OWN_NAME = "NAME"  # stands for keys that the user chooses, such as those of optim.rules

HEADER = """# The keys of a recipe

<!-- Written by `make docs` from recipes/schema.py and recipes/data.py. Change the descriptions there. -->

A recipe is a YAML file. Together with the code, it decides every number of a training; the seed is part of it.
`ssaseg recipes keys` prints this page, and `ssaseg recipes keys optim` prints one section of it.

```yaml
extends: camvid-seaformer_b-ssa     # a shipped recipe, a file beside this one, or a list of them
model: {pretrained: SeaFormer_B.safetensors}
optim:
  lr: 5.0e-4
  rules: {head: {lr: 10}}
```

**Where a value comes from.** For each key, the last of these that gives a value decides:

1. the default on this page; a *required* key has no default
2. the recipes that `extends` names, in the order of the list, each together with the recipes that it extends
3. the file itself
4. the arguments `key=value`, with dotted keys: `ssaseg train my.yaml optim.lr=5e-4 augment.crop=[360,480]`

The values of a shipped recipe may therefore differ from the defaults. `ssaseg train NAME --print-config` prints
the final value of every key. A run stores the same text as `config.yaml`, which is itself a recipe.

**How they merge.** Sections are merged key by key. A list is replaced as a whole; so is a section that is given
as `key={...}`. For a key that may be null, `null` cancels the value of an extended recipe. If `data.dataset`
changes, nothing of the extended recipe's `data` section is kept except mean, std and cache.

**How they are read.** By the rules of YAML 1.2: `1e-3` is a number; `off` and `no` are text. Nothing is converted
silently: `batch: "16"` is an error. An unknown key is also an error; the message suggests the nearest known key.
Paths are relative to the current directory; paths in `extends` are relative to the recipe's folder.

**What a resumed run may change.** `ssaseg train --resume` accepts new values for the following keys. It refuses
any other change, because the result would change:
FREE_KEYS.
To train for more steps, start a new run with another `--out`. It may start from
`model.pretrained=RUN/best.safetensors`.
"""


class Key(NamedTuple):
    """A key of a recipe."""

    name: str  # dotted, from the recipe's root
    values: str  # "integer >= 1 or null"
    default: str  # "default `16`", "**required**"
    meaning: str
    section: str  # dotted name of the section that is its value; "" if its value is plain


class KeyGroup(NamedTuple):
    """A section: the keys of one mapping."""

    names: tuple[str, ...]  # dotted; several if several sections have the same keys
    meaning: str
    keys: tuple[Key, ...]


# ---- what is printed ---------------------------------------------------------------------------------------------
def recipe_page() -> str:
    """The whole page."""
    groups = read_schema()
    listed = ", ".join(f"`{name}`" for group in groups for name in group.names if name)
    index = textwrap.fill(f"**Sections:** {listed}.", WIDTH, **WHOLE)
    free = textwrap.fill(", ".join(f"`{key}`" for key in sorted(FREE_KEYS)), WIDTH, **WHOLE)
    header = HEADER.replace("FREE_KEYS", free)
    return "\n".join([header, f"{index}\n", *(text_of(group) for group in groups), classifiers_text()]).rstrip() + "\n"


def section_page(wanted: str) -> str:
    """The section `wanted` and the sections inside it, or the key `wanted`. Raises CommandError if there is neither."""
    groups = read_schema()
    found = [group for group in groups if any(f"{name}.".startswith(f"{wanted}.") for name in group.names)]
    if found:
        return "\n".join(map(text_of, found)).rstrip() + "\n"
    keys = {key.name: key for group in groups for key in group.keys}
    if wanted in keys:
        return f"{lines_of(keys[wanted])}\n"
    sections = [name for group in groups for name in group.names if name]
    near = difflib.get_close_matches(wanted, [*sections, *keys], n=1, cutoff=0.5)
    inside = [name for name in keys if name.rpartition(".")[2] == wanted]
    hint = f"did you mean {' or '.join(inside[:3] or near)}?" if inside or near else f"sections: {', '.join(sections)}"
    raise CommandError(f"{wanted}: no section or key of a recipe has this name\n{hint}")


def text_of(group: KeyGroup) -> str:
    """A section as Markdown."""
    heading = ", ".join(group.names) or "At the top"
    meaning = textwrap.fill(group.meaning, WIDTH, **WHOLE)
    return "\n".join([f"## {heading}\n", f"{meaning}\n", *map(lines_of, group.keys), ""])


def lines_of(key: Key) -> str:
    """A key as an item of a Markdown list."""
    meaning = f"{key.meaning} (section `{key.section}`)" if key.section else key.meaning
    first = meaning.split()[0].rstrip(",;")
    if first.isalpha() and not (
        key.values.startswith(ONE_OF) and first in key.values
    ):  # the spelling of a value matters
        meaning = f"{meaning[0].upper()}{meaning[1:]}"
    head = textwrap.wrap(f"- `{key.name}`: {key.values}; {key.default}.", WIDTH, subsequent_indent="  ", **WHOLE)
    body = textwrap.wrap(f"{meaning}.", WIDTH, initial_indent="  ", subsequent_indent="  ", **WHOLE)
    return "\n".join([*head, *body])


# ---- the schema as text ------------------------------------------------------------------------------------------
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
    from ssaseg.datasets import list_datasets
    from ssaseg.models import CLASSIFIERS, list_models

    tables = {"model.name": list_models(), "model.classifier": sorted(CLASSIFIERS), "data.dataset": list_datasets()}
    if name == "model.options":
        return f"mapping of {OWN_NAME} to a value"
    return f"{ONE_OF}{', '.join(tables[name])}" if name in tables else ""


def classifiers_text() -> str:
    """What each classifier's losses and options are called, with their defaults."""
    from ssaseg.models import CLASSIFIERS

    lines = ["## Losses and options of the classifiers\n", "Names for `loss.weights` and `model.options`.\n"]
    for name, kind in CLASSIFIERS.items():
        named = [(f"`loss.weights.{key}`", loss.weight, loss.meaning) for key, loss in kind.LOSSES.items()]
        named += [(f"`model.options.{key}`", option.default, option.meaning) for key, option in kind.OPTIONS.items()]
        keys = [f"  - {key}: default `{default}`; {meaning}." for key, default, meaning in named]
        lines += [f"- {name}" + (f" ({kind.NOTE})" if kind.NOTE else ""), *keys]
    return "\n".join(lines)


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
