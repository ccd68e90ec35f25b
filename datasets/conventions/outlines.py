"""What conventions of outlines share: their JSON files, the images these name, splits, and the painting of shapes.

Outlines are filled as Pillow's `ImageDraw.polygon(fill, outline)` does, edges included: this is labelme's own rule, and
within one pixel of an edge that of the other tools.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

import base64
import binascii
import math
import os
import posixpath
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence, Set
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ssaseg.datasets.base import DataError, brief
from ssaseg.datasets.conventions.base import Item, Options, Tree
from ssaseg.datasets.decoding import MAX_PIXELS, open_image
from ssaseg.datasets.inspection import image_size
from ssaseg.datasets.pairlist import choose_splits, split_of_path
from ssaseg.datasets.pairs import IMAGE_SUFFIXES, first_names
from ssaseg.files.reading import read_text
from ssaseg.files.structured import read_json
from ssaseg.files.text import printable

LARGEST_JSON = 2**28  # bytes of a file about one image, which may hold the image itself
MOST_STEPS = 2**31  # points of an outline × rows: Pillow looks at every edge in every row, here for some seconds
MOST_CLASSES = 255  # 255 itself means "ignored"

Point = tuple[float, float]


# ---- files -------------------------------------------------------------------------------------------------------
def read_object(file: Path, kind: str, limit: int = LARGEST_JSON) -> dict[str, Any]:
    """The JSON object in a file of one annotation tool. Raises DataError where it holds something else, and OSError."""
    try:
        document = read_json(file, limit)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not JSON: not UTF-8 text ({error.reason})\nexpected a file of {kind}") from None
    except ValueError as error:
        reason = printable(str(error))
        raise DataError(f"{file}: is not whole JSON: {reason}\nexpected a file of {kind}\nexport it again") from None
    if not isinstance(document, dict):
        what = f"a JSON {type(document).__name__}, not an object"
        raise DataError(f"{file}: {what}\nexpected a file of {kind}\nexport it again")
    return document


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty, such as class names. Raises DataError and OSError."""
    try:
        lines = read_text(file).splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason})\nexpected class names, one a line") from None
    return [line.strip() for line in lines if line.strip()]


def read_size(where: object, height: object, width: object) -> tuple[int, int]:
    """H and W of an image as a file states them. Raises DataError for what is not a size, and for huge images."""
    sides = [int(side) if isinstance(side, float) and side.is_integer() else side for side in (height, width)]
    if not all(type(side) is int and side > 0 for side in sides):
        size = f"width {brief(width)}, height {brief(height)}"
        raise DataError(f"{where}: {size}\nexpected whole numbers of pixels\nexport it again")
    rows, columns = int(sides[0]), int(sides[1])  # type: ignore[call-overload]
    if rows * columns > MAX_PIXELS:
        size = f"width {columns}, height {rows}"
        raise DataError(f"{where}: {size}\nexpected at most {MAX_PIXELS:,} pixels\nsplit the image")
    return rows, columns


def require_size(image: Path, size: tuple[int, int], file: object) -> None:
    """Raises DataError where an image, as it is shown, has not the size (H, W) that its annotation file states."""
    found = image_size(image, False)
    if found == size:
        return
    fix = "annotate this image, or correct the size in the file; outlines are not scaled"
    if found == (size[1], size[0]):
        fix = "width and height are swapped, as by an EXIF orientation: annotate the image as shown, or remove it"
    raise DataError(
        f"{image}: image of {found[1]}x{found[0]} pixels (width x height)\n"
        f"expected {size[1]}x{size[0]}, as in {file}\n{fix}"
    )


# ---- images and splits -------------------------------------------------------------------------------------------
class Row(NamedTuple):
    """An image and what its label is read from, before its split and name are known."""

    image: PurePosixPath  # below the root
    label: Any
    hint: PurePosixPath  # path whose words say the split: the folder of the image, or its annotation file


class Images:
    """The images below a root, found by the names that annotation files give them."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    @cached_property
    def _known(self) -> set[PurePosixPath]:
        return {file for file in self.tree.files if file.suffix.lower() in IMAGE_SUFFIXES}

    @cached_property
    def _by_name(self) -> dict[str, list[PurePosixPath]]:
        groups: dict[str, list[PurePosixPath]] = defaultdict(list)
        for file in sorted(self._known):
            groups[file.name].append(file)
        return groups

    def find(self, name: str, near: PurePosixPath, apart: Set[PurePosixPath] = frozenset()) -> PurePosixPath | None:
        """The image that a file in the folder `near` calls `name`; None where there is none, or no single best one.
        Files in `apart` are not images.

        The name may be a path of another machine, with backslashes: the image is the one with most of its last parts;
        of several such images, that which shares most folders with `near`. An image of another split is not taken, and
        nothing outside the root is found.
        """
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        if not parts:
            return None
        beside = PurePosixPath(posixpath.normpath((near / "/".join(parts)).as_posix()))
        if beside in self._known and beside not in apart:
            return beside
        said = split_of_path(PurePosixPath(*parts[:-1]))

        def fit(file: PurePosixPath) -> tuple[int, int]:
            ends = zip(reversed(file.parts), reversed(parts), strict=False)
            return _equal(ends), _equal(zip(file.parts[:-1], near.parts, strict=False))

        files = [file for file in self._by_name.get(parts[-1], []) if file not in apart]
        files = [file for file in files if not said or split_of_path(file.parent) in (None, said)]
        best = max(map(fit, files), default=None)
        found = [file for file in files if fit(file) == best]
        return found[0] if len(found) == 1 else None

    def beside(self, file: PurePosixPath) -> PurePosixPath | None:
        """The image with the name of a file, except for the suffix, in its folder."""
        for suffix in IMAGE_SUFFIXES:
            for name in (file.with_suffix(suffix), file.with_suffix(suffix.upper())):
                if name in self._known:
                    return name
        return None

    def below(self, folder: PurePosixPath) -> list[PurePosixPath]:
        """All images below a folder, sorted."""
        return sorted(file for file in self._known if file.is_relative_to(folder))


def _equal(pairs: Iterable[tuple[str, str]]) -> int:
    """How many pairs are equal before the first that is not."""
    count = 0
    for one, other in pairs:
        if one != other:
            break
        count += 1
    return count


def make_items(root: Path, rows: Sequence[Row], what: str) -> tuple[list[Item], list[str]]:
    """Items by split, sorted, with names below the folder that the images of a split share; and notes about splits.

    Without a training and a validation split all images are "all". Test images are for validation where no others are;
    otherwise they, and images of no split, are left out. Raises DataError where there is none or two have one name.
    """
    if not rows:
        raise DataError(f"{root}: no image of {what} was found\nexpected images with annotations\nadd the images")
    groups: dict[str | None, list[Row]] = defaultdict(list)
    for row in rows:
        groups[split_of_path(row.hint)].append(row)
    notes: list[str] = []
    chosen = {"all": list(rows)}
    if splits := choose_splits(groups):
        names, notes = splits
        chosen = {split: groups.pop(name) for split, name in names.items()}
        for split, others in groups.items():
            notes.append(f"images of the {split} split" if split else "images in no split")
            notes[-1] += f", not converted: {len(others)}"
    items = []
    for split, members in chosen.items():
        shared = PurePosixPath(os.path.commonpath([str("/" / row.image.parent) for row in members]))
        taken: dict[str, PurePosixPath] = {}
        for row in sorted(members, key=lambda row: row.image):
            name = ("/" / row.image).relative_to(shared).with_suffix("").as_posix()
            if name in taken:
                raise DataError(
                    f"{root / taken[name]} and {root / row.image}: two annotated images with the same name, or one "
                    "that is annotated twice\nexpected one annotation for each name\nrename or remove one"
                )
            taken[name] = row.image
            items.append(Item(split, name, root / row.image, row.label))
    return items, notes


def no_image(file: Path, name: object) -> DataError:
    """The error for an image that an annotation file names, but that is not below the root."""
    shown = brief(name)
    return DataError(
        f"{file}: its image {shown} was not found, or more than one fits\n"
        "expected the image below the folder --source\nadd the images, or remove the annotation"
    )


# ---- classes -----------------------------------------------------------------------------------------------------
def with_background(names: Iterable[str], options: Options, where: object) -> tuple[list[str], int, str]:
    """The classes, the train id of the pixels that no outline covers, and a note about them.

    They belong to the class that `options.background` names, else to "background", which is added as the first class
    where `names` do not hold it. Raises DataError for too many classes.
    """
    classes = list(dict.fromkeys(names))
    rest = options.background or "background"
    known = next((name for name in classes if name == rest or (not options.background and name.lower() == rest)), None)
    if known is None:
        classes, known = [rest, *classes], rest
    if len(classes) > MOST_CLASSES:
        raise DataError(
            f"{where}: {len(classes)} classes: {first_names(list(map(printable, classes)))}\n"
            f"expected at most {MOST_CLASSES}\nmerge classes"
        )
    note = f"pixels in no outline are class {classes.index(known)}, {known}: --background NAME gives another"
    return classes, classes.index(known), note


def require_class(where: object, name: Hashable, ids: dict[Any, int], listed: object) -> int:
    """The train id of a class. Raises DataError where `ids` has no such name."""
    if not isinstance(name, Hashable) or name not in ids:
        known = first_names([printable(str(each)) for each in ids], 8)
        raise DataError(f"{where}: class {brief(name)} is not in {listed}\nexpected one of: {known}\nadd it there")
    return ids[name]


# ---- painting ----------------------------------------------------------------------------------------------------
def new_canvas(size: tuple[int, int], rest: int) -> Image.Image:
    """A canvas of one byte a pixel for an image of (H, W), all of it `rest`."""
    return Image.new("L", (size[1], size[0]), rest)


def read_points(where: object, points: Any, size: tuple[int, int], least: int = 1) -> list[Point]:
    """The points [[x, y], …] [pixels] of an outline in an image of (H, W). Raises DataError where they are not such,
    are fewer than `least` or very many, or lie far outside the image.
    """
    pairs = isinstance(points, list) and all(
        isinstance(point, list | tuple) and len(point) == 2 and all(type(value) in (int, float) for value in point)
        for point in points
    )
    if not pairs or len(points) < least:
        found = f"an outline of {len(points)} points" if pairs else f"an outline {brief(points)}"
        raise DataError(f"{where}: {found}\nexpected at least {least} points [x, y]\ncorrect or remove it")
    side = max(size)
    odd = next((value for point in points for value in point if not -side <= value <= 2 * side), None)  # also NaN
    if odd is not None:
        raise DataError(
            f"{where}: a point at {brief(odd)}\nexpected pixels of an image of {size[1]}x{size[0]}\nexport it again"
        )
    if len(points) * size[0] > MOST_STEPS:
        most = f"expected at most {MOST_STEPS // size[0]:,} for an image of {size[0]} rows"
        raise DataError(f"{where}: an outline of {len(points):,} points\n{most}\nsimplify the outline")
    return [(x, y) for x, y in points]


def fill(canvas: Image.Image, points: Sequence[Point], train_id: int) -> None:
    """Fills an outline on the canvas; outlines of one or two points are dots and lines."""
    ImageDraw.Draw(canvas).polygon(list(points), fill=train_id, outline=train_id)


def fill_with_holes(
    canvas: Image.Image, points: Sequence[Point], holes: Sequence[Sequence[Point]], train_id: int
) -> None:
    """Fills an outline except its holes; the edges of holes are not filled."""
    if not holes:
        fill(canvas, points, train_id)
        return
    stencil, corner = stencil_of(points, canvas.size)
    for hole in holes:
        fill(stencil, [(x - corner[0], y - corner[1]) for x, y in hole], 0)
    canvas.paste(train_id, corner, stencil)


def stencil_of(points: Sequence[Point], size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """A filled outline as a picture that is 255 inside, only as large as the part of it in an image of (W, H); and the
    place (x, y) of its upper left corner.
    """
    (left, right), (top, bottom) = (
        (max(math.floor(min(values)), 0), min(math.ceil(max(values)) + 1, most))
        for values, most in zip(zip(*points, strict=True), size, strict=True)
    )
    stencil = Image.new("L", (max(right - left, 1), max(bottom - top, 1)), 0)
    fill(stencil, [(x - left, y - top) for x, y in points], 255)
    return stencil, (left, top)


def ellipse_points(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> list[Point]:
    """An ellipse as an outline of 360 points. angle: of the first radius, in the direction from x to y [radians]."""
    turns = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    along, across = rx * np.cos(turns), ry * np.sin(turns)
    xs = x + along * math.cos(angle) - across * math.sin(angle)
    ys = y + along * math.sin(angle) + across * math.cos(angle)
    return list(zip(np.rint(xs).tolist(), np.rint(ys).tolist(), strict=True))


def decode_bits(where: object, text: Any, size: tuple[int, int], compressed: bool) -> np.ndarray:
    """The picture of a mask that a JSON file holds as base64 of a PNG file, bool (h, w).

    size: (H, W) of the image, which the picture must not exceed: it is checked before pixels are decoded.
    compressed: whether zlib has compressed the file once more. Raises DataError.
    """

    def wrong(reason: str) -> DataError:
        return DataError(f"{where}: its bitmap {reason}\nexpected a PNG file in base64\nexport it again")

    most = 4 * size[0] * size[1] + 2**16  # bytes of a PNG file that is not compressed at all, with four channels
    if not isinstance(text, str) or len(text) > 2 * most:
        raise wrong(f"is {brief(text)[:20]}" if not isinstance(text, str) else "is larger than its image")
    try:
        data = base64.b64decode(text, validate=False)
        if compressed and not data.startswith(b"\x89PNG"):
            data = zlib.decompressobj().decompress(data, most)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise wrong(f"is damaged ({error})") from None
    if not data.startswith(b"\x89PNG"):
        raise wrong("is not a PNG file")
    try:
        with open_image(data) as picture:
            if picture.width > size[1] or picture.height > size[0]:
                raise wrong(f"has {picture.width}x{picture.height} pixels, its image {size[1]}x{size[0]}")
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                return np.asarray(picture.convert("RGBA"))[..., 3] > 0
            if picture.mode not in ("1", "L", "P", "I;16", "I"):
                raise wrong(f"has colours (mode {picture.mode})")
            return np.asarray(picture) > 0
    except DataError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise ten types for damaged files
        raise wrong(f"is damaged ({printable(str(error) or type(error).__name__)})") from None


def paste(canvas: Image.Image, bits: np.ndarray, place: tuple[int, int], train_id: int) -> None:
    """Paints the true pixels of `bits` (h, w), whose upper left corner is at `place` (x, y), and may lie outside."""
    canvas.paste(train_id, place, Image.fromarray(bits.astype(np.uint8) * 255))
