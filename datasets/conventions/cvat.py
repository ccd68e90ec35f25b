"""CVAT for images 1.1: `annotations.xml` with polygons, masks and boxes.

As in CVAT's own export of segmentation masks, a shape of a higher z_order lies on one of a lower, and if equal the
later one; polylines, points, cuboids, skeletons and tags have no area and are left out. Polygons are filled as
pycocotools fills them.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple
from xml.etree import ElementTree

import numpy as np

from ssaseg.datasets.annotations import Region, region_runs
from ssaseg.datasets.base import DataError, brief
from ssaseg.datasets.conventions.base import REST, Colour, Convention, Item, Options, Source, Tree
from ssaseg.datasets.conventions.outlines import (
    Images,
    Row,
    ellipse_points,
    make_items,
    no_image,
    read_size,
    require_class,
    require_size,
    with_background,
)
from ssaseg.datasets.pairs import first_names
from ssaseg.files.reading import open_file
from ssaseg.files.text import printable

LARGEST_XML = 2**29  # bytes
AREAS = ("polygon", "box", "ellipse", "mask")
NO_AREAS = ("polyline", "points", "cuboid", "skeleton", "tag")
HEAD = 2**16  # bytes of a file that are looked at to recognise the convention


class Shape(NamedTuple):
    """One shape, as the file has it."""

    kind: str
    label: str
    z_order: int
    values: dict[str, str]


@dataclass(frozen=True)
class Drawing:
    """The shapes of one image, from the lowest up."""

    file: Path
    size: tuple[int, int]  # H, W
    shapes: tuple[Shape, ...]


def _files(tree: Tree) -> list[PurePosixPath]:
    found = []
    for file in (
        tree.by_suffix.get(".xml", []) if len(tree.by_suffix.get(".xml", [])) <= 100 else tree.named("annotations.xml")
    ):
        try:
            with open_file(tree.root / file) as stream:
                head = stream.read(HEAD)
        except OSError:
            continue
        if re.search(rb"<annotations>\s*(<version>|<meta>)", head):
            found.append(file)
    return found


def recognise(tree: Tree) -> str | None:
    files = _files(tree)
    return f"{first_names([str(file) for file in files])}: annotations of CVAT" if files else None


def open_source(tree: Tree, options: Options) -> Source:
    images, rows = Images(tree), list[Row]()
    colours: dict[str, Colour | None] = {}
    left_out: Counter[str] = Counter()
    for file in _files(tree):
        for element in _elements(tree.root / file):
            if element.tag == "label":
                name = (element.findtext("name") or "").strip()
                hexadecimal = re.fullmatch("#([0-9A-Fa-f]{6})", (element.findtext("color") or "").strip())
                red, green, blue = bytes.fromhex(hexadecimal[1]) if hexadecimal else b"\0\0\0"
                if name and (element.findtext("type") or "any") not in ("tag", "points", "skeleton"):
                    colours[name] = (red, green, blue) if hexadecimal else None
            else:
                rows.append(_row(tree, images, file, element, left_out))
    used = sorted({shape.label for row in rows for shape in row.label.shapes})
    classes, rest, about_rest = with_background([*colours, *used], options, tree.root)
    items, notes = make_items(tree.root, rows, "CVAT's annotations")
    palette = [colours.get(name) or (0, 0, 0) for name in classes]
    distinct = len(set(palette)) == len(palette)
    notes = ["class names in the order of CVAT's labels", about_rest, "a shape of a higher z_order lies on top", *notes]
    if left_out:
        notes.append(f"shapes without area, left out: {', '.join(f'{n} {kind}' for kind, n in left_out.items())}")
    ids = {name: number for number, name in enumerate(classes)}
    return Source(items, classes, Reader(ids, rest), palette if distinct else None, notes)


def _elements(file: Path) -> Iterator[ElementTree.Element]:
    """The elements `label` and `image`. Raises DataError for a file that is not whole, or has entities of its own."""
    with open_file(file) as stream:
        yield from _parse(file, Checked(file, stream))


class Checked:
    """A stream of XML that is read once, block by block. Entities can grow without limit: they are refused."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.stream, self.end, self.size = file, stream, b"", 0

    def read(self, count: int = -1) -> bytes:
        """The next block. Raises DataError where it is not what CVAT writes, or the file is too large."""
        block = self.stream.read(count)
        seen, self.end, self.size = self.end + block, block[-16:], self.size + len(block)
        if b"\0" in seen or b"<!DOCTYPE" in seen or b"<!ENTITY" in seen:
            raise DataError(
                f"{self.file}: not UTF-8, or with a DOCTYPE\nexpected the XML file that CVAT exports\nexport it again"
            )
        if self.size > LARGEST_XML:
            most = f"expected at most {LARGEST_XML:,} bytes"
            raise DataError(f"{self.file}: a larger file than CVAT's XML files\n{most}\nexport fewer images at once")
        return block


def _parse(file: Path, stream: Checked) -> Iterator[ElementTree.Element]:
    depth, root = 0, None
    try:
        for event, element in ElementTree.iterparse(stream, ("start", "end")):
            root = element if root is None else root
            depth += 1 if event == "start" else -1
            if depth > 32:
                raise DataError(f"{file}: elements are nested too deeply\nexpected the XML file that CVAT exports")
            if event == "start" and element.tag == "track":
                raise DataError(
                    f"{file}: tracks of a video\nexpected images\nexport the task as `CVAT for images`, with images"
                )
            if event == "end" and element.tag in ("label", "image") and (element.tag == "image" or len(element)):
                yield element
                element.clear()
                if element.tag == "image":  # the root would keep all of them
                    root.clear()
    except ElementTree.ParseError as error:
        reason = printable(str(error))
        raise DataError(
            f"{file}: is not whole XML: {reason}\nexpected the file that CVAT exports\nexport again"
        ) from None


def _row(tree: Tree, images: Images, file: PurePosixPath, element: ElementTree.Element, left_out: Counter[str]) -> Row:
    name = element.get("name") or ""
    subset = (element.get("subset") or "").replace("/", "_")
    near = file.parent / "images"
    image = images.find(name, near / subset) or images.find(name, near) or images.find(name, file.parent)
    if image is None:
        raise no_image(tree.root / file, name)
    where = f"{tree.root / file}: image {brief(name)}"
    sides = [
        int(side) if side.isdecimal() and len(side) < 10 else side
        for side in map(element.get, ("height", "width"))
        if side
    ]
    size = read_size(where, *(sides if len(sides) == 2 else (None, None)))
    shapes = []
    for child in element:
        if child.tag in AREAS:
            order = child.get("z_order") or "0"
            z_order = int(order) if re.fullmatch(r"-?\d{1,9}", order) else 0
            shapes.append(Shape(child.tag, child.get("label") or "", z_order, dict(child.attrib)))
        elif child.tag in NO_AREAS:
            left_out[child.tag] += 1
    drawing = Drawing(tree.root / file, size, tuple(sorted(shapes, key=lambda shape: shape.z_order)))
    return Row(image, drawing, image.parent / subset)


@dataclass(frozen=True)
class Reader:
    """`Source.read`."""

    ids: dict[str, int]
    rest: int

    def __call__(self, item: Item) -> np.ndarray:
        drawing: Drawing = item.label
        height, width = drawing.size
        require_size(item.image, drawing.size, drawing.file)
        canvas = np.full(height * width, self.rest, np.uint8)  # column after column, as in run lengths
        for number, shape in enumerate(drawing.shapes):
            where = f"{drawing.file}: image {brief(item.image.name)}: {shape.kind} {number}"
            train_id = require_class(where, shape.label, self.ids, "CVAT's labels")
            if shape.kind == "mask":
                _paint_mask(canvas.reshape(width, height).T, where, shape.values, train_id)
                continue
            region = Region(f"{shape.kind} {number}", shape.label, False, [_polygon(where, shape)])
            runs = region_runs(drawing.file, region, height, width, f"image {brief(item.image.name)}")
            ends = np.cumsum(runs).tolist()
            for first, end in zip(ends[::2], ends[1::2], strict=False):
                canvas[first:end] = train_id
        return np.ascontiguousarray(canvas.reshape(width, height).T)


def _numbers(where: str, values: dict[str, str], *keys: str) -> list[float]:
    with contextlib.suppress(KeyError, ValueError):
        numbers = [float(values[key]) for key in keys]
        if all(map(math.isfinite, numbers)):
            return numbers
    found = ", ".join(f"{key}={brief(values.get(key))}" for key in keys)
    raise DataError(f"{where}: {found}\nexpected numbers\nexport it again")


def _polygon(where: str, shape: Shape) -> list[float]:
    """The outline [x, y, x, y, …] [pixels]."""
    if shape.kind == "box":
        left, top, right, bottom = _numbers(where, shape.values, "xtl", "ytl", "xbr", "ybr")
        return [left, top, right, top, right, bottom, left, bottom]
    if shape.kind == "ellipse":
        x, y, rx, ry = _numbers(where, shape.values, "cx", "cy", "rx", "ry")
        if not max(abs(x), abs(y), abs(rx), abs(ry)) < 1e6:
            raise DataError(f"{where}: an ellipse far outside the image\nexpected pixels\ncorrect or remove it")
        return [value for point in ellipse_points(x, y, rx, ry) for value in point]
    try:
        return [float(value) for point in shape.values["points"].split(";") for value in point.split(",")]
    except (KeyError, ValueError):
        points = brief(shape.values.get("points"))
        raise DataError(f"{where}: points are {points}\nexpected x,y;x,y;…\nexport it again") from None


def _paint_mask(canvas: np.ndarray, where: str, values: dict[str, str], train_id: int) -> None:
    """Paints a mask: run lengths in a box, row after row, the first of pixels outside the mask."""
    left, top, width, height = map(int, _numbers(where, values, "left", "top", "width", "height"))
    inside = left >= 0 and top >= 0 and left + width <= canvas.shape[1] and top + height <= canvas.shape[0]
    text = re.split(r"[,\s]+", values.get("rle", "").strip())
    valid = all(each.isdecimal() and len(each) < 10 for each in text)
    runs = np.array([int(each) for each in text] if valid else [], np.int64)
    if not inside or min(width, height) <= 0 or runs.sum() != width * height:
        raise DataError(
            f"{where}: run lengths of {runs.sum()} pixels in a box of {width}x{height} at {left}, {top}\n"
            f"expected {width * height} pixels, inside {canvas.shape[1]}x{canvas.shape[0]} pixels\nexport it again"
        )
    bits = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    canvas[top : top + height, left : left + width][bits] = train_id


CVAT = Convention("cvat", "CVAT for images: annotations.xml", recognise, open_source, REST)
