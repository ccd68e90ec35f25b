"""Small checkpoints, images and masks for tests of `ssaseg explain`."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from calling import call
from predicting import picture, write

from ssaseg.models import build_model, save_model

CLASSES = ["road", "car", "tree"]
H, W = 64, 72


def checkpoint(path: Path, classifier: str = "ssa", classes: list[str] = CLASSES, seed: int = 0, **more: Any) -> Path:
    """Random weights, of a network of `tiny_networks`; labels of those with a 1×1 convolution have all classes."""
    torch.manual_seed(seed)
    model = build_model("seaformer_y", len(classes), classifier)
    if hasattr(model.classifier, "conv_seg"):
        torch.nn.init.normal_(model.classifier.conv_seg.weight, 0.0, 2.0)
    save_model(path, model, {"classes": classes, "protocol": {"scale": None, "multiple": None}, **more})
    return path


def make_place(folder: Path) -> Path:
    """A folder with checkpoints `ssa` and `linear`, two images in subfolders, and their masks."""
    checkpoint(folder / "ssa")
    checkpoint(folder / "linear", "linear", seed=1)
    for index, name in enumerate(("a/one", "two")):
        write(folder / f"images/{name}.png", picture(H, W, seed=index))
        mask = cv2.resize(np.random.default_rng(index).integers(0, 4, (4, 5)).astype(np.uint8), (W, H), None, 0, 0, 0)
        write(folder / f"masks/{name}.png", np.where(mask == 3, 255, mask).astype(np.uint8))
    return folder


def explain(out: Path, *words: str | Path, code: int = 0) -> dict[str, Any]:
    """The report of `ssaseg explain`."""
    result = call("explain", *words, "--out", out, "--device", "cpu")
    assert result.exit_code == code, result.output
    return json.loads((out / "explain.json").read_text())
