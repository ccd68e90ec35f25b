"""Class names in JSON and YAML files: of annotation tools, of Ultralytics, of Hugging Face."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ssaseg.datasets.classnames.names import MOST_NAMES, MOST_ROWS, Colour, Line, to_colour
from ssaseg.files.structured import parse_json, require_shallow

# Keys whose value holds the classes, the most certain first; and keys of one class.
HOLDERS = (
    *("id2label", "id_to_label", "idx_to_class", "label_map", "label2id", "class_to_idx", "names", "class_names"),
    *("label_names", "classes", "labels", "categories", "class_label", "CLASSES"),
)
NAMES = ("readable", "name", "title", "label", "class", "class_name", "label_name", "display_name", "category")
IDS = ("id", "index", "value", "class_id", "label_id", "pixel_value")
COLOURS = ("color", "colour", "rgb", "hex", "hexcolor", "color_rgb", "color_hex_code")
# Lists of colours beside the names.
COLOUR_LISTS = ("segmentation_colors", "palette", "colors", "colours", "color_map", "colormap", "PALETTE")
DEEPEST = 5


def read_document(content: bytes, file: str, coloured: bool = False) -> list[Line]:
    """The classes in a JSON or YAML file; empty where it holds none. Raises ValueError where it cannot be read.

    `coloured`: only classes that all have colours, wherever they are in the file.
    """
    value = parse_json(content) if file.endswith(".json") else parse_yaml(content)
    return _find(value, re.match(r"data|config|meta|dataset", file) is None, coloured)


def parse_yaml(content: bytes | str, loader: Any = yaml.CSafeLoader) -> Any:
    """The value in a YAML file that is not trusted. Raises ValueError where it is not YAML, or has aliases: a few stand
    for billions of values, and no file of names needs them.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, loader)):
            raise ValueError("aliases in YAML")
        value = yaml.load(content, loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not YAML: {type(error).__name__}") from None
    require_shallow(value)
    return value


def _find(value: Any, held: bool, coloured: bool, left: int = DEEPEST) -> list[Line]:
    """`held`: the place of the value says that it holds classes."""
    lines = _lines(value, held or coloured)
    if lines and (not coloured or all(line.colour for line in lines)):
        return lines
    if not isinstance(value, dict) or not left:
        return []
    inner = [(value[key], True) for key in (*HOLDERS, *COLOUR_LISTS) if isinstance(value.get(key), dict | list)]
    # Hugging Face puts names below the names of its columns.
    others = [each for key, each in value.items() if key not in HOLDERS and isinstance(each, dict)]
    lists = [each for each in value.values() if isinstance(each, list)] if coloured else []
    inner = [*inner, *((each, False) for each in [*others, *lists])][:MOST_NAMES]
    if coloured:
        found = next((lines for each, _ in inner if (lines := _find(each, True, True, left - 1))), [])
        if found:
            return found
    found = next((lines for each, held in inner if (lines := _find(each, held, False, left - 1))), [])
    colours: Any = next((value[key] for key in COLOUR_LISTS if isinstance(value.get(key), list | dict)), [])
    colours = _in_order(colours) if isinstance(colours, dict) else colours
    if len(colours) == len(found) and not any(line.colour for line in found):
        found = [line._replace(colour=to_colour(each)) for line, each in zip(found, colours, strict=True)]
    return found if not coloured or all(line.colour for line in found) else []


def _in_order(values: dict[Any, Any]) -> list[Any]:
    """The values of {0: a, 1: b, ...}; [] for other keys."""
    by_key = {str(key): value for key, value in values.items()}
    keys = [str(number) for number in range(len(values))]
    return [by_key[key] for key in keys] if by_key.keys() == set(keys) else []


def _lines(value: Any, held: bool) -> list[Line]:
    """A list of names or of objects with a name, names by id, ids by name, colours by name, or names by colour."""
    if isinstance(value, list) and held and 0 < len(value) <= MOST_ROWS:
        lines = [_line(each) for each in value]
        return [line for line in lines if line] if all(lines) else []
    if not isinstance(value, dict) or not 0 < len(value) <= MOST_ROWS:
        return []
    keys = [str(key) for key in value]
    if all(re.fullmatch(r"-?\d{1,4}", key) for key in keys):
        lines = [_line(each) for each in value.values()]
        if all(lines):
            return sorted(line._replace(id=int(key)) for key, line in zip(keys, lines, strict=True) if line)
    if not held:
        return []
    if all(type(each) is int for each in value.values()) and len(set(value.values())) == len(value):
        return sorted(Line(each, key) for key, each in zip(keys, value.values(), strict=True))
    if all(isinstance(each, str) and to_colour(key) for key, each in zip(keys, value.values(), strict=True)):
        return [Line(None, each, to_colour(key)) for key, each in zip(keys, value.values(), strict=True)]
    colours = [_colour_of(each) for each in value.values()]
    return [Line(None, key, colour) for key, colour in zip(keys, colours, strict=True)] if all(colours) else []


def _line(value: Any) -> Line | None:
    if isinstance(value, str):
        return Line(None, value) if value.strip() and len(value) < MOST_NAMES else None
    if not isinstance(value, dict):
        return None
    name = next((value[key] for key in NAMES if isinstance(value.get(key), str) and value[key].strip()), None)
    if name is None or len(name) >= MOST_NAMES:
        return None
    # Supervisely's ids, beside a title, are those of its data base.
    number = next((value[key] for key in IDS if type(value.get(key)) is int and "title" not in value), None)
    # Mapillary's and Cityscapes' words for pixels that are not trained on.
    ignored = value.get("evaluate") is False or any(value.get(key) is True for key in ("ignoreInEval", "ignore"))
    return Line(number, name, _colour_of(value), ignored)


def _colour_of(value: Any) -> Colour | None:
    """The colour of one class: itself, or below one of the usual keys."""
    if isinstance(value, dict):
        return next((colour for key in COLOURS if (colour := to_colour(value.get(key)))), None)
    return to_colour(value)
