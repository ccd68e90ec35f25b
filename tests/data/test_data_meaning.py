"""Files that mean something else than they seem to, through the commands: init, check, train and predict."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from calling import call, put
from PIL import Image
from predicting import save_checkpoint
from raw_files import png

from ssaseg.cli.errors import CommandError
from ssaseg.cli.training.build import load_data
from ssaseg.cli.training.preflight import check_labels
from ssaseg.datasets import Dataset
from ssaseg.recipes import RecipeError, load_recipe

RECIPE = """
model: {{name: seaformer_t}}
data:
  root: {root}
  train: {{images: images/train, masks: masks/train}}
  val: {{images: images/val, masks: masks/val}}
  classes: [sky, road]
augment: {{scale: [64, 64], crop: [64, 64]}}
optim: {{lr: 1.0e-3}}
train: {{steps: 1}}
"""
COLOURS = [[40, 40, 40], [220, 60, 60], [60, 200, 70]]


def make(root: Path, write: Any, count: int = 3) -> Path:
    """Images and masks, the latter written by `write(file, number)`; and a recipe beside them."""
    for at, split in enumerate(("train", "val")):
        for number in range(count):
            put(root / f"images/{split}/{number}.png")
            mask = root / f"masks/{split}/{number}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            write(mask, at + number)
    recipe = root.parent / "own.yaml"
    recipe.write_text(RECIPE.format(root=json.dumps(str(root))), encoding="utf-8")
    return recipe


def ids(*values: int) -> np.ndarray:
    return np.resize(np.array(values, np.uint8), (40, 50))


def plain(file: Path, number: int) -> None:
    Image.fromarray(ids(0, 1)).save(file)


def train_check(recipe: Path, *words: str) -> dict[str, Dataset]:
    """What `ssaseg train` does with data before it builds a network."""
    loaded = load_recipe(str(recipe), words)
    splits = dict(zip(("training", "validation"), load_data(loaded), strict=True))
    check_labels(splits, recipe=loaded)
    return splits


def init(root: Path) -> Any:
    return call("data", "init", root, "--out", root.parent / "made.yaml")


# ---- masks -------------------------------------------------------------------------------------------------------
def test_palettes_that_number_colours_anew_in_each_file(tmp_path: Path) -> None:
    def write(file: Path, number: int) -> None:
        picture = Image.fromarray(ids(0, 1))
        picture.putpalette([part for colour in (COLOURS[0], COLOURS[1 + number % 2]) for part in colour])
        picture.save(file)

    root = tmp_path / "data"
    recipe = make(root, write)
    for result in (init(root), call("data", "check", recipe)):
        assert result.exit_code == 2
        for part in ("masks/train/0.png: id 1 is #dc3c3c", "#3cc846 in ", "masks/train/1.png"):
            assert part in result.output, result.output
    assert not (tmp_path / "made.yaml").exists()
    with pytest.raises(CommandError, match="id 1 is #dc3c3c"):
        train_check(recipe)


def test_soft_edges_are_no_classes(tmp_path: Path) -> None:
    """JPEG's traces around the edges of 0 and 255, stored as PNG."""
    hard = np.zeros((40, 50), np.uint8)
    cv2.ellipse(hard, (25, 20), (14, 9), 30, 0, 360, 255, -1)
    buffer = io.BytesIO()
    Image.fromarray(hard).save(buffer, "JPEG", quality=95)
    soft = np.array(Image.open(buffer))
    recipe = make(tmp_path / "data", lambda file, _: Image.fromarray(soft).save(file))
    result = init(tmp_path / "data")
    assert result.exit_code == 2
    assert "binary masks in masks/train/" in result.output
    assert "ssaseg data prepare binary" in result.output
    table = {int(value): at % 2 for at, value in enumerate(np.unique(soft)) if value != 255}
    result = call("data", "check", recipe, f"data.raw_to_train={json.dumps(table)}")
    assert "soft edges" in result.output
    assert "ssaseg data prepare binary" in result.output
    out = tmp_path / "out"
    assert call("data", "prepare", "binary", "--source", tmp_path / "data", "--root", out).exit_code == 0


def test_many_classes_of_which_few_pixels_are_labelled(tmp_path: Path) -> None:
    """255 has 85 % of the pixels, and 150 classes share the others: these are no soft edges."""
    values = ids(255)
    values[:6] = np.resize(np.arange(150), (6, 50))
    make(tmp_path / "data", lambda file, _: Image.fromarray(values).save(file))
    result = init(tmp_path / "data")
    assert result.exit_code == 0, result.output
    assert "255 is in the masks: read as 'ignored'" in result.output


def test_one_bit_and_eight_bits_are_read_alike(tmp_path: Path) -> None:
    def write(file: Path, number: int) -> None:
        file.write_bytes(png(ids(0, 1), 1) if number % 2 else png(ids(0, 255), 8))

    root = tmp_path / "data"
    recipe = make(root, write)
    result = call("data", "check", recipe)
    assert result.exit_code == 2
    assert "data.raw_to_train={0: 0, 1: 1, 255: 1}" in result.output
    result = init(root)
    assert result.exit_code == 0, result.output
    splits = train_check(tmp_path / "made.yaml")
    for split in splits.values():
        for index in range(len(split)):
            np.testing.assert_array_equal(split.load(index)[1], ids(0, 1))


def test_255_is_the_second_of_two_names(tmp_path: Path) -> None:
    root = tmp_path / "data"
    make(root, lambda file, _: Image.fromarray(ids(0, 255)).save(file))
    (root / "classes.txt").write_text("nothing\nboat\n")
    assert init(root).exit_code == 0
    splits = train_check(tmp_path / "made.yaml")
    assert splits["training"].classes == ("nothing", "boat")
    np.testing.assert_array_equal(splits["training"].load(0)[1], ids(0, 1))


# ---- images ------------------------------------------------------------------------------------------------------
def test_12_bits_in_16_from_init_to_predict(
    tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """`init` states the range, `check` is then content, and the checkpoint carries it to `predict`."""
    root = tmp_path / "data"
    recipe = make(root, plain)
    seeded = np.random.default_rng(0)
    for file in sorted(root.glob("images/*/*.png")):
        cv2.imwrite(str(file), seeded.integers(0, 4096, (40, 50, 3)).astype(np.uint16))
    train_check(recipe)
    said = capsys.readouterr().err
    assert "only 16 grey levels are left" in said
    assert "set data.range: [0, 4095]" in said
    assert init(root).exit_code == 0
    made = load_recipe(str(tmp_path / "made.yaml"))
    assert made.data.range == (0, 4095)
    assert call("data", "check", tmp_path / "made.yaml").exit_code == 0
    image = train_check(tmp_path / "made.yaml")["training"].load_image(0)
    assert len(np.unique(image)) > 200

    checkpoint = save_checkpoint(tmp_path / "m.safetensors", header={"range": [0, 4095]})
    Image.fromarray(image[..., ::-1]).save(tmp_path / "mapped.png")
    words = [root / "images/train/0.png", tmp_path / "mapped.png", "--out", tmp_path / "out", "--device", "cpu"]
    assert call("predict", checkpoint, *words).exit_code == 0
    labels = [np.array(Image.open(tmp_path / f"out/index/{name}.png")) for name in ("0", "mapped")]
    np.testing.assert_array_equal(*labels)
    assert len(np.unique(labels[0])) > 1


def test_orientation_is_said_by_init_check_and_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    recipe = make(root, plain)
    exif = Image.Exif()
    exif[0x0112] = 3
    for file in root.glob("images/train/*.png"):
        Image.open(file).save(file, exif=exif)
    result = call("data", "check", recipe)
    assert result.exit_code == 1
    assert "3 images have an EXIF orientation" in result.output
    assert "3 images have an EXIF orientation" in init(root).output
    train_check(recipe)
    assert "warning, training split: 3 images have an EXIF orientation" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "words"), [((24, 90), []), ((20, 300), ["test.scale=[128,96]"])])
def test_small_validation_images_are_said_before_the_first_step(
    tmp_path: Path, size: tuple[int, int], words: list[str]
) -> None:
    recipe = make(tmp_path / "data", plain)
    put(tmp_path / "data/images/val/1.png", size=size)
    put(tmp_path / "data/masks/val/1.png", (0, 1), size)
    result = call("data", "check", recipe, *words)
    assert result.exit_code == 2
    assert "1: too small for validation" in result.output
    with pytest.raises(CommandError, match=r"too small for validation(.|\n)*test\.multiple=32"):
        train_check(recipe, *words)
    assert call("data", "check", recipe, *words, "test.multiple=32").exit_code == 0


def test_small_images_outside_of_the_sample_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(tmp_path / "data", plain, count=4)
    put(tmp_path / "data/images/val/3.png", size=(24, 50))
    put(tmp_path / "data/masks/val/3.png", (0, 1), (24, 50))
    from ssaseg.datasets import check

    monkeypatch.setattr(check, "evenly", lambda count, sample: [0])
    with pytest.raises(CommandError, match="3: too small for validation"):
        train_check(recipe)


def test_images_in_both_splits_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make(tmp_path / "data", plain)
    twice = "data.val={images: images/train, masks: masks/train}"
    for words, code in ((["data", "check", str(recipe), twice], 1), (["data", "check", str(recipe)], 0)):
        assert call(*words).exit_code == code
    train_check(recipe, twice)
    assert "3 of 3 validation images are training images too: 0, 1, 2;" in capsys.readouterr().err
    copy = tmp_path / "data/images/val/2.png"
    copy.write_bytes((tmp_path / "data/images/train/0.png").read_bytes())
    assert "1 of 3 validation image is a training image too: 2;" in call("data", "check", recipe).output


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]"], "data.std"),
        (["data.std=[0.229,0.224,0.225]"], "data.std"),
        (["data.mean=[0.5,0.5,0.5]", "data.std=[1,1,1]"], "data.std"),
        (["data.mean=[0,0,0]", "data.std=[1,1,1]"], None),
        (["data.mean=[0,0,0]", "data.std=[255,255,255]"], None),
    ],
)
def test_mean_and_std_on_the_scale_of_1(tmp_path: Path, words: list[str], key: str | None) -> None:
    recipe = make(tmp_path / "data", plain, count=1)
    if key is None:
        load_recipe(str(recipe), words)
        return
    with pytest.raises(RecipeError, match=rf"{key}(.|\n)*0\.\.255(.|\n)*multiply by 255"):
        load_recipe(str(recipe), words)


@pytest.mark.parametrize("value", ["[5,5]", "[9,0]", "[0,70000]", "[0]", "[0.5,2]"])
def test_ranges_that_are_none(tmp_path: Path, value: str) -> None:
    recipe = make(tmp_path / "data", plain, count=1)
    with pytest.raises(RecipeError, match=r"data\.range"):
        load_recipe(str(recipe), [f"data.range={value}"])


# ---- predict -----------------------------------------------------------------------------------------------------
def test_predict_counts_what_it_leaves_out_and_takes_what_is_jpeg(tmp_path: Path, one_thread: None) -> None:
    photos = tmp_path / "photos"
    checkpoint = save_checkpoint(tmp_path / "m.safetensors")
    picture = Image.open(put(photos / "a.jpg"))
    for name in ("b.jfif", "c.jpe"):
        picture.save(photos / name, "JPEG")
    picture.save(photos / "d.gif")
    picture.save(photos / "e.jp2")
    for name in ("f.heic", "g.heic", "h.txt", ".hidden"):
        (photos / name).write_text("x")
    result = call("predict", checkpoint, photos, "--out", photos / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "3 files of other types are left out: 2 .heic, 1 .txt" in result.stderr
    assert "labelled 5 of 5 images" in result.stdout
    result = call("predict", checkpoint, photos / "*.heic", "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 2
    assert "no image found; 2 files of other types are left out: 2 .heic" in result.output
