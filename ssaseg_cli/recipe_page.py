"""Every key of a recipe on one page, `docs/recipe.md`: written from the schema, so that it cannot say something else.

The page is Markdown that reads as well on a terminal: a key and its values on one line, what it means on the next.
"""

import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ssaseg.cli.errors import CommandError
from ssaseg.cli.training.state import FREE_KEYS
from ssaseg.recipes import Recipe

JsonSchema = Mapping[str, Any]

WIDTH = 110  # characters of a line

WHOLE: Any = {"break_on_hyphens": False, "break_long_words": False}

ONE_OF = "one of "

OWN_NAME = "NAME"  # stands for keys that users choose, such as those of optim.rules

HEADER = """# The keys of a recipe

<!-- Written by `make docs` from recipes/schema.py and recipes/data.py. Change the descriptions there. -->

A recipe is a YAML file; with the seed in it, it decides every number of a training but for the code. This page is
also what `ssaseg recipes keys` prints; `ssaseg recipes keys optim` prints one section.

```yaml
extends: camvid-seaformer_b-ssa     # a shipped recipe, a file beside this one, or a list of them
model: {pretrained: SeaFormer_B.safetensors}
optim:
  lr: 5.0e-4
  rules: {head: {lr: 10}}
```

**Where a value comes from.** Later ones win, key by key:

1. the default on this page, where nobody says anything; a *required* key has none
2. the recipes that `extends` names, in the order of the list, each with what it extends itself
3. the file itself
4. the words `key=value` of a call, dotted: `ssaseg train my.yaml optim.lr=5e-4 augment.crop=[360,480]`

Shipped recipes therefore differ from the defaults: `ssaseg train NAME --print-config` prints every key as it is
in the end, and a run stores the same as `config.yaml`, which is itself a recipe.

**How they merge.** Sections key by key; a list is replaced whole, and so is a section that is given as
`key={...}`; `null` takes back what a base said, for keys that have null among their values. A
`data.dataset` other than the base's drops all of the base's `data` section but mean, std and cache.

**How they are read.** As YAML 1.2 has it: `1e-3` is a number, `off` and `no` are text. Nothing is converted
silently, so `batch: "16"` is an error; and so is an unknown key, with the nearest known one named. Paths are
relative to the current directory, in `extends` to the recipe's folder.

**What a resumed run may change.** `ssaseg train --resume` goes on with other values of these keys, and refuses
any other change, as it would change the result:
FREE_KEYS.
More steps are a new run with another `--out`, which may start from `model.pretrained=RUN/best.safetensors`.
"""


class Key(NamedTuple):
    """A key of a recipe."""

    name: str  # dotted, from the recipe's root
    values: str  # "integer >= 1 or null"
    default: str  # "default `16`", "**required**"
    meaning: str
    section: str  # dotted name of the section that is its value, "" where its value is plain


class Part(NamedTuple):
    """A section: the keys of one mapping."""

    names: tuple[str, ...]  # several where the same keys are at several places
    meaning: str
    keys: tuple[Key, ...]


# ---- what is printed ---------------------------------------------------------------------------------------------
def recipe_page() -> str:
    """The whole page."""
    parts = read_schema()
    listed = ", ".join(f"`{name}`" for part in parts for name in part.names if name)
    index = textwrap.fill(f"**Sections:** {listed}.", WIDTH, **WHOLE)
    free = textwrap.fill(", ".join(f"`{key}`" for key in sorted(FREE_KEYS)), WIDTH, **WHOLE)
    header = HEADER.replace("FREE_KEYS", free)
    return "\n".join([header, f"{index}\n", *(text_of(part) for part in parts), classifiers_text()]).rstrip() + "\n"


def section_page(wanted: str) -> str:
    """The section `wanted` with those inside it, or a single key. Raises CommandError where there is neither."""
    parts = read_schema()
    found = [part for part in parts if any(f"{name}.".startswith(f"{wanted}.") for name in part.names)]
    if found:
        return "\n".join(map(text_of, found)).rstrip() + "\n"
    keys = {key.name: key for part in parts for key in part.keys}
    if wanted in keys:
        return f"{lines_of(keys[wanted])}\n"
    sections = [name for part in parts for name in part.names if name]
    near = difflib.get_close_matches(wanted, [*sections, *keys], n=1, cutoff=0.5)
    inside = [name for name in keys if name.rpartition(".")[2] == wanted]
    hint = f"did you mean {' or '.join(inside[:3] or near)}?" if inside or near else f"sections: {', '.join(sections)}"
    raise CommandError(f"{wanted}: no section or key of a recipe has this name\n{hint}")


def text_of(part: Part) -> str:
    """A section as Markdown."""
    heading = ", ".join(part.names) or "At the top"
    meaning = textwrap.fill(part.meaning, WIDTH, **WHOLE)
    return "\n".join([f"## {heading}\n", f"{meaning}\n", *map(lines_of, part.keys), ""])


def lines_of(key: Key) -> str:
    """A key as an item of a list."""
    meaning = f"{key.meaning} (section `{key.section}`)" if key.section else key.meaning
    first = meaning.split()[0].rstrip(",;")
    if first.isalpha() and not (key.values.startswith(ONE_OF) and first in key.values):  # a value's spelling counts
        meaning = f"{meaning[0].upper()}{meaning[1:]}"
    head = textwrap.wrap(f"- `{key.name}`: {key.values}; {key.default}.", WIDTH, subsequent_indent="  ", **WHOLE)
    body = textwrap.wrap(f"{meaning}.", WIDTH, initial_indent="  ", subsequent_indent="  ", **WHOLE)
    return "\n".join([*head, *body])


# ---- what the schema says ----------------------------------------------------------------------------------------
def read_schema() -> list[Part]:
    """All sections of a recipe, the top first, each followed by those inside it."""
    schema = Recipe.model_json_schema()
    parts: dict[str, Part] = {}
    for name, section in _sections(schema, schema["$defs"], ""):
        title = section["title"]
        if title in parts:  # data.train and data.val have the same keys, which are told once
            parts[title] = parts[title]._replace(names=(*parts[title].names, name))
            continue
        required = section.get("required", ())
        keys = tuple(_key(name, key, field, key in required) for key, field in section["properties"].items())
        parts[title] = Part((name,), " ".join(section["description"].split()), keys)
    return list(parts.values())


def _sections(section: JsonSchema, definitions: JsonSchema, name: str) -> Iterator[tuple[str, JsonSchema]]:
    """Dotted name and schema of a section and of all inside it."""
    yield name, section
    for key, field in section["properties"].items():
        reference, below = _reference(field)
        if reference:
            yield from _sections(definitions[reference], definitions, f"{name}.{key}{below}".lstrip("."))


def _reference(field: JsonSchema) -> tuple[str, str]:
    """Name in the schema of the section that a field's value is, or "", and what its keys have before their names."""
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
    if name == "name":  # `load_recipe` gives it
        default = "default: the file's stem"
    elif required:
        default = "**required**"
    elif reference and field["default"]:
        default = "default: its keys' own"
    else:
        value = field["default"]
        default = f"default `{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"
    values = _looked_up(name) or _values(field)
    return Key(name, values, default, field["description"], f"{name}{below}" if reference else "")


def _looked_up(name: str) -> str:
    """Values of the keys that are plain text in the schema, and that the command looks up; "" for all others."""
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
        lines += [f"- {name}", *(f"  - {key}: default `{default}`; {meaning}." for key, default, meaning in named)]
    return "\n".join(lines)


def _values(kind: JsonSchema) -> str:
    """The values that a JSON schema allows, in words."""
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
