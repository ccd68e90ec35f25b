"""`ssaseg data init` on images of other than three bands: the recipe reads them, or says how."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from calling import call
from PIL import Image
from tiffs import tiff

from ssaseg.recipes import load_recipe


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
