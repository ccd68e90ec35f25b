"""Draws the picture of README.md, docs/pictures/labels.jpg, from real output.

    make demo
    python benchmarks/picture.py --camvid DIR             # a folder with images/val and annotations/val
    python benchmarks/picture.py --camvid DIR --weights X.safetensors --demo runs/demo/best.safetensors

First row: a validation frame of CamVid and its labels by the weights in benchmarks/weights. Second row: a validation
scene that ssaseg draws itself, and its labels by the network of `make demo`. Neither was seen in training. Run it again
when other weights are shipped. The numbers of frame and scene are fixed, not chosen by their score.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ssaseg import Predictor
from ssaseg.cli.drawing.panels import Panel, coloured, encode, grid, legend_of, marked
from ssaseg.datasets import IGNORED
from ssaseg.datasets.synthetic import SyntheticScenes

PROJECT = Path(__file__).resolve().parent.parent
WEIGHTS = PROJECT / "benchmarks/weights/camvid-lite0-ssa.safetensors"
WRONG = (230, 50, 50)  # RGB
LARGEST = 200_000  # bytes of the picture


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description="Draw the picture of README.md.")
    parser.add_argument("--camvid", type=Path, required=True, help="folder with images/val and annotations/val")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--demo", type=Path, default=PROJECT / "runs/demo/best.safetensors", help="of `make demo`")
    parser.add_argument("--frame", type=int, default=60, help="of the validation frames, by name (default %(default)s)")
    parser.add_argument("--scene", type=int, default=1, help="of the validation scenes (default %(default)s)")
    parser.add_argument("--out", type=Path, default=PROJECT / "docs/pictures/labels.jpg")
    given = parser.parse_args()

    frame = sorted((given.camvid / "images/val").glob("*.jpg"))[given.frame]
    mask = given.camvid / "annotations/val" / f"{frame.stem}.png"
    scene, scene_labels = SyntheticScenes(48, 160, 160, split="val").load(given.scene)
    samples = [
        (given.weights, cv2.imread(str(frame)), np.asarray(Image.open(mask)), "CamVid, validation"),
        (given.demo, scene, scene_labels, "built-in scene, validation"),
    ]
    parts = []
    for weights, image, true, title in samples:
        predictor = Predictor(str(weights), device="cpu", exact=True)
        palette = predictor.palette.tolist()
        labels = predictor(image[..., ::-1])
        wrong = (labels != true) & (true != IGNORED)
        share = wrong.sum() / (true != IGNORED).sum()
        row = [
            Panel(title, image),
            Panel("labels", coloured(image, labels, palette)),
            Panel(f"wrong: {share:.1%} of the pixels", marked(image, wrong, WRONG)),
        ]
        parts.append(grid([row], legend_of([labels], predictor.classes, palette)))
    given.out.parent.mkdir(exist_ok=True)
    picture = encode(np.concatenate(parts), ".jpg")
    given.out.write_bytes(picture)
    print(f"{given.out}: {len(picture):,} bytes{'' if len(picture) < LARGEST else ', too large'}")


if __name__ == "__main__":
    main()
