"""Lists of inputs, one a line: `--list FILE`, or `-` for stdin."""

import os
import sys
from collections.abc import Iterator

from ssaseg.datasets.base import DataError
from ssaseg.files.reading import LARGEST, decode_text, read_file
from ssaseg.files.text import printable

STDIN = "-"


def read_list(file: str) -> list[str]:
    """The paths and addresses in a file, or on stdin: one a line, or with a NUL byte after each, as `find -print0` has.

    Blank lines are left out; line ends may be those of Windows; a mark of UTF-8 or UTF-16 is taken off. Names that are
    not UTF-8 are kept, as Python keeps them. Raises DataError for an empty list, OSError for a file that cannot be
    read.
    """
    content = sys.stdin.buffer.read(LARGEST + 1) if file == STDIN else read_file(file)
    shown = "stdin" if file == STDIN else printable(file)
    if len(content) > LARGEST:
        raise DataError(f"--list {shown}: larger than {LARGEST / 2**20:,.0f} MiB\ngive several shorter lists")
    lines = list(_lines(content))
    if not lines:
        raise DataError(f"--list {shown}: no name in it\nexpected one path or address a line")
    return lines


def _lines(content: bytes) -> Iterator[str]:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # as PowerShell writes it
        try:
            content = decode_text(content).encode("utf-8", "surrogateescape")
        except UnicodeDecodeError:
            raise DataError("--list: damaged text in UTF-16\nsave it again in UTF-8") from None
    content = content.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in content:
        yield from (os.fsdecode(name) for name in content.split(b"\0") if name)
        return
    for line in content.split(b"\n"):
        name = line.removesuffix(b"\r")
        if name.strip():
            yield os.fsdecode(name)
