"""labelme: one JSON file for each image, with `shapes`. Painted as labelme's own converters to VOC paint.

A later shape lies on an earlier one. Pixels in no shape are `_background_`; shapes `__ignore__` are ignored, as in the
files labels.txt of its examples. (labelme 5: `utils/shape.py` and `examples/semantic_segmentation/labelme2voc.py`.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ssaseg.datasets.base import IGNORED, DataError, brief
from ssaseg.datasets.conventions.base import REST, TABLE, Convention, Item, Options, Source, Tree
from ssaseg.datasets.conventions.hints import keys_of
from ssaseg.datasets.conventions.outlines import (
    Images,
    Row,
    decode_bits,
    fill,
    make_items,
    new_canvas,
    no_image,
    paste,
    read_lines,
    read_object,
    read_points,
    read_size,
    require_class,
    require_size,
    with_background,
)
from ssaseg.datasets.conventions.pictures import look_at_all
from ssaseg.datasets.inspection import image_size

IGNORE, BACKGROUND = "__ignore__", "_background_"
LINE_WIDTH, POINT_RADIUS = 10, 5  # [pixels], of labelme's lines and points
SAMPLE = 20  # JSON files that are looked at to recognise the convention
# By type of shape: the number of points it must have, and whether more are allowed.
POINTS = {"polygon": 3, "rotation": 3, "rectangle": 2, "circle": 2, "line": 2, "linestrip": 2, "point": 1, "mask": 2}
OPEN_ENDED = ("polygon", "rotation", "linestrip")


def _is_labelme(file: Path) -> bool:
    return {"shapes", "imagePath"} <= keys_of(file)


def _files(tree: Tree) -> list[PurePosixPath]:
    """JSON files, those beside an image of the same name first, then those nearest to the root."""
    images = {image.with_suffix("") for image in Images(tree).below(PurePosixPath())}
    files = tree.by_suffix.get(".json", [])
    return sorted(files, key=lambda file: (file.with_suffix("") not in images, len(file.parts), file))


def recognise(tree: Tree) -> str | None:
    files = _files(tree)
    found = next((file for file in files[:SAMPLE] if _is_labelme(tree.root / file)), None)
    return f"{found} has labelme's keys `shapes` and `imagePath`" if found else None


def open_source(tree: Tree, options: Options) -> Source:
    images, rows, names, others = Images(tree), list[Row](), set[str](), 0
    files = tree.by_suffix.get(".json", [])
    for file, found in zip(files, look_at_all([tree.root / each for each in files], _summary), strict=True):
        if isinstance(found, Exception):
            raise found
        if found is None:
            others += 1
            continue
        image = _image(tree, images, file, found)
        rows.append(Row(image, tree.root / file, image.parent))
        names |= found.labels
    listed = next(tree.named("labels.txt"), None)
    if options.table or listed:
        table = options.table or tree.root / str(listed)
        order = read_lines(table)
        note = f"class names in the order of {table.name}"
    else:
        table, order, note = tree.root, sorted(names), "class names in alphabetical order: no labels.txt was found"
    order = [name for name in order if name not in (IGNORE, BACKGROUND)]
    classes, rest, about_rest = with_background(order, options, table)
    ids = {name: number for number, name in enumerate(classes)} | {IGNORE: IGNORED, BACKGROUND: rest}
    for name in sorted(names):
        require_class(f"{tree.root}: shapes", name, ids, table)
    items, notes = make_items(tree.root, rows, "labelme's JSON files")
    used = {tree.root / row.image for row in rows}
    without = [each for each in images.below(PurePosixPath()) if tree.root / each not in used]
    if without:
        notes.append(f"images without a JSON file, not converted: {len(without)} (such as {without[0]})")
    if others:
        notes.append(f"JSON files without `shapes`, not used: {others}")
    return Source(items, classes, Reader(ids, rest), notes=[note, about_rest, "a later shape lies on top", *notes])


class Summary(NamedTuple):
    """What is kept of a file, which may hold a whole image."""

    image: Any  # `imagePath`
    inside: bool  # whether the image is in the file
    labels: frozenset[str]


def _summary(file: Path) -> Summary | None:
    """None for a file without shapes. Raises DataError and OSError."""
    document = read_object(file, "labelme")
    if not isinstance(document.get("shapes"), list):
        return None
    labels = frozenset(shape["label"] for shape in _shapes(file, document))
    return Summary(document.get("imagePath"), isinstance(document.get("imageData"), str), labels)


def _image(tree: Tree, images: Images, file: PurePosixPath, summary: Summary) -> PurePosixPath:
    name = summary.image
    found = images.find(name, file.parent) if isinstance(name, str) else None
    found = found or images.beside(file)
    if found is None and summary.inside:
        raise DataError(
            f"{tree.root / file}: its image {brief(name)} is only inside the file, as imageData\n"
            "expected an image file beside it\nwrite it with `labelme_export_json FILE.json`, or copy it there"
        )
    if found is None:
        raise no_image(tree.root / file, name)
    return found


def _shapes(file: Path, document: dict[str, Any]) -> list[dict[str, Any]]:
    """The shapes of a file; each is an object with a label that is text."""
    shapes: list[dict[str, Any]] = document["shapes"]
    for number, shape in enumerate(shapes):
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label:
            raise DataError(
                f"{file}: shape {number}: its label is {brief(label)}\nexpected a class name\nlabel it, or remove it"
            )
    return shapes


@dataclass(frozen=True)
class Reader:
    """`Source.read`."""

    ids: dict[str, int]
    rest: int

    def __call__(self, item: Item) -> np.ndarray:
        file: Path = item.label
        document = read_object(file, "labelme")
        height, width = document.get("imageHeight"), document.get("imageWidth")
        # Older files do not state the size.
        size = read_size(file, height, width) if height is not None or width is not None else None
        if size is None:
            size = image_size(item.image, False)
        else:
            require_size(item.image, size, file)
        canvas = new_canvas(size, self.rest)
        for number, shape in enumerate(_shapes(file, document)):
            where = f"{file}: shape {number} ({brief(shape['label'])})"
            train_id = require_class(where, shape["label"], self.ids, "the class names")
            _paint(canvas, where, shape, size, train_id)
        return np.asarray(canvas)


def _paint(canvas: Image.Image, where: str, shape: dict[str, Any], size: tuple[int, int], train_id: int) -> None:
    kind = shape.get("shape_type") or "polygon"
    if not isinstance(kind, str) or kind not in POINTS:
        raise DataError(
            f"{where}: shape_type is {brief(kind)}\nexpected one of: {', '.join(POINTS)}\ndraw it as a polygon"
        )
    points = read_points(where, shape.get("points"), size, POINTS[kind])
    if len(points) > POINTS[kind] and kind not in OPEN_ENDED and not (kind == "rectangle" and len(points) == 4):
        raise DataError(f"{where}: a {kind} of {len(points)} points\nexpected {POINTS[kind]}\nexport it again")
    draw = ImageDraw.Draw(canvas)
    if kind in ("polygon", "rotation"):
        fill(canvas, points, train_id)
    elif kind == "rectangle":  # with two corners, or all four
        (left, right), (top, bottom) = ((min(values), max(values)) for values in zip(*points, strict=True))
        draw.rectangle((left, top, right, bottom), fill=train_id, outline=train_id)
    elif kind == "circle":
        (x, y), other = points
        _disc(draw, x, y, math.dist((x, y), other), train_id)
    elif kind == "point":
        _disc(draw, *points[0], POINT_RADIUS, train_id)
    elif kind == "mask":
        (left, top), (right, bottom) = ((int(x), int(y)) for x, y in points)
        bits = decode_bits(where, shape.get("mask"), size, compressed=False)
        if bits.shape != (bottom - top + 1, right - left + 1):
            found = f"a mask of {bits.shape[1]}x{bits.shape[0]} pixels"
            box = f"{right - left + 1}x{bottom - top + 1}"
            raise DataError(f"{where}: {found}\nexpected {box}, as its two points say\nexport it again")
        paste(canvas, bits, (left, top), train_id)
    else:
        draw.line(points, fill=train_id, width=LINE_WIDTH)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, train_id: int) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=train_id, outline=train_id)


LABELME = Convention("labelme", "labelme: one JSON file of shapes for each image", recognise, open_source, TABLE | REST)
