"""Files with one JSON object a line, for all images of a folder of results: `rle.json` and `shares.json`."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from ssaseg.cli.errors import CommandError
from ssaseg.files.reading import open_file
from ssaseg.files.text import printable
from ssaseg.files.writing import make_temporary

# Bytes of a line that is read: more than the run lengths of 100 million pixels, each of another class than the next.
LONGEST_LINE = 2**28

Fits = Callable[[object], bool]  # whether a value is an object of such a file


def to_line(value: Any) -> bytes:
    """A value as JSON in UTF-8, without line feed. A file name that is not Unicode is written with JSON's escapes."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def from_line(line: bytes) -> Any:
    """The value of a line of JSON; None for what is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file. A longer line than `LONGEST_LINE`, as of a sparse file of terabytes, is cut off and is the
    last one.
    """
    while line := file.readline(LONGEST_LINE):
        yield line
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            return


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError: that of a full disk has no name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces `path` at the end; after an error `path` is unchanged. OSErrors name `path`."""
    with naming(path):
        temporary, descriptor = make_temporary(path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def write_sorted(
    path: Path,
    new: Iterable[tuple[str, Sequence[bytes]]],
    old: Iterable[tuple[str, Sequence[bytes]]],
    frame: tuple[bytes, bytes, bytes],
) -> None:
    """Makes a file anew from the lines of images, (name, lines), sorted by name: the same images make the same file,
    in whatever order and by however many commands they were labelled. Of two images with one name the first of `new`.

    frame: what stands before the first line, between two lines, and after the last one. Lines wait in a file without a
    name, and only their places in memory. Raises OSError.
    """
    first, between, last = frame
    done: set[str] = set()
    places: list[tuple[str, int, int]] = []  # name, offset, bytes
    with replacing(path) as file, TemporaryFile(dir=path.parent) as heap:
        for entries, replaced in ((new, False), (old, True)):
            before = frozenset(done) if replaced else done
            for name, lines in entries:
                if name in before:
                    continue
                done.add(name)
                if lines:
                    content = between.join(lines)
                    places.append((name, heap.tell(), len(content)))
                    heap.write(content)
        places.sort()
        separator = first
        for _, offset, size in places:
            heap.seek(offset)
            file.write(separator + heap.read(size))
            separator = between
        file.write(last if places else first + last.lstrip())


def write_objects(path: Path, new: Iterable[tuple[str, Sequence[bytes]]], fits: Fits) -> None:
    """Makes the file anew: a JSON list, one object a line, sorted by image. It has the images of `new`, (name,
    objects), of two images with the same name the first, and the other images of the old file. Raises as
    `read_objects`, and OSError.
    """
    old = ((entry["image"], [line]) for entry, line in read_objects(path, fits))
    write_sorted(path, new, old, (b"[\n", b",\n", b"\n]\n"))


def read_objects(path: Path, fits: Fits) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each object of a file that `write_objects` wrote, and its line; nothing if there is no file. An object names its
    image under `image`.

    Raises CommandError for any other file, OSError if it cannot be read.
    """
    if not os.path.lexists(path):
        return
    with open_file(path) as file:
        for line in read_lines(file):
            text = line.strip().removesuffix(b",")
            if text in (b"[", b"]", b"[]"):
                continue
            entry = from_line(text)
            if not (isinstance(entry, dict) and isinstance(entry.get("image"), str) and fits(entry)):
                fix = "its entries should be kept: move the file away, or choose another --out"
                raise CommandError(f"{printable(str(path))}: not a list that `ssaseg predict` wrote\n{fix}")
            yield entry, text
