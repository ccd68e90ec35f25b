"""Several masks for one image: one for each class or one for each object, told apart by endings or folders.

`000_car.png` and `000_road.png`, `000_m0_00000001.png`, `car/000.png` and `road/000.png`, `000/masks/*.png` as in Data
Science Bowl 2018. The masks of an image are painted from the largest to the smallest, so that the smaller is on top.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ssaseg.datasets.base import DataError
from ssaseg.datasets.checking.storage import THRESHOLD
from ssaseg.datasets.conventions.base import REST, TABLE, Convention, Item, Options, Source, Tree
from ssaseg.datasets.conventions.binary import TOLERANCE
from ssaseg.datasets.conventions.layer_classes import choose_classes
from ssaseg.datasets.conventions.layer_files import are_soft, find_layers
from ssaseg.datasets.conventions.pictures import read_picture
from ssaseg.datasets.pairs import first_names


def recognise(tree: Tree) -> str | None:
    """Several masks for one image. Raises DataError where it is not clear which class each of them has."""
    found = find_layers(tree)
    if found is None:
        return None
    classes = choose_classes(tree.root, found, Options())[0]
    most = max(len(image.layers) for image in found.images)
    return f"up to {most} masks for each image, such as {found.example}; classes: {first_names(classes, 6)}"


def open_source(tree: Tree, options: Options) -> Source:
    """Raises DataError where no image has several masks, or where it is not clear which class each of them has."""
    found = find_layers(tree)
    if found is None:
        raise DataError(
            f"{tree.root}: no image has several masks that show one class or object each\n"
            "expected such as 000_car.png and 000_road.png, or car/000.png and road/000.png\n"
            f"`ssaseg data init {tree.root}` says what the folder holds"
        )
    classes, ids, rule = choose_classes(tree.root, found, options)
    files = [tree.root / file for image in found.images for file, _ in image.layers]
    read = Stack(are_soft(files))
    splits = {image.split for image in found.images}
    items = [
        Item(
            image.split or ("all" if splits == {None} else "train"),
            image.name,
            tree.root / image.file,
            tuple((tree.root / file, ids[label]) for file, label in image.layers),
        )
        for image in found.images
    ]
    notes = [f"{len(files)} masks of {len(items)} images; {rule}; of masks that overlap the smaller is on top"]
    notes.append(f"pixels in no mask: {classes[0]}")
    if found.without:
        notes.append(f"{found.without} images without mask are left out")
    return Source(items, classes, read.read, None, notes)


# ---- pixels ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """Paints the masks of an image. It is sent to worker processes."""

    soft: bool  # whether the masks have soft edges: then the threshold is 128; otherwise all but 0 is the object

    def read(self, item: Item) -> np.ndarray:
        """Train ids uint8 (H, W). Raises DataError where masks have different sizes or several values, and OSError."""
        parts = []
        shape: tuple[int, ...] | None = None
        for file, train_id in item.label:
            shown = self._object(file)
            if shape is not None and shown.shape != shape:
                raise DataError(
                    f"{file}: a mask of {shown.shape[1]}x{shown.shape[0]} pixels (width x height)\n"
                    f"expected {shape[1]}x{shape[0]}, as {item.label[0][0]}\nwrite all masks of an image in one size"
                )
            shape = (shown.shape[0], shown.shape[1])
            left, top, width, height = cv2.boundingRect(shown)
            crop = shown[top : top + height, left : left + width].astype(bool)  # only this stays in memory
            parts.append((int(crop.sum()), left, top, crop, train_id))
        assert shape is not None  # an item has at least one mask
        ids = np.zeros(shape, np.uint8)
        for _, left, top, crop, train_id in sorted(parts, key=lambda part: -part[0]):
            ids[top : top + crop.shape[0], left : left + crop.shape[1]][crop] = train_id
        return ids

    def _object(self, file: Path) -> np.ndarray:
        """uint8 (H, W), 0 where the object is not."""
        grey = read_picture(file).grey(TOLERANCE)
        if grey is not None and (self.soft or int(grey.max(initial=0)) == 255):
            return cv2.threshold(np.ascontiguousarray(grey), THRESHOLD - 1, 1, cv2.THRESH_BINARY)[1]
        if grey is None or len(np.unique(grey)) > 2:
            seen = "colours" if grey is None else f"{len(np.unique(grey))} values"
            fix = "check that it is the mask of one object or class"
            raise DataError(f"{file}: a mask of {seen}\nexpected one value beside 0\n{fix}")
        return np.ascontiguousarray(grey)


LAYERS = Convention(
    "layers",
    "several masks for each image, one a class or one an object: 000_car.png, car/000.png, 000/masks/*.png",
    recognise,
    open_source,
    TABLE | REST,
    explains=True,
)
