"""Which errors concern one image, so that it is skipped and the others are labelled, and what is printed about them."""

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

import cv2
import torch

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.datasets import DataError
from ssaseg.files.text import printable

# Errors of one name, or of one folder below OUT/KIND. Others, such as a full disk, would meet every image.
NAME_ERRORS = {
    *(errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP),
    *(errno.EACCES, errno.EPERM),
}
# What a process or a system has run out of.
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# PyTorch raises RuntimeError if memory is used up: its allocators', C++'s, oneDNN's, CUDA's libraries' texts.
NO_MEMORY = re.compile(
    "allocate|bad_alloc|out of memory|ALLOC_FAILED|could not create a (memory|primitive)|[Ii]nvalid buffer size"
    "|integer overflow|too large"
)

AGAIN = "run the command again with --resume"
EXAMPLES = 3  # files that are named for one reason
MOST_REASONS = 100
NUMBER = re.compile(r"\d+")


class Skip(NamedTuple):
    """A file that is left out, and why; both safe to print."""

    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class Skips:
    """What is left out in a run: one line a reason, with its first files. Reasons that differ in numbers are one.

    As a context, it prints the lines at the end of what is done inside, also after an error.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, tuple[int, list[Skip]]] = {}

    def __enter__(self) -> "Skips":
        return self

    def __exit__(self, *error: object) -> None:
        self.report()

    def add(self, skip: Skip) -> None:
        """Adds a file. After `MOST_REASONS`, others are counted together."""
        key = NUMBER.sub("#", skip.reason)
        key = key if key in self.reasons or len(self.reasons) < MOST_REASONS else ""
        count, first = self.reasons.get(key, (0, []))
        self.reasons[key] = count + 1, [*first, skip][:EXAMPLES]

    def report(self) -> None:
        """Prints the lines on stderr."""
        for key, (count, first) in self.reasons.items():
            reason = first[0].reason if key else "other reasons"
            names = ", ".join(skip.file for skip in first) + ", …" * (count > len(first))
            echo(f"skipped{f' {count} images' if count > 1 else ''}: {names}: {reason}", err=True)


def skip_reason(error: Exception, path: Path | str, writing: bool = False, again: str = AGAIN) -> Skip:
    """The image `path` that an error has met, and the reason in one line. As text, a path is shown as it is.

    `writing`: the error has come up while results were written. `again`: the fix of an error that would meet the other
    images too, which is raised. An error of an unknown kind, as decoders raise for damaged files, is given with its
    type; with SSASEG_DEBUG=1 it is raised.
    """
    shown = printable(str(path))
    if isinstance(error, OSError):
        if error.errno in EXHAUSTED or (writing and error.errno not in NAME_ERRORS):
            raise error
        return Skip(printable(str(error.filename)) if writing else shown, printable(error.strerror or str(error)))
    # In the text of an error a line feed in the file's name would end the first line.
    text = str(error).replace(str(path), shown).replace(str(Path(path)), shown)
    if isinstance(error, DataError):
        return Skip(shown, printable("; ".join(text.splitlines()[:3])).removeprefix(f"{shown}: "))
    if isinstance(error, FloatingPointError | CommandError):
        raise error
    if lacks_memory(error):
        amount = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
        return Skip(shown, f"not enough memory for this image{f' ({amount[1]} more)' if amount else ''}")
    first = f"{type(error).__name__}: {printable(text.partition(chr(10))[0])}"
    if "CUDA error" in text:  # each later call would fail too
        raise CommandError(f"{shown}: {first}\n{again}, or with --device cpu")
    if os.environ.get("SSASEG_DEBUG") == "1":
        raise error
    return Skip(shown, first)


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that memory is used up, on the CPU or the GPU."""
    if isinstance(error, cv2.error):
        return error.code == cv2.Error.StsNoMem
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None
    )
