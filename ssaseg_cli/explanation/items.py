"""The images to explain, with their labels if these are known: a split of a recipe's data, or files and a mask folder.

Axes: K classes, H×W pixels.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.report import open_dataset, recipe_of, require_channels, require_data_classes
from ssaseg.cli.prediction.sources import Source
from ssaseg.datasets import DataError, Dataset, stated_classes
from ssaseg.datasets.bands.reading import read_bands
from ssaseg.datasets.base import Levels
from ssaseg.datasets.decoding import read_mask
from ssaseg.datasets.ids import label_table
from ssaseg.datasets.pairs import IMAGE_SUFFIXES
from ssaseg.datasets.published import LAYOUTS
from ssaseg.files.text import printable
from ssaseg.recipes import Recipe

Pair = tuple[np.ndarray, np.ndarray | None]  # image BGR uint8 (H,W,3); labels uint8 (H,W), 255 ignored, None: unknown


class Item(NamedTuple):
    """An image that is read when it is needed."""

    path: Path  # for messages
    name: str  # of its picture: a relative path without suffix
    read: Callable[[], Pair]  # raises DataError or OSError


class Items(NamedTuple):
    """All images, and where their labels come from."""

    items: list[Item]
    labels: str | None  # None: there are none


def of_split(checkpoint: Path, metadata: Mapping[str, Any], data: str | None, root: Path | None, split: str) -> Items:
    """The images of a split of the recipe `data`, or of the checkpoint's. Raises CommandError for other classes."""
    recipe = recipe_of(checkpoint, metadata, data)
    require_channels(checkpoint, metadata, recipe)
    dataset = open_dataset(recipe, split, root)
    require_data_classes(checkpoint, metadata["classes"], recipe.name, dataset.classes)
    files = dataset.image_files
    items = [
        Item(files[index] if files else Path(dataset.name(index)), dataset.name(index), partial(_load, dataset, index))
        for index in range(len(dataset))
    ]
    return Items(items, f"{split} split of recipe {recipe.name}")


def _load(dataset: Dataset, index: int) -> Pair:
    return dataset.load(index)


def of_files(
    sources: Sequence[Source],
    masks: Path | None,
    checkpoint: Path,
    metadata: Mapping[str, Any],
    data: str | None,
) -> Items:
    """The images of files, folders and patterns, as `find_sources` finds them.

    `masks`: folder with a mask for each image, under the image's path below its input; names and ids are read by the
    rules of the recipe `data`, or of the checkpoint's recipe. Raises CommandError for `masks` that is not a folder, for
    a recipe with other classes than the checkpoint's; RecipeError for `data`.
    """
    rules = None
    if masks is not None:
        if not masks.is_dir():
            raise CommandError(f"--masks {printable(str(masks))}: not a folder\ngive the folder with the images' masks")
        known = data is not None or metadata["recipe"] is not None
        recipe = recipe_of(checkpoint, metadata, data) if known else None
        if recipe is not None:
            classes = stated_classes(recipe.data.dataset, recipe.data.model_dump())[0]
            if classes:  # those of COCO-format files may be in the files only
                require_data_classes(checkpoint, metadata["classes"], recipe.name, classes)
        rules = rules_of(recipe, masks, len(metadata["classes"]))
    channels, levels = metadata.get("channels", 3), metadata["range"] and tuple(metadata["range"])
    items = [Item(source.path, source.name, partial(_read, source, rules, channels, levels)) for source in sources]
    return Items(items, None if masks is None else f"masks in {masks}")


@dataclass(frozen=True)
class Rules:
    """How masks are found and read."""

    folder: Path
    image_suffixes: Sequence[str]  # ends of images' names; of those that match, the longest is left out
    suffix: str  # in its place
    train_ids: np.ndarray  # uint8 (256,): of each raw id
    valid: np.ndarray  # bool (256,): whether a raw id has a meaning

    def mask_of(self, relative: str) -> Path:
        """The mask of an image; an image of none of the suffixes has what follows the last dot as its suffix."""
        ends = [each for each in self.image_suffixes if relative.lower().endswith(each.lower())]
        longest = max((len(each) for each in ends), default=len(Path(relative).suffix))
        return self.folder / (relative[: len(relative) - longest] + self.suffix)


def rules_of(recipe: Recipe | None, folder: Path, count: int) -> Rules:
    """The rules of a recipe's data of `count` classes; without a recipe, ids are class numbers, and 255 is ignored."""
    if recipe is not None and recipe.data.dataset in LAYOUTS:
        layout = LAYOUTS[recipe.data.dataset]
        table = label_table(count, reduce_zero_label=layout.reduce_zero_label)
        return Rules(folder, (layout.image_suffix,), layout.mask_suffix, *table)
    if recipe is None or recipe.data.dataset != "folder":
        return Rules(folder, IMAGE_SUFFIXES, ".png", *label_table(count))
    data = recipe.data
    table = label_table(count, data.ignore_index, data.reduce_zero_label, data.raw_to_train)
    return Rules(folder, data.image_suffixes, data.mask_suffix, *table)


def _read(source: Source, rules: Rules | None, channels: int, levels: Levels | None = None) -> Pair:
    image = read_bands(source.path, channels, levels=levels)
    if rules is None:
        return image, None
    path = rules.mask_of(source.relative)
    if not os.path.exists(path):
        raise DataError(f"{source.path}: no mask\nexpected {path}")
    raw = read_mask(path).ids
    if raw.shape != image.shape[:2]:
        sizes = [f"{width}x{height}" for height, width in (raw.shape, image.shape[:2])]
        raise DataError(f"{path}: mask of {sizes[0]} pixels (width x height)\nexpected {sizes[1]}, as {source.path}")
    wrong = np.flatnonzero(np.bincount(raw.ravel(), minlength=256) * ~rules.valid)
    if len(wrong):
        raise DataError(f"{path}: id {wrong[0]} has no class\ncheck data.ignore_index and the like in --data RECIPE")
    return image, cv2.LUT(raw, rules.train_ids)
