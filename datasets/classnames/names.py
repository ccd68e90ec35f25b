"""Class names with their ids and colours, as a file has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssaseg.datasets.base import IGNORED

Colour = tuple[int, int, int]  # RGB, 0..255

# The first line of labelme's files, for pixels without a class. It has the id -1, which is 255 in a mask.
NO_CLASS = "__ignore__"
# More classes than a mask of one byte can have.
MOST_NAMES = 256


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


def to_names(file: Path, lines: Sequence[Line]) -> Names:
    """The names of all classes. Ids count where all of them fit into a byte, or are -1."""
    numbered = all(line.id is not None and -1 <= line.id <= IGNORED for line in lines)
    lines = lines if numbered else [line for line in lines if line.name.casefold() != NO_CLASS]
    names: dict[int, str] = {}
    colours: dict[int, Colour] = {}
    ignored: set[int] = set()
    for number, line in enumerate(lines):
        key = line.id if numbered and line.id is not None else number
        if key in (-1, IGNORED) or line.name.casefold() == NO_CLASS:
            ignored |= {key} - {-1, IGNORED}
            continue
        name = line.name or f"class_{key}"
        names[key] = f"{name}_{key}" if name in names.values() else name
        if line.colour is not None:
            colours[key] = line.colour
    return Names(file, names, colours, numbered, frozenset(ignored))
