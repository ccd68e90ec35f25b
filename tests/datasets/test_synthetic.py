"""The procedural scenes: the same everywhere, all classes in them, look-alikes alike."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import HELPERS

from ssaseg.datasets import DataError, build_dataset
from ssaseg.datasets.exporting import export_scenes
from ssaseg.datasets.pairs import PairDataset
from ssaseg.datasets.synthetic import CLASSES, LOOK_ALIKES, PALETTE, SyntheticScenes

GROUND = {"ball": "grass", "buoy": "water", "bale": "grass", "crate": "road"}


def digest(scenes: SyntheticScenes, index: int) -> str:
    image, label = scenes.load(index)
    return hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    scenes = SyntheticScenes(8, 96, 128, seed=3)
    first = digest(scenes, 2)
    digest(scenes, 5)
    assert digest(scenes, 2) == first
    assert digest(SyntheticScenes(50, 96, 128, seed=3), 2) == first
    others = [SyntheticScenes(8, 96, 128, seed=4), SyntheticScenes(8, 96, 128, seed=3, split="val")]
    assert len({first, digest(scenes, 3), *(digest(other, 2) for other in others)}) == 4


def test_another_process_draws_the_same() -> None:
    output = subprocess.run([sys.executable, HELPERS / "drawing.py"], capture_output=True, text=True, check=True).stdout
    assert output.strip() == digest(SyntheticScenes(8, 96, 128, seed=3), 2)


def test_a_scene_stays_what_it_was() -> None:
    """Scores are compared over months: whoever changes a drawing changes these numbers (OpenCV 4.8 and 5.0 agree)."""
    image, label = SyntheticScenes(1, 160, 160, seed=0).load(0)
    pixels = np.bincount(label.ravel(), minlength=256)
    expected = [7200, 2564, 5794, 3514, 3905, 304, 0, 0, 311, 261, 522, 476, 221, 528]
    assert [*pixels[: len(CLASSES)], pixels[255]] == expected
    assert image.sum(axis=(0, 1)).tolist() == [3836996, 3895117, 3345875]


@pytest.mark.parametrize(("height", "width"), [(160, 160), (64, 64), (97, 203), (360, 480)])
def test_shapes_and_ids(height: int, width: int) -> None:
    scenes = SyntheticScenes(2, height, width)
    image, label = scenes.load(1)
    assert (image.shape, image.dtype) == ((height, width, 3), np.uint8)
    assert (label.shape, label.dtype) == ((height, width), np.uint8)
    assert scenes.valid_raw[label].all()
    assert image.std() > 10
    np.testing.assert_array_equal(scenes.label_lut[scenes.load_raw(1)[1]], label)
    np.testing.assert_array_equal(scenes.load_image(1), image)


def test_every_class_occurs_often_and_rims_are_ignored() -> None:
    scenes = SyntheticScenes(60, 160, 160)
    present = sum((np.bincount(scenes.load(index)[1].ravel(), minlength=256) > 0).astype(int) for index in range(60))
    assert len(CLASSES) == len(PALETTE) == len(set(PALETTE)) == 13
    assert present[: len(CLASSES)].min() >= 20
    assert present[255] == 60


def test_look_alikes_look_alike_and_lie_on_their_ground() -> None:
    scenes = SyntheticScenes(120, 160, 160, seed=1)
    colours: dict[str, list[np.ndarray]] = {name: [] for pair in LOOK_ALIKES for name in pair}
    for index in range(len(scenes)):
        image, label = scenes.load(index)
        for name, seen in colours.items():
            inside = label == CLASSES.index(name)
            if inside.any():
                seen.append(image[inside].mean(axis=0))
                rows, columns = np.nonzero(inside)
                assert np.ptp(rows) >= 7
                assert np.ptp(columns) >= 7
                # Beyond the rim of ignored pixels lies nothing but the ground.
                around = {
                    int(label[row + down, column + across])
                    for row, column in zip(rows, columns, strict=True)
                    for down, across in ((-2, 0), (2, 0), (0, -2), (0, 2))
                    if 0 <= row + down < 160 and 0 <= column + across < 160
                }
                assert around <= {CLASSES.index(name), CLASSES.index(GROUND[name]), 255}
    for one, other in LOOK_ALIKES:
        means = [np.mean(colours[name], axis=0) for name in (one, other)]
        spread = np.std(colours[one], axis=0)
        assert np.abs(means[0] - means[1]).max() < 0.35 * spread.max(), f"{one} and {other} differ in colour"


def test_impossible_scenes() -> None:
    with pytest.raises(DataError, match="64x64"):
        SyntheticScenes(1, 63, 200)
    with pytest.raises(IndexError):
        SyntheticScenes(1, 64, 64).load(1)


def test_build_by_name(tmp_path: Path) -> None:
    options = {"synthetic": {"height": 64, "width": 80, "train": 5, "val": 2, "seed": 1}, "classes": []}
    train, val = (build_dataset("synthetic", split, root=tmp_path, options=options) for split in ("train", "val"))
    assert (len(train), len(val), train.name(3), val.name(1)) == (5, 2, "train_00003", "val_00001")
    assert train.load(0)[0].shape == (64, 80, 3)


def test_export_is_a_folder_data_set_of_the_same_pixels(tmp_path: Path) -> None:
    files = export_scenes(tmp_path, 2, split="val", height=64, width=80, seed=5)
    assert files == [tmp_path / f"images/val/val_0000{index}.png" for index in range(2)]
    dataset = PairDataset(tmp_path / "images/val", tmp_path / "annotations/val", CLASSES, PALETTE)
    scenes = SyntheticScenes(2, 64, 80, seed=5, split="val")
    for index in range(2):
        for got, expected in zip(dataset.load(index), scenes.load(index), strict=True):
            np.testing.assert_array_equal(got, expected)
