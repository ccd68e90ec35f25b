"""COCO panoptic: a JSON file with `segments_info`, and PNG files of segment ids (R + 256 G + 65536 B).

Classes are the categories of all JSON files in the order of their ids. A pixel belongs to the category of its segment,
also where `iscrowd` is 1: a crowd has a class, only its objects are not told apart. Segment id 0 is unlabelled.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ssaseg.datasets.annotations import read_document
from ssaseg.datasets.base import IGNORED, DataError, brief, require_below
from ssaseg.datasets.conventions.base import REST, Convention, Item, Options, Source, Tree
from ssaseg.datasets.conventions.hints import keys_of
from ssaseg.datasets.conventions.outlines import (
    MOST_CLASSES,
    Images,
    Row,
    make_items,
    no_image,
    require_size,
    with_background,
)
from ssaseg.datasets.decoding import open_image, read_complete
from ssaseg.datasets.pairs import first_names
from ssaseg.files.text import printable

KEYS = "images (id, file_name), annotations (image_id, file_name, segments_info) and categories (id, name)"
SAMPLE = 50  # JSON files that are looked at to recognise the convention


def _files(tree: Tree, most: int | None = None) -> list[PurePosixPath]:
    """Panoptic files; with `most`, only among so many of the JSON files, those with "panoptic" in their names first."""
    files = sorted(
        tree.by_suffix.get(".json", []), key=lambda file: ("panoptic" not in file.name, len(file.parts), file)
    )
    return [file for file in files[:most] if {"annotations", "segments_info"} <= keys_of(tree.root / file)]


def recognise(tree: Tree) -> str | None:
    files = _files(tree, SAMPLE)
    if not files or not tree.by_suffix.get(".png"):
        return None
    return f"{first_names([str(file) for file in sorted(files)])} with `segments_info`, and PNG files of segment ids"


def open_source(tree: Tree, options: Options) -> Source:
    images, pngs, rows = Images(tree), Pngs(tree.by_suffix[".png"]), list[Row]()
    categories: dict[int, str] = {}
    for file in sorted(_files(tree)):
        document = read_document(tree.root / file, "COCO panoptic file", KEYS)
        for entry in _entries(tree.root / file, document, "categories", ("id", "name")):
            if type(entry["id"]) is not int or not isinstance(entry["name"], str):
                raise _wrong(tree.root / file, f"a category is {brief(entry)}")
            if categories.setdefault(entry["id"], entry["name"]) != entry["name"]:
                both = f"{brief(categories[entry['id']])} and {brief(entry['name'])}"
                raise DataError(f"{tree.root / file}: category {entry['id']} is {both}\nexpected one name for an id")
        rows += _rows(tree, file, document, images, pngs)
        del document  # of all files, only the segments stay in memory
    names = list(dict.fromkeys(name for _, name in sorted(categories.items())))
    rest, about_rest = IGNORED, "segment id 0 is ignored: --background NAME makes it a class"
    if options.background:
        names, rest, about_rest = with_background(names, options, tree.root)
    if len(names) > MOST_CLASSES:
        raise DataError(f"{tree.root}: {len(names)} categories\nexpected at most {MOST_CLASSES}\nmerge categories")
    ids = {0: rest} | {category + 1: names.index(name) for category, name in categories.items()}
    for row in rows:
        row.label.to_train_ids(ids)
    items, notes = make_items(tree.root, rows, "panoptic JSON files")
    notes = [
        "class names in the order of the category ids",
        about_rest,
        "crowds have the class of their category",
        *notes,
    ]
    return Source(items, names, read, notes=notes)


@dataclass
class Segments:
    """The label of one image."""

    json: Path
    png: Path
    ids: np.ndarray  # int32 (S,)
    classes: np.ndarray  # (S,): category + 1 and 0 for unlabelled, int64; after `to_train_ids` train ids, uint8

    def to_train_ids(self, ids: dict[int, int]) -> None:
        """Puts train ids in the place of categories. Raises DataError for one that no file has."""
        if unknown := sorted(set(self.classes.tolist()) - ids.keys()):
            found = f"segments_info has category_id {unknown[0] - 1}"
            expected = "expected an id of 1 to 16777215 and a category_id of `categories`"
            raise DataError(f"{self.json}: {self.png.name}: {found}\n{expected}\nexport it again")
        self.classes = np.array([ids[value] for value in self.classes.tolist()], np.uint8)


def _rows(
    tree: Tree,
    file: PurePosixPath,
    document: dict[str, Any],
    images: Images,
    pngs: Pngs,
) -> list[Row]:
    where = tree.root / file
    names = {}
    for entry in _entries(where, document, "images", ("id", "file_name")):
        if not isinstance(entry["file_name"], str) or not isinstance(entry["id"], int | str):
            raise _wrong(where, f"an image is {brief(entry)}")
        names[entry["id"]] = entry["file_name"]
    found = []
    for entry in _entries(where, document, "annotations", ("image_id", "file_name", "segments_info")):
        image_id, name = entry["image_id"], entry["file_name"]
        if not isinstance(image_id, int | str) or image_id not in names or not isinstance(name, str):
            raise _wrong(where, f"an annotation has image_id {brief(image_id)} and file_name {brief(name)}")
        found.append((names[image_id], pngs.find(where, file, name), entry["segments_info"]))
    apart = {png for _, png, _ in found}  # with image files of the same names in other folders
    near = file.parent.parent / file.stem.removeprefix("panoptic_")
    rows = []
    for name, png, entries in found:
        image = images.find(name, near, apart)
        if image is None:
            raise no_image(where, name)
        rows.append(Row(image, _segments(where, tree.root / png, entries), file))
    return rows


class Pngs:
    """The PNG files below the root, by name."""

    def __init__(self, files: list[PurePosixPath]) -> None:
        self.files = set(files)
        self.by_name: dict[str, list[PurePosixPath]] = defaultdict(list)
        for file in files:
            self.by_name[file.name].append(file)

    def find(self, where: Path, file: PurePosixPath, name: str) -> PurePosixPath:
        """The PNG file of an annotation: in the folder with the JSON file's name, beside it, or anywhere if only one
        ends in `name`. Raises DataError.
        """
        name = name.replace("\\", "/")
        require_below(f"{where}: file_name", name)
        for folder in (file.with_suffix(""), file.parent):
            if folder / name in self.files:
                return folder / name
        parts = PurePosixPath(name).parts
        found = [path for path in self.by_name.get(parts[-1], []) if path.parts[-len(parts) :] == parts]
        if len(found) != 1:
            what = f"{len(found)} files fit" if found else "no such file"
            fix = f"expected {where.with_suffix('') / name}\nunpack the PNG files there, a folder for each JSON file"
            raise DataError(f"{where}: file_name {brief(name)}: {what}\n{fix}")
        return found[0]


def _segments(where: Path, png: Path, entries: Any) -> Segments:
    found = {0: 0}
    for entry in entries if isinstance(entries, list) else [None]:
        number, category = (entry.get("id"), entry.get("category_id")) if isinstance(entry, dict) else (None, None)
        if (
            type(number) is not int
            or not 0 < number < 1 << 24
            or type(category) is not int
            or not 0 <= category < 1 << 31
        ):
            expected = "expected an id of 1 to 16777215 and a category_id of `categories`"
            raise DataError(f"{where}: {png.name}: segments_info has {brief(entry)}\n{expected}\nexport it again")
        found[number] = category + 1
    return Segments(where, png, np.array(list(found), np.int32), np.array(list(found.values()), np.int64))


def read(item: Item) -> np.ndarray:
    """`Source.read`."""
    segments: Segments = item.label
    data = read_complete(segments.png)
    try:
        with open_image(data) as picture:
            mode = picture.mode
            pixels = np.asarray(picture) if mode in ("RGB", "RGBA") else None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise ten types for damaged files
        reason = printable(str(error) or type(error).__name__)
        raise DataError(f"{segments.png}: damaged: {reason}\nexpected a PNG file\ncopy it again") from None
    if pixels is None:
        raise DataError(
            f"{segments.png}: a PNG file of mode {mode}\nexpected RGB: ids R + 256 G + 65536 B\nexport again"
        )
    require_size(item.image, (pixels.shape[0], pixels.shape[1]), segments.png)
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    numbers = red | green << 8 | blue << 16
    # Of all possible ids: 0 for those that the JSON does not list. Only the pages that are used take memory.
    table = np.zeros(1 << 24, np.uint16)
    table[segments.ids] = segments.classes.astype(np.uint16) + 1
    found = table[numbers]
    if not found.all():
        unknown = numbers[found == 0]
        first, count = int(unknown[0]), int((unknown == unknown[0]).sum())
        raise DataError(
            f"{segments.png}: segment id {first} in {count} pixels is not in segments_info of {segments.json}\n"
            "expected every segment of the PNG file there\nexport the JSON and the PNG files again, together"
        )
    return (found - 1).astype(np.uint8)


def _entries(where: Path, document: dict[str, Any], section: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    entries = document.get(section)
    if not isinstance(entries, list) or not entries:
        raise _wrong(where, f"`{section}` is {brief(entries)}")
    for entry in entries:
        if not isinstance(entry, dict) or not set(keys) <= set(entry):
            raise _wrong(where, f"{section}: {brief(entry)} has not all of {', '.join(keys)}")
    return entries


def _wrong(where: Path, found: str) -> DataError:
    return DataError(f"{where}: {found}\nexpected {KEYS}\nexport it again")


PANOPTIC = Convention(
    "coco_panoptic",
    "COCO panoptic: a JSON file with segments_info, and PNG files of segment ids",
    recognise,
    open_source,
    REST,
)
