"""Reading a COCO-format file and checking it: its categories, images and regions, and the pixels of a region.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_utils

from ssaseg.datasets.base import DataError, brief, require_below
from ssaseg.datasets.decoding import MAX_PIXELS
from ssaseg.datasets.pairs import first_names
from ssaseg.files.reading import read_file
from ssaseg.files.text import printable

LARGEST = 2**31  # bytes of a file; COCO's largest has half of it

LONGEST_OUTLINE = 4_000_000  # pixels, of all polygons of a region


class Region(NamedTuple):
    """One annotation."""

    id: Any  # for messages
    category: str
    crowd: bool
    segmentation: Any  # as in the file: polygons or run lengths


class Content(NamedTuple):
    """One file: names of categories, and what they are a group or a part of, by id; by an image's file name its (H, W),
    and its regions in the file's order.
    """

    categories: dict[int, str]
    groups: dict[int, str | None]
    sizes: dict[str, tuple[int, int]]
    regions: dict[str, list[Region]]


def read_annotations(file: Path) -> Content:
    """Read and check a COCO-format file. Segmentations are checked later, by `region_runs`, when they are painted.

    Annotations of images that the file does not list are ignored, as in pycocotools; it is an error if all of them are.
    Raises DataError for this and for a file that is not in COCO format.
    """
    document = read_document(file)
    categories, groups = _categories(file, document)
    images = _images(file, document)
    sizes = dict(images.values())
    regions: dict[str, list[Region]] = {name: [] for name in sizes}
    elsewhere = 0
    for where, entry in _entries(file, document, "annotations", ("id", "image_id", "category_id", "segmentation")):
        category = categories.get(_key(where, entry, "category_id"))
        if category is None:
            raise DataError(
                f"{where}: category_id {brief(entry['category_id'])} is not the id of a category\n"
                f"expected one of {first_names([brief(number) for number in sorted(categories)], 10)}\n"
                "add it to `categories`, or correct the annotation"
            )
        image = images.get(_key(where, entry, "image_id"))
        if image is None:
            elsewhere += 1
        else:
            region = Region(entry["id"], category, bool(entry.get("iscrowd")), entry["segmentation"])
            regions[image[0]].append(region)
    if elsewhere and not any(regions.values()):
        known = first_names([brief(number) for number in images])
        expected = f"expected image_id to be the id of an image: {known}"
        raise DataError(f"{file}: no annotation belongs to an image\n{expected}")
    return Content(categories, groups, sizes, regions)


class FileIds(NamedTuple):
    """Ids in a COCO-format file, by the images' file names and the categories' names."""

    images: dict[str, int]
    categories: dict[str, int]


def read_ids(file: Path) -> FileIds:
    """The ids in a COCO-format file, whose annotations are not read. Raises DataError as `read_annotations` does, for
    ids of images that are not whole numbers, and for two categories of one name.
    """
    document = read_document(file)
    categories, _ = _categories(file, document)
    names = {name: number for number, name in categories.items()}
    if len(names) < len(categories):
        twice = next(name for number, name in categories.items() if names[name] != number)
        raise DataError(f"{file}: two categories are called {brief(twice)}\nexpected a name for each\nrename one")
    images = {}
    for number, (name, _) in _images(file, document).items():
        if type(number) is not int:
            raise DataError(f"{file}: images: an id is {brief(number)}\nexpected whole numbers, as pycocotools reads")
        images[name] = number
    return FileIds(images, names)


def read_document(
    file: Path, kind: str = "COCO-format file", content: str = "images, annotations and categories"
) -> dict[str, Any]:
    """The JSON object in a file; its content is not checked. Raises DataError where the file is missing, cut off, or
    holds something other than an object.

    kind, content: what the file is and what it holds, for messages.
    """
    try:
        text = read_file(file, LARGEST)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file\nexpected a {kind}\ncheck data.root and annotations") from None
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        # A file that is cut off fails at its end; a file with a mistake can fail anywhere.
        end = len(error.doc.rstrip())
        what = "is cut off" if error.pos >= end - 1 or error.msg.startswith("Unterminated") else "is not JSON"
        raise DataError(
            f"{file}: {what}: {error.msg}, line {error.lineno}, after {error.pos} of {end} characters\n"
            f"expected a whole {kind}\ncopy or export it again"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not JSON: not UTF-8 text ({error.reason})\nexpected a {kind}") from None
    except (RecursionError, ValueError):  # a number of thousands of digits
        raise DataError(f"{file}: lists are nested too deeply, or a number is too long\nexpected a {kind}") from None
    if not isinstance(document, dict):
        raise DataError(
            f"{file}: a JSON {type(document).__name__}, not an object\n"
            f"expected an object with {content}\n"
            "files with a list hold predictions; use the labels, in a file such as instances_*.json or stuff_*.json"
        )
    return document


def _entries(file: Path, document: dict[str, Any], section: str, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The entries of a list of the file, each with its place for a message: the file, the list and the entry's id."""
    entries = document.get(section)
    if not isinstance(entries, list):
        what = "is missing" if entries is None else f"is {type(entries).__name__}, not a list"
        raise DataError(
            f"{file}: `{section}` {what}\nexpected an object with images, annotations and categories\n"
            "files with only captions or image names hold no labels"
        )
    if not entries:
        raise DataError(f"{file}: `{section}` is empty\nexpected at least one entry")
    for number, entry in enumerate(entries):
        absent = [key for key in keys if key not in entry] if isinstance(entry, dict) else list(keys)
        if absent:
            # The id that the annotation tool gave is easier to find than the entry's number in the file.
            name = f"id {_id(entry['id'])}" if isinstance(entry, dict) and "id" in entry else f"entry {number}"
            raise DataError(
                f"{file}: {section}, {name}: {', '.join(absent)} missing\nexpected the keys {', '.join(keys)}\n"
                "export the file again from the tool that made it, or add the keys"
            )
        yield f"{file}: {section}, id {_id(entry['id'])}", entry


def _id(value: Any) -> str:
    """An id for messages: mostly a number or a short text, which has no quotes then."""
    plain = (type(value) is int and abs(value) < 1 << 63) or (isinstance(value, str) and len(value) <= 60)
    return printable(str(value)) if plain else brief(value)


def _key(where: str, entry: dict[str, Any], name: str) -> Any:
    """The value of an id. Raises DataError where it is neither a number nor text."""
    if not isinstance(entry[name], int | str):
        raise DataError(f"{where}: {name} is {brief(entry[name])}\nexpected a whole number")
    return entry[name]


def _categories(file: Path, document: dict[str, Any]) -> tuple[dict[int, str], dict[int, str | None]]:
    """Names, and supercategories, by id."""
    categories: dict[int, str] = {}
    groups: dict[int, str | None] = {}
    for where, entry in _entries(file, document, "categories", ("id", "name")):
        if not isinstance(entry["id"], int) or not isinstance(entry["name"], str) or not entry["name"]:
            name = brief(entry["name"])
            raise DataError(f"{where}: its name is {name}\nexpected a whole number as id and text as name")
        if categories.setdefault(entry["id"], entry["name"]) != entry["name"]:
            both = f"{categories[entry['id']]} and {entry['name']}"
            raise DataError(f"{where} is used for {both}\nexpected a different id for each category")
        group = entry.get("supercategory")
        groups[entry["id"]] = group if isinstance(group, str) else None
    return categories, groups


def _images(file: Path, document: dict[str, Any]) -> dict[Any, tuple[str, tuple[int, int]]]:
    """File name and (H, W) by image id."""
    images: dict[Any, tuple[str, tuple[int, int]]] = {}
    names = set()
    for where, entry in _entries(file, document, "images", ("id", "file_name", "height", "width")):
        height, width, name = entry["height"], entry["width"], entry["file_name"]
        if not (type(height) is int and type(width) is int and min(height, width) > 0):
            size = f"width {brief(width)}, height {brief(height)}"
            raise DataError(f"{where}: {size}\nexpected whole numbers of pixels")
        if height * width > MAX_PIXELS:
            size = f"width {brief(width)}, height {brief(height)}"
            raise DataError(f"{where}: {size}\nexpected at most {MAX_PIXELS:,} pixels\nsplit the image")
        if not isinstance(name, str):
            raise DataError(f"{where}: file_name is {brief(name)}\nexpected a path below the folder of images")
        name = name.replace("\\", "/")  # written on Windows: no file that is read has a backslash in its name
        require_below(f"{where}: file_name", name)
        if name in names or _key(where, entry, "id") in images:
            raise DataError(f"{where}: {name}: its id or name is used twice\nexpected one entry an image\nremove one")
        names.add(name)
        images[entry["id"]] = name, (height, width)
    return images


def region_runs(file: Path, region: Region, height: int, width: int, section: str = "annotations") -> np.ndarray:
    """The pixels of a region as run lengths, int64 (R,): pixels outside, inside, outside, …, column after column.

    pycocotools fills the polygons, all of a region together; polygons of fewer than three points have no inside.
    Raises DataError for a segmentation that is not valid or does not fit an image of H×W. `section`: the key of the
    file that its message names.
    """
    where, segmentation = f"{file}: {section}, id {_id(region.id)}", region.segmentation
    if isinstance(segmentation, list) and segmentation:
        polygons = [_polygon(where, polygon, max(height, width)) for polygon in segmentation]
        if sum(map(len, polygons)) * 3 * max(height, width) > LONGEST_OUTLINE:  # otherwise it cannot be too long
            _require_short(where, polygons)
        # pycocotools reads four numbers as a box, and fails without a polygon.
        whole = [points for points in polygons if len(points) >= 6]
        if not whole:
            return run_lengths([height * width])
        return run_lengths(mask_utils.merge(mask_utils.frPyObjects(whole, height, width))["counts"].decode())
    if not isinstance(segmentation, dict):
        shown = "empty" if segmentation == [] else brief(segmentation)
        raise DataError(
            f"{where}: the segmentation is {shown}\nexpected polygons or run lengths\n"
            "a box does not say which pixels belong to the object: outline it, or remove the annotation"
        )
    size, runs = segmentation.get("size"), run_lengths(segmentation.get("counts"))
    if size != [height, width]:
        raise DataError(
            f"{where}: run lengths of size {brief(size)}\nexpected [height, width] of its image, [{height}, {width}]"
        )
    if runs.min(initial=0) < 0 or runs.max(initial=0) > height * width or runs.sum() != height * width:
        found = f"run lengths of {runs.sum()} pixels in total" if len(runs) else "no run lengths"
        raise DataError(f"{where}: {found}\nexpected {height * width}, the pixels of {width}x{height}\nexport it again")
    return runs


def _polygon(where: str, points: Any, side: int) -> list[float]:
    """The polygon [x, y, x, y, …]. Raises DataError where it is not one, or lies far outside the image."""
    numbers = isinstance(points, list) and all(type(number) in (int, float) for number in points)
    if not numbers or len(points) % 2:
        found = f"{len(points)} numbers" if numbers else brief(points)
        raise DataError(f"{where}: a polygon of {found}\nexpected a list [x, y, x, y, …]\nexport it again")
    # Numbers near the limits of an integer would crash pycocotools, and with it the process.
    if not all(-side <= number <= 2 * side for number in points):  # also NaN
        found = f"a polygon from {brief(min(points))} to {brief(max(points))}"
        raise DataError(f"{where}: {found}\nexpected pixels of an image whose longer side is {side}\nexport it again")
    return points


def _require_short(where: str, polygons: list[list[float]]) -> None:
    """Raises DataError for polygons of so many pixels of outline that pycocotools would need gigabytes for them."""
    length = 0.0
    for points in polygons:
        corners = np.array(points).reshape(-1, 2)
        length += float(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1, initial=0).sum())
    if length > LONGEST_OUTLINE:
        what = f"polygons of {length:.0f} pixels of outline"
        raise DataError(f"{where}: {what}\nexpected at most {LONGEST_OUTLINE:,}\nsplit the region, or use run lengths")


def run_lengths(counts: Any) -> np.ndarray:
    """Run lengths, int64, of a COCO `counts`: a list of numbers, or compressed text. Empty where it is neither.

    The text has 6 bits a character, offset by 48: five bits of the number, lowest bits first, and one bit that says
    that more characters follow. Bit 16 of a number's last character is its sign. From the fourth number on, the text
    has the difference to the number two before.
    """
    nothing = np.empty(0, np.int64)
    if isinstance(counts, list):
        valid = all(type(count) is int and 0 <= count < 1 << 40 for count in counts)
        return np.array(counts, np.int64) if valid else nothing
    if not isinstance(counts, str) or not counts or not all("0" <= sign <= "o" for sign in (min(counts), max(counts))):
        return nothing
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    last = codes & 32 == 0
    if not last[-1]:
        return nothing
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(starts, np.diff([*starts, len(codes)]))
    if place.max() > 6:  # a number larger than the pixels of any image
        return nothing
    runs = np.add.reduceat((codes & 31) << 5 * place, starts)
    runs -= np.where(codes[last] & 16, np.int64(32) << 5 * place[last], 0)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs
