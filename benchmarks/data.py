"""Own data: seconds of `ssaseg data check` on 2,000 pairs, and images/s of `ssaseg data prepare` for each kind.

    python benchmarks/data.py
    python benchmarks/data.py --smoke

Protocol: built-in scenes of 480x360 pixels, each many times, are written into a temporary folder as annotation tools
write them. Outlines are those of the regions of the scenes. Files are read from the page cache. `check` is measured as
benchmarks/check.py does: the wall time of the whole command, with imports and table. Of `prepare`, the images/s that
the command prints are taken: reading labels, writing masks and linking images, without imports and the search of the
folder; with one process and with one per core in turn, each time into a new folder.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import cv2
import numpy as np

RESULT = Path(__file__).parent / "results" / "data.json"
GOAL = 60  # seconds of `check`
PAIRS, SCENES, SIZE = 2000, 40, (360, 480)  # size: height, width [pixels]


class Scenes:
    """Scenes, each under several names. `write` copies the files of a scene that were made once."""

    def __init__(self, count: int, size: tuple[int, int], images: int) -> None:
        from ssaseg.datasets.synthetic import CLASSES, SyntheticScenes

        drawn = SyntheticScenes(count, *size, 0, "train")
        self.images = images
        self.classes, self.palette = list(CLASSES), np.array(drawn.palette, np.uint8)
        self.pairs = [drawn.load(index) for index in range(count)]
        # 255 is drawn where scenes are ambiguous: here it is the first class, as masks in colours have no such colour.
        self.labels = [np.where(label == 255, 0, label).astype(np.uint8) for _, label in self.pairs]

    def photos(self, folder: Path) -> None:
        self.files(folder, ".jpg", lambda at, file: cv2.imwrite(str(file), self.pairs[at][0]))

    def files(self, folder: Path, ending: str, make: Callable[[int, Path], object]) -> None:
        """Files NAME + ending for all images, of which the first of each scene is made and the others are copied."""
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(self.images):
            file, first = folder / f"{index:05d}{ending}", folder / f"{index % len(self.labels):05d}{ending}"
            if index < len(self.labels):
                make(index, file)
            elif first.exists():
                shutil.copyfile(first, file)

    def outlines(self, at: int) -> list[tuple[int, np.ndarray]]:
        """Class and points int (N, 2), x and y [pixels], of each region above the background."""
        found = []
        for value in range(1, len(self.classes)):
            inside = (self.labels[at] == value).view(np.uint8)
            regions, _ = cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
            found += [(value, points[:, 0]) for points in regions if len(points) > 2]
        return found


# ---- labels as tools write them ----------------------------------------------------------------------------------
def write_colours(root: Path, scenes: Scenes) -> None:
    scenes.photos(root / "images")
    bgr = scenes.palette[:, ::-1]
    scenes.files(root / "masks", ".png", lambda at, file: cv2.imwrite(str(file), bgr[scenes.labels[at]]))
    rows = [f"{name},{','.join(map(str, colour))}" for name, colour in zip(scenes.classes, scenes.palette, strict=True)]
    (root / "class_dict.csv").write_text("\n".join(["name,r,g,b", *rows]))


def write_binary(root: Path, scenes: Scenes) -> None:
    def make(at: int, file: Path) -> None:
        white = np.where(scenes.labels[at] > 0, 255, 0).astype(np.uint8)
        cv2.imwrite(str(file), np.dstack([white] * 3))

    scenes.photos(root / "images")
    scenes.files(root / "masks", ".png", make)


def write_layers(root: Path, scenes: Scenes) -> None:
    def make(value: int, at: int, file: Path) -> None:
        inside = scenes.labels[at] == value
        if inside.any():
            cv2.imwrite(str(file), np.where(inside, 255, 0).astype(np.uint8))

    scenes.photos(root / "images")
    for value, name in enumerate(scenes.classes[1:], 1):
        ending = f"_{name.replace(' ', '-')}.png"
        scenes.files(root / "masks", ending, lambda at, file, value=value: make(value, at, file))


def write_yolo(root: Path, scenes: Scenes) -> None:
    height, width = scenes.labels[0].shape

    def make(at: int, file: Path) -> None:
        lines = [
            " ".join([str(value - 1), *(f"{x / width:.6f} {y / height:.6f}" for x, y in points)])
            for value, points in scenes.outlines(at)
        ]
        file.write_text("\n".join(lines))

    scenes.photos(root / "images")
    scenes.files(root / "labels", ".txt", make)
    (root / "data.yaml").write_text(f"train: images\nnames: {json.dumps(scenes.classes[1:])}\n")


def write_labelme(root: Path, scenes: Scenes) -> None:
    height, width = scenes.labels[0].shape
    scenes.photos(root)
    for index in range(scenes.images):  # each names its own image
        shapes = [
            {"label": scenes.classes[value], "points": points.tolist(), "shape_type": "polygon"}
            for value, points in scenes.outlines(index % len(scenes.labels))
        ]
        content = {"version": "5.4.1", "shapes": shapes, "imagePath": f"{index:05d}.jpg", "imageData": None}
        (root / f"{index:05d}.json").write_text(json.dumps(content | {"imageHeight": height, "imageWidth": width}))


def write_coco_panoptic(root: Path, scenes: Scenes) -> None:
    height, width = scenes.labels[0].shape

    def make(at: int, file: Path) -> None:  # segment id: class + 1, in red
        zero = np.zeros_like(scenes.labels[at])
        cv2.imwrite(str(file), np.dstack([zero, zero, scenes.labels[at] + 1]))

    scenes.photos(root / "train2017")
    scenes.files(root / "annotations/panoptic_train2017", ".png", make)
    images, entries = [], []
    for index in range(scenes.images):
        name = f"{index:05d}"
        images.append({"id": index, "file_name": f"{name}.jpg", "height": height, "width": width})
        values = np.unique(scenes.labels[index % len(scenes.labels)]).tolist()
        segments = [{"id": value + 1, "category_id": value + 1, "iscrowd": 0} for value in values]
        entries.append({"image_id": index, "file_name": f"{name}.png", "segments_info": segments})
    categories = [{"id": value, "name": name} for value, name in enumerate(scenes.classes, 1)]
    content = {"images": images, "annotations": entries, "categories": categories}
    (root / "annotations/panoptic_train2017.json").write_text(json.dumps(content))


KINDS: dict[str, Callable[[Path, Scenes], None]] = {
    "colours": write_colours,
    "binary": write_binary,
    "layers": write_layers,
    "yolo": write_yolo,
    "labelme": write_labelme,
    "coco_panoptic": write_coco_panoptic,
}


# ---- measuring ---------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of check")
    parser.add_argument("--images", type=int, default=500, help="of each kind of prepare")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a few small pairs; writes no result")
    args = parser.parse_args()
    if args.smoke:
        result = measure(6, 4, scenes=2, size=(96, 128), rounds=1)
        assert result["prepare [images/s]"].keys() == KINDS.keys(), result
        print(f"smoke: {json.dumps(result)}")
        return
    result = measure(args.pairs, args.images, SCENES, SIZE, args.rounds)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    assert result["check [s]"] < GOAL, "`data check` is slower than its goal"


def measure(pairs: int, images: int, scenes: int, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Medians of `rounds`; size: (height, width) [pixels]."""
    from ssaseg.cli.device import count_cores

    cores = count_cores()
    load = round(os.getloadavg()[0], 2)
    checked = check.measure(pairs, scenes, size, rounds)
    drawn, rates = Scenes(scenes, size, images), {}
    for kind, write in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "source")
            write(source, drawn)
            found: dict[str, list[float]] = {"1 process": [], f"{cores} processes": []}
            for turn in range(rounds):
                for workers, side in zip((0, cores), found, strict=True):
                    out = Path(folder, f"out-{turn}-{workers}")
                    found[side].append(images_per_second(kind, source, out, workers, images))
                    shutil.rmtree(out)
        rates[kind] = {side: round(statistics.median(speeds), 1) for side, speeds in found.items()}
    return {
        "command": " ".join(["python", "benchmarks/data.py", *sys.argv[1:]]),
        "size": checked["size"],
        "rounds": rounds,
        "pairs of check": pairs,
        "check [s]": checked["command [s]"],
        "goal of check [s]": GOAL,
        "images of prepare": images,
        "prepare [images/s]": rates,
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load average at the start": load,
        "load average before the end": round(os.getloadavg()[0], 2),
        "versions": checked["versions"],
    }


def images_per_second(kind: str, source: Path, root: Path, workers: int, images: int) -> float:
    """What the command prints. It must have made all masks."""
    from click.testing import CliRunner

    from ssaseg.cli.main import cli

    words = ["data", "prepare", kind, "--source", str(source), "--root", str(root), "--workers", str(workers)]
    done = CliRunner().invoke(cli, words)
    found = re.search(r"masks made in [\d.]+ s: ([\d,]+) images/s", done.stdout.replace("\n", " "))
    assert done.exit_code == 0, done.output
    assert found is not None, done.stdout
    assert len([*root.rglob("masks/**/*.png")]) == images, done.stdout
    return float(found[1].replace(",", ""))


if __name__ == "__main__":
    main()
