"""Label maps of PASCAL-Context from `trainval_merged.json`, without the `detail` package and its C extension.

The file belongs to PASCAL in Detail, which contains PASCAL-Context, for VOC 2010. It lists `images` with image_id,
file_name, height, width and phase, and `annos_segmentation` with id, image_id, category_id and segmentation, a COCO run
length. As in `detail`'s `getMask`, all annotations of an image are painted in the order of the file, crowds too: a
later one covers an earlier one. Pixels that are never painted are 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssaseg.datasets.annotations import Region, read_document, region_runs
from ssaseg.datasets.base import DataError, brief
from ssaseg.datasets.decoding import MAX_PIXELS

CONTEXT_FILE = "trainval_merged.json"
ANNOTATIONS = "annos_segmentation"  # the key of the annotations in the file
# Of 460 class numbers those of the background and the 59 most frequent classes; in masks they are 0..59, in this order.
CONTEXT_IDS = (
    *(0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85),
    *(98, 104, 105, 113, 115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296),
    *(308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
)


class Drawing(NamedTuple):
    """The annotations of one image."""

    file: Path  # the JSON
    split: str
    name: str
    height: int
    width: int
    shapes: list[tuple[int, Region]]  # class numbers and regions, in the order of painting

    def __str__(self) -> str:
        """The file and the image, for messages."""
        return f"{self.file}: image {self.name}"


def drawings(file: Path) -> Iterator[Drawing]:
    """One for each image of both splits. Raises DataError for a file that is cut off or is not PASCAL in Detail's."""
    document = read_document(file, f"{CONTEXT_FILE} of PASCAL in Detail", f"images and {ANNOTATIONS}")
    try:
        # By id, as in `detail`: of two annotations with the same id, only the second is painted, in the first's place.
        rows = {row["id"]: row for row in document[ANNOTATIONS]}
        shapes: dict[Any, list[tuple[int, Region]]] = {image["image_id"]: [] for image in document["images"]}
        for row in rows.values():
            region = Region(row["id"], "", bool(row.get("iscrowd")), row["segmentation"])
            shapes[row["image_id"]].append((_whole(row, "category_id"), region))
        for image in document["images"]:
            if image["phase"] in ("train", "val"):
                height, width = _whole(image, "height"), _whole(image, "width")
                if height * width > MAX_PIXELS:
                    raise TypeError(f"an image has {brief(height * width)} pixels, expected at most {MAX_PIXELS:,}")
                name = Path(image["file_name"]).stem
                yield Drawing(file, image["phase"], name, height, width, shapes[image["image_id"]])
    except (KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        keys = "images (image_id, file_name, height, width, phase) and " + ANNOTATIONS
        fix = f"use {CONTEXT_FILE} of PASCAL in Detail"
        raise DataError(f"{file}: not in the form of PASCAL in Detail: {what}\nexpected {keys}\n{fix}") from None


def _whole(row: dict[str, Any], key: str) -> int:
    if type(row[key]) is not int or row[key] < 0:
        raise TypeError(f"{key} is {brief(row[key])}")
    return row[key]


def draw(drawing: Drawing) -> np.ndarray:
    """Class numbers 0..459, int64 (H, W). Raises DataError for a segmentation that is not valid or does not fit."""
    canvas = np.zeros(drawing.width * drawing.height, np.int64)  # column after column, as in run lengths
    for category, region in drawing.shapes:
        runs = region_runs(drawing.file, region, drawing.height, drawing.width, ANNOTATIONS)
        canvas[np.repeat(np.arange(len(runs)) % 2 == 1, runs)] = category
    return canvas.reshape(drawing.width, drawing.height).T
