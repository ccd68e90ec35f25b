"""`shares.json`: the share of each class in each image, one image a line; and the same as a table, `shares.csv`.

Axes: H×W pixels of an image.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssaseg.cli.results.objects import read_objects, replacing, to_line
from ssaseg.files.text import printable

DIGITS = 6  # behind the point


def share_lines(name: str, labels: np.ndarray, classes: Sequence[str]) -> list[bytes]:
    """One JSON object with the shares 0..1 of all classes in labels (H,W).

    Keys: image (path below its INPUT), width and height [pixels], shares {class: share}.
    """
    pixels = np.bincount(labels.reshape(-1), minlength=len(classes))
    return [share_line(name, pixels, labels.shape, classes)]


def share_line(name: str, pixels: np.ndarray, size: Sequence[int], classes: Sequence[str]) -> bytes:
    """The same of the number of pixels of each class in an image of `size` (height, width)."""
    total = max(int(pixels.sum()), 1)
    shares = {name: round(count / total, DIGITS) for name, count in zip(unique(classes), pixels.tolist(), strict=True)}
    return to_line({"image": name, "width": size[1], "height": size[0], "shares": shares})


def unique(classes: Sequence[str]) -> list[str]:
    """The names of classes, with their numbers where two are equal."""
    counts = Counter(classes)
    return [name if counts[name] == 1 else f"{name} ({index})" for index, name in enumerate(classes)]


def is_shares(value: object) -> bool:
    """Whether a JSON value has what `share_lines` writes."""
    match value:
        case {"image": str(), "width": int(), "height": int(), "shares": dict(shares)}:
            return all(isinstance(share, int | float) for share in shares.values())
    return False


def write_table(path: Path) -> None:
    """Writes the objects of a `shares.json` as CSV beside it: an image a row, a class a column.

    Columns are the classes of all images: those of other checkpoints too, whose cells are then empty.
    """
    columns: dict[str, None] = {}
    for entry, _ in read_objects(path, is_shares):
        columns.update(dict.fromkeys(entry["shares"]))
    with replacing(path.with_suffix(".csv")) as file:
        file.write(_row(["image", "width", "height", *map(printable, columns)]))
        for entry, _ in read_objects(path, is_shares):
            shares = (entry["shares"].get(name, "") for name in columns)
            file.write(_row([printable(entry["image"]), entry["width"], entry["height"], *shares]))


def _row(cells: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
