"""From YAML files and `key=value` words to one plain mapping, remembering where each key was written.

Scalars are those of YAML 1.2. PyYAML follows YAML 1.1, where `1e-3` is text, `off` is false and `1:30` is ninety.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
COMMAND_LINE = "command line"
LIST = "`ssaseg recipes list` names the shipped ones"
SYNTAX = "a recipe has `key: value` lines, indented by spaces, and quotes around text that holds `: ` or ` #`"
Keys = tuple[Any, ...]  # names from the recipe's root down to a value
# Keys of `data` that are about the network as much as about the data set: another data set does not change them.
KEPT = {"mean", "std", "cache"}


class RecipeError(ValueError):
    """A recipe that cannot be read or does not make sense. The message has at most three lines."""


@dataclass(frozen=True)
class Layer:
    """The plain values of a recipe, and the place ("file:line") where each key was last written."""

    values: dict[Any, Any]
    places: dict[Keys, str]


class _Loader(yaml.SafeLoader):
    """Scalars of YAML 1.2: true/false only, no dates, no base 60; and `_` between digits."""


FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.nan$")
_Loader.yaml_implicit_resolvers = {}  # the first resolver that matches decides; PyYAML's own are left out
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, None)


def shipped_recipes() -> list[str]:
    """Names of the recipes that can be run; files that start with `_` are only there to be extended."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))


def recipe_file(name: str, beside: Path | None = None) -> Path:
    """The file that `name` means: a path where it has a suffix or a folder, else a shipped recipe.

    Args:
        name: what the user wrote, e.g. "demo", "my.yaml", "_camvid".
        beside: folder that a path is relative to; the current directory where absent.

    Raises:
        RecipeError: no name, or there is no such file; names the nearest shipped recipes.
    """
    if not name.strip():
        raise RecipeError(f"a recipe's name is empty\n{LIST}")
    is_path = Path(name).suffix in (".yaml", ".yml") or len(Path(name).parts) != 1
    path = (beside or Path()) / Path(name).expanduser() if is_path else FOLDER / f"{name}.yaml"
    if path.exists():
        return path
    near = difflib.get_close_matches(Path(name).stem, shipped_recipes(), n=3, cutoff=0.5)
    mend = f"did you mean {' or '.join(near)}?" if near else LIST
    if is_path:
        raise RecipeError(f"{path}: no such file\na name without folder and suffix is a shipped recipe; {mend}")
    raise RecipeError(f"{name}: no shipped recipe has this name, and a file needs its suffix .yaml\n{mend}")


def read_recipe(path: Path, above: tuple[Path, ...] = ()) -> Layer:
    """Read a file and everything it extends; later bases win over earlier ones, the file wins over its bases.

    Of a base's `data` section, what another `data.dataset`, or other classes, leave without meaning is dropped: see
    `_obsolete`.

    Args:
        path: the YAML file.
        above: the files that led here through `extends`, resolved; finds cycles.

    Raises:
        RecipeError: unreadable file, YAML error, duplicate key, missing base, cycle.
    """
    if path.resolve() in above:
        chain = " -> ".join(one.name for one in (*above, path))
        raise RecipeError(f"{path}: extends itself: {chain}\nremove one of these extends")
    own = _read_file(path)
    bases = own.values.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        place = own.places[("extends",)]
        raise RecipeError(f"{place}: extends: expected a recipe's name or file, or a list of them, got {bases!r}")
    layer = Layer({}, {})
    for base in bases:
        try:
            base_path = recipe_file(base, beside=path.parent)
        except RecipeError as error:
            raise RecipeError(f"{own.places[('extends',)]}: extends: {error}") from None
        layer = _merge(layer, read_recipe(base_path, (*above, path.resolve())))
    layer.values.pop("name", None)  # a name is its file's own: two runs would share a folder
    return _merge(layer, own)


def apply_overrides(layer: Layer, overrides: Sequence[str]) -> Layer:
    """Set the keys that words such as `optim.lr=1e-3` name; a mapping given as value replaces the old one.

    What another `data.dataset` or other classes make obsolete is dropped first, as in a file that extends.

    Raises:
        RecipeError: a word that is not `key=value`, whose value is no YAML, or whose key goes through a plain value.
    """
    settings = [_setting(word) for word in overrides]
    said = {keys[1]: value for keys, value in settings if len(keys) == 2 and keys[0] == "data"}
    layer = _without(layer, _obsolete(layer.values.get("data"), said))
    for word, (keys, value) in zip(overrides, settings, strict=True):
        above = {keys[:end]: COMMAND_LINE for end in range(1, len(keys))}
        places = {**above, **layer.places, keys: COMMAND_LINE}
        layer = Layer(_set(layer.values, keys, value, word), places)
    return layer


def _setting(word: str) -> tuple[Keys, Any]:
    """The key and the value of a word."""
    dotted, equals, text = word.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(keys):
        raise RecipeError(f"{word}: expected key=value\nfor example optim.lr=1e-3 or augment.crop=[360,480]")
    if keys == ("extends",):
        raise RecipeError(f"{word}: extends can only be written in a file\ngive the keys themselves as key=value")
    try:
        value, _ = _parse(text, "")
    except RecipeError as error:
        what = str(error).splitlines()[0].partition(": ")[2]
        raise RecipeError(f"{word}: {what}\nin a shell, put quotes around it") from error
    return keys, value


def _set(values: Any, keys: Keys, value: Any, word: str) -> dict[Any, Any]:
    if values is not None and not isinstance(values, dict):
        mend = "lists are set whole, as in augment.crop=[360,480]" if isinstance(values, list) else ""
        raise RecipeError(f"{word}: nothing can be set below {short(values)}\n{mend}".rstrip())
    values = dict(values or {})
    values[keys[0]] = _set(values.get(keys[0]), keys[1:], value, word) if keys[1:] else value
    return values


def _merge(base: Layer, heir: Layer) -> Layer:
    base = _without(base, _obsolete(base.values.get("data"), heir.values.get("data")))
    return Layer(_merge_values(base.values, heir.values), {**base.places, **heir.places})


def _obsolete(base: Any, heir: Any) -> set[Any]:
    """Keys of an inherited `data` section that mean nothing beside what the heir's says.

    Another data set: all but KEPT, since classes, folders and ids are those of the base's own. Other classes without
    colours: a palette that has not as many.
    """
    if not isinstance(base, dict) or not isinstance(heir, dict):
        return set()
    if "dataset" in heir and heir["dataset"] != base.get("dataset", "folder"):  # the schema's default
        return base.keys() - KEPT
    names, palette = heir.get("classes"), base.get("palette")
    if isinstance(names, list) and isinstance(palette, list) and "palette" not in heir and len(names) != len(palette):
        return {"palette"}
    return set()


def _without(layer: Layer, keys: set[Any]) -> Layer:
    """The layer, and its places, without these keys of its `data` section."""
    if not keys:
        return layer
    data = {key: value for key, value in layer.values["data"].items() if key not in keys}
    places = {at: place for at, place in layer.places.items() if at[:1] != ("data",) or not keys & set(at[1:2])}
    return Layer({**layer.values, "data": data}, places)


def _merge_values(base: dict[Any, Any], heir: dict[Any, Any]) -> dict[Any, Any]:
    merged = dict(base)
    for key, value in heir.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge_values(base[key], value) if both else value
    return merged


def _read_file(path: Path) -> Layer:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})\nis this a recipe?") from error
    values, places = _parse(text, str(path))
    if values is None:
        raise RecipeError(f"{path}: the recipe is empty\n`ssaseg recipes copy demo` writes one to start from")
    if not isinstance(values, dict):
        mend = "`ssaseg recipes show demo` shows what a recipe looks like"
        raise RecipeError(f"{path}: expected `key: value` lines, got {short(values)}\n{mend}")
    return Layer(values, places)


def _parse(text: str, source: str) -> tuple[Any, dict[Keys, str]]:
    """One YAML document as plain Python, and the line of every key."""
    places: dict[Keys, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (_build(loader, node, (), source, places) if node else None), places
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{source}:{line}: not valid YAML: {what}\n{SYNTAX}") from error
    except yaml.YAMLError as error:  # a control character, found before there are lines
        raise RecipeError(f"{source}: not valid YAML: {str(error).splitlines()[0]}\n{SYNTAX}") from error
    except RecursionError as error:  # an alias inside its own anchor
        what = "nested too deeply, or an alias that holds itself"
        raise RecipeError(f"{source}: {what}\nwrite the values out") from error


def _build(loader: _Loader, node: yaml.Node, at: Keys, source: str, places: dict[Keys, str]) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*at, i), source, places) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        place = f"{source}:{key_node.start_mark.line + 1}"
        key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if key is None:
            raise RecipeError(f"{place}: a key must be a word or a number\n{SYNTAX}")
        path = (*at, key)
        if key in mapping:  # YAML forbids it, PyYAML silently keeps the last one
            dotted = ".".join(map(str, path))
            first = places[path].rpartition(":")[2]
            raise RecipeError(f"{place}: {dotted} is there twice, first on line {first}\nkeep one of them")
        places[path] = place
        mapping[key] = _build(loader, value_node, path, source, places)
    return mapping


def short(value: object) -> str:
    """A value as an error message shows it: at most 60 characters, null as "nothing"."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
