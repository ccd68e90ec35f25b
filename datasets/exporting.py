"""The built-in scenes as files, in the layouts that the readers of other data sets expect.

With `folder` the pixels are those that training sees; the other layouts have JPEG images, as their models do, and the
same labels: whichever reader takes them, images and labels are equal.
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
from ssaseg.datasets.synthetic import CLASSES, PALETTE, SyntheticScenes

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
    """Write `count` scenes of a split below `folder`, laid out as `layout`, a key of EXPORTS; returns the image files.

    Class k is id k in the masks of `folder`, and k + 1 in those of the others, where 0 is no class; outlines, which no
    class has, are 255, 0, or without annotation. Files of the same names are overwritten.
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
    first = int(from_one)
    colours = np.zeros((256, 3), np.uint8)
    colours[first : first + len(PALETTE)] = PALETTE
    # 255 + 1 is 0 in a byte, which is what ignored pixels shall be.
    mask = Image.fromarray(label + np.uint8(first))
    mask.putpalette(colours.tobytes())
    mask.save(file)


def _document(described: list[tuple[str, np.ndarray]], height: int, width: int) -> dict[str, Any]:
    """A COCO-format document: one annotation per class and image, its run lengths now as numbers and now as text."""
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
