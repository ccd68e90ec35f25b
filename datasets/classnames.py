"""Guess what the ids in a user's masks mean: from a file of class names if there is one, otherwise from the ids.

Nothing here is certain: every guess comes with a note that says what was found, for the person who reads the recipe.
"""

from __future__ import annotations

import csv
import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ssaseg.datasets.base import IGNORED, DataError
from ssaseg.datasets.pairs import first_names
from ssaseg.files.reading import read_file

NAME_FILES = ("classes.txt", "labels.txt", "labelmap.txt", "label_map.txt", "class_names.txt", "class_dict.csv")
LARGEST_NAMES = 2**16  # bytes of such a file
LONGEST_LINE = 500  # characters
# More different ids than this are probably the grey levels of a picture, not classes.
MOST_IDS = 200
# The first line of labelme's files, for pixels without a class. It has the id -1, which is 255 in a mask.
NO_CLASS = "__ignore__"
# Names that id 0 often has. In a list that starts with one of them, the first name belongs to 0.
BACKGROUND = re.compile(r"_*(background|bg|void|unlabell?ed|other)_*", re.IGNORECASE)
# Headers of columns, in lower case.
COLUMNS = {
    "id": re.compile(r"(class|label|category|train)?[ _-]?(id|index|idx|value|nr|no)"),
    "name": re.compile(r"(class|label|category)?[ _-]?names?|class|label|category"),
    "r": re.compile(r"r|red"),
    "g": re.compile(r"g|green"),
    "b": re.compile(r"b|blue"),
}
COLOUR = re.compile(r"(.+?)\s*[:,;\s]\s*(\d{1,3})\s*[,\s]\s*(\d{1,3})\s*[,\s]\s*(\d{1,3})(?:\s*[:;,].*)?")
ID_FIRST = re.compile(r"(?P<id>-?\d{1,9})\s*[:;,=\s]\s*(?P<name>.+)")
ID_LAST = re.compile(r"(?P<name>.+?)\s*[:;,=\s]\s*(?P<id>-?\d{1,9})")


@dataclass
class Labels:
    """What raw ids are assumed to mean, as keys of a recipe's data section; and notes that say why."""

    classes: list[str]
    raw_ids: list[int]  # one for each class
    reduce_zero_label: bool = False
    raw_to_train: dict[int, int] | None = None
    palette: list[tuple[int, int, int]] | None = None
    notes: list[str] = field(default_factory=list)


class Names(NamedTuple):
    """Class names in a file, by the id in the file or else by line number from 0; and colours, if it has any."""

    file: Path
    names: dict[int, str]
    colours: dict[int, tuple[int, int, int]]
    numbered: bool  # whether the file has ids
    ignored: frozenset[int] = frozenset()  # ids of pixels without a class, according to the file


class Line(NamedTuple):
    """One class of a file."""

    id: int | None
    name: str
    colour: tuple[int, int, int] | None


# ---- ids ---------------------------------------------------------------------------------------------------------


def guess_labels(ids: Sequence[int], names: Names | None, palette: bytes | None) -> Labels:
    """What the raw ids that occur (sorted) are assumed to mean.

    `palette`: RGB triples that all mask files have, or None. Raises DataError where the ids cannot be classes.
    """
    present = [value for value in ids if value != IGNORED]
    if len(ids) > MOST_IDS:
        raise DataError(
            f"the masks hold {len(ids)} different values: they look like grey levels, not like class ids\n"
            f"expected one small number for each class\nwrite class ids 0, 1, 2, … without smoothing"
        )
    labels = None if names is None else _named(present, names)
    if labels is None:
        labels = _unnamed(list(ids), present)
        if names is not None:
            ids_found = first_names([str(value) for value in present], 10)
            reason = f"it has {len(names.names)} names, and the ids are {ids_found}"
            labels.notes.append(f"{names.file.name} is not used: {reason}")
            names = None
    if len(labels.classes) < 2:
        raise DataError(
            f"the masks hold one class, id {first_names(list(map(str, ids)))}: there is nothing to distinguish\n"
            "expected 2 classes or more\ngive the background its own class id"
        )
    if IGNORED in ids and IGNORED not in labels.raw_ids:
        labels.notes.append("255 is in the masks: read as 'ignored', its usual meaning")
    first = int(labels.reduce_zero_label and names is not None and not names.numbered)  # the id of the first line
    if names is not None and names.colours.keys() >= {value - first for value in labels.raw_ids}:
        labels.palette = [names.colours[value - first] for value in labels.raw_ids]
    elif palette is not None and 3 * max(labels.raw_ids) < len(palette):
        colours = [tuple(palette[3 * value : 3 * value + 3]) for value in labels.raw_ids]
        # Where colours are equal, the palette was never filled in.
        if len(set(colours)) == len(colours):
            labels.palette = [(r, g, b) for r, g, b in colours]
            labels.notes.append("colours: the palette of the mask files")
    return labels


def _named(present: Sequence[int], names: Names) -> Labels | None:
    """Labels according to a file of names, or None where it does not fit the ids."""
    given, file = names.names, names.file.name
    notes = [f"class names: {file}"]
    if names.numbered:
        ids = sorted({*given, *present} - names.ignored)
        if unnamed := [str(value) for value in ids if value not in given]:
            notes.append(f"ids that {file} does not name: {first_names(unnamed, 10)}")
        if unseen := [name for value, name in given.items() if value not in present]:
            notes.append(f"{len(unseen)} of {len(given)} names have no pixel: {first_names(unseen, 6)}")
        classes = [given.get(value, f"class_{value}") for value in ids]
        return _with_map(Labels(classes, ids, notes=notes), names.ignored & set(present))
    count, last = len(given), max(present, default=0)
    if last > count or (last == count and (count < 2 or BACKGROUND.fullmatch(given[0]))):
        return None
    if last == count:
        notes.append(f"0 is read as 'ignored': {file} has {count} names, and ids go up to {count}")
        return Labels(list(given.values()), list(range(1, count + 1)), True, notes=notes)
    if last < count - 1:
        notes.append(f"{count} names, but ids only go up to {last}: the last names have no pixel")
    if present and 0 not in present:
        notes.append(f"no mask holds 0, the id of {given[0]}; if ids start at 1: reduce_zero_label: true")
    return Labels(list(given.values()), list(range(count)), notes=notes)


def _unnamed(ids: Sequence[int], present: Sequence[int]) -> Labels:
    if ids == [0, IGNORED]:
        note = "0 and 255 are the only ids: read as two classes, not as a class and 'ignored'"
        return Labels(["class_0", "class_255"], [0, IGNORED], raw_to_train={0: 0, IGNORED: 1}, notes=[note])
    labels = Labels([f"class_{value}" for value in present], list(present))
    labels.notes.append("class names are made from the ids: write the real ones")
    if present and present == list(range(1, len(present) + 1)):
        labels.reduce_zero_label = True
        labels.notes.append("ids start at 1, and no mask holds 0: 0 is read as 'ignored' (reduce_zero_label)")
        return labels
    if 0 in present:
        labels.notes.append("0 is read as a class; if it means 'unlabelled', map it to 255 in raw_to_train")
    return _with_map(labels)


def _with_map(labels: Labels, ignored: frozenset[int] = frozenset()) -> Labels:
    """The labels with `raw_to_train`, where the ids are not 0, 1, 2, … or some of them are to be ignored."""
    if ignored or labels.raw_ids != list(range(len(labels.raw_ids))):
        labels.raw_to_train = {raw: train_id for train_id, raw in enumerate(labels.raw_ids)}
        last = len(labels.raw_ids) - 1
        labels.notes.append(f"the ids have gaps or do not start at 0: raw_to_train numbers them 0..{last}")
        labels.raw_to_train |= dict.fromkeys(sorted(ignored), IGNORED)
    return labels


# ---- files of names ----------------------------------------------------------------------------------------------


def read_class_names(root: Path) -> tuple[Names | None, list[str]]:
    """Class names from a file such as classes.txt in `root`, one a line, perhaps with an id or a colour; and notes.

    These forms can be read: `name`, `3 name`, `3: name`, `name 3`, CVAT's `name:R,G,B:…`, `name,R,G,B`, columns under a
    header such as `id,name`, and labelme's `__ignore__`. None where there is no such file, or it cannot be read.
    """
    notes: list[str] = []
    for file in (root / name for name in NAME_FILES):
        try:
            text = read_file(file, LARGEST_NAMES).decode("utf-8-sig")
            if "\0" in text:
                raise UnicodeError("UTF-16 text")
            if max(map(len, text.splitlines()), default=0) > LONGEST_LINE:
                raise OSError(errno.EFBIG, f"a line of more than {LONGEST_LINE} characters", str(file))
        except (FileNotFoundError, IsADirectoryError):
            continue
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text; save it as UTF-8"
            notes.append(f"{file.name} is not used: {reason}")
            continue
        lines = [line.strip() for line in text.splitlines()]
        if lines := [line for line in lines if line and line[0] != "#"]:
            names = _to_names(file, _columns(lines) or _lines(lines))
            if any(line.casefold().endswith(NO_CLASS) for line in lines):
                notes.append(f"{NO_CLASS} in {file.name} is not a class: its pixels are 255 in the masks, and ignored")
            return (names if names.names else None), notes
    return None, notes


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


def _to_names(file: Path, lines: Sequence[Line]) -> Names:
    numbered = all(line.id is not None and -1 <= line.id <= IGNORED for line in lines)
    lines = lines if numbered else [line for line in lines if line.name.casefold() != NO_CLASS]
    names: dict[int, str] = {}
    colours: dict[int, tuple[int, int, int]] = {}
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
