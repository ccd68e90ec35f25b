"""`classes.json`: what the numbers and colours in a folder of results mean."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.files.reading import LARGEST_TEXT, read_file
from ssaseg.files.structured import parse_json
from ssaseg.files.text import printable
from ssaseg.files.writing import write_atomic

CLASSES = "classes.json"


def read_classes(out: Path) -> dict[str, Any] | None:
    """What `write_classes` wrote below `out`; None without such a file.

    Raises CommandError for another file of this name, which is not replaced; OSError if it cannot be read.
    """
    path = out / CLASSES
    if not os.path.lexists(path):
        return None
    return parse_classes(read_file(path, LARGEST_TEXT), printable(str(path)))


def parse_classes(content: bytes, shown: str) -> dict[str, Any]:
    """The value in a `classes.json`. shown: the file, for messages. Raises CommandError for another file."""
    try:
        found = parse_json(content)
    except ValueError:
        found = None
    match found:
        case {"classes": [*_], "palette": [*_], "checkpoint": str(), "sha256": str()}:
            return dict(found)
    fix = "move it away, or choose another --out"
    raise CommandError(f"{shown}: not written by `ssaseg predict`, which writes this file\n{fix}")


def classes_of(
    metadata: Mapping[str, Any], palette: Sequence[Sequence[int]], checkpoint: Path, code: str
) -> dict[str, Any]:
    """Classes in the order of their numbers, their colours RGB 0..255, and the network: its name, its classifier, its
    file and the sum of the file.
    """
    return {
        "classes": list(metadata["classes"]),
        "palette": [list(colour) for colour in palette],
        "model": metadata["model"],
        "classifier": metadata["classifier"],
        "checkpoint": checkpoint.name,
        "sha256": code,
    }


def write_classes(out: Path, value: Mapping[str, Any]) -> None:
    """Writes the value of `classes_of` to `out`. Warns if results of other classes are there. Raises as
    `read_classes`.
    """
    before = read_classes(out)
    warn_of_others(before, value, printable(str(out)))
    if before != value:
        write_atomic(out / CLASSES, json.dumps(value, indent=1).encode() + b"\n", sync=False, root=out)


def warn_of_others(before: Mapping[str, Any] | None, value: Mapping[str, Any], shown: str) -> None:
    """Warns if the classes of earlier results are others. shown: where they are."""
    if before is not None and before["classes"] != value["classes"]:
        other = printable(before["checkpoint"])
        text = f"results of {other}, with other classes, are here too; {CLASSES} describes those of this run"
        echo(f"warning: {shown}: {text}\nchoose another --out to keep them apart", err=True)
