"""What was found in a user's folder, and the data sets that read it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssaseg.datasets.pairlist import name_pairs
from ssaseg.datasets.pairs import IMAGE_SUFFIXES, PairDataset, Pairs

Paths = list[tuple[str, str]]  # images and their masks, below the root


@dataclass
class Found:
    """Where the pairs are, below a root. A split is "train" or "val", or "all", which is divided later.

    `folders` has two folders for each split. Where no two folders hold all pairs of a split, it is empty, and `pairs`
    has the files of all splits.
    """

    folders: dict[str, tuple[str, str]]  # split -> folder of images, folder of masks
    mask_suffix: str = ".png"
    image_suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    lists: dict[str, str] = field(default_factory=dict)  # split -> file of names, or of pairs where there are `pairs`
    notes: list[str] = field(default_factory=list)
    pairs: dict[str, Paths] = field(default_factory=dict)
    published: str | None = None  # the published data set in another layout, whose classes are known
    several: int = 0  # images that more than one mask file fits equally well
    example: tuple[str, str, str] | None = None  # such an image and two of its masks
    image_folders: list[str] = field(default_factory=list)  # all folders with images that are used
    mask_folders: list[str] = field(default_factory=list)  # all folders with masks that are used

    def datasets(
        self, root: Path, classes: Sequence[str], palette: Any = None, **meaning: Any
    ) -> dict[str, PairDataset]:
        """The complete pairs of each split. `meaning`: arguments of PairDataset that say what ids mean."""
        if self.pairs:
            return {
                split: PairDataset(root, root, classes, palette, pairs=open_pairs(root, pairs), **meaning)
                for split, pairs in self.pairs.items()
            }
        opened = {}
        for split in self.lists if self.lists and "all" in self.folders else self.folders:
            images, masks = self.folders.get(split) or self.folders["all"]
            opened[split] = PairDataset(
                root / images,
                root / masks,
                classes,
                palette,
                image_suffixes=self.image_suffixes,
                mask_suffix=self.mask_suffix,
                names=root / self.lists[split] if split in self.lists else None,
                partial=True,
                **meaning,
            )
        return opened


def open_pairs(root: Path, pairs: Paths) -> Pairs:
    """The same pairs with names, sorted by name."""
    masks = dict(pairs)
    named = sorted((name, image) for image, name in name_pairs(masks).items())
    images = [image for _, image in named]
    return Pairs([name for name, _ in named], [root / each for each in images], [root / masks[each] for each in images])


def split_names(names: Sequence[str]) -> dict[str, list[str]]:
    """A fifth of the names for validation: those with the lowest hashes. The order of the names changes nothing.

    Neither split is empty; a single name is in both.
    """
    order = sorted(names, key=lambda name: (zlib.crc32(name.encode(errors="surrogateescape")), name))
    val = order[: max(round(len(order) / 5), 1)]
    return {"train": sorted(order[len(val) :] or val), "val": sorted(val)}
