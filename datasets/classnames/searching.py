"""Finds the file of class names of a user's data."""

from __future__ import annotations

import csv
import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from ssaseg.datasets.classnames.documents import read_document
from ssaseg.datasets.classnames.lines import read_lines, text_lines
from ssaseg.datasets.classnames.names import MOST_NAMES, NO_CLASS, Line, Names, to_names
from ssaseg.datasets.labels import label_space
from ssaseg.files.reading import decode_text, read_file

# Names of such files, in lower case; in one folder the first one is used.
NAME_FILES = tuple(
    re.compile(pattern)
    for pattern in (
        r"_?(classes|labels|label_?map|class_?names|class_?list|label_?names|label_?list|names|categories)\.txt",
        r"(class_?dict|class_?dict_seg|_?classes|label_?map|labels|label_?colou?rs?|class_?colou?rs?)\.(csv|tsv)",
        r"(label_?colou?rs?|class_?colou?rs?|class_?dict|colou?r_?map|palette)\.txt",
        r"(id2label|label_?map|dataset_meta|meta|labels|classes|class_?names|categories|dataset_info|config.*)\.json",
        r"(data|dataset|classes|labels|names)\.ya?ml",
    )
)
LARGEST_NAMES, LARGEST_DOCUMENT = 2**16, 2**20  # bytes of a text file, of a JSON or YAML file
LONGEST_LINE = 500  # characters
MOST_FOLDERS = 50


def read_class_names(root: Path, folders: Sequence[str] = ()) -> tuple[Names | None, list[str]]:
    """Class names from a file such as classes.txt in `root`, or in or above one of `folders`; and notes.

    folders: paths below `root`, those of the masks first. Of several files that nearest to the root is used. None where
    there is no such file, or none that can be read.
    """
    notes: list[str] = []
    chosen: Names | None = None
    for file in _files(root, folders):
        shown = file.relative_to(root).as_posix()
        try:
            lines = _read(file)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else _reason(error)
            notes.append(f"{shown} is not used: {reason}")
            continue
        names = to_names(file, lines)
        if not names.names:
            continue
        if chosen is None:
            chosen = names
            if any(line.name.casefold() == NO_CLASS for line in lines):
                notes.append(f"{NO_CLASS} in {file.name} is not a class: its pixels are 255 in the masks, and ignored")
        elif [*names.names.values()] != [*chosen.names.values()]:
            first = chosen.file.relative_to(root).as_posix()
            notes.append(f"{shown} has other class names than {first} and is not used")
            break
    return chosen, notes


def known_names(dataset: str) -> Names:
    """The classes of a published data set whose masks number them from 0, with the first id after them ignored."""
    labels = label_space(dataset)
    colours = {number: (red, green, blue) for number, (red, green, blue) in enumerate(labels.palette)}
    names = dict(enumerate(labels.classes))
    return Names(Path(dataset), names, colours, True, frozenset([len(names)]))


def _reason(error: ValueError) -> str:
    return "not UTF-8 text; save it as UTF-8" if isinstance(error, UnicodeError) else str(error)


def _files(root: Path, folders: Iterable[str]) -> Iterator[Path]:
    """Files with such a name: in the root, then in the folders above the given ones, the highest first."""
    paths = {PurePosixPath(): 0}
    for folder in [*folders][:MOST_FOLDERS]:
        path = PurePosixPath(folder)
        for each in (path, *path.parents):
            paths.setdefault(each, len(paths))
    for path in sorted(paths, key=lambda path: (len(path.parts), paths[path]))[: 2 * MOST_FOLDERS]:
        try:
            with os.scandir(root / path) as entries:
                names = sorted(entry.name for entry in entries if _order(entry.name) < len(NAME_FILES))
        except OSError:
            continue
        yield from (root / path / name for name in sorted(names, key=_order))


def _order(name: str) -> int:
    return next((at for at, pattern in enumerate(NAME_FILES) if pattern.fullmatch(name.lower())), len(NAME_FILES))


def read_names(file: Path) -> Names:
    """The class names in one file that a user names. Raises OSError and ValueError if it cannot be read."""
    return to_names(file, _read(file))


def _read(file: Path) -> list[Line]:
    if not file.is_file():  # a folder of this name
        return []
    suffix = file.suffix.lower()
    if suffix in (".json", ".yaml", ".yml"):
        try:
            return read_document(read_file(file, LARGEST_DOCUMENT), file.name.lower())
        except OSError as error:
            if error.errno == errno.EFBIG:  # annotations, not names
                return []
            raise
    lines = text_lines(decode_text(read_file(file, LARGEST_NAMES)))
    if max(map(len, lines), default=0) > LONGEST_LINE:
        raise OSError(errno.EFBIG, f"a line of more than {LONGEST_LINE} characters", str(file))
    if len(lines) > MOST_NAMES + 1:
        raise ValueError(f"{len(lines)} lines, where at most {MOST_NAMES} classes are possible")
    try:
        return read_lines(lines)
    except csv.Error as error:
        raise ValueError(str(error)) from None
