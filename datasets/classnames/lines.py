"""Text files of class names: one a line, perhaps with an id or a colour, or columns under a header.

These forms can be read: `name`, `3 name`, `3: name`, `name 3`, CVAT's and VOC's `name:R,G,B:…`, `name,R,G,B`,
`R G B name`, `3 R G B name`, `name #rrggbb`, columns under a header such as `id,name` or `name,r,g,b`, Roboflow's
`Pixel Value, Class`, and labelme's `__ignore__`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence

from ssaseg.datasets.classnames.names import HEX, Line, to_colour

# Headers of columns, in lower case.
COLUMNS = {
    "id": re.compile(r"(class|label|category|train|pixel)?[ _-]?(id|index|idx|value|nr|no)"),
    "name": re.compile(r"(class|label|category)?[ _-]?names?|class(es)?|labels?|category|title|readable"),
    "r": re.compile(r"r|red"),
    "g": re.compile(r"g|green"),
    "b": re.compile(r"b|blue"),
    "colour": re.compile(r"colou?r|rgb|hex|colou?r[ _-]?(hex|rgb)|hex[ _-]?colou?r"),
}
NUMBERS = r"(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})"
NAME_FIRST = re.compile(rf"(.*?\S)[\s:,;=]+{NUMBERS}(?:[\s:,;].*)?")
COLOUR_FIRST = re.compile(rf"(?:(\d{{1,3}})[\s:,;]+(?=\d+[\s,;]+\d+[\s,;]+\d+\b))?{NUMBERS}[\s:,;=]+(\S*[^\d\s].*)")
ID_FIRST = re.compile(r"(?P<id>-?\d{1,9})\s*[:;,=.\s]\s*(?P<name>.+)")
ID_LAST = re.compile(r"(?P<name>.+?)\s*[:;,=\s]\s*(?P<id>-?\d{1,9})")
FILE = re.compile(r".*\.(jpe?g|png|tiff?|bmp|gif|npy)", re.IGNORECASE)


def text_lines(text: str) -> list[str]:
    """The lines of a text without empty ones and comments. Raises UnicodeError for UTF-16."""
    if "\0" in text:
        raise UnicodeError("UTF-16 text")
    lines = [line.strip() for line in text.splitlines()]
    # "#ff0000 car" is no comment.
    return [line for line in lines if line and (line[0] != "#" or HEX.match(line)) and not line.startswith("//")]


def read_lines(lines: Sequence[str]) -> list[Line]:
    """The classes of `text_lines`; empty where the lines are names of files. Raises csv.Error."""
    if not lines or any(map(FILE.fullmatch, lines[:3])):
        return []
    return _columns(lines) or _lines(lines)


def _columns(lines: Sequence[str]) -> list[Line] | None:
    """The lines below a header with a column of names, alone or with ids or colours; None without such a header."""
    separator = next((mark for mark in ("\t", ";", ",") if mark in lines[0]), None)
    rows = list(csv.reader(lines, delimiter=separator, skipinitialspace=True)) if separator else [lines[0].split()]
    at: dict[str, int] = {}
    for number, word in enumerate(rows[0]):
        kind = next((kind for kind, pattern in COLUMNS.items() if pattern.fullmatch(word.strip().lower())), None)
        at.setdefault(kind or "", number)
    if "name" not in at or (len(rows[0]) > 1 and not at.keys() & {"id", "r", "colour"}):
        return None
    if separator is None:  # the header is one word, and names may have spaces
        return _lines(lines[1:])
    found = []
    for row in rows[1:]:
        cells = {kind: row[number].strip() if number < len(row) else "" for kind, number in at.items()}
        colour = to_colour([cells.get(kind, "") for kind in "rgb"] if "r" in at else cells.get("colour"))
        value = cells.get("id", "")
        found.append(Line(int(value) if re.fullmatch(r"-?\d{1,9}", value) else None, cells["name"], colour))
    return found


def _lines(lines: Sequence[str]) -> list[Line]:
    """Names without header. Numbers before or after the names are ids where all numbers and all names differ."""
    rows = [_coloured(line) or Line(None, line) for line in lines]
    for pattern in (ID_FIRST, ID_LAST):
        found = [match for row in rows if (match := pattern.fullmatch(row.name))]
        # "zone 1", "zone 2" are names: without the numbers they would be the same.
        distinct = min(len({int(match["id"]) for match in found}), len({match["name"] for match in found}))
        if distinct == len(rows):
            return [Line(int(match["id"]), match["name"], row.colour) for match, row in zip(found, rows, strict=True)]
    return rows


def _coloured(line: str) -> Line | None:
    """A line of a name and a colour, in any order; None for others."""
    if '"' in line and "," in line:
        cells = next(csv.reader([line], skipinitialspace=True))
        if len(cells) >= 4 and (colour := to_colour(cells[1:4])):
            return Line(None, cells[0], colour)
    if found := HEX.search(line):
        name = (line[: found.start()] + line[found.end() :]).strip(" \t:,;=\"'")
        return Line(None, name, to_colour(found[0]))
    bare = re.sub(r"""[\[\]()"']""", " ", line).strip()
    number = None
    if match := COLOUR_FIRST.fullmatch(bare):
        number, *numbers, name = match.groups()
    elif match := NAME_FIRST.fullmatch(bare):
        name, *numbers = match.groups()
    else:
        return None
    colour = to_colour(numbers)
    return colour and Line(None if number is None else int(number), name.strip(" \t:,;="), colour)
