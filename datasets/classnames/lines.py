"""Text files of class names: one a line, perhaps with an id or a colour, or columns under a header.

These forms can be read: `name`, `3 name`, `3: name`, `name 3`, CVAT's `name:R,G,B:…`, `name,R,G,B`, `R G B name`,
columns under a header such as `id,name`, Roboflow's `Pixel Value, Class`, and labelme's `__ignore__`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence

from ssaseg.datasets.classnames.names import Line

# Headers of columns, in lower case.
COLUMNS = {
    "id": re.compile(r"(class|label|category|train|pixel)?[ _-]?(id|index|idx|value|nr|no)"),
    "name": re.compile(r"(class|label|category)?[ _-]?names?|class|label|category"),
    "r": re.compile(r"r|red"),
    "g": re.compile(r"g|green"),
    "b": re.compile(r"b|blue"),
}
COLOUR = re.compile(r"(.+?)\s*[:,;\s]\s*(\d{1,3})\s*[,\s]\s*(\d{1,3})\s*[,\s]\s*(\d{1,3})(?:\s*[:;,].*)?")
COLOUR_FIRST = re.compile(r"(\d{1,3})\s*[,\s]\s*(\d{1,3})\s*[,\s]\s*(\d{1,3})\s*[:,;\s]\s*([^\d\s].*)")
ID_FIRST = re.compile(r"(?P<id>-?\d{1,9})\s*[:;,=\s]\s*(?P<name>.+)")
ID_LAST = re.compile(r"(?P<name>.+?)\s*[:;,=\s]\s*(?P<id>-?\d{1,9})")
FILE = re.compile(r".*\.(jpe?g|png|tiff?|bmp|gif|npy)", re.IGNORECASE)


def read_lines(lines: Sequence[str]) -> list[Line]:
    """The classes of the lines of a file (no empty lines, no comments); empty where the lines are names of files."""
    if any(map(FILE.fullmatch, lines[:3])):
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
    if "name" not in at or (len(rows[0]) > 1 and not at.keys() & {"id", "r"}):
        return None
    if separator is None:  # the header is one word, and names may have spaces
        return _lines(lines[1:])
    found = []
    for row in rows[1:]:
        cells = {kind: row[number].strip() if number < len(row) else "" for kind, number in at.items()}
        rgb = [cells.get(kind, "") for kind in "rgb"]
        colour = _to_colour(rgb) if all(part.isdecimal() for part in rgb) else None
        value = cells.get("id", "")
        found.append(Line(int(value) if re.fullmatch(r"-?\d+", value) else None, cells["name"], colour))
    return found


def _lines(lines: Sequence[str]) -> list[Line]:
    """Names without header. Numbers before or after the names are ids where all numbers and all names differ."""
    first = [COLOUR_FIRST.fullmatch(line) for line in lines]
    if all(first):
        lines = [f"{match[4]} {match[1]} {match[2]} {match[3]}" for match in first if match]
    coloured = [COLOUR.fullmatch(line) for line in lines]
    bare = [match[1] if match else line for line, match in zip(lines, coloured, strict=True)]
    colours = [_to_colour(match.groups()[1:]) if match else None for match in coloured]
    for pattern in (ID_FIRST, ID_LAST):
        found = [match for line in bare if (match := pattern.fullmatch(line))]
        # "zone 1", "zone 2" are names: without the numbers they would be the same.
        distinct = min(len({int(match["id"]) for match in found}), len({match["name"] for match in found}))
        if distinct == len(lines):
            return [Line(int(match["id"]), match["name"], rgb) for match, rgb in zip(found, colours, strict=True)]
    return [Line(None, name, rgb) for name, rgb in zip(bare, colours, strict=True)]


def _to_colour(parts: Sequence[str]) -> tuple[int, int, int]:
    red, green, blue = (min(int(part), 255) for part in parts)
    return red, green, blue
