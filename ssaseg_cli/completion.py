"""What the shell completes: names of recipes, keys with their values, networks, data sets, published weights.

Each function is a `shell_complete` of click: it gets what is typed, and returns what begins with it. Nothing here
imports more than click: the shell waits. Names come from `help_tables` and the folder of the recipes.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from click import Context, Parameter
from click.shell_completion import CompletionItem

from ssaseg.cli.help_tables import help_tables
from ssaseg.cli.recipe_page import ONE_OF, OWN_NAME, Key, stored_groups

Items = list[CompletionItem]
Complete = Callable[[Context, Parameter, str], Items]

WORDS = ("true", "false", "null", "auto")  # values of a key that stand alone in its description
LONGEST = 70  # characters of a description


def names_of(*tables: str, files: bool = False) -> Complete:
    """Completes the names in tables of `help_tables`, and "recipes", the shipped ones. files: and files.

    bash shows files only where no name fits.
    """

    def complete(context: Context, parameter: Parameter, typed: str) -> Items:
        return _files(typed, files) + _items(typed, (name for table in tables for name in _table(table)))

    return complete


def in_list(names: Iterable[str]) -> Complete:
    """Completes the last of several names with commas between them."""

    def complete(context: Context, parameter: Parameter, typed: str) -> Items:
        before, comma, _ = typed.rpartition(",")
        used = before.split(",")
        return _items(typed, (f"{before}{comma}{name}" for name in names if name not in used))

    return complete


def complete_overrides(context: Context, parameter: Parameter, typed: str) -> Items:
    """Completes `KEY=VALUE`: the keys of a recipe, then what a key can be, its default first.

    The only key that fits has its values beside it, or dots: so no shell puts a space after "=". bash takes "=" for a
    word of its own, and then wants the value alone.
    """
    known = recipe_keys()
    before = [word for word in context.params.get(str(parameter.name)) or () if word != "="]
    name, equals, _ = typed.partition("=")
    if not equals and before and before[-1] in known:
        return _items(typed, _values(known[before[-1]]))
    if equals:
        return _items(typed, (f"{name}={value}" for value in _values(known[name]))) if name in known else []
    fitting = {f"{key}=": known[key].meaning for key in known if key.startswith(typed)}
    if len(fitting) == 1:
        (alone,) = fitting
        fitting |= {f"{alone}{value}": "" for value in [*_values(known[alone[:-1]])] or ["..."]}
    return [CompletionItem(text, help=_short(meaning)) for text, meaning in fitting.items()]


def complete_sections(context: Context, parameter: Parameter, typed: str) -> Items:
    """Completes the sections and keys that `ssaseg recipes keys` takes."""
    sections = {name: group.meaning for group in stored_groups() for name in group.names if name}
    keys = {key.name: key.meaning for group in stored_groups() for key in group.keys}
    return [
        CompletionItem(name, help=_short(text)) for name, text in (keys | sections).items() if name.startswith(typed)
    ]


@cache
def recipe_keys() -> dict[str, Key]:
    """Every key with a plain value by its dotted name, in the order of the page; losses and options by their names."""
    found: dict[str, Key] = {}
    for group in stored_groups():
        for key in group.keys:
            last = key.name.rpartition(".")[2]
            names = [f"{section}.{last}".lstrip(".") for section in group.names]
            found |= {name: key for name in names if not key.section and OWN_NAME not in name}
    for kind in help_tables()["classifiers"].values():
        for table, above in (("losses", "loss.weights"), ("options", "model.options")):
            for name, (default, meaning) in kind[table].items():
                key = Key(f"{above}.{name}", "number", f"default `{default}`", meaning, "")
                found.setdefault(key.name, key)
    return found


def _values(key: Key) -> Iterator[str]:
    """The values that a description lists, the default first. A list has brackets, which shells need in quotes."""
    default = key.default.removeprefix("default `").removesuffix("`") if "`" in key.default else ""
    listed = [default] if default and not set(default) & set("[]{}") else []
    for part in key.values.split(" or "):
        listed += part.removeprefix(ONE_OF).split(", ") if part.startswith(ONE_OF) else [part] * (part in WORDS)
    yield from dict.fromkeys(listed)


def _table(name: str) -> Iterable[str]:
    if name != "recipes":
        table: Iterable[str] = help_tables()[name]
        return table
    home = find_spec("ssaseg.recipes")  # to import it takes longer: it checks recipes, too
    assert home is not None
    return sorted(path.stem for path in Path(str(home.origin)).parent.glob("[!_]*.yaml"))


def _items(typed: str, names: Iterable[str]) -> Items:
    return [CompletionItem(name) for name in names if name.startswith(typed)]


def _files(typed: str, wanted: bool) -> Items:
    return [CompletionItem(typed, type="file")] if wanted else []


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
