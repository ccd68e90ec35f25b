"""A run on images of four bands, from the recipe to an ONNX file, with the commands that a user types."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from calling import call
from networks import tiny_networks
from PIL import Image
from tiffs import tiff

from ssaseg.cli.training import loop
from ssaseg.cli.training.pictures import write_predictions
from ssaseg.datasets.bands.reading import read_bands
from ssaseg.models import load_model
from ssaseg.models.header import DEFAULTS

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD = [120.0, 116.0, 103.0, 90.0], [58.0, 57.0, 57.0, 40.0]


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_networks():
        yield


def write_data(folder: Path, images: int = 4) -> dict:
    """Images of 64x64 whose class is in the fourth band alone; and a recipe's keys."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(images):
            mask = rng.integers(0, 2, (64, 64), np.uint8)
            bands = rng.integers(0, 256, (64, 64, 4), np.uint8)
            bands[..., 3] = 200 * mask
            (folder / "images" / split / f"{index}.tif").write_bytes(tiff(bands))
            Image.fromarray(mask).save(folder / "masks" / split / f"{index}.png")
    return {
        "model": {"name": "seaformer_y", "classifier": "linear"},
        "data": {
            "root": str(folder),
            **{split: {"images": f"images/{split}", "masks": f"masks/{split}"} for split in ("train", "val")},
            "classes": ["low", "high"],
            "channels": 4,
            "mean": MEAN,
            "std": STD,
        },
        "augment": {"scale": [64, 64], "crop": [64, 64]},
        "optim": {"lr": 1e-3, "warmup": 0, "ema": 0.9},
        "train": {"steps": 2, "batch": 2, "workers": 0, "eval_every": 2, "save_every": 2},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bands")
    recipe = write_data(folder / "data")
    (folder / "four.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "after_evaluation", lambda job, _: write_predictions(job))
        result = call("train", folder / "four.yaml", "--out", folder / "run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return folder


def test_the_run_has_its_channels_everywhere(run: Path) -> None:
    model, metadata = load_model(run / "run/best.safetensors")
    assert metadata["channels"] == model.channels == 4
    assert metadata["mean"] == MEAN
    assert metadata["recipe"]["data"]["channels"] == 4
    assert (run / "run/batch.png").exists()
    assert (run / "run/predictions.png").exists()


def test_data_check(run: Path) -> None:
    assert call("data", "check", run / "four.yaml").exit_code == 0
    five = ["data.channels=5", "data.mean=[1,2,3,4,5]", "data.std=[1,2,3,4,5]"]
    result = call("data", "check", run / "four.yaml", *five)
    assert result.exit_code != 0
    assert "an image of 4 bands\nexpected 5, as data.channels of the recipe" in result.output


def test_eval_and_other_channels(run: Path) -> None:
    checkpoint = run / "run/best.safetensors"
    assert call("eval", checkpoint, "--device", "cpu").exit_code == 0
    recipe = yaml.safe_load((run / "four.yaml").read_text())
    for key in ("channels", "mean", "std"):
        del recipe["data"][key]
    (run / "three.yaml").write_text(yaml.safe_dump(recipe))
    result = call("eval", checkpoint, "--data", run / "three.yaml", "--device", "cpu")
    assert result.exit_code != 0
    assert "a network for images of 4 channels; recipe three: 3\n" in result.output


def test_predict_skips_what_has_no_four_bands(run: Path) -> None:
    folder = run / "data/images/val"
    Image.new("RGB", (64, 64)).save(run / "photo.png")
    result = call(
        "predict", run / "run/best.safetensors", folder, run / "photo.png", "--out", run / "labels",
        "--save", "index,overlay", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "photo.png: an image of 3 bands; expected 4, as data.channels of the recipe" in result.output
    assert sorted(path.name for path in (run / "labels/index").rglob("*.png")) == [f"{k}.png" for k in range(4)]
    (overlay,) = (run / "labels/overlay").rglob("0.*")
    assert np.asarray(Image.open(overlay)).shape == (64, 64, 3)


def test_profile(run: Path) -> None:
    words = ["--size", "64", "64", "--runs", "1", "--device", "cpu", "--json", "-"]
    result = call("profile", run / "run/best.safetensors", *words)
    assert json.loads(result.stdout)["columns"][0]["parameters"] > 0


@pytest.mark.slow
def test_explain(run: Path) -> None:
    checkpoint = run / "run/best.safetensors"
    for words in (["--data", run / "four.yaml"], [run / "data/images/val/0.tif"]):
        result = call(
            "explain", checkpoint, *words, "--out", run / f"why{len(words)}", "--limit", "1", "--device", "cpu"
        )
        assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_pt2(run: Path) -> None:
    result = call("convert", run / "run/best.safetensors", run / "a.pt2")
    assert result.exit_code == 0, result.output
    program = torch.export.load(run / "a.pt2")
    assert program.module()(torch.zeros(1, 4, 128, 160)).shape == (1, 2, 16, 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rgb", "normalized"])
def test_onnx(kind: str, run: Path) -> None:
    words = ["--input", kind, "--verify", run / "data/images/val"]
    result = call("convert", run / "run/best.safetensors", run / f"{kind}.onnx", *words)
    assert result.exit_code == 0, result.output
    session = onnxruntime.InferenceSession(run / f"{kind}.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1] == 4
    assert session.get_modelmeta().custom_metadata_map["channels"] == "4"
    image = read_bands(run / "data/images/val/0.tif", 4)[..., [2, 1, 0, 3]].transpose(2, 0, 1)[None]
    if kind == "normalized":
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))
        image = ((image - mean) / std).astype(np.float32)
    assert session.run(None, {"images": image})[0].shape[:2] == (1, 2)


def test_from_rgb_weights_with_a_line_in_the_report(run: Path) -> None:
    from ssaseg.models import build_model, save_model

    save_model(run / "rgb.safetensors", build_model("seaformer_y", 2, "linear"), DEFAULTS)
    words = [f"model.pretrained={run / 'rgb.safetensors'}"]
    result = call("train", run / "four.yaml", *words, "--out", run / "tuned", "--device", "cpu", "--dry-run")
    assert result.exit_code == 0, result.output
    assert (
        "stem.conv.weight: from 3 to 4 channels; of each new channel: the mean of red, green and blue" in result.output
    )
