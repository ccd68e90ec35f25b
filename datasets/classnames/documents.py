"""Class names in JSON and YAML files: of annotation tools, of Ultralytics, of Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from ssaseg.datasets.classnames.names import MOST_NAMES, Colour, Line
from ssaseg.files.structured import parse_json, require_shallow

# Keys whose value holds the classes, the most certain first; and keys of one class.
HOLDERS = (
    *("id2label", "id_to_label", "idx_to_class", "label_map", "label2id", "class_to_idx", "names", "class_names"),
    *("label_names", "classes", "labels", "categories", "class_label"),
)
NAMES = ("readable", "name", "title", "label", "class", "class_name", "label_name", "display_name")
IDS = ("id", "index", "value", "class_id", "label_id", "pixel_value")
COLOURS = ("color", "colour", "rgb", "color_rgb")
# Lists of colours beside the names.
COLOUR_LISTS = ("segmentation_colors", "colors", "colours", "palette")
DEEPEST = 5


def read_document(content: bytes, file: str) -> list[Line]:
    """The classes in a JSON or YAML file; empty where it holds none. Raises ValueError where it cannot be read."""
    value = parse_json(content) if file.endswith(".json") else _parse_yaml(content)
    return _find(value, held=re.match(r"data|config|meta|dataset", file) is None)


def _parse_yaml(content: bytes) -> Any:
    try:
        # Aliases can make a small file huge; no file of names needs them.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(content, Loader=yaml.SafeLoader)):
            raise ValueError("YAML aliases")
        value = yaml.safe_load(content)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not YAML: {type(error).__name__}") from None
    require_shallow(value)
    return value


def _find(value: Any, held: bool, left: int = DEEPEST) -> list[Line]:
    """`held`: the place of the value says that it holds classes."""
    lines = _lines(value, held)
    if lines or not isinstance(value, dict) or not left:
        return lines
    inner = [(value[key], True) for key in HOLDERS if key in value]
    # Hugging Face puts names below the names of its columns.
    inner += [(each, False) for key, each in value.items() if isinstance(each, dict) and key not in HOLDERS]
    found = next((lines for each, held in inner[:MOST_NAMES] if (lines := _find(each, held, left - 1))), [])
    colours: list[Any] = next((value[key] for key in COLOUR_LISTS if isinstance(value.get(key), list)), [])
    if len(colours) == len(found) and not any(line.colour for line in found):
        found = [line._replace(colour=_colour(each)) for line, each in zip(found, colours, strict=True)]
    return found


def _lines(value: Any, held: bool) -> list[Line]:
    """A list of names or of objects with a name, names by id, ids by name, or colours by name."""
    if isinstance(value, list) and held and 0 < len(value) <= MOST_NAMES:
        lines = [_line(each) for each in value]
        return [line for line in lines if line] if all(lines) else []
    if not isinstance(value, dict) or not 0 < len(value) <= MOST_NAMES:
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
    colours = [_colour(each) for each in value.values()]
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
    return Line(number, name, next(_colours(value), None))


def _colours(value: dict[str, Any]) -> Iterator[Colour]:
    yield from (colour for key in COLOURS if (colour := _colour(value.get(key))))


def _colour(value: Any) -> Colour | None:
    """From [r, g, b] or [r, g, b, a], each 0..255, "#rrggbb" or "r,g,b"."""
    if isinstance(value, str):
        if found := re.fullmatch(r"#([\da-fA-F]{2})([\da-fA-F]{2})([\da-fA-F]{2})([\da-fA-F]{2})?", value):
            return int(found[1], 16), int(found[2], 16), int(found[3], 16)
        value = [int(each) for each in re.findall(r"\d{1,4}", value)] if re.fullmatch(r"[\d\s,]{5,20}", value) else None
    if (
        isinstance(value, list)
        and len(value) in (3, 4)
        and all(type(each) is int and 0 <= each <= 255 for each in value)
    ):
        return value[0], value[1], value[2]
    return None
