"""Supervisely: `meta.json` with the classes, and datasets: folders with `img/NAME.jpg` and `ann/NAME.jpg.json`.

A later object lies on an earlier one. Points of polygons are pixels; a bitmap is a PNG file, compressed by zlib and
written as base64, whose upper left corner is at `origin` (supervisely's documentation of its JSON format).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ssaseg.datasets.base import DataError, brief
from ssaseg.datasets.conventions.base import REST, Colour, Convention, Item, Options, Source, Tree
from ssaseg.datasets.conventions.hints import keys_of
from ssaseg.datasets.conventions.outlines import (
    Images,
    Row,
    decode_bits,
    fill_with_holes,
    make_items,
    new_canvas,
    no_image,
    paste,
    read_object,
    read_points,
    read_size,
    require_class,
    require_size,
    with_background,
)

META = "meta.json"


def recognise(tree: Tree) -> str | None:
    meta = _meta(tree)
    if meta is None or not _annotations(tree):
        return None
    return f"{meta} has Supervisely's classes (`title`, `shape`), and folders `ann` have one JSON file for each image"


def _meta(tree: Tree) -> PurePosixPath | None:
    return next((file for file in tree.named(META) if {"classes", "title"} <= keys_of(tree.root / file)), None)


def _annotations(tree: Tree) -> list[PurePosixPath]:
    return [file for file in tree.by_suffix.get(".json", []) if file.parent.name == "ann"]


def open_source(tree: Tree, options: Options) -> Source:
    meta = _meta(tree)
    if meta is None:
        raise DataError(f"{tree.root}: no meta.json of Supervisely\nexpected the folder that has them")
    names, colours = _read_meta(tree.root / meta)
    classes, rest, about_rest = with_background(names, options, tree.root / meta)
    ids = {name: number for number, name in enumerate(classes)}
    images, rows = Images(tree), []
    for file in _annotations(tree):
        # NAME.jpg.json beside NAME.jpg; in older exports NAME.json. Folders below img/ and ann/ are the same.
        name = file.name.removesuffix(file.suffix)
        folder = file.parent.parent / "img"
        image = images.find(name, folder) or images.beside(folder / file.name)
        if image is None:
            raise no_image(tree.root / file, f"img/{name}")
        rows.append(Row(image, tree.root / file, file.parent.parent))
    items, notes = make_items(tree.root, rows, "Supervisely's datasets")
    palette = _palette(classes, colours)
    notes = [f"class names and colours from {meta}", about_rest, "a later object lies on top", *notes]
    return Source(items, classes, Reader(ids, rest), palette, notes)


def _read_meta(file: Path) -> tuple[list[str], dict[str, Colour]]:
    document = read_object(file, "Supervisely")
    entries, names, colours = document.get("classes"), [], {}
    for entry in entries if isinstance(entries, list) else []:
        title = entry.get("title") if isinstance(entry, dict) else None
        if not isinstance(title, str) or not title:
            raise DataError(f"{file}: classes: a title is {brief(title)}\nexpected a class name\nexport it again")
        names.append(title)
        colour = entry.get("color")
        if isinstance(colour, str) and re.fullmatch("#[0-9A-Fa-f]{6}", colour):
            red, green, blue = bytes.fromhex(colour[1:])
            colours[title] = (red, green, blue)
    if not names:
        raise DataError(f"{file}: `classes` has no class\nexpected a list of objects with `title`\nexport it again")
    return names, colours


def _palette(classes: list[str], colours: dict[str, Colour]) -> list[Colour] | None:
    """The colours of the classes, black for the added background; None where they are unknown or not distinct."""
    palette = [colours.get(name, (0, 0, 0)) for name in classes]
    return palette if len(set(palette)) == len(classes) <= 256 else None


@dataclass(frozen=True)
class Reader:
    """`Source.read`."""

    ids: dict[str, int]
    rest: int

    def __call__(self, item: Item) -> np.ndarray:
        file: Path = item.label
        document = read_object(file, "Supervisely")
        stated = document.get("size")
        stated = stated if isinstance(stated, dict) else {}
        size = read_size(file, stated.get("height"), stated.get("width"))
        require_size(item.image, size, file)
        canvas = new_canvas(size, self.rest)
        objects = document.get("objects")
        if not isinstance(objects, list):
            raise DataError(f"{file}: `objects` is {brief(objects)}\nexpected a list\nexport it again")
        for number, entry in enumerate(objects):
            entry = entry if isinstance(entry, dict) else {}
            where = f"{file}: object {number}"
            train_id = require_class(where, entry.get("classTitle"), self.ids, META)
            _paint(canvas, where, entry, size, train_id)
        return np.asarray(canvas)


def _paint(canvas: Image.Image, where: str, entry: dict[str, Any], size: tuple[int, int], train_id: int) -> None:
    kind = entry.get("geometryType")
    if kind == "bitmap":
        bitmap = entry.get("bitmap")
        bitmap = bitmap if isinstance(bitmap, dict) else {}
        ((left, top),) = read_points(where, [bitmap.get("origin")], size)
        paste(canvas, decode_bits(where, bitmap.get("data"), size, compressed=True), (int(left), int(top)), train_id)
        return
    if kind not in ("polygon", "rectangle"):
        raise DataError(
            f"{where}: its geometryType is {brief(kind)}\nexpected polygon, bitmap or rectangle\n"
            "other shapes have no area: remove them, or draw them as polygons"
        )
    points = entry.get("points")
    points = points if isinstance(points, dict) else {}
    outside = read_points(where, points.get("exterior"), size, 2 if kind == "rectangle" else 3)
    if kind == "rectangle":
        (left, right), (top, bottom) = ((min(values), max(values)) for values in zip(*outside, strict=True))
        ImageDraw.Draw(canvas).rectangle((left, top, right, bottom), fill=train_id)
        return
    inside = points.get("interior") or []
    holes = [read_points(where, hole, size, 3) for hole in (inside if isinstance(inside, list) else [inside])]
    fill_with_holes(canvas, outside, holes, train_id)


SUPERVISELY = Convention(
    "supervisely", "Supervisely: meta.json, DATASET/img and DATASET/ann/NAME.jpg.json", recognise, open_source, REST
)
