"""What a COCO-format file holds, checked: its categories, images and regions; and the pixels of a region.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_utils

from ssaseg.datasets.base import DataError
from ssaseg.datasets.pairs import some


class Region(NamedTuple):
    """One annotation."""

    id: Any  # for messages
    category: str
    crowd: bool
    segmentation: Any  # as in the file: polygons, or run lengths


class Content(NamedTuple):
    """One file: names of categories by id; per image, by its file name, (H, W) and its regions in the file's order."""

    categories: dict[int, str]
    sizes: dict[str, tuple[int, int]]
    regions: dict[str, list[Region]]


def read_annotations(file: Path) -> Content:
    """Read and check a COCO-format file. Segmentations are looked at only when they are painted, by `region_runs`.

    Annotations of images that the file does not list are passed over, as pycocotools does; where none fits any image,
    that is an error. Raises DataError for a file that is none of the kind.
    """
    document = read_document(file)
    categories = _categories(file, document)
    images = _images(file, document)
    sizes = dict(images.values())
    regions: dict[str, list[Region]] = {name: [] for name in sizes}
    elsewhere = 0
    for where, entry in _entries(file, document, "annotations", ("id", "image_id", "category_id", "segmentation")):
        category = categories.get(_key(where, entry, "category_id"))
        if category is None:
            raise DataError(
                f"{where}: category_id {entry['category_id']!r} is no category's id\n"
                f"expected one of {some([str(number) for number in sorted(categories)], 10)}\n"
                "add it to `categories`, or correct the annotation"
            )
        image = images.get(_key(where, entry, "image_id"))
        if image is None:
            elsewhere += 1
        else:
            region = Region(entry["id"], category, bool(entry.get("iscrowd")), entry["segmentation"])
            regions[image[0]].append(region)
    if elsewhere and not any(regions.values()):
        known = some([repr(number) for number in images])
        raise DataError(f"{file}: no annotation belongs to an image\nexpected image_id to be an image's id: {known}")
    return Content(categories, sizes, regions)


def read_document(
    file: Path, kind: str = "COCO-format file", parts: str = "images, annotations and categories"
) -> dict[str, Any]:
    """The JSON object of a file, unchecked. Raises DataError where it is missing, cut off or no object.

    kind, parts: what the file is and what is in it, for messages.
    """
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file}: no such file\nexpected a {kind}\ncheck data.root and annotations") from None
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        # A file that was cut off fails at its end; one that somebody edited, anywhere.
        end = len(error.doc.rstrip())
        what = "is cut off" if error.pos >= end - 1 or error.msg.startswith("Unterminated") else "is not JSON"
        raise DataError(
            f"{file}: {what}: {error.msg}, line {error.lineno}, after {error.pos} of {end} characters\n"
            f"expected a whole {kind}\ncopy or export it again"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not JSON: no UTF-8 text ({error.reason})\nexpected a {kind}") from None
    if not isinstance(document, dict):
        raise DataError(
            f"{file}: a JSON {type(document).__name__}, no object\n"
            f"expected an object with {parts}\n"
            "a list is a file of predictions; the labels are in an instances_*.json or stuff_*.json"
        )
    return document


def _entries(file: Path, document: dict[str, Any], part: str, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The entries of a part, each with the words for a message that say where it is."""
    entries = document.get(part)
    if not isinstance(entries, list):
        what = "is missing" if entries is None else f"is {type(entries).__name__}, no list"
        raise DataError(
            f"{file}: `{part}` {what}\nexpected an object with images, annotations and categories\n"
            "files of captions or of image names alone hold no labels"
        )
    if not entries:
        raise DataError(f"{file}: `{part}` is empty\nexpected at least one entry")
    for number, entry in enumerate(entries):
        absent = [key for key in keys if key not in entry] if isinstance(entry, dict) else list(keys)
        if absent:
            # The annotation tool's own number finds an entry sooner than its place in the file.
            name = f"id {entry['id']}" if isinstance(entry, dict) and "id" in entry else f"entry {number}"
            raise DataError(
                f"{file}: {part}, {name}: {', '.join(absent)} missing\nexpected the keys {', '.join(keys)}\n"
                "export it again from the tool that made it, or add the keys"
            )
        yield f"{file}: {part}, id {entry['id']}", entry


def _key(where: str, entry: dict[str, Any], name: str) -> Any:
    """The value of an id. Raises DataError where it is neither a number nor a text."""
    if not isinstance(entry[name], int | str):
        raise DataError(f"{where}: {name} is {entry[name]!r}\nexpected a whole number")
    return entry[name]


def _categories(file: Path, document: dict[str, Any]) -> dict[int, str]:
    categories: dict[int, str] = {}
    for where, entry in _entries(file, document, "categories", ("id", "name")):
        if not isinstance(entry["id"], int) or not isinstance(entry["name"], str) or not entry["name"]:
            raise DataError(f"{where}: named {entry['name']!r}\nexpected a whole number for id and text for name")
        if categories.setdefault(entry["id"], entry["name"]) != entry["name"]:
            first = categories[entry["id"]]
            raise DataError(f"{where} is {first} and {entry['name']}\nexpected an id of its own for each category")
    return categories


def _images(file: Path, document: dict[str, Any]) -> dict[Any, tuple[str, tuple[int, int]]]:
    """Per image id the file name and (H, W)."""
    images: dict[Any, tuple[str, tuple[int, int]]] = {}
    names = set()
    for where, entry in _entries(file, document, "images", ("id", "file_name", "height", "width")):
        height, width, name = entry["height"], entry["width"], entry["file_name"]
        if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
            raise DataError(f"{where}: width {width!r}, height {height!r}\nexpected whole numbers of pixels")
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: file_name is {name!r}\nexpected a path below the folder of images")
        if name in names or _key(where, entry, "id") in images:
            raise DataError(f"{where}: {name}: its id or name is there twice\nexpected one entry an image\nremove one")
        names.add(name)
        images[entry["id"]] = name, (height, width)
    return images


def region_runs(file: Path, region: Region, height: int, width: int, part: str = "annotations") -> np.ndarray:
    """The pixels of a region, int64 (R,): lengths of runs outside, inside, outside, …, down one column after the other.

    Polygons are filled by pycocotools, several of one region together; those of fewer than three points have no inside.
    Raises DataError for a segmentation that is none, or does not fit an image of H×W; `part` is the file's key that
    its message names.
    """
    where, segmentation = f"{file}: {part}, id {region.id}", region.segmentation
    if isinstance(segmentation, list) and segmentation:
        polygons = [_polygon(where, polygon, max(height, width)) for polygon in segmentation]
        # pycocotools takes four numbers for a box, and no polygon at all for an error.
        whole = [points for points in polygons if len(points) >= 6]
        if not whole:
            return run_lengths([height * width])
        return run_lengths(mask_utils.merge(mask_utils.frPyObjects(whole, height, width))["counts"].decode())
    if not isinstance(segmentation, dict):
        shown = "empty" if segmentation == [] else repr(segmentation)[:60]
        raise DataError(
            f"{where}: the segmentation is {shown}\nexpected polygons or run lengths\n"
            "a box alone does not say which pixels: outline the object, or remove the annotation"
        )
    size, runs = segmentation.get("size"), run_lengths(segmentation.get("counts"))
    if size != [height, width]:
        raise DataError(
            f"{where}: run lengths of size {size}\nexpected its image's [height, width], [{height}, {width}]"
        )
    if runs.min(initial=0) < 0 or runs.sum() != height * width:
        found = f"run lengths of {runs.sum()} pixels together" if len(runs) else "no run lengths"
        raise DataError(f"{where}: {found}\nexpected {height * width}, the pixels of {width}x{height}\nexport it again")
    return runs


def _polygon(where: str, points: Any, side: int) -> list[float]:
    """The polygon [x, y, x, y, …]. Raises DataError where it is none, or lies far outside the image."""
    numbers = isinstance(points, list) and all(type(number) in (int, float) for number in points)
    if not numbers or len(points) % 2:
        found = f"{len(points)} numbers" if numbers else repr(points)[:60]
        raise DataError(f"{where}: a polygon of {found}\nexpected a list [x, y, x, y, …]\nexport it again")
    # Anything near the limits of an integer would end pycocotools, and with it the process.
    if points and not (math.isfinite(sum(points)) and -side <= min(points) and max(points) <= 2 * side):
        found = f"a polygon from {min(points)} to {max(points)}"
        raise DataError(f"{where}: {found}\nexpected pixels of an image whose longer side is {side}\nexport it again")
    return points


def run_lengths(counts: Any) -> np.ndarray:
    """Run lengths, int64, of a COCO `counts`: as they are, or as text. Empty where it is neither.

    The text has 6 bits a character, offset by 48: five of the number, lowest first, and one that says that more
    follow; the last one's 16 is the sign. From the fourth number on it is the difference to the number two before.
    """
    nothing = np.empty(0, np.int64)
    if isinstance(counts, list):
        sound = all(type(count) is int and 0 <= count < 1 << 40 for count in counts)
        return np.array(counts, np.int64) if sound else nothing
    if not isinstance(counts, str) or not counts or not all("0" <= sign <= "o" for sign in (min(counts), max(counts))):
        return nothing
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    last = codes & 32 == 0
    if not last[-1]:
        return nothing
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(starts, np.diff([*starts, len(codes)]))
    if place.max() > 6:  # more than any image has
        return nothing
    runs = np.add.reduceat((codes & 31) << 5 * place, starts)
    runs -= np.where(codes[last] & 16, np.int64(32) << 5 * place[last], 0)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs
