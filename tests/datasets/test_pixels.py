"""From the file to the network's input: mmsegmentation 1.2.2's pixels and labels, with each data set's settings."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from places import FIXTURES

from ssaseg.datasets import DataError, colour
from ssaseg.datasets.decoding import read_image, read_mask
from ssaseg.datasets.pairs import PairDataset
from ssaseg.datasets.transforms import DRAWS, HUE, SATURATION, Sample, TrainTransform, test_image

STORED = np.load(FIXTURES / "mmseg_datasets.npz")
NAMES = [str(name) for name in STORED["image_files"]]
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
COLUMNS = ["brightness", "contrast", "saturation", "hue", "contrast"]


class Settings(NamedTuple):
    """As in the official configurations: sizes are (width, height) for `scale`, (height, width) for `crop`."""

    scale: tuple[int, int]
    multiple: int | None
    crop: tuple[int, int]
    classes: int


SETTINGS = {
    "ade20k": Settings((2048, 512), 32, (512, 512), 150),
    "coco_stuff10k": Settings((2048, 512), None, (512, 512), 171),
    "pascal_context_59": Settings((520, 520), None, (480, 480), 59),
}


@pytest.fixture(scope="module", params=SETTINGS)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PairDataset]:
    """A data set's name and its files on the disk, as the fixture's script gave them to mmsegmentation."""
    name: str = request.param
    root = tmp_path_factory.mktemp(name)
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for i, file in enumerate(NAMES):
        (root / "images" / file).write_bytes(STORED[f"source{i}"].tobytes())
        (root / "masks" / file).with_suffix(".png").write_bytes(STORED[f"{name}_mask{i}"].tobytes())
    classes = [str(k) for k in range(SETTINGS[name].classes)]
    return name, PairDataset(root / "images", root / "masks", classes, reduce_zero_label=True)


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def at_positions(image: np.ndarray | torch.Tensor, count: int) -> np.ndarray:
    """The pixels of (h,w,3) that are stored: see the fixture's script."""
    pixels = np.asarray(image).reshape(-1, 3)
    return pixels[(np.arange(count) * 7919) % len(pixels)]


def test_decoded_images_and_labels(data: tuple[str, PairDataset]) -> None:
    name, dataset = data
    for i in range(len(dataset)):
        image, label = dataset.load(i)
        assert digest(image) == str(STORED[f"decoded{i}"]), dataset.name(i)
        assert digest(label) == str(STORED[f"{name}_label{i}"]), dataset.name(i)


def test_test_pipeline(data: tuple[str, PairDataset]) -> None:
    name, dataset = data
    for i in range(len(dataset)):
        image = test_image(dataset.load_image(i), SETTINGS[name].scale, SETTINGS[name].multiple)
        assert image.shape[:2] == tuple(STORED[f"{name}_test{i}_shape"]), dataset.name(i)
        assert digest(image) == str(STORED[f"{name}_test{i}"]), dataset.name(i)
        expected = STORED[f"{name}_test{i}_values"]
        values = colour.normalize(torch.from_numpy(image)[None], MEAN, STD)[0].permute(1, 2, 0)
        np.testing.assert_allclose(at_positions(values, len(expected)), expected, rtol=0, atol=1e-4)


def train_sample(name: str, dataset: PairDataset, i: int) -> tuple[Sample, np.random.RandomState]:
    transform = TrainTransform(SETTINGS[name].scale, (0.5, 2.0), SETTINGS[name].crop, cat_max_ratio=0.75, flip=0.5)
    rng = np.random.RandomState(i)
    return transform(*dataset.load_raw(i), rng, dataset.label_lut), rng


def test_train_pipeline(data: tuple[str, PairDataset]) -> None:
    name, dataset = data
    for i in range(len(dataset)):
        sample, rng = train_sample(name, dataset, i)
        height, width = sample.size
        key = f"{name}_train{i}"
        assert sample.size == tuple(STORED[f"{key}_shape"]), dataset.name(i)
        assert digest(sample.image[:height, :width]) == str(STORED[f"{key}_image"]), dataset.name(i)
        assert digest(sample.label[:height, :width]) == str(STORED[f"{key}_label"]), dataset.name(i)
        assert rng.random_sample() == STORED[f"{key}_next"], "another number of random numbers was drawn"
        taken = [step for step, value in zip(COLUMNS, sample.draws, strict=True) if not np.isnan(value)]
        assert taken == STORED[f"{key}_steps"].tolist()
        assert (sample.label[height:] == 255).all()
        assert (sample.label[:, width:] == 255).all()


def test_colour_steps(data: tuple[str, PairDataset]) -> None:
    """Each step from mmsegmentation's pixels before it: exact, or at most one level apart where HSV is involved."""
    name, dataset = data
    compared = dict.fromkeys(range(DRAWS), 0)
    for i in range(len(dataset)):
        draws = train_sample(name, dataset, i)[0].draws
        pixels = STORED[f"{name}_train{i}_pixels"]  # 1 + steps,V,3
        for k, step in enumerate((~np.isnan(draws)).nonzero()[0]):
            only = np.full((1, DRAWS), np.nan, np.float32)
            only[0, step] = draws[step]
            planes = colour.to_planes(torch.from_numpy(pixels[k][None, None]))
            colour.distort(planes, torch.from_numpy(only))
            result = planes[0, :, 0].T.flip(1).numpy()
            difference = np.abs(result - pixels[k + 1])
            compared[step] += difference.size
            assert difference.max() <= (1 if step in (SATURATION, HUE) else 0), f"{dataset.name(i)}, {COLUMNS[step]}"
    assert sum(compared.values()) > 5000
    assert compared[SATURATION] > 0
    assert compared[HUE] > 0


def test_normalised_training_pixels(data: tuple[str, PairDataset]) -> None:
    name, dataset = data
    for i in range(len(dataset)):
        last = torch.from_numpy(STORED[f"{name}_train{i}_pixels"][-1])
        values = colour.normalize(last[None, None], MEAN, STD)[0, :, 0].T
        np.testing.assert_allclose(values.numpy(), STORED[f"{name}_train{i}_values"], rtol=0, atol=1e-4)


def test_cases_are_small_large_upright_and_turned(data: tuple[str, PairDataset]) -> None:
    """What the comparisons above rest on: crops filled and not, both orientations, one class only."""
    name, dataset = data
    height, width = SETTINGS[name].crop
    shapes = [tuple(STORED[f"{name}_train{i}_shape"]) for i in range(len(dataset))]
    assert any(shape == (height, width) for shape in shapes)
    assert any(shape[0] < height for shape in shapes)
    assert any(shape[1] < width for shape in shapes)
    inputs = [tuple(STORED[f"{name}_test{i}_shape"]) for i in range(len(dataset))]
    assert any(shape[0] < shape[1] for shape in inputs)
    assert any(shape[0] > shape[1] for shape in inputs)
    assert all(side % 32 == 0 for shape in inputs for side in shape) == (name == "ade20k")


@pytest.mark.parametrize("name", [*STORED["odd_images"], *STORED["odd_masks"]])
def test_rare_formats_decode_alike(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(STORED[f"odd_{name}"].tobytes())
    pixels = read_mask(file)[0] if name.startswith("mask_") else read_image(file)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, STORED[f"odd_{name}_pixels"])


def test_every_flipped_bit_in_a_grey_mask_is_noticed(tmp_path: Path) -> None:
    """Pillow alone passes over a sixth of them, and gives other labels."""
    whole = STORED["ade20k_mask0"].tobytes()
    file = tmp_path / "mask.png"
    rng = np.random.RandomState(0)
    for at in rng.randint(8, len(whole), 60):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randint(8)
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged mask"):
            read_mask(file)
