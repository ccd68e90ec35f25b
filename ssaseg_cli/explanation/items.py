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
from ssaseg.cli.prediction.sources import Source, find_sources
from ssaseg.cli.scoring.report import open_dataset, recipe_of, require_data_classes
from ssaseg.datasets import DataError, Dataset
from ssaseg.datasets.decoding import read_image, read_mask
from ssaseg.datasets.pairs import label_table
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
    inputs: Sequence[str],
    out: Path,
    results: Sequence[str],
    masks: Path | None,
    checkpoint: Path,
    metadata: Mapping[str, Any],
    data: str | None,
) -> Items:
    """The images of files, folders and patterns, as `ssaseg predict` finds them. `results`: folders of `out` to skip.

    `masks`: folder with a mask for each image, under the image's path below its input; its ids are read by the rules of
    the recipe `data`, or of the checkpoint's recipe. Raises CommandError, and DataError for `masks` that is no folder.
    """
    sources = find_sources(inputs, out, results)
    rules = None
    if masks is not None:
        if not masks.is_dir():
            raise CommandError(f"--masks {printable(str(masks))}: not a folder\ngive the folder with the images' masks")
        known = data is not None or metadata["recipe"] is not None
        rules = rules_of(recipe_of(checkpoint, metadata, data) if known else None, masks, metadata)
    items = [Item(source.path, source.name, partial(_read, source, rules)) for source in sources]
    return Items(items, None if masks is None else f"masks in {masks}")


@dataclass(frozen=True)
class Rules:
    """How masks are found and read."""

    folder: Path
    suffix: str  # in place of the image's
    train_ids: np.ndarray  # uint8 (256,): of each raw id
    valid: np.ndarray  # bool (256,): whether a raw id has a meaning


def rules_of(recipe: Recipe | None, folder: Path, metadata: Mapping[str, Any]) -> Rules:
    """The rules of a recipe's data; without a recipe, ids are class numbers, and 255 is ignored."""
    count = len(metadata["classes"])
    if recipe is not None and recipe.data.dataset in LAYOUTS:
        layout = LAYOUTS[recipe.data.dataset]
        return Rules(folder, layout.mask_suffix, *label_table(count, reduce_zero_label=layout.reduce_zero_label))
    if recipe is None or recipe.data.dataset != "folder":
        return Rules(folder, ".png", *label_table(count))
    data = recipe.data
    table = label_table(count, data.ignore_index, data.reduce_zero_label, data.raw_to_train)
    return Rules(folder, data.mask_suffix, *table)


def _read(source: Source, rules: Rules | None) -> Pair:
    image = read_image(source.path)
    if rules is None:
        return image, None
    path = rules.folder / (source.relative.removesuffix(Path(source.relative).suffix) + rules.suffix)
    if not os.path.exists(path):
        raise DataError(f"{source.path}: no mask\nexpected {path}")
    raw, _ = read_mask(path)
    if raw.shape != image.shape[:2]:
        sizes = [f"{width}x{height}" for height, width in (raw.shape, image.shape[:2])]
        raise DataError(f"{path}: mask of {sizes[0]} pixels (width x height)\nexpected {sizes[1]}, as {source.path}")
    wrong = np.flatnonzero(np.bincount(raw.ravel(), minlength=256) * ~rules.valid)
    if len(wrong):
        raise DataError(f"{path}: id {wrong[0]} has no class\ncheck data.ignore_index and the like in --data RECIPE")
    return image, cv2.LUT(raw, rules.train_ids)
