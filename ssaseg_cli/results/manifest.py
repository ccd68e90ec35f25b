"""The manifest: what became of each image, one JSON object a line.

`OUT/manifest.jsonl` has one line for each image of OUT, sorted by `file`; commands write it together with the other
files of all images, see `journal.py`. While a command runs, the same objects are lines of its journal, with two more
things in them: `results`, and the image's objects for files of all images.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssaseg.cli.errors import CommandError
from ssaseg.cli.results.objects import from_line, read_lines, to_line, write_sorted
from ssaseg.files.reading import open_file
from ssaseg.files.text import printable

MANIFEST = "manifest.jsonl"


class Entry(NamedTuple):
    """What became of one image; its fields are the keys of a line, in this order."""

    file: str  # its path below its INPUT
    outputs: Sequence[str]  # its results: paths below OUT; of objects in a file of all images, that file
    size: tuple[int, int] | None  # width and height [pixels]; None where it could not be read
    seconds: float  # of work on it: to read, label, encode and write it, without waits
    error: str | None  # why it has no results, in one line; None for an image that is done

    def json(self) -> dict[str, Any]:
        """The object of a line."""
        return {**self._asdict(), "seconds": round(self.seconds, 4)}


def parse_entry(value: object) -> Entry | None:
    """The entry of a line's object, whatever else is in it; None for any other value."""
    match value:
        case {
            "file": str(file),
            "outputs": [*outputs],
            "size": ([int(), int()] | None) as size,
            "seconds": int(seconds) | float(seconds),
            "error": (str() | None) as error,
        } if all(isinstance(each, str) for each in outputs):
            return Entry(file, outputs, size and (size[0], size[1]), seconds, error)
    return None


def read_manifest(out: Path) -> Iterator[Entry]:
    """The entries of `OUT/manifest.jsonl`; nothing without such a file.

    Raises CommandError for a file that is not ours, OSError if it cannot be read.
    """
    path = out / MANIFEST
    if not os.path.lexists(path):
        return
    with open_file(path) as file:
        for line in read_lines(file):
            entry = parse_entry(from_line(line))
            if entry is None:
                fix = "move it away, or choose another --out"
                raise CommandError(f"{printable(str(path))}: not a manifest that `ssaseg predict` wrote\n{fix}")
            yield entry


def write_manifest(out: Path, new: Iterable[Entry]) -> None:
    """Makes `OUT/manifest.jsonl` anew: of two entries of `new` for one image the first, then those that it had before.

    Raises as `read_manifest`, and OSError if it cannot be written.
    """

    def lines(entries: Iterable[Entry]) -> Iterator[tuple[str, list[bytes]]]:
        return ((entry.file, [to_line(entry.json())]) for entry in entries)

    write_sorted(out / MANIFEST, lines(new), lines(read_manifest(out)), (b"", b"\n", b"\n"))
