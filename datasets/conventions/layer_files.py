"""Which images have several masks, and what tells the masks of an image apart: endings or folders.

The masks are only looked at to see that each shows one thing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ssaseg.datasets.base import DataError
from ssaseg.datasets.checking.storage import is_soft
from ssaseg.datasets.conventions.base import Tree
from ssaseg.datasets.conventions.binary import TOLERANCE
from ssaseg.datasets.conventions.pictures import look_at_all, read_picture, some_of
from ssaseg.datasets.inspection import count_ids
from ssaseg.datasets.pairs import IMAGE_SUFFIXES, first_names
from ssaseg.datasets.survey.places import IMAGES, MASKS, SECOND, SPLITS

SAMPLE = 16  # masks that are looked at to see whether each shows one object or class
FEWEST = 0.05  # share of the images that must have several masks
# Folders and endings of pictures that are made from masks, or are no masks of classes.
OTHERS = re.compile(
    r"segmentationobject|instances?|instanceids|colou?rs?|colou?r(map|mask)s?|depths?|vis|viz|visuali[sz]ations?"
    r"|overlays?|previews?|preds?|predictions?|results?|edges?|boundar(y|ies)|contours?|roi|fov|heatmaps?|probs?"
    r"|thumb(nail)?s?"
)
# Words beside "images", "masks" or "train" that say nothing about the scene: "1. Original Images", "masks_png".
PLAIN = re.compile(r"\d+|[a-z]|all|groundtruths?|originals?|sets?|full|raw|binary|data(sets?)?|png|jpe?g|tiff?|bmp")
ROLES = {"others": OTHERS, "masks": MASKS, "images": IMAGES}

Key = tuple[str, ...]


@dataclass
class Image:
    """An image with its masks."""

    file: PurePosixPath
    split: str | None
    name: str  # of the files that are written
    layers: list[tuple[PurePosixPath, str]] = field(default_factory=list)  # file, what tells it from the others


class Folder(NamedTuple):
    """What the names of the folders of a file say."""

    role: str | None  # "images", "masks", "others"
    split: str | None
    key: Key  # the other words: images and their masks have the same


class Layers(NamedTuple):
    """A folder of images with several masks each."""

    images: list[Image]  # those with masks
    nested: bool  # whether the masks of an image have a folder of their own
    without: int  # images without mask

    @property
    def example(self) -> str:
        """Two masks of one image, for messages."""
        image = max(self.images, key=lambda image: len(image.layers))
        return first_names([str(file) for file, _ in image.layers], 2)


def find_layers(tree: Tree) -> Layers | None:
    """Images with several masks that show one class or object each; None where most images have one mask."""
    files = [file for file in tree.files if file.suffix.lower() in IMAGE_SUFFIXES]
    # Only where masks have no image by all words of their folders, words that say little are passed over.
    found = _assign(files, plain=False) or _assign(files, plain=True)
    if found is None:
        return None
    images, nested = found
    with_masks = [image for image in images if image.layers]
    several = [image for image in with_masks if len(image.layers) > 1]
    exact = sum(any(not label for _, label in image.layers) for image in with_masks)
    if not several or len(several) < FEWEST * len(with_masks) or 2 * exact >= len(with_masks):
        return None
    masks = [tree.root / file for image in several for file, _ in image.layers]
    if not _are_layers(some_of(masks, SAMPLE)):
        return None
    return Layers(with_masks, 2 * nested > len(masks), len(images) - len(with_masks))


def _assign(files: Sequence[PurePosixPath], plain: bool) -> tuple[list[Image], int] | None:
    """All images with their masks, and how many masks lie in a folder of their image. None where no mask has an image,
    and where two images cannot be told apart.
    """
    places = {file: _folder(file, plain) for file in files}
    images, masks = _divide(places)
    index: dict[Key, dict[str, Image]] = {}
    for file in images:
        place = places[file]
        parts = [*(part for part in place.key if part != place.split), file.stem]
        if len(parts) > 1 and parts[-2] == parts[-1]:  # 000/images/000.png
            parts.pop()
        stems = index.setdefault(place.key, {})
        if file.stem in stems:
            return None
        stems[file.stem] = Image(file, place.split, "/".join(parts))
    nested = used = 0
    for file in masks:
        if owner := _owner(file, places[file].key, index):
            image, label, own_folder = owner
            image.layers.append((file, label))
            nested += own_folder
            used += 1
    return ([image for stems in index.values() for image in stems.values()], nested) if used else None


def _folder(file: PurePosixPath, plain: bool) -> Folder:
    """`plain`: words that say little are passed over where others say something."""
    role, split, key = None, None, []
    for part in file.parent.parts:
        words = re.findall(r"[^\W_]+", part)
        kept = []
        if MASKS.fullmatch(re.sub(r"[\W\d_]", "", part.lower())):  # ground_truth
            role, words = "masks", []
        for word in words:
            bare = re.sub(r"\d", "", word.lower())
            if SECOND.fullmatch(word.lower()):
                role = "others"
                break
            if found := next((name for name, pattern in SPLITS.items() if pattern.fullmatch(bare)), None):
                split = found
                kept.append(found)
            elif kind := next((kind for kind, pattern in ROLES.items() if pattern.fullmatch(bare)), None):
                role = kind
            else:
                kept.append(word)
        if len(kept) < len(words) or (split in kept):
            part = "_".join(word for word in kept if not (plain and PLAIN.fullmatch(word.lower())))
        if kept and part:
            key.append(part)
    last = re.split(r"[\W_]+", file.stem.lower())[-1]
    return Folder("others" if OTHERS.fullmatch(last) or SECOND.fullmatch(last) else role, split, tuple(key))


def _divide(places: Mapping[PurePosixPath, Folder]) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """Images and masks, by the names of their folders; or, in one folder, by the names of the files."""
    by_role: dict[str | None, list[PurePosixPath]] = {}
    for file, place in places.items():
        by_role.setdefault(place.role, []).append(file)
    images, masks, plain = (by_role.get(role, []) for role in ("images", "masks", None))
    if images or masks:
        return images or plain, masks or plain
    stems = {(file.parent, file.stem) for file in plain}
    extended = [file for file in plain if any((file.parent, stem) in stems for stem, _ in _cuts(file.stem) if stem)]
    rest = set(plain) - set(extended)
    return [file for file in plain if file in rest], extended


def _cuts(stem: str) -> Iterator[tuple[str, str]]:
    """A name cut before a mark, the longest start first: 000_m0 and _1, 000 and _m0_1."""
    for at in reversed([found.start() for found in re.finditer(r"[\W_]", stem)]):
        yield stem[:at], stem[at:]


def _owner(file: PurePosixPath, key: Key, index: Mapping[Key, dict[str, Image]]) -> tuple[Image, str, bool] | None:
    """The image that a mask belongs to, what tells the mask from others, and whether the image has its own folder."""
    if image := _by_stem(file.stem, index.get(key, {})):
        return *image, False
    if key and (owner := index.get(key[:-1], {}).get(key[-1])):  # masks/000/1.png
        return owner, file.stem, True
    alone = index.get(key, {})
    if key and len(alone) == 1 and key[-1] in alone:  # 000/images/000.png, 000/masks/1.png
        return alone[key[-1]], file.stem, True
    for at in range(len(key) - 1, -1, -1):  # masks/car/000.png
        if image := _by_stem(file.stem, index.get(key[:at] + key[at + 1 :], {})):
            return image[0], f"{key[at]}/{image[1]}", False
    return None


def _by_stem(stem: str, images: Mapping[str, Image]) -> tuple[Image, str] | None:
    if stem in images:
        return images[stem], ""
    return next(((images[start], rest) for start, rest in _cuts(stem) if start in images), None)


def _are_layers(files: Sequence[Path]) -> bool:
    """Whether each of these masks shows one thing: it has one value beside 0, or all are black and white with soft
    edges.
    """
    read = [counts for counts in look_at_all(files, _counts_of) if not isinstance(counts, OSError)]
    arrays = [counts for counts in read if isinstance(counts, np.ndarray)]
    if not read or len(arrays) < len(read):
        return False
    return all(np.count_nonzero(counts[1:]) <= 1 for counts in arrays) or is_soft(sum(arrays, np.zeros(256, np.int64)))


def are_soft(files: Sequence[Path]) -> bool:
    """Whether a sample of these masks has soft edges."""
    read = [counts for counts in look_at_all(some_of(files, SAMPLE), _counts_of) if isinstance(counts, np.ndarray)]
    return is_soft(sum(read, np.zeros(256, np.int64)))


def _counts_of(file: Path) -> np.ndarray:
    """Pixels of each level of grey, int64 (256,). Raises DataError where a mask is in colours."""
    grey = read_picture(file).grey(TOLERANCE)
    if grey is None:
        raise DataError(f"{file}: a mask in colours\nexpected black and white")
    return count_ids(np.ascontiguousarray(grey))
