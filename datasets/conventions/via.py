"""VGG Image Annotator (VIA 1 and 2): JSON files of regions, as annotations or as a whole project.

Regions are polygons, rectangles, circles, ellipses and polylines; a polyline is closed and filled. A later region lies
on an earlier one. The class is the value of the one attribute that regions have.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ssaseg.datasets.base import DataError, brief
from ssaseg.datasets.conventions.base import REST, TABLE, Convention, Item, Options, Source, Tree
from ssaseg.datasets.conventions.hints import keys_of
from ssaseg.datasets.conventions.outlines import (
    MOST_CLASSES,
    Images,
    Point,
    Row,
    ellipse_points,
    fill,
    make_items,
    new_canvas,
    no_image,
    read_lines,
    read_object,
    read_points,
    require_class,
    with_background,
)
from ssaseg.datasets.inspection import image_size
from ssaseg.datasets.pairs import first_names
from ssaseg.files.text import printable

SAMPLE = 50  # JSON files that are looked at to recognise the convention
NUMBERS = {"rect": ("x", "y", "width", "height"), "circle": ("cx", "cy", "r"), "ellipse": ("cx", "cy", "rx", "ry")}
ONLY = "object"  # the class of regions where none has an attribute


class Region(NamedTuple):
    """One region, as the file has it."""

    shape: dict[str, Any]
    attributes: dict[str, str]


class Shapes(NamedTuple):
    """The label of one image."""

    file: Path
    text: str  # JSON of the list of `shape_attributes`
    attributes: tuple[tuple[tuple[str, str], ...], ...]  # of each region


def _files(tree: Tree, most: int | None = None) -> list[PurePosixPath]:
    """VIA's files; with `most`, only among so many of the JSON files, those nearest to the root."""
    files = sorted(tree.by_suffix.get(".json", []), key=lambda file: (len(file.parts), file))[:most]
    return [file for file in files if {"regions", "shape_attributes"} <= keys_of(tree.root / file)]


def recognise(tree: Tree) -> str | None:
    files = _files(tree, SAMPLE)
    return (
        f"{first_names([str(file) for file in files])} with VIA's `regions` and `shape_attributes`" if files else None
    )


def open_source(tree: Tree, options: Options) -> Source:
    images, rows, empty = Images(tree), list[Row](), 0
    for file in _files(tree):
        for name, regions in _images(tree.root / file):
            image = images.find(name, file.parent)
            if image is None:
                raise no_image(tree.root / file, name)
            empty += not regions
            # The split is in the name of the image's folder, or in that of the file or its folders.
            # As text, the shapes take an eighth of the memory.
            text = json.dumps([region.shape for region in regions], separators=(",", ":"))
            attributes = tuple(tuple(region.attributes.items()) for region in regions)
            rows.append(Row(image, Shapes(tree.root / file, text, attributes), file / image.parent.name))
    found = [dict(attributes) for row in rows for attributes in row.label.attributes]
    listed = read_lines(options.table) if options.table else None
    attribute, names = _class_attribute(tree.root, found, listed)
    if listed is not None and attribute is None:
        raise DataError(
            f"{tree.root}: regions have no attribute, so that no name of {options.table} fits\n"
            "expected an attribute whose values are the classes\nset it in VIA, or remove --table: all are one class"
        )
    if listed is not None:
        ids = {name: number for number, name in enumerate(listed)}
        for name in sorted({attributes[str(attribute)] for attributes in found}):
            require_class(f"{tree.root}: attribute {brief(attribute)}", name, ids, options.table)
        names = listed
    classes, rest, about_rest = with_background(names, options, tree.root)
    items, notes = make_items(tree.root, rows, "VIA's JSON files")
    shown = f"the attribute {printable(attribute)}" if attribute else f"regions have no attribute: all are `{ONLY}`"
    notes = [f"classes: {shown}", about_rest, "a later region lies on top, polylines are closed and filled", *notes]
    if empty:
        notes.append(f"images without a region: {empty}; all of their pixels are {classes[rest]}")
    ids = {name: number for number, name in enumerate(classes)}
    return Source(items, classes, Reader(attribute, ids, rest), notes=notes)


def _images(file: Path) -> Iterator[tuple[str, list[Region]]]:
    """File names of images and their regions. Raises DataError for a file that VIA does not write."""
    document = read_object(file, "VIA")
    entries = document.get("_via_img_metadata", document)
    for entry in entries.values() if isinstance(entries, dict) else [None]:
        name = entry.get("filename") if isinstance(entry, dict) else None
        regions = entry.get("regions", []) if isinstance(entry, dict) else None
        regions = list(regions.values()) if isinstance(regions, dict) else regions  # VIA 1
        if not isinstance(name, str) or not isinstance(regions, list):
            raise DataError(f"{file}: an entry is {brief(entry)}\nexpected filename and regions\nexport it again")
        yield name, [_region(file, name, region) for region in regions]


def _region(file: Path, name: str, region: Any) -> Region:
    shape, given = (
        (region.get("shape_attributes"), region.get("region_attributes")) if isinstance(region, dict) else (None, None)
    )
    if not isinstance(shape, dict) or not isinstance(given, dict | None):
        raise DataError(
            f"{file}: {brief(name)}: a region is {brief(region)}\nexpected shape_attributes\nexport it again"
        )
    attributes = {}
    for key, value in (given or {}).items():
        if isinstance(value, dict):  # of checkboxes
            value = ", ".join(sorted(choice for choice, chosen in value.items() if chosen))
        if isinstance(value, str | int | float) and str(value).strip():
            attributes[key] = str(value).strip()
    return Region(shape, attributes)


def _class_attribute(
    root: Path, regions: list[dict[str, str]], listed: list[str] | None
) -> tuple[str | None, list[str]]:
    """The attribute that says the class (None: no region has one), and the classes, sorted. Raises DataError.

    listed: class names that the user gives: of several attributes, the one that has only such values is used.
    """
    values: dict[str, set[str]] = defaultdict(set)
    have: dict[str, int] = defaultdict(int)
    for region in regions:
        for key, value in region.items():
            values[key].add(value)
            have[key] += 1
    if not values:
        return None, [ONLY]
    fitting = [key for key, found in values.items() if found <= set(listed or ())]
    if len(fitting) == 1 and have[fitting[0]] == len(regions):
        return fitting[0], sorted(values[fitting[0]])
    if len(values) > 1:
        shown = [f"{brief(key)} ({len(each)} values, such as {brief(min(each))})" for key, each in values.items()]
        raise DataError(
            f"{root}: regions have {len(values)} attributes: {first_names(shown, 5)}\n"
            "expected one, whose values are the classes\n"
            "give a file with the class names, one a line, with --table; or remove the other attributes in VIA"
        )
    ((key, found),) = values.items()
    if have[key] < len(regions):
        raise DataError(
            f"{root}: {len(regions) - have[key]} of {len(regions)} regions have no value of attribute {brief(key)}\n"
            "expected a class for each region\nset it in VIA, and export again"
        )
    if len(found) > MOST_CLASSES - 1:
        raise DataError(
            f"{root}: the attribute {brief(key)} has {len(found)} values, such as {brief(min(found))}\n"
            f"expected at most {MOST_CLASSES - 1} classes\nis it a number or a remark? Give each region a class"
        )
    return key, sorted(found)


@dataclass(frozen=True)
class Reader:
    """`Source.read`."""

    attribute: str | None
    ids: dict[str, int]
    rest: int

    def __call__(self, item: Item) -> np.ndarray:
        shapes: Shapes = item.label
        size = image_size(item.image, False)  # VIA does not write it
        canvas = new_canvas(size, self.rest)
        for number, (shape, given) in enumerate(zip(json.loads(shapes.text), shapes.attributes, strict=True)):
            name = dict(given)[self.attribute] if self.attribute else ONLY
            where = f"{shapes.file}: {item.image.name}: region {number}"
            fill(canvas, _outline(where, shape, size), self.ids[name])
        return np.asarray(canvas)


def _outline(where: str, shape: dict[str, Any], size: tuple[int, int]) -> list[Point]:
    kind = shape.get("name")
    if kind in ("polygon", "polyline"):
        xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
        same = isinstance(xs, list) and isinstance(ys, list) and len(xs) == len(ys)
        return read_points(where, list(zip(xs, ys, strict=True)) if same else None, size, 3)  # type: ignore[arg-type]
    if not isinstance(kind, str) or kind not in NUMBERS:
        kinds = ", ".join(["polygon", "polyline", *NUMBERS])
        raise DataError(f"{where}: its shape is {brief(kind)}\nexpected one of: {kinds}\ndraw it as a polygon")
    numbers = [shape.get(key) for key in NUMBERS[kind]]
    if not all(type(number) in (int, float) and abs(number) <= 2 * max(size) for number in numbers):  # type: ignore
        raise DataError(
            f"{where}: {kind} with {', '.join(NUMBERS[kind])} = {brief(numbers)}\n"
            f"expected pixels of an image of {size[1]}x{size[0]}\ncorrect or remove it"
        )
    x, y, *sides = (float(number) for number in numbers if number is not None)
    if kind == "rect":
        right, bottom = x + sides[0], y + sides[1]
        return [(x, y), (right, y), (right, bottom), (x, bottom)]
    angle = shape.get("theta", 0.0)
    angle = float(angle) if type(angle) in (int, float) and math.isfinite(angle) else 0.0
    return ellipse_points(x, y, sides[0], sides[-1], angle)


VIA = Convention("via", "VGG Image Annotator (VIA): JSON files of regions", recognise, open_source, TABLE | REST)
