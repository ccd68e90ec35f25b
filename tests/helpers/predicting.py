"""Small checkpoints and images for tests of `ssaseg predict`."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

from ssaseg.models import build_model, save_model

CLASSES = ["road", "car", "tree", "sky", "void"]
DESCRIPTIONS = ("classes.json", "manifest.jsonl", "rle.images.json", "shares.csv")
PALETTE = [[128, 64, 128], [0, 0, 142], [107, 142, 35], [70, 130, 180], [1, 2, 3]]


def save_checkpoint(
    path: Path,
    classifier: str = "ssa",
    protocol: dict | None = None,
    network: str = "seaformer_t",
    header: dict | None = None,
) -> Path:
    torch.manual_seed(0)
    metadata = {"classes": CLASSES, "palette": PALETTE, "protocol": protocol or {"scale": None, "multiple": None}}
    save_model(path, build_model(network, len(CLASSES), classifier), metadata | (header or {}))
    return path


def picture(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """Smooth colours, so that JPEG keeps them."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height))


def write(path: Path, image: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture() if image is None else image)
    return path


def files(folder: Path) -> list[str]:
    """All files below a folder, except those that describe its results."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if not name.startswith(".predict") and name not in DESCRIPTIONS)


def labelled_images(path: Path) -> set[str]:
    """The images in an `rle.json`."""
    return {entry["image"] for entry in json.loads(path.read_text())} if path.exists() else set()


# Another command that has labelled one image into OUT (its argument), and still runs until its stdin ends.
OTHER_COMMAND = """
import sys
from pathlib import Path
from ssaseg.cli.prediction.journal import Journal, objects_result
from ssaseg.cli.results.manifest import Entry
from ssaseg.cli.results.objects import to_line
with Journal(Path(sys.argv[1])) as journal:
    entry = {"image": "other.png", "image_id": 5, "category": "x", "segmentation": {"size": [1, 1], "counts": ""}}
    lines = [to_line({**entry, "category_id": number}) for number in (0, 3)]
    entry = Entry("other.png", ["rle.json"], (1, 1), 0.0, None)
    journal.add(entry, [objects_result("rle", "other.png", "0" * 32, lines)], {"rle": lines})
    journal.file.write(b'{"results": [["rle.json/half.png", ')
    journal.file.flush()
    print("ready", flush=True)
    sys.stdin.read()
"""


def start_other(out: Path) -> subprocess.Popen[bytes]:
    """Starts `OTHER_COMMAND` and waits until it has added its image. The process needs no PyTorch."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", OTHER_COMMAND, str(out)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"ready\n"
    return other
