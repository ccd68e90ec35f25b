"""Writing the built-in scenes as files, in the layouts of other data sets.

With `folder` the pixels are those that training uses. The other layouts have JPEG images, as the real data sets have.
The labels are the same in all layouts, whichever data set reads them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from ssaseg.datasets.annotations import run_lengths
from ssaseg.datasets.base import IGNORED
from ssaseg.datasets.published import LAYOUTS, Layout
from ssaseg.datasets.synthetic import CLASSES, SyntheticScenes, mask_palette

_FOLDERS = {"train": "images/train", "val": "images/val"}
_MASKS = {"train": "annotations/train", "val": "annotations/val"}
EXPORTS: dict[str, Layout] = {
    "folder": Layout("", "", _FOLDERS, _MASKS, {}, image_suffix=".png"),
    "ade20k": LAYOUTS["ade20k"],
    "pascal_context": LAYOUTS["pascal_context_59"],
    "coco": Layout("", "", _FOLDERS, {split: f"annotations/instances_{split}.json" for split in _FOLDERS}, {}),
}


def export_scenes(
    folder: Path,
    count: int,
    *,
    split: str = "train",
    height: int = 160,
    width: int = 160,
    seed: int = 0,
    layout: str = "folder",
) -> list[Path]:
    """Write `count` scenes of a split below `folder` in the layout `layout`, a key of EXPORTS; returns the image files.

    Class k has the id k in masks of the layout `folder`, and k + 1 in the others, where 0 belongs to no class. Outlines
    of objects belong to no class: they are 255, 0, or without annotation. Existing files are overwritten.
    """
    rows, scenes = EXPORTS[layout], SyntheticScenes(count, height, width, seed, split)
    images = folder / rows.images[split]
    images.mkdir(parents=True, exist_ok=True)
    (folder / rows.masks[split]).parent.mkdir(parents=True, exist_ok=True)
    written, described = [], []
    for index in range(count):
        name = scenes.name(index)
        image, label = scenes.load(index)
        written.append(images / f"{name}{rows.image_suffix}")
        Image.fromarray(image[..., ::-1]).save(written[-1], quality=95)
        if layout == "coco":
            described.append((written[-1].name, label))
        else:
            _write_mask(folder / rows.masks[split] / f"{name}{rows.mask_suffix}", label, rows.reduce_zero_label)
    if layout == "coco":
        text = json.dumps(_document(described, height, width))
        (folder / rows.masks[split]).write_text(text, encoding="utf-8")
    if rows.lists:
        listed = folder / rows.lists[split]
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{scenes.name(index)}\n" for index in range(count)), encoding="utf-8")
    return written


def _write_mask(file: Path, label: np.ndarray, from_one: bool) -> None:
    """A palette PNG of ids; with `from_one` class k is k + 1 and ignored pixels are 0."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # In a byte 255 + 1 is 0, the id of ignored pixels with `from_one`.
    mask = Image.fromarray(label + np.uint8(from_one))
    mask.putpalette(mask_palette(from_one))
    mask.save(file)


def _document(described: list[tuple[str, np.ndarray]], height: int, width: int) -> dict[str, Any]:
    """A COCO-format document: one annotation for each class and image, with run lengths as numbers and text in turn."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, label) in enumerate(described, 1):
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for train_id in (int(value) for value in np.unique(label) if value != IGNORED):
            pixels = np.asfortranarray(label == train_id, dtype=np.uint8)
            packed = mask_utils.encode(pixels)
            text = packed["counts"].decode("ascii")
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": train_id + 1,
                    "segmentation": {
                        "size": [height, width],
                        "counts": run_lengths(text).tolist() if train_id % 2 else text,
                    },
                    "area": int(mask_utils.area(packed)),
                    "bbox": mask_utils.toBbox(packed).tolist(),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": train_id + 1, "name": name} for train_id, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}
