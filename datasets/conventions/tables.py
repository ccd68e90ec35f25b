"""Tables of classes with colours, in the forms in which tools and data sets write them.

Text: CVAT's and VOC's `labelmap.txt` (`name:r,g,b:parts:actions`), CamVid's `label_colors.txt` (colour first or name
first, with tabs or spaces), `class_dict.csv` (columns in any order), `name,#rrggbb`. JSON: Mapillary's `labels` with
`color`, `readable` and `evaluate`, datumaro's `dataset_meta.json` with `segmentation_colors`, Supervisely's `classes`,
`{name: colour}`, and lists of names and colours side by side; YAML with the same content.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssaseg.datasets.base import IGNORED, DataError, brief
from ssaseg.datasets.conventions.base import Colour, Tree
from ssaseg.files.reading import read_file
from ssaseg.files.structured import parse_json, require_shallow

LARGEST, LARGEST_YAML = 2**20, 2**16  # bytes of a table
MOST_ROWS = 10_000
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".yaml", ".yml")
MOST_FILES = 50  # candidates that are opened
# Folders that a table lies in: the data's, or one or two below it.
DEEPEST = 3
WORDS = re.compile(r"class|label|colou?r|palette|legend|categor|names|meta|config|map|data", re.IGNORECASE)
# This name stands for pixels without a class, as in labelme's files.
NO_CLASS = "__ignore__"

HEX = re.compile(r"(?:#|0x)([0-9a-fA-F]{6})(?:[0-9a-fA-F]{2})?")
HEADER = {
    "name": re.compile(r"(class|label|category)?[ _-]?names?|class(es)?|labels?|category|title|readable"),
    "r": re.compile(r"r|red"),
    "g": re.compile(r"g|green"),
    "b": re.compile(r"b|blue"),
    "colour": re.compile(r"colou?r|rgb|hex|colou?r[ _-]?(hex|rgb)|hex[ _-]?colou?r"),
}
NUMBERS = r"(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})"
NAME_FIRST = re.compile(rf"(.*?\S)[\s:,;=]+{NUMBERS}(?:[\s:,;].*)?")
COLOUR_FIRST = re.compile(rf"(?:\d{{1,3}}[\s:,;]+(?=\d+[\s,;]+\d+[\s,;]+\d+\b))?{NUMBERS}[\s:,;=]+(\S*[^\d\s].*)")
ID = re.compile(r"(\d{1,4})\s*[\s:;,=.]\s*(.*\S)")
# Keys of JSON files.
NAMES = ("readable", "title", "name", "label", "class", "class_name", "category", "label_name")
COLOURS = ("color", "colour", "rgb", "hex", "hexcolor", "color_rgb", "color_hex_code")
NAME_LISTS = ("labels", "classes", "class_names", "names", "label_map", "CLASSES", "categories")
COLOUR_LISTS = ("segmentation_colors", "palette", "colors", "colours", "color_map", "colormap", "PALETTE")


@dataclass
class Table:
    """Classes with their colours. A class may have several colours."""

    file: Path
    classes: list[str] = field(default_factory=list)  # in the order of the file, which is that of the ids
    palette: list[Colour] = field(default_factory=list)  # the first colour of each class
    ids: dict[Colour, int] = field(default_factory=dict)  # RGB -> index of the class, or `IGNORED`
    notes: list[str] = field(default_factory=list)  # rules that were needed

    def same(self, other: Table) -> bool:
        """Whether both say the same of every colour."""
        return self.classes == other.classes and self.ids == other.ids


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    colour: Colour
    ignored: bool = False


def find_tables(tree: Tree) -> list[Table]:
    """All tables of colours in a folder of data, at its root or up to two folders below; the nearest come first."""
    found = []
    files = [file for suffix in SUFFIXES for file in tree.by_suffix.get(suffix, ())]
    likely = [file for file in files if len(file.parts) <= DEEPEST and WORDS.search(file.stem)]
    for file in sorted(likely, key=lambda file: (len(file.parts), file))[:MOST_FILES]:
        try:
            found.append(read_table(tree.root / file))
        except (DataError, OSError):  # a file of something else
            continue
    return found


def read_table(file: Path) -> Table:
    """A table of at least two colours. Raises DataError where the file is none, OSError where it cannot be read."""
    content = read_file(file, LARGEST)
    try:
        if file.suffix.lower() == ".json":
            rows = list(_from_json(parse_json(content)))
        elif file.suffix.lower() in (".yaml", ".yml"):
            rows = list(_from_json(_parse_yaml(read_file(file, LARGEST_YAML))))
        else:
            rows = list(_from_text(content.decode("utf-8-sig")))
    except (ValueError, csv.Error, yaml.YAMLError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(
            f"{file}: cannot be read as a table of colours: {error}\nexpected lines of name,r,g,b"
        ) from None
    if len(rows) < 2:
        raise DataError(
            f"{file}: no table of classes with colours in it\nexpected two classes or more, one a line, as name,r,g,b\n"
            f'write for example "road,128,64,128"; the name {NO_CLASS} for pixels to ignore'
        )
    return _to_table(file, rows)


def read_names(file: Path) -> list[str]:
    """The names in a file that the user names: of a table of colours, or one a line, without numbers before them.

    Raises DataError where there are none, OSError where the file cannot be read.
    """
    try:
        return read_table(file).classes
    except DataError:
        text = read_file(file, LARGEST).decode("utf-8-sig", errors="replace")
    names = [line.strip() for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]
    names = [row.name for row in _numbered([Row(name, (0, 0, 0)) for name in names])]
    if not names or "\ufffd" in text or "\0" in text:
        raise DataError(f"{file}: no class names in this file\nexpected UTF-8 text, one name a line")
    return names


def _to_table(file: Path, rows: Sequence[Row]) -> Table:
    table = Table(file)
    ids: dict[str, int] = {}
    hidden, several, ignored = [], [], []
    for row in rows:
        name = " ".join(row.name.split()) or f"class_{len(ids)}"
        nothing = row.ignored or name.casefold() == NO_CLASS
        if row.colour in table.ids:
            if nothing or ids.get(name) != table.ids[row.colour]:
                hidden.append(name)
            continue
        if nothing:
            ignored.append(name)
            table.ids[row.colour] = IGNORED
            continue
        if name in ids:
            several.append(name)
        elif len(ids) == IGNORED:
            raise DataError(f"{file}: more than {IGNORED} classes\nexpected at most {IGNORED}\nmerge some of them")
        else:
            ids[name] = len(ids)
            table.classes.append(name)
            table.palette.append(row.colour)
        table.ids[row.colour] = ids[name]
    for names, what in (
        (ignored, "are ignored, as the table says"),
        (several, "have several colours, which are one class"),
        (hidden, "have the colour of an earlier class, and are read as it"),
    ):
        if names:
            shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
            table.notes.append(f"classes of {file.name} that {what}: {shown}")
    return table


# ---- text --------------------------------------------------------------------------------------------------------


def _from_text(text: str) -> Iterator[Row]:
    """Rows of a text. Raises ValueError where a line is none: then the file is something else."""
    if "\0" in text:
        raise ValueError("not UTF-8 text")
    lines = [line.strip() for line in text.splitlines()]
    # "#ff0000 car" is no comment.
    lines = [line for line in lines if line and (line[0] != "#" or HEX.match(line)) and not line.startswith("//")]
    if len(lines) > MOST_ROWS or max(map(len, lines), default=0) > 1000:
        raise ValueError("too many or too long lines")
    rows = _columns(lines)
    if rows is None:
        rows = _numbered([_line(line) for line in lines])
    yield from rows


def _columns(lines: Sequence[str]) -> list[Row] | None:
    """Rows below a header with columns of names and colours; None without such a header."""
    if not lines:
        return None
    mark = next((mark for mark in ("\t", ";", ",") if mark in lines[0]), None)
    if mark is None:
        return None
    header, *rest = csv.reader(lines, delimiter=mark, skipinitialspace=True)
    at: dict[str, int] = {}
    for number, word in enumerate(header):
        kind = next((kind for kind, pattern in HEADER.items() if pattern.fullmatch(word.strip().lower())), None)
        at.setdefault(kind or "", number)
    if "name" not in at or not ({"r", "g", "b"} <= at.keys() or "colour" in at):
        return None
    rows = []
    for row in rest:
        cells = [*row, *[""] * len(header)]
        value = [cells[at[kind]].strip() for kind in "rgb"] if "r" in at else cells[at["colour"]].strip()
        if (colour := _colour(value)) is None:
            raise ValueError(f"no colour in {brief(mark.join(row))}")
        rows.append(Row(cells[at["name"]].strip(), colour))
    return rows


def _line(line: str) -> Row:
    """A line without header: the name first or the colour first."""
    if '"' in line and "," in line:
        cells = next(csv.reader([line], skipinitialspace=True))
        if len(cells) >= 4 and (colour := _colour(cells[1:4])):
            return Row(cells[0], colour)
    if found := HEX.search(line):
        name = (line[: found.start()] + line[found.end() :]).strip(" \t:,;=\"'")
        return Row(name, _colour(found[0]) or (0, 0, 0))
    bare = re.sub(r"""[\[\]()"']""", " ", line).strip()
    if found := COLOUR_FIRST.fullmatch(bare):
        *numbers, name = found.groups()
    elif found := NAME_FIRST.fullmatch(bare):
        name, *numbers = found.groups()
    else:
        raise ValueError(f"no name and colour in {brief(line)}")
    if (colour := _colour(numbers)) is None:
        raise ValueError(f"no colour of 0..255 in {brief(line)}")
    return Row(name.strip(" \t:,;="), colour)


def _numbered(rows: list[Row]) -> list[Row]:
    """The rows without numbers before the names, where all have one and all names differ without it."""
    found = [ID.fullmatch(row.name) for row in rows]
    names = {match[2] for match in found if match}
    numbers = {match[1] for match in found if match}
    if rows and len(names) == len(numbers) == len(rows):
        return [Row(match[2], row.colour) for match, row in zip(found, rows, strict=True) if match]
    return rows


def _colour(value: Any) -> Colour | None:
    """RGB of a list of three or four numbers, of `#rrggbb`, or of text such as `128, 64, 128`."""
    if isinstance(value, str):
        if found := HEX.fullmatch(value.strip()):
            return int(found[1][:2], 16), int(found[1][2:4], 16), int(found[1][4:6], 16)
        value = re.findall(r"\d+", value) if re.fullmatch(r"[\s\d,;()\[\]rgbaRGBA]+", value) else []
    if not isinstance(value, list | tuple) or len(value) not in (3, 4):
        return None
    try:
        red, green, blue = (int(str(part)) for part in value[:3])
    except ValueError:
        return None
    return (red, green, blue) if all(0 <= part <= 255 for part in (red, green, blue)) else None


# ---- JSON --------------------------------------------------------------------------------------------------------


def _from_json(value: Any) -> Iterator[Row]:
    """Rows of the first list or mapping that is a table, down to two levels below the top."""
    for part in _parts(value, 2):
        if rows := _side_by_side(part) or _objects(part) or _mapping(part):
            yield from rows
            return


def _parse_yaml(content: bytes) -> Any:
    """Raises ValueError and YAMLError. A few aliases would stand for billions of values."""
    if b"*" in content and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, yaml.CSafeLoader)):
        raise ValueError("aliases in YAML")
    value = yaml.load(content, yaml.CSafeLoader)
    require_shallow(value)
    return value


def _parts(value: Any, deeper: int) -> Iterator[Any]:
    yield value
    if isinstance(value, dict) and deeper:
        for inner in value.values():
            if isinstance(inner, dict | list) and len(inner) <= MOST_ROWS:
                yield from _parts(inner, deeper - 1)


def _side_by_side(value: Any) -> list[Row]:
    """Names under one key, colours under another, as in datumaro's dataset_meta.json."""
    if not isinstance(value, dict):
        return []
    colours = next((value[key] for key in COLOUR_LISTS if isinstance(value.get(key), list | dict)), None)
    if isinstance(colours, dict):  # id -> colour
        colours = _in_order(colours)
    for names in (value[key] for key in NAME_LISTS if key in value) if colours else ():
        if isinstance(names, dict):  # id -> name
            names = _in_order(names)
        if isinstance(names, list) and len(names) == len(colours or ()) and all(isinstance(n, str) for n in names):
            found = [(name, _colour(colour)) for name, colour in zip(names, colours or (), strict=True)]
            return [Row(name, colour) for name, colour in found if colour] if all(c for _, c in found) else []
    return []


def _in_order(values: dict[Any, Any]) -> list[Any] | None:
    """The values of {0: a, 1: b, ...}; None for other keys."""
    by_key = {str(key): value for key, value in values.items()}
    keys = [str(number) for number in range(len(values))]
    return [by_key[key] for key in keys] if by_key.keys() == set(keys) else None


def _objects(value: Any) -> list[Row]:
    """A list of objects with a name and a colour; with `evaluate: false` (Mapillary) the pixels are ignored."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        return []
    rows = []
    for each in value:
        name = next((each[key] for key in NAMES if isinstance(each.get(key), str)), None)
        colour = next((_colour(each[key]) for key in COLOURS if key in each), None)
        if name is None or colour is None:
            return []
        ignored = each.get("evaluate") is False or each.get("ignoreInEval") is True or each.get("ignore") is True
        rows.append(Row(name, colour, ignored))
    return rows


def _mapping(value: Any) -> list[Row]:
    """`{name: colour}` or `{colour: name}`."""
    if not isinstance(value, dict) or not value:
        return []
    rows = []
    for key, inner in value.items():
        inner = inner.get("color", inner.get("colour")) if isinstance(inner, dict) else inner
        if (colour := _colour(inner)) and not _colour(str(key)):
            rows.append(Row(str(key), colour))
        elif isinstance(inner, str) and (colour := _colour(str(key))):
            rows.append(Row(inner, colour))
        else:
            return []
    return rows
