"""YOLO segmentation: `data.yaml` with class names and folders, and one text file of outlines for each image.

A line is the class number and x y x y …, as shares of the width and height. The text file of an image is beside it, or
where the last `images` of its path is `labels`. As in Ultralytics' loader, an image without text file, or with an empty
one, is all background; a coordinate is the pixel that holds the point; and a smaller region lies on a larger one.
Classes are the background, then the names of data.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from ssaseg.datasets.base import DataError, brief
from ssaseg.datasets.classnames.documents import parse_yaml
from ssaseg.datasets.conventions.base import REST, TABLE, Convention, Item, Options, Source, Tree, prepare_command
from ssaseg.datasets.conventions.outlines import (
    Images,
    Row,
    fill,
    make_items,
    new_canvas,
    read_lines,
    read_points,
    stencil_of,
    with_background,
)
from ssaseg.datasets.inspection import image_size
from ssaseg.datasets.pairlist import SPLITS, split_of_path
from ssaseg.datasets.pairs import first_names
from ssaseg.files.reading import read_text
from ssaseg.files.text import printable

LARGEST_YAML, LARGEST_TEXT = 2**18, 2**26  # bytes
MOST_CLASSES = 254  # beside the background
SAMPLE = 30  # text files that are looked at to recognise the convention
OUTSIDE = 0.05  # shares of the image that a coordinate may be outside of it: it is moved to the edge
# Files have six digits: 45.99997 is the pixel 46, not 45.
ROUNDING = 0.01  # [pixels]


# ---- data.yaml ---------------------------------------------------------------------------------------------------
def _configuration(tree: Tree) -> tuple[PurePosixPath, dict[str, Any]] | None:
    """The YAML file with class names, and its content: all values are text. None where there is none."""
    files = sorted(tree.by_suffix.get(".yaml", []) + tree.by_suffix.get(".yml", []), key=lambda file: len(file.parts))
    for file in files[:SAMPLE]:
        try:
            # The base loader makes text of all scalars: `no` is a class name.
            content = parse_yaml(read_text(tree.root / file, LARGEST_YAML), yaml.BaseLoader)
        except (OSError, ValueError):
            continue
        if (
            isinstance(content, dict) and "masks_dir" in content
        ):  # Ultralytics' key for PNG masks: there are no outlines
            continue
        if isinstance(content, dict) and content.get("names") and {"nc", "path", *SPLITS} & set(content):
            return file, content
    return None


def _class_names(where: Path, given: Any) -> list[str]:
    """The names by class number: a list, or a mapping from numbers. Raises DataError."""
    if isinstance(given, dict):
        numbers = sorted((int(key), value) for key, value in given.items() if str(key).isdecimal() and len(key) < 6)
        if [number for number, _ in numbers] != list(range(len(given))):
            found = first_names([printable(str(key)) for key in given], 8)
            raise DataError(
                f"{where}: names has the keys {found}\nexpected 0, 1, 2, … without gaps\nnumber all classes"
            )
        given = [value for _, value in numbers]
    names = [each.strip() if isinstance(each, str) else "" for each in given] if isinstance(given, list) else []
    if not names or not all(names):
        raise DataError(f"{where}: names is {brief(given)}\nexpected a list of class names\nname all classes")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: names has {brief(twice)} twice\nexpected each name once\nrename one")
    if len(names) > MOST_CLASSES:
        raise DataError(f"{where}: {len(names)} names\nexpected at most {MOST_CLASSES}\nmerge classes")
    return names


def _folders(
    tree: Tree, file: PurePosixPath, content: dict[str, Any]
) -> tuple[dict[str, list[PurePosixPath]], list[str]]:
    """For each split the folders of images, or lists of images, that data.yaml names, and notes about missing ones.

    Paths may be of another machine, or begin with `..` as Roboflow's do: the one that has most of the last parts below
    the folder of data.yaml, or below the root, is taken.
    """
    known = {parent for each in tree.files for parent in each.parents} | set(tree.by_suffix.get(".txt", []))
    found: dict[str, list[PurePosixPath]] = {}
    owners: dict[PurePosixPath, tuple[str, str]] = {}
    notes = []
    base = content.get("path")
    for split in SPLITS:
        entries = content.get(split)
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, str) or entry.strip().lower() in ("", "null", "~"):
                continue
            place = _resolve(file.parent, base if isinstance(base, str) else "", entry, known)
            if place is None:
                notes.append(f"{file}: {split}: {printable(entry)} does not exist below {tree.root}")
                continue
            other, text = owners.setdefault(place, (split, entry))
            if other != split and text != entry:
                raise DataError(
                    f"{tree.root / file}: {other} {printable(text)} and {split} {printable(entry)} both fit {place}\n"
                    "expected a folder for each split, below --source\ncorrect the paths in data.yaml"
                )
            found.setdefault(split, []).append(place)
    return found, notes


def _resolve(beside: PurePosixPath, base: str, entry: str, known: set[PurePosixPath]) -> PurePosixPath | None:
    parts = [
        part
        for part in f"{base}/{entry}".replace("\\", "/").split("/")
        if part not in ("", ".", "..") and not part.endswith(":") and "*" not in part
    ]
    for start in range(len(parts)):
        for folder in dict.fromkeys([beside, PurePosixPath()]):
            if folder.joinpath(*parts[start:]) in known:
                return folder.joinpath(*parts[start:])
    return beside if entry.strip() in (".", "./") else None


# ---- images and their text files ---------------------------------------------------------------------------------
def _label_file(image: PurePosixPath) -> PurePosixPath:
    parts = list(image.with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return PurePosixPath(*parts)


def _texts(tree: Tree) -> Iterator[PurePosixPath]:
    """Text files that belong to an image."""
    labels = {_label_file(image) for image in Images(tree).below(PurePosixPath())}
    return (file for file in tree.by_suffix.get(".txt", []) if file in labels)


def _is_outlines(file: Path) -> bool | None:
    """Whether the lines of a text file are outlines (True) or boxes (False); None for an empty and any other file."""
    try:
        lines = [line.split() for line in read_text(file, LARGEST_TEXT).splitlines() if line.strip()]
        if not all(math.isfinite(float(value)) for line in lines[:1] for value in line):
            return None
    except (OSError, ValueError):
        return None
    return None if not lines else any(len(line) > 6 for line in lines)


def _kind(tree: Tree) -> bool | None:
    """Of the first text files that are not empty: whether one has outlines; None where they are not YOLO's."""
    seen: list[bool] = []
    for file in _texts(tree):
        if (kind := _is_outlines(tree.root / file)) is not None:
            seen.append(kind)
        if kind or len(seen) == SAMPLE:
            break
    return any(seen) if seen else None


def _names_file(tree: Tree) -> PurePosixPath | None:
    return next(tree.named("classes.txt", "obj.names"), None)


def recognise(tree: Tree) -> str | None:
    configured = _configuration(tree)
    if configured is None and _names_file(tree) is None:
        return None
    kind = _kind(tree)
    if kind is None:
        return None
    what = "outlines" if kind else "boxes"
    return f"{configured[0] if configured else _names_file(tree)} has class names, and text files of {what} are YOLO's"


def without_names(tree: Tree) -> str | None:
    """What to do where there are text files of outlines, but no class names; None where there are none."""
    if _configuration(tree) is not None or _names_file(tree) is not None or not _kind(tree):
        return None
    first = printable(str(next(file for file in _texts(tree) if _is_outlines(tree.root / file))))
    command = prepare_command("yolo", tree.root, "--table", "classes.txt")
    return f"{first}: outlines of YOLO without class names: write these in classes.txt, one a line, and run `{command}`"


def open_source(tree: Tree, options: Options) -> Source:
    configured = _configuration(tree)
    if configured is not None and "kpt_shape" in configured[1]:
        raise DataError(f"{tree.root / configured[0]}: kpt_shape: these are key points\nexpected outlines of regions")
    if (kind := _kind(tree)) is None or (configured is None and options.table is None and _names_file(tree) is None):
        what = "text files of outlines for its images" if kind is None else "data.yaml, and no classes.txt"
        raise DataError(
            f"{tree.root}: no {what}\nexpected data.yaml, images, and labels/*.txt\nadd them, or use --table"
        )
    if kind is False:
        first = next(file for file in _texts(tree) if _is_outlines(tree.root / file) is False)
        raise DataError(
            f"{tree.root / first}: lines of five numbers: boxes; so are the other text files\n"
            "expected outlines: a class number and at least three points x y\n"
            "a box does not say which pixels belong to an object: export for segmentation, or outline the objects"
        )
    images, notes = Images(tree), list[str]()
    places: dict[str, list[PurePosixPath]] = {}
    if options.table is not None or configured is None:
        source = options.table or tree.root / str(_names_file(tree))
        names = _class_names(source, read_lines(source))
    else:
        source = tree.root / configured[0]
        names = _class_names(source, configured[1]["names"])
    if configured is not None:
        places, notes = _folders(tree, *configured)
    rows = list(_rows(tree, images, places)) or list(_unlisted(tree, images))
    empty = sum(row.label is None for row in rows)
    if empty == len(rows) > 0:
        raise DataError(
            f"{tree.root / rows[0].image}: neither this image nor another has a text file\n"
            f"expected {tree.root / _label_file(rows[0].image)} for the first\nadd the folder labels"
        )
    items, more = make_items(tree.root, rows, "YOLO")
    classes, rest, about_rest = with_background(names, options, source)
    numbers = tuple(classes.index(name) for name in names)
    notes = [
        f"class names from {source.name}",
        about_rest,
        "of regions that overlap, the smaller lies on top",
        *notes,
        *more,
    ]
    if {"val", "test"} <= set(places):
        notes.append("images of the test split are not converted")
    if empty:
        notes.append(f"images without a text file, all background: {empty}")
    return Source(items, classes, Reader(numbers, rest), notes=notes)


def _rows(tree: Tree, images: Images, places: dict[str, list[PurePosixPath]]) -> Iterator[Row]:
    """Images of the splits that data.yaml names."""
    texts = set(tree.by_suffix.get(".txt", []))
    for split, found in places.items():
        if split == "test" and "val" in places:
            continue
        members: dict[PurePosixPath, None] = {}
        for place in found:
            members |= dict.fromkeys(_listed(tree, images, place) if place in texts else images.below(place))
        for image in members:
            label = _label_file(image)
            yield Row(image, tree.root / label if label in texts else None, PurePosixPath(split))


def _listed(tree: Tree, images: Images, file: PurePosixPath) -> Iterator[PurePosixPath]:
    """The images in a list, one path a line."""
    for line in read_lines(tree.root / file):
        image = images.find(line, file.parent)
        if image is None:
            raise DataError(
                f"{tree.root / file}: {brief(line)} was not found, or more than one image fits\n"
                "expected the path of an image below --source\nadd the image, or remove the line"
            )
        yield image


def _unlisted(tree: Tree, images: Images) -> Iterator[Row]:
    """Images in folders that have text files, with splits by the names of folders: no data.yaml says them."""
    texts = set(tree.by_suffix.get(".txt", []))
    folders = {file.parent for file in _texts(tree)}
    for image in images.below(PurePosixPath()):
        label = _label_file(image)
        if label.parent in folders:
            split = split_of_path(image.parent)
            yield Row(image, tree.root / label if label in texts else None, PurePosixPath(split or ""))


# ---- one image ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reader:
    """`Source.read`."""

    numbers: tuple[int, ...]  # class number in the text files -> train id
    rest: int

    def __call__(self, item: Item) -> np.ndarray:
        size = image_size(item.image, False)
        canvas = new_canvas(size, self.rest)
        regions = []
        for where, number, points in _outlines(item.label, size) if item.label is not None else ():
            if number >= len(self.numbers):
                most = f"expected 0..{len(self.numbers) - 1}: data.yaml has {len(self.numbers)} names"
                raise DataError(f"{where}: class {number}\n{most}\ncorrect the line, or add the name")
            regions.append((stencil_of(points, canvas.size)[0].histogram()[255], self.numbers[number], points))
        for _, train_id, points in sorted(regions, key=lambda region: -region[0]):  # if equal, the later on top
            fill(canvas, points, train_id)
        return np.asarray(canvas)


def _outlines(file: Path, size: tuple[int, int]) -> Iterator[tuple[str, int, list[tuple[float, float]]]]:
    """For each line of a text file its place, the class number, and the points [pixels]. Raises DataError."""
    try:
        lines = read_text(file, LARGEST_TEXT).splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason})\nexpected lines of numbers") from None
    for row, line in enumerate(lines, 1):
        words, where = line.split(), f"{file}: line {row}"
        if not words:
            continue
        try:
            number, *values = map(float, words)
        except ValueError:
            raise DataError(f"{where}: {brief(line)}\nexpected numbers: class x y x y …\ncorrect the line") from None
        if len(values) == 4:
            raise DataError(
                f"{where}: five numbers: a box\nexpected an outline: a class number and at least three points x y\n"
                "a box does not say which pixels belong to an object: outline it, or remove the line"
            )
        if len(values) < 6 or len(values) % 2 or not (number >= 0 and number.is_integer()):
            raise DataError(
                f"{where}: {len(words)} numbers, class {brief(words[0])}\n"
                "expected a class number and at least three points x y\ncorrect the line"
            )
        if not all(-OUTSIDE <= value <= 1 + OUTSIDE for value in values):  # also NaN
            raise DataError(
                f"{where}: coordinates from {min(values):.6g} to {max(values):.6g}\n"
                "expected shares of the width and height, 0 to 1\ndivide pixels by the size of the image"
            )
        height, width = size
        points = [
            [
                math.floor(min(max(x, 0.0), 1.0) * width + ROUNDING),
                math.floor(min(max(y, 0.0), 1.0) * height + ROUNDING),
            ]
            for x, y in zip(values[::2], values[1::2], strict=True)
        ]
        yield where, int(number), read_points(where, points, size, 3)


YOLO = Convention(
    "yolo",
    "YOLO segmentation: data.yaml and text files of outlines",
    recognise,
    open_source,
    TABLE | REST,
    explains=True,
)
