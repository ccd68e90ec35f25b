"""From YAML files and `key=value` arguments to one plain mapping, and the place where each key was written.

Scalars follow YAML 1.2. PyYAML follows YAML 1.1, in which `1e-3` is text, `off` is false and `1:30` is ninety.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ssaseg.files.reading import read_text
from ssaseg.files.text import cut, printable

FOLDER = Path(__file__).parent
HERE = "${recipe_dir}"  # at the start of a path in a recipe: the folder of the recipe's file
RUN = "config.yaml"  # the recipe in the folder of a run
COMMAND_LINE = "command line"
LIST = "`ssaseg recipes list` prints the shipped recipes"
SYNTAX = "expected lines `key: value`, indented with spaces; text that contains `: ` or ` #` needs quotes"
Keys = tuple[Any, ...]  # names from the recipe's root down to a value
# Of a recipe file: bytes; of all files that it extends, and of an argument: values, nested levels, files.
LARGEST, MOST_VALUES, DEEPEST, MOST_FILES = 2**18, 20_000, 20, 50
# Keys of `data` that do not depend on the data set alone: they are kept when a recipe changes `data.dataset`.
KEPT = {"mean", "std", "cache"}


class RecipeError(ValueError):
    """A recipe that cannot be read or is not valid. The message has at most three lines."""


@dataclass(frozen=True)
class Layer:
    """The plain values of a recipe, and for each key the place ("file:line") where its value was written last."""

    values: dict[Any, Any]
    places: dict[Keys, str]


class _Loader(yaml.SafeLoader):
    """Reads scalars as in YAML 1.2: only true and false are booleans, no dates, no base 60; and `_` between digits."""

    left, depth = MOST_VALUES, 0

    def count(self) -> None:
        """Counts one value. An alias can stand for many, whose copies would fill the memory."""
        self.left -= 1
        if self.left < 0:
            raise yaml.YAMLError(f"more than {MOST_VALUES} values, with those of aliases")

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Called by PyYAML for every value that is written."""
        self.count()
        self.depth += 1
        if self.depth > DEEPEST + 2:
            raise RecursionError
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.nan$")
_Loader.yaml_implicit_resolvers = {}  # removes PyYAML's resolvers; the first that matches decides
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, None)


def shipped_recipes() -> list[str]:
    """Names of the recipes that can be run. Files that start with `_` are only bases for them."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))


def recipe_file(name: str, beside: Path | None = None) -> Path:
    """The file of a recipe: `name` is a path if it has the suffix .yaml or a folder, otherwise a shipped recipe.

    Args:
        name: what the user wrote, e.g. "demo", "my.yaml", "_camvid", or the folder of a run, which holds its recipe.
        beside: folder that a path is relative to; None: the current directory.

    Raises:
        RecipeError: the name is empty, or there is no such file. The message suggests the nearest shipped recipes.
    """
    if not name.strip():
        raise RecipeError(f"the name of the recipe is empty\n{LIST}")
    is_path = Path(name).suffix in (".yaml", ".yml") or len(Path(name).parts) != 1
    path = (beside or Path()) / Path(name) if is_path else FOLDER / f"{name}.yaml"
    folder = file = None
    with contextlib.suppress(RuntimeError, ValueError, OSError):  # no such user, a NUL byte, a name that is too long
        own = (beside or Path()) / Path(name).expanduser()
        path = own if is_path or (own.is_dir() and not path.exists()) else path
        if path.exists() and not path.is_dir():
            return path
        if (path / RUN).is_file():
            return path / RUN
        folder = path if path.is_dir() else None
        file = own.with_name(f"{own.name}.yaml")
        file = file if not is_path and file.is_file() else None
    if folder is not None:
        raise _folder_error(folder)
    if file is not None:
        raise RecipeError(f"{brief(name)}: no shipped recipe has this name\ndid you mean the file {brief(file)}?")
    if re.match(r"[\w.]+=", name):
        raise RecipeError(f"{brief(name)}: expected a recipe first, then key=value\n{LIST}")
    near = difflib.get_close_matches(Path(name).stem[:60], shipped_recipes(), n=3, cutoff=0.5)
    fix = f"did you mean {' or '.join(near)}?" if near else LIST
    if is_path:
        raise RecipeError(
            f"{brief(path, 300)}: no such file\na name without folder and suffix is a shipped recipe; {fix}"
        )
    raise RecipeError(f"{brief(name)}: no shipped recipe has this name; to give a file, write its suffix .yaml\n{fix}")


def _folder_error(path: Path) -> RecipeError:
    """The error for a folder where a recipe is expected."""
    inside = sorted(file.name for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
    fix = "for a folder of images and masks, `ssaseg data init` writes a recipe"
    if inside:
        fix = f"files in it: {', '.join(map(brief, inside[:3]))}{', …' * (len(inside) > 3)}"
    return RecipeError(f"{brief(path, 300)}: a folder, expected a recipe's name or file, or the folder of a run\n{fix}")


def read_recipe(path: Path, above: tuple[Path, ...] = (), read: list[Path] | None = None) -> Layer:
    """Read a file and all recipes that it extends. A later base overrides an earlier one, the file overrides its bases.

    If the file changes `data.dataset` or the classes, keys of the base's `data` section that have no meaning then are
    dropped: see `_obsolete`. `train.epochs` replaces `train.steps` of a base, and the other way round.

    Args:
        path: the YAML file.
        above: the files that extend this one, directly or not, as resolved paths; used to find cycles.
        read: the files that were read before, each as often as it was read; used to limit them.

    Raises:
        RecipeError: unreadable file, YAML error, duplicate key, missing base, cycle, too many bases.
    """
    read = [] if read is None else read
    read.append(path)
    if len(read) > MOST_FILES:
        what = f"extends more than {MOST_FILES} recipes, directly or through others"
        raise RecipeError(f"{read[0]}: {what}\nwrite them into one file: ssaseg recipes copy")
    here = Path(os.path.realpath(path))
    if here in above:
        chain = " -> ".join(one.name for one in (*above, path))
        raise RecipeError(f"{path}: the recipe extends itself: {chain}\nremove one of these extends")
    own = _read_file(path)
    bases = own.values.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        place = own.places[("extends",)]
        raise RecipeError(f"{place}: extends: expected a recipe's name or file, or a list of them, got {short(bases)}")
    layer = Layer({}, {})
    for base in bases:
        try:
            base_path = recipe_file(base, beside=path.parent)
        except RecipeError as error:
            raise RecipeError(f"{own.places[('extends',)]}: extends: {error}") from None
        layer = _merge(layer, read_recipe(base_path, (*above, here), read))
    layer.values.pop("name", None)  # names are not inherited: two runs would have the same folder
    return _merge(layer, own)


def apply_overrides(layer: Layer, overrides: Sequence[str]) -> Layer:
    """Set keys by arguments such as `optim.lr=1e-3`. A mapping as value replaces the old mapping.

    Keys that others make obsolete are dropped first, as with `extends`.

    Raises:
        RecipeError: an argument is not `key=value`, its value is not YAML, or its key is below a plain value.
    """
    settings = [_setting(argument) for argument in overrides]
    given: dict[Any, dict[Any, Any]] = {"data": {}, "train": {}}
    for keys, value in settings:
        if len(keys) == 2 and keys[0] in given:
            given[keys[0]][keys[1]] = value
    layer = _without_obsolete(layer, given)
    for argument, (keys, value) in zip(overrides, settings, strict=True):
        above = {keys[:end]: COMMAND_LINE for end in range(1, len(keys))}
        places = {**above, **layer.places, keys: COMMAND_LINE}
        layer = Layer(_set(layer.values, keys, value, argument), places)
    return layer


def _setting(argument: str) -> tuple[Keys, Any]:
    """The key and the value of a `key=value` argument."""
    dotted, equals, text = argument.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(keys) or len(keys) > DEEPEST:
        raise RecipeError(f"{brief(argument)}: expected key=value\nfor example optim.lr=1e-3 or augment.crop=[360,480]")
    if keys == ("extends",):
        raise RecipeError(
            f"{brief(argument)}: extends can only be written in a file\ngive the keys themselves as key=value"
        )
    try:
        value, _ = _parse(text, "")
    except RecipeError as error:
        what = str(error).splitlines()[0].partition(": ")[2]
        raise RecipeError(f"{brief(argument)}: {what}\nin a shell, put quotes around the argument") from error
    return keys, value


def _set(values: Any, keys: Keys, value: Any, argument: str) -> dict[Any, Any]:
    if values is not None and not isinstance(values, dict):
        fix = "set the whole list, as in augment.crop=[360,480]" if isinstance(values, list) else ""
        raise RecipeError(f"{brief(argument)}: {short(values)} has no keys that could be set\n{fix}".rstrip())
    values = dict(values or {})
    values[keys[0]] = _set(values.get(keys[0]), keys[1:], value, argument) if keys[1:] else value
    return values


def _merge(base: Layer, child: Layer) -> Layer:
    base = _without_obsolete(base, child.values)
    return Layer(_merge_values(base.values, child.values), {**base.places, **child.places})


def _obsolete(base: Any, child: Any) -> set[Any]:
    """Keys of a base's `data` section that have no meaning together with the `data` section of its child.

    If the child has another data set: all keys except KEPT, since classes, folders and ids belong to the base's data
    set. If the child has another number of classes and no palette: the palette.
    """
    if not isinstance(base, dict) or not isinstance(child, dict):
        return set()
    if "dataset" in child and child["dataset"] != base.get("dataset", "folder"):  # the schema's default
        return base.keys() - KEPT
    names, palette = child.get("classes"), base.get("palette")
    if isinstance(names, list) and isinstance(palette, list) and "palette" not in child and len(names) != len(palette):
        return {"palette"}
    return set()


def _without_obsolete(base: Layer, child: dict[Any, Any]) -> Layer:
    """The base of a recipe without the keys that the values of its child make obsolete."""
    base = _without(base, "data", _obsolete(base.values.get("data"), child.get("data")))
    lengths, train = {"steps", "epochs"}, child.get("train")
    given = {key for key in lengths if isinstance(train, dict) and train.get(key) is not None}
    return _without(base, "train", lengths - given if given else set())


def _without(layer: Layer, section: str, keys: set[Any]) -> Layer:
    """The layer without these keys of a section; their places are removed, too."""
    if not keys or not isinstance(layer.values.get(section), dict):
        return layer
    kept = {key: value for key, value in layer.values[section].items() if key not in keys}
    places = {at: place for at, place in layer.places.items() if at[:1] != (section,) or not keys & set(at[1:2])}
    return Layer({**layer.values, section: kept}, places)


def _merge_values(base: dict[Any, Any], child: dict[Any, Any]) -> dict[Any, Any]:
    merged = dict(base)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge_values(base[key], value) if both else value
    return merged


def recipe_text(path: Path) -> str:
    """The text of a recipe's file. Raises RecipeError if it is not a readable UTF-8 file of a recipe's size."""
    try:
        return read_text(path, LARGEST)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (at byte {error.start})\nis this file a recipe?") from error


def _read_file(path: Path) -> Layer:
    values, places = _parse(recipe_text(path), str(path))
    values = _placed(values, os.path.abspath(path.parent))
    if values is None:
        raise RecipeError(f"{path}: the recipe is empty\n`ssaseg recipes copy demo` writes an example to start from")
    if not isinstance(values, dict):
        fix = "`ssaseg recipes show demo` shows what a recipe looks like"
        raise RecipeError(f"{path}: expected `key: value` lines, got {short(values)}\n{fix}")
    return Layer(values, places)


def _placed(value: Any, folder: str) -> Any:
    """The values with the recipe's folder in the place of `HERE`, as it is not known later."""
    if isinstance(value, dict):
        return {key: _placed(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_placed(inner, folder) for inner in value]
    if isinstance(value, str) and (value == HERE or value.startswith(f"{HERE}/")):
        return os.path.normpath(os.path.join(folder, value[len(HERE) + 1 :]))
    return value


def _parse(text: str, source: str) -> tuple[Any, dict[Keys, str]]:
    """A YAML document as plain Python values, and the line of every key."""
    places: dict[Keys, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (_build(loader, node, (), source, places) if node else None), places
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{source}:{line}: not valid YAML: {what}\n{SYNTAX}") from error
    except yaml.YAMLError as error:  # a control character: this error has no line number
        raise RecipeError(f"{source}: not valid YAML: {str(error).splitlines()[0]}\n{SYNTAX}") from error
    except RecursionError as error:  # an alias inside its own anchor
        what = "nested too deeply, or an alias that contains itself"
        raise RecipeError(f"{source}: {what}\nwrite the values without aliases") from error


def _build(loader: _Loader, node: yaml.Node, at: Keys, source: str, places: dict[Keys, str]) -> Any:
    loader.count()
    if len(at) > DEEPEST:
        raise RecipeError(
            f"{source}:{node.start_mark.line + 1}: nested too deeply, or an alias that contains itself\n{SYNTAX}"
        )
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*at, i), source, places) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(loader, node, source)
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        place = f"{source}:{key_node.start_mark.line + 1}"
        key = _scalar(loader, key_node, source) if isinstance(key_node, yaml.ScalarNode) else None
        if key is None:
            raise RecipeError(f"{place}: a key must be text or a number\n{SYNTAX}")
        path = (*at, key)
        if key in mapping:  # YAML forbids it, PyYAML silently keeps the last one
            dotted = ".".join(map(brief, path))
            first = places[path].rpartition(":")[2]
            raise RecipeError(f"{place}: {dotted} is given twice, first on line {first}\nremove one of them")
        places[path] = place
        mapping[key] = _build(loader, value_node, path, source, places)
    return mapping


def _scalar(loader: _Loader, node: yaml.Node, source: str) -> Any:
    """A number, text, true, false or null."""
    value: Any = None
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):  # PyYAML's, for a tag and its text
        value = loader.construct_object(node)
        # Python refuses to write longer numbers as text.
        if value is None or isinstance(value, bool | float | str) or (type(value) is int and abs(value) < 10**100):
            return value
    what = f"{short(node.value)} cannot be read as a number or text"
    raise RecipeError(f"{source}:{node.start_mark.line + 1}: {what}\n{SYNTAX}")


def short(value: object) -> str:
    """A value as text for an error message: at most 60 characters; null becomes "nothing"."""
    return cut("nothing" if value is None else repr(value))


def brief(key: object, most: int = 60) -> str:
    """A key or a name as text for an error message: on one line, at most `most` characters."""
    return cut(printable(str(key)), most)
