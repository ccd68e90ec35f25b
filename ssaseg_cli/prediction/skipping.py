"""Which errors concern one image, so that it is skipped and the others are labelled, and what is printed about it."""

import errno
import os
import re
from pathlib import Path

import cv2
import torch

from ssaseg.cli.errors import CommandError
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

AGAIN = "run the command again with --skip-existing"


def skip_reason(error: Exception, path: Path, writing: bool = False, again: str = AGAIN) -> str:
    """One line about the image `path` that an error has met: its name and the reason.

    `writing`: the error has come up while results were written. `again`: the fix of an error that would meet the other
    images too, which is raised. An error of an unknown kind, as decoders raise for damaged files, is given with its
    type; with SSASEG_DEBUG=1 it is raised.
    """
    shown = printable(str(path))
    if isinstance(error, OSError):
        if error.errno in EXHAUSTED or (writing and error.errno not in NAME_ERRORS):
            raise error
        return f"{printable(str(error.filename)) if writing else shown}: {printable(error.strerror or str(error))}"
    # In the text of an error a line feed in the file's name would end the first line.
    text = str(error).replace(str(path), shown)
    if isinstance(error, DataError):
        reason = printable("; ".join(text.splitlines()[:2]))
        return reason if shown in reason else f"{shown}: {reason}"  # an engine does not know the image
    if isinstance(error, FloatingPointError | CommandError):
        raise error
    if lacks_memory(error):
        amount = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
        return f"{shown}: not enough memory for this image{f' ({amount[1]} more)' if amount else ''}"
    first = f"{type(error).__name__}: {printable(text.partition(chr(10))[0])}"
    if "CUDA error" in text:  # each later call would fail too
        raise CommandError(f"{shown}: {first}\n{again}, or with --device cpu")
    if os.environ.get("SSASEG_DEBUG") == "1":
        raise error
    return f"{shown}: {first}"


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that memory is used up, on the CPU or the GPU."""
    if isinstance(error, cv2.error):
        return error.code == cv2.Error.StsNoMem
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None
    )
