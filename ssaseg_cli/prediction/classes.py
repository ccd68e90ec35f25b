"""`classes.json`: what the numbers and colours in a folder of results mean."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.files.structured import read_json
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
    try:
        found = read_json(path)
    except ValueError:
        found = None
    match found:
        case {"classes": [*_], "palette": [*_], "checkpoint": str(), "sha256": str()}:
            return dict(found)
    fix = "move it away, or choose another --out"
    raise CommandError(f"{printable(str(path))}: not written by `ssaseg predict`, which writes this file\n{fix}")


def write_classes(
    out: Path, metadata: Mapping[str, Any], palette: Sequence[Sequence[int]], checkpoint: Path, code: str
) -> None:
    """Writes classes in the order of their numbers, their colours RGB 0..255, and the network: its name, its
    classifier, its file and the sum of the file. Warns if results of other classes are in `out`. Raises as
    `read_classes`.
    """
    value = {
        "classes": list(metadata["classes"]),
        "palette": [list(colour) for colour in palette],
        "model": metadata["model"],
        "classifier": metadata["classifier"],
        "checkpoint": checkpoint.name,
        "sha256": code,
    }
    before = read_classes(out)
    if before is not None and before["classes"] != value["classes"]:
        other = printable(before["checkpoint"])
        text = f"results of {other}, with other classes, are here too; {CLASSES} describes those of this run"
        echo(f"warning: {printable(str(out))}: {text}\nchoose another --out to keep them apart", err=True)
    if before != value:
        write_atomic(out / CLASSES, json.dumps(value, indent=1).encode() + b"\n", sync=False, root=out)
