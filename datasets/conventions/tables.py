"""Tables of classes with colours, in the forms in which tools and data sets write them.

Text: CVAT's and VOC's `labelmap.txt` (`name:r,g,b:parts:actions`), CamVid's `label_colors.txt` (colour first or name
first, with tabs or spaces), `class_dict.csv` (columns in any order), `name,#rrggbb`. JSON: Mapillary's `labels` with
`color`, `readable` and `evaluate`, datumaro's `dataset_meta.json` with `segmentation_colors`, Supervisely's `classes`,
`{name: colour}`, and lists of names and colours side by side; YAML with the same content.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ssaseg.datasets.base import IGNORED, DataError, brief
from ssaseg.datasets.classnames.documents import read_document
from ssaseg.datasets.classnames.lines import read_lines, text_lines
from ssaseg.datasets.classnames.names import MOST_ROWS, NO_CLASS, Line
from ssaseg.datasets.conventions.base import Colour, Tree
from ssaseg.files.reading import decode_text, read_file

LARGEST, LARGEST_YAML = 2**20, 2**16  # bytes of a table
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".yaml", ".yml")
MOST_FILES = 50  # candidates that are opened
# Folders that a table lies in: the data's, or one or two below it.
DEEPEST = 3
WORDS = re.compile(r"class|label|colou?r|palette|legend|categor|names|meta|config|map|data", re.IGNORECASE)


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


class Unusable(DataError):
    """A file that probably is a table of colours, but cannot be used."""


def why_unused(tree: Tree) -> str | None:
    """What is wrong with the first table that cannot be used, on one line; None where there is none."""
    for file in _likely(tree):
        try:
            read_table(tree.root / file)
        except Unusable as error:
            return str(error).split("\n")[0]
        except (DataError, OSError):
            continue
    return None


def find_tables(tree: Tree) -> list[Table]:
    """All tables of colours in a folder of data, at its root or up to two folders below; the nearest come first."""
    found = []
    for file in _likely(tree):
        try:
            found.append(read_table(tree.root / file))
        except (DataError, OSError):  # a file of something else
            continue
    return found


def _likely(tree: Tree) -> list[PurePosixPath]:
    files = [file for suffix in SUFFIXES for file in tree.by_suffix.get(suffix, ())]
    likely = [file for file in files if len(file.parts) <= DEEPEST and WORDS.search(file.stem)]
    return sorted(likely, key=lambda file: (len(file.parts), file))[:MOST_FILES]


def read_table(file: Path) -> Table:
    """A table of at least two colours. Raises DataError where the file is none, OSError where it cannot be read."""
    try:
        rows = _read(file)
        if without := next((row for row in rows if row.colour is None), None):
            raise ValueError(f"no colour of 0..255 in {brief(without.name)}")
    except UnicodeDecodeError as error:
        raise Unusable(
            f"{file}: not UTF-8 text ({error.reason})\nexpected lines of name,r,g,b\nsave it as UTF-8"
        ) from None
    except (ValueError, csv.Error, RecursionError) as error:
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
        lines = [row for row in _read(file) if row.name and not row.ignored and row.name.casefold() != NO_CLASS]
    except (ValueError, csv.Error, RecursionError):
        lines = []
    if not lines:
        raise DataError(f"{file}: no class names in this file\nexpected UTF-8 text, one name a line")
    return list(dict.fromkeys(" ".join(line.name.split()) for line in lines))


def _read(file: Path) -> list[Line]:
    """The classes in a file, with colours if it has any. Raises ValueError, csv.Error and OSError."""
    suffix = file.suffix.lower()
    if suffix in (".json", ".yaml", ".yml"):
        content, name = read_file(file, LARGEST if suffix == ".json" else LARGEST_YAML), f"table{suffix}"
        return read_document(content, name, coloured=True) or read_document(content, name)
    lines = text_lines(decode_text(read_file(file, LARGEST)))
    if len(lines) > MOST_ROWS or max(map(len, lines), default=0) > 1000:
        raise ValueError("too many or too long lines")
    return read_lines(lines)


def _to_table(file: Path, rows: Sequence[Line]) -> Table:
    table = Table(file)
    ids: dict[str, int] = {}
    hidden, several, ignored = [], [], []
    for row in rows:
        name = " ".join(row.name.split()) or f"class_{len(ids)}"
        nothing = row.ignored or name.casefold() == NO_CLASS
        assert row.colour is not None  # `read_table` has looked
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
            raise Unusable(f"{file}: more than {IGNORED} classes\nexpected at most {IGNORED}\nmerge some of them")
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
