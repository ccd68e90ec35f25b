"""KITTI's semantic benchmark: `image_2` and, beside it, `semantic` with the ids of Cityscapes, 0..33.

`semantic_rgb` has the same in colours, and `instance` has id × 256 + number: neither is read.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import cv2
import numpy as np

from ssaseg.datasets.base import IGNORED, DataError
from ssaseg.datasets.conventions.base import Convention, Item, Options, Source, Tree
from ssaseg.datasets.conventions.downloads import CITYSCAPES_IDS
from ssaseg.datasets.conventions.outlines import Images, Row, make_items, require_size
from ssaseg.datasets.decoding import read_mask
from ssaseg.datasets.labels import label_space

LAST_ID = 33  # of Cityscapes; -1, the licence plate, is 255 in one byte


def _folder(tree: Tree) -> PurePosixPath | None:
    """The folder that holds `image_2` and `semantic`."""
    found = sorted({file.parent.parent for file in tree.by_suffix.get(".png", []) if file.parent.name == "semantic"})
    images = {file.parent for file in tree.files}
    return next((folder for folder in found if folder / "image_2" in images), None)


def recognise(tree: Tree) -> str | None:
    folder = _folder(tree)
    if folder is None:
        return None
    return f"{folder / 'semantic'} beside {folder / 'image_2'}: KITTI's masks, whose ids are those of Cityscapes"


def open_source(tree: Tree, _options: Options) -> Source:
    folder = _folder(tree)
    if folder is None:
        raise DataError(f"{tree.root}: no folders image_2 and semantic\nexpected the folder that has them")
    images = {file.stem: file for file in Images(tree).below(folder / "image_2")}
    masks = [file for file in tree.by_suffix[".png"] if file.parent == folder / "semantic"]
    absent = [mask for mask in masks if mask.stem not in images]
    if absent:
        raise DataError(
            f"{tree.root / absent[0]}: no image of this name in {folder / 'image_2'}, nor for {len(absent) - 1} more\n"
            "expected one image for each mask\nadd the images, or remove the masks"
        )
    rows = [Row(images[mask.stem], tree.root / mask, PurePosixPath("all")) for mask in masks]
    items, notes = make_items(tree.root, rows, "KITTI")
    space = label_space("cityscapes")
    notes = [
        f"masks of {folder / 'semantic'}; semantic_rgb and instance are not read",
        "the 19 classes that Cityscapes trains; its other ids are ignored",
        *notes,
    ]
    palette = [(red, green, blue) for red, green, blue in space.palette]
    return Source(items, list(space.classes), read, palette, notes)


def read(item: Item) -> np.ndarray:
    """`Source.read`."""
    raw = read_mask(item.label).ids
    require_size(item.image, (raw.shape[0], raw.shape[1]), item.label)
    odd = raw[(raw > LAST_ID) & (raw != IGNORED)]
    if odd.size:
        raise DataError(f"{item.label}: id {odd[0]}\nexpected ids of Cityscapes, 0..{LAST_ID}\nuse the folder semantic")
    table = np.full(256, IGNORED, np.uint8)
    table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
    return np.asarray(cv2.LUT(raw, table))


KITTI = Convention("kitti", "KITTI: training/image_2 and training/semantic, ids of Cityscapes", recognise, open_source)
