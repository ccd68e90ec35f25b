"""Class names with their ids and colours, as a file has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssaseg.datasets.base import IGNORED, Colour

# The first line of labelme's files, for pixels without a class. It has the id -1, which is 255 in a mask.
NO_CLASS = "__ignore__"
# More classes than a mask of one byte can have.
MOST_NAMES = 256
MOST_ROWS = 10_000  # of a table of colours, of which a class may have several


class Names(NamedTuple):
    """Class names in a file, by the id in the file or else by line number from 0; and colours, if it has any."""

    file: Path
    names: dict[int, str]
    colours: dict[int, Colour]
    numbered: bool  # whether the file has ids
    ignored: frozenset[int] = frozenset()  # ids of pixels without a class, according to the file


class Line(NamedTuple):
    """One class of a file."""

    id: int | None
    name: str
    colour: Colour | None = None
    ignored: bool = False  # whether the file says that its pixels are not evaluated


HEX = re.compile(r"(?:#|0x)([0-9a-fA-F]{6})(?:[0-9a-fA-F]{2})?")


def to_colour(value: Any) -> Colour | None:
    """RGB of a list of three or four numbers of 0..255, of `#rrggbb`, or of text such as `128, 64, 128`; or None."""
    if isinstance(value, str):
        if found := HEX.fullmatch(value.strip()):
            return int(found[1][:2], 16), int(found[1][2:4], 16), int(found[1][4:], 16)
        value = re.findall(r"\d{1,4}", value) if re.fullmatch(r"[\s\d,;()\[\]rgbaRGBA]{5,40}", value) else []
    if not isinstance(value, list | tuple) or len(value) not in (3, 4):
        return None
    if not all(type(part) is int or (isinstance(part, str) and re.fullmatch(r"\d{1,4}", part)) for part in value):
        return None
    red, green, blue = (int(part) for part in value[:3])
    return (red, green, blue) if all(0 <= part <= 255 for part in (red, green, blue)) else None


def to_names(file: Path, lines: Sequence[Line]) -> Names:
    """The names of all classes. Ids count where all of them fit into a byte, or are -1; without ids, the line numbers
    are the ids where the file says that some of its classes are ignored.
    """
    if any(line.ignored for line in lines) and not all(line.id is not None for line in lines):
        lines = [line._replace(id=number) for number, line in enumerate(lines)]
    numbered = all(line.id is not None and -1 <= line.id <= IGNORED for line in lines)
    lines = lines if numbered else [line for line in lines if line.name.casefold() != NO_CLASS]
    names: dict[int, str] = {}
    colours: dict[int, Colour] = {}
    ignored: set[int] = set()
    for number, line in enumerate(lines):
        key = line.id if numbered and line.id is not None else number
        if key in (-1, IGNORED) or line.ignored or line.name.casefold() == NO_CLASS:
            ignored |= {key} - {-1, IGNORED}
            continue
        name = line.name or f"class_{key}"
        names[key] = f"{name}_{key}" if name in names.values() else name
        if line.colour is not None:
            colours[key] = line.colour
    return Names(file, names, colours, numbered, frozenset(ignored))
