"""All keys of a recipe on one page, `docs/recipe.md`, from `help_tables`: to import the schema takes longer.

The page is Markdown that is readable on a terminal, too: a key and its values on one line, its meaning on the next.
"""

import difflib
import textwrap
from typing import Any, NamedTuple

from ssaseg.cli.errors import CommandError
from ssaseg.cli.help_tables import help_tables

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
Paths are relative to the current directory; paths in `extends` are relative to the recipe's folder, and so are
paths in a file that start with `${recipe_dir}/`: they stay right where the recipe is moved with its data.

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
    groups = stored_groups()
    listed = ", ".join(f"`{name}`" for group in groups for name in group.names if name)
    index = textwrap.fill(f"**Sections:** {listed}.", WIDTH, **WHOLE)
    free = textwrap.fill(", ".join(f"`{key}`" for key in help_tables()["free_keys"]), WIDTH, **WHOLE)
    header = HEADER.replace("FREE_KEYS", free)
    return "\n".join([header, f"{index}\n", *(text_of(group) for group in groups), classifiers_text()]).rstrip() + "\n"


def section_page(wanted: str) -> str:
    """The section `wanted` and the sections inside it, or the key `wanted`. Raises CommandError if there is neither."""
    groups = stored_groups()
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


def stored_groups() -> list[KeyGroup]:
    """All sections, as `recipe_keys.read_schema` has read them from the schema."""
    return [
        KeyGroup(tuple(names), meaning, tuple(Key(*key) for key in keys))
        for names, meaning, keys in help_tables()["keys"]
    ]


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


def classifiers_text() -> str:
    """What each classifier's losses and options are called, with their defaults."""
    lines = ["## Losses and options of the classifiers\n", "Names for `loss.weights` and `model.options`.\n"]
    for name, kind in help_tables()["classifiers"].items():
        named = [(f"`loss.weights.{key}`", *loss) for key, loss in kind["losses"].items()]
        named += [(f"`model.options.{key}`", *option) for key, option in kind["options"].items()]
        keys = [f"  - {key}: default `{default}`; {meaning}." for key, default, meaning in named]
        lines += [f"- {name}" + (f" ({kind['note']})" if kind["note"] else ""), *keys]
    return "\n".join(lines)
