"""A labelled data set of a few small images with its recipe, and predictions of them as label files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image


def write_labels(folder: Path, maps: Mapping[str, np.ndarray], suffix: str = ".png") -> Path:
    """PNGs by name."""
    for name, ids in maps.items():
        file = folder / f"{name}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids).save(file)
    return folder


def write_data(folder: Path, labels: Mapping[str, np.ndarray], classes: list[str], **data: Any) -> Path:
    """Masks of raw ids by name, grey images beside them, and a recipe that has them as the validation split."""
    write_labels(folder / "masks", labels)
    write_labels(folder / "images", {name: np.zeros((*ids.shape, 3), np.uint8) for name, ids in labels.items()})
    split = {"images": "images", "masks": "masks"}
    recipe = {
        "model": {"name": "seaformer_t"},
        "data": {"root": str(folder), "train": split, "val": split, "classes": classes, **data},
        "augment": {"scale": [64, 64], "crop": [64, 64]},
        "test": {"scale": None},
        "optim": {"lr": 0.001},
        "train": {"steps": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"
