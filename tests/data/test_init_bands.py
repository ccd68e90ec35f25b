"""`ssaseg data init` on images of other than three bands: the recipe reads them, or says how."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from calling import call
from PIL import Image
from tiffs import tiff

from ssaseg.recipes import load_recipe


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting processes takes longer than reading a few small files."""
    monkeypatch.setattr("ssaseg.cli.data.reading.count_cores", lambda: 0)


def folder(root: Path, bands: int, suffix: str = ".tif", kind: type = np.uint8) -> Path:
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for index in range(6):
        mask = rng.integers(0, 2, (40, 48), np.uint8)
        values = rng.integers(0, np.iinfo(kind).max, (40, 48, bands), kind)
        Image.fromarray(mask).save(root / f"masks/{index}.png")
        file = root / f"images/{index}{suffix}"
        if suffix == ".tif":
            file.write_bytes(tiff(values))
        else:
            Image.fromarray(values.squeeze()).save(file)
    return root


@pytest.mark.parametrize(("bands", "kind"), [(5, np.uint8), (13, np.uint16)])
def test_five_bands_and_more_are_all_used(bands: int, kind: type, tmp_path: Path) -> None:
    result = call("data", "init", folder(tmp_path / "d", bands, kind=kind), "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    assert f"the images have {bands} bands, all of which are used: see data.channels" in result.output
    data = load_recipe(str(tmp_path / "r.yaml")).data
    assert data.channels == len(data.mean) == len(data.std) == bands
    assert all(100 < value < 155 for value in data.mean), "half of the range, and a little noise"
    assert all(60 < value < 90 for value in data.std)
    assert call("data", "check", tmp_path / "r.yaml").exit_code == 0
    assert call("data", "check", tmp_path / "d").exit_code == 0


def test_images_of_different_bands_are_said(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", 5)
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(root / "images/0.tif")
    result = call("data", "init", root, "--out", tmp_path / "r.yaml")
    assert "the images have 3 and 5 bands: only images of at most 4 are read" in result.output


@pytest.mark.parametrize(("bands", "suffix"), [(4, ".tif"), (1, ".png")])
def test_grey_and_four_bands_are_a_comment_to_take(bands: int, suffix: str, tmp_path: Path) -> None:
    result = call("data", "init", folder(tmp_path / "d", bands, suffix), "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    assert "see data.channels" in result.output
    text = (tmp_path / "r.yaml").read_text()
    assert yaml.safe_load(text)["data"].keys().isdisjoint({"channels", "mean", "std"})
    for key in ("channels", "mean", "std"):
        assert text.count(f"  # {key}: ") == 1
        text = text.replace(f"  # {key}: ", f"  {key}: ")
    (tmp_path / "taken.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "taken.yaml")).data.channels == bands
    assert call("data", "check", tmp_path / "taken.yaml").exit_code == 0


def test_alpha_of_photos_is_no_band(tmp_path: Path) -> None:
    result = call("data", "init", folder(tmp_path / "d", 4, ".png"), "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    assert "channels" not in result.output
    assert "channels" not in (tmp_path / "r.yaml").read_text()


# ---- 16 bits in every layout -------------------------------------------------------------------------------------
def twelve_bits(file: Path, bands: int = 3, top: int = 4095) -> None:
    rng = np.random.default_rng(zlib.crc32(str(file).encode()))
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, top, (24, 32, bands), np.uint16)
    pixels[0, 0] = top
    file.write_bytes(tiff(pixels))


def mask(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.array([0, 1], np.uint8), (24, 32))).save(file)


def coco_file(file: Path, names: list[str]) -> None:
    images = [{"id": n, "file_name": name, "height": 24, "width": 32} for n, name in enumerate(names)]
    outline = [[0, 0, 32, 0, 32, 12, 0, 12]]
    regions = [{"id": n, "image_id": n, "category_id": 1, "segmentation": outline} for n in range(len(names))]
    file.write_text(json.dumps({"images": images, "annotations": regions, "categories": [{"id": 1, "name": "road"}]}))


def as_folders(root: Path) -> None:
    for index in range(3):
        twelve_bits(root / f"images/{index}.tif")
        mask(root / f"masks/{index}.png")


def as_pairs(root: Path) -> None:
    for place in ("a", "b"):
        twelve_bits(root / place / "images/0.tif")
        mask(root / place / "masks/0.png")


def as_names(root: Path) -> None:
    as_folders(root)
    for split, names in (("train", "0 1"), ("val", "2")):
        (root / f"{split}.txt").write_text(names.replace(" ", "\n"))


def as_coco(root: Path) -> None:
    for index in range(3):
        twelve_bits(root / f"images/{index}.tif")
    coco_file(root / "labels.json", ["0.tif", "1.tif", "2.tif"])


@pytest.mark.parametrize("make", [as_folders, as_pairs, as_names, as_coco])
def test_the_range_of_16_bits_is_written_in_every_layout(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "d")
    result = call("data", "init", tmp_path / "d", "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    assert "images have 16 bits, largest value 4095: data.range [0, 4095] becomes 0..255" in result.stdout
    assert load_recipe(str(tmp_path / "r.yaml")).data.range == (0, 4095)
    for checked in (call("data", "check", tmp_path / "r.yaml"), call("data", "check", tmp_path / "d")):
        assert checked.exit_code in (0, 1), checked.output  # a class may have no pixel
        assert "set data.range" not in checked.output
        assert "no effect" not in checked.output


@pytest.mark.parametrize("kind", ["folders", "coco"])
def test_mean_and_spread_are_those_of_the_range(kind: str, tmp_path: Path) -> None:
    """Of five bands of 12 bits. Before, these were the levels of the upper 8 bits: 0 to 15."""
    for index in range(3):
        twelve_bits(tmp_path / f"d/images/{index}.tif", bands=5)
        if kind == "folders":
            mask(tmp_path / f"d/masks/{index}.png")
    if kind == "coco":
        coco_file(tmp_path / "d/labels.json", ["0.tif", "1.tif", "2.tif"])
    result = call("data", "init", tmp_path / "d", "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    assert "the images have 5 bands, all of which are used: see data.channels" in result.stdout
    data = load_recipe(str(tmp_path / "r.yaml")).data
    assert (data.channels, data.range) == (5, (0, 4095))
    assert all(100 < value < 155 for value in data.mean), data.mean
    assert all(60 < value < 90 for value in data.std), data.std
    checked = call("data", "check", tmp_path / "r.yaml")
    assert checked.exit_code == 0, checked.output
    assert "data.range" not in checked.output
