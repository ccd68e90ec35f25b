"""What lies beside results: classes, legends, shares and COCO results; and options that change the protocol."""

import csv
import json
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import pytest
import torch
from calling import call
from PIL import Image
from predicting import CLASSES, PALETTE, picture, save_checkpoint, write
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from ssaseg.cli.drawing.legend import SHARE, entries, with_legend
from ssaseg.cli.drawing.panels import overlay
from ssaseg.cli.evaluation.command import evaluate
from ssaseg.cli.options import protocol_changes
from ssaseg.cli.prediction.command import predict
from ssaseg.cli.prediction.ids import Ids
from ssaseg.cli.results.shares import share_lines, unique
from ssaseg.cli.scoring.inference import predict_labels
from ssaseg.cli.scoring.trained_size import times_larger, trained_scale, warn_of_size
from ssaseg.models import load_model
from ssaseg.recipes import parse_protocol

pytestmark = pytest.mark.usefixtures("one_thread", "tiny")
GIVEN = {"slide": None, "whole": False, "scale": None, "size": None, "ratios": None, "flip": None}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny: None) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors", "linear", network="seaformer_y")


def test_overlays_are_halves_rounded_up() -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (64, 65, 3), dtype=np.uint8)
    labels = generator.choice([0, 1, 2, 200, 255], (64, 65)).astype(np.uint8)
    palette = [(255, 0, 1), (254, 3, 128), (7, 8, 9)]
    colours = np.zeros((256, 3), int)
    colours[:3] = palette
    expected = (image.astype(int) + colours[labels][..., ::-1] + 1) // 2
    np.testing.assert_array_equal(
        overlay(image, labels, palette), np.where((labels == 255)[..., None], image, expected)
    )


# ---- COCO results ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def labelled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `in` and its results `out`: two images of two sizes, the second labelled by a second run."""
    place = tmp_path_factory.mktemp("labelled")
    words = ("predict", checkpoint, place / "in", "--out", place / "out", "--save", "index,rle,shares")
    write(place / "in/deep/a.png", picture(40, 56, 1))
    call(*words)
    write(place / "in/b.png", picture(48, 40, 2))
    ended = call(*words, "--skip-existing")
    assert "labelled 1 of 2 images" in ended.stdout
    assert "results are in" in ended.stdout
    assert "index/, rle.json, shares.json, classes.json" in ended.stdout
    return place


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools with NumPy 2
def test_coco_loads_the_results(labelled: Path) -> None:
    results = COCO(labelled / "out/rle.images.json").loadRes(str(labelled / "out/rle.json"))
    names = {image["file_name"]: image for image in results.loadImgs(results.getImgIds())}
    assert {name: (image["width"], image["height"]) for name, image in names.items()} == {
        "deep/a.png": (56, 40),
        "b.png": (40, 48),
    }
    for name, image in names.items():
        assert image["id"] == Ids().image(name) < 2**53
        labels = np.array(Image.open(labelled / "out/index" / name))
        found = results.loadAnns(results.getAnnIds(imgIds=image["id"]))
        assert [each["category_id"] for each in found] == np.unique(labels).tolist()
        for each in found:
            region = labels == each["category_id"]
            np.testing.assert_array_equal(coco_mask.decode(each["segmentation"]) > 0, region)
            assert each["area"] == region.sum(), "not that of a box around it"
            assert each["score"] == 1
            assert results.loadCats(each["category_id"])[0]["name"] == CLASSES[each["category_id"]]


def annotations(path: Path, images: dict[str, Any], categories: dict[int, str]) -> Path:
    listed = [{"id": number, "file_name": name, "width": 9, "height": 9} for name, number in images.items()]
    named = [{"id": number, "name": name} for number, name in categories.items()]
    path.write_text(json.dumps({"images": listed, "annotations": [], "categories": named}))
    return path


def test_ids_of_a_coco_file(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    """Images by their path or their name alone; classes by name, and others are left out."""
    file = annotations(tmp_path / "val.json", {"far/a.png": 7, "b.png": 9, "c.png": 1}, {17: "Car", 3: "road", 5: "x"})
    words = ("predict", checkpoint, labelled / "in", "--out", tmp_path / "out", "--save", "rle", "--annotations", file)
    result = call(*words)
    assert result.exit_code == 0
    assert "3 classes are no categories there and not in rle.json: tree, sky, void" in result.stderr
    loaded = COCO(file).loadRes(str(tmp_path / "out/rle.json")).dataset["annotations"]
    expected = {
        (number, {0: 3, 1: 17}[index])
        for name, number in (("deep/a.png", 7), ("b.png", 9))
        for index in np.unique(Image.open(labelled / "out/index" / name))
        if index < 2
    }
    assert {(each["image_id"], each["category_id"]) for each in loaded} == expected


@pytest.mark.parametrize(
    ("images", "categories", "text"),
    [
        ({"b.png": 9}, {1: "car"}, "has no id for 1 of 2 images: deep/a.png"),
        ({"x/a.png": 8, "y/a.png": 7, "b.png": 9}, {1: "car"}, "has no id for 1 of 2 images: deep/a.png"),
        ({"a.png": "7", "b.png": 9}, {1: "car"}, "an id is '7'"),
        ({"a.png": 7, "b.png": 9}, {1: "car", 2: "car"}, "two categories are called 'car'"),
    ],
)
def test_a_coco_file_that_does_not_fit_is_refused_before_the_network_is_read(
    labelled: Path, tmp_path: Path, images: dict[str, Any], categories: dict[int, str], text: str
) -> None:
    file = annotations(tmp_path / "val.json", images, categories)
    words = ("predict", __file__, labelled / "in", "--out", tmp_path / "out", "--save", "rle", "--annotations", file)
    result = call(*words)
    assert (result.exit_code, text in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()


# ---- shares ------------------------------------------------------------------------------------------------------
def test_shares_of_two_runs(labelled: Path) -> None:
    objects = {entry["image"]: entry for entry in json.loads((labelled / "out/shares.json").read_text())}
    rows = list(csv.DictReader((labelled / "out/shares.csv").open()))
    assert {row["image"] for row in rows} == set(objects) == {"deep/a.png", "b.png"}
    for row in rows:
        labels = np.array(Image.open(labelled / "out/index" / row["image"]))
        entry = objects[row["image"]]
        assert (entry["height"], entry["width"]) == labels.shape == (int(row["height"]), int(row["width"]))
        shares = np.bincount(labels.ravel(), minlength=5) / labels.size
        assert list(entry["shares"]) == list(row)[3:] == CLASSES
        np.testing.assert_allclose(list(entry["shares"].values()), shares, atol=1e-6)
        np.testing.assert_allclose([float(row[name]) for name in CLASSES], shares, atol=1e-6)


def test_shares_of_classes_with_one_name() -> None:
    assert unique(["a", "b", "a"]) == ["a (0)", "b", "a (2)"]
    (line,) = share_lines("x\n.png", np.array([[0, 2, 2, 2]], np.uint8), ["a", "b", "a"])
    assert json.loads(line)["shares"] == {"a (0)": 0.25, "b": 0, "a (2)": 0.75}


# ---- classes and legends -----------------------------------------------------------------------------------------
def test_classes_are_beside_the_results(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    found = json.loads((labelled / "out/classes.json").read_text())
    assert (found["classes"], found["palette"]) == (CLASSES, PALETTE)
    assert (found["model"], found["classifier"], found["checkpoint"]) == ("seaformer_y", "linear", checkpoint.name)
    assert len(found["sha256"]) == 64
    words = ("predict", checkpoint, labelled / "in/b.png", "--out", tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(found | {"classes": ["other"], "checkpoint": "x\x1b"}))
    result = call(*words)
    assert r"results of x\x1b, with other classes, are here too" in result.stderr
    assert json.loads((tmp_path / "classes.json").read_text()) == found
    for own in ('["road"]', "{", "[" * 99):
        (tmp_path / "classes.json").write_text(own)
        result = call(*words[:1], __file__, *words[2:])
        assert (result.exit_code, "not written by `ssaseg predict`" in result.stderr) == (2, True)
        assert (tmp_path / "classes.json").read_text() == own


@pytest.mark.parametrize(("height", "width"), [(360, 480), (480, 200), (600, 900), (100, 1000), (60, 80)])
def test_a_legend_covers_little_and_names_what_is_there(height: int, width: int) -> None:
    image = np.full((height, width, 3), 255, np.uint8)
    labels = np.zeros((height, width), np.uint8)
    labels[:, : width // 4] = 3
    classes = ["road", "never", "rare", "a very long name of a class \x1b[2J", *(f"class {k}" for k in range(4, 60))]
    colours = [[k, 255 - k, 0] for k in range(60)]
    labels[0, 0] = 2
    named = [entry.text for entry in entries(labels, classes, colours)]
    assert named == ["road  75 %", "a very long name of a cla…  25 %"]
    made = with_legend(image, labels, classes, colours)
    assert made.shape == image.shape
    changed = (made != image).any(axis=2)
    if min(height, width) < 90:
        assert not changed.any(), "too small"
        return
    assert 0 < changed.mean() <= SHARE
    assert changed[-1, 0]
    assert not changed[: height // 2].any()
    assert (made == (0, 255, 0)).all(axis=2).any(), "the colour of road, in BGR"
    for each in range(60):
        labels[each % height, :] = each
    assert (with_legend(image, labels, classes, colours) != image).any(axis=2).mean() <= SHARE


def test_overlays_without_a_legend(checkpoint: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.png", np.zeros((240, 320, 3), np.uint8))
    words = ("predict", checkpoint, source, "--save", "overlay,color", "--out")
    call(*words, tmp_path / "with")
    call(*words, tmp_path / "without", "--no-legend")
    first, second = (np.array(Image.open(tmp_path / out / "overlay/a.jpg")).astype(int) for out in ("with", "without"))
    colours = np.array(Image.open(tmp_path / "without/color/a.png"))
    assert np.abs(second - colours / 2).mean() < 6  # JPEG
    assert np.abs(first - second).max() > 100
    assert np.abs(first - second)[:100].mean() < 1


# ---- the protocol ------------------------------------------------------------------------------------------------
def test_eval_and_predict_change_the_protocol_alike() -> None:
    names = {parameter.name: parameter.to_info_dict() for parameter in predict.params}
    others = {parameter.name: parameter.to_info_dict() for parameter in evaluate.params}
    assert {key: names[key] for key in GIVEN} == {key: others[key] for key in GIVEN}
    cases = [
        ({}, {}),
        ({"size": 360}, {"scale": [1440, 360]}),
        ({"size": 9000}, {"scale": [16384, 9000]}),
        ({"size": "own"}, {"scale": None}),
        ({"scale": (480, 360), "flip": False}, {"scale": [480, 360], "flip": False}),
        (
            {"slide": (64, 32), "ratios": [0.5]},
            {"mode": "slide", "crop": [64, 64], "stride": [32, 32], "ratios": [0.5]},
        ),
        ({"whole": True}, {"mode": "whole", "crop": None, "stride": None}),
    ]
    for given, expected in cases:
        changes = protocol_changes(GIVEN | given)
        assert changes == expected
        parse_protocol(changes, "test")
    for wrong in ({"slide": (9, 9), "whole": True}, {"scale": (9, 9), "size": 9}):
        with click.Context(predict), pytest.raises(click.UsageError, match="give either"):
            protocol_changes(GIVEN | wrong)


@pytest.mark.parametrize("value", ["31", "1e3", "big", "16385", "-64", "²"])
def test_a_size_that_is_none(value: str) -> None:
    result = call("predict", __file__, "x", "--out", "y", "--size", value)
    assert (result.exit_code, "from 32 to 16384, or own" in result.stderr) == (2, True)


def test_labels_of_a_changed_protocol(checkpoint: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.png", picture(80, 100))
    words = ("predict", checkpoint, source, "--out", tmp_path / "out", "--exact", "--size", "40", "--ratios", "1,1.5")
    result = call(*words, "--flip")
    assert "protocol of the checkpoint, changed: resized to fit 160x40" in result.stdout
    assert "scales 1, 1.5, with horizontal flip" in result.stdout
    model, metadata = load_model(checkpoint)
    image = cv2.imread(str(source))
    assert image is not None
    protocol = {"scale": [160, 40], "ratios": [1.0, 1.5], "flip": True}
    expected = predict_labels(model, image, protocol, metadata["mean"], metadata["std"], torch.device("cpu")).labels
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out/index/a.png")), expected)


def test_photos_larger_than_in_training_are_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [(96, 144), (144, 96), (60, 90), (32, 48)]  # of 48x32 in training: 3, 3, 1.9 and 1 times as large
    photos = [write(tmp_path / f"{index}.png", picture(*size)) for index, size in enumerate(sizes)]
    photos.append(tmp_path / "gone.png")
    metadata = {"recipe": {"augment": {"scale": [48, 32]}}, "protocol": {"scale": None}}
    warn_of_size(metadata, parse_protocol({}, "x"), photos)
    text = "2 of 4 images are up to 3.0 times as large as in training (48x32)"
    warned = capsys.readouterr().err
    assert warned == f"warning: {text}: labels get worse\nresize them with --scale 48 32\n"
    slide = {"mode": "slide", "crop": [32, 32], "stride": [32, 32]}
    warn_of_size(metadata, parse_protocol(slide, "x"), photos)
    assert capsys.readouterr().err == warned, "windows do not change how large things are"
    warn_of_size(metadata, parse_protocol({"scale": [48, 32]}, "x"), photos)
    warn_of_size({"recipe": None, "protocol": {"scale": None}}, parse_protocol({}, "x"), photos)
    assert capsys.readouterr().err == ""
    warn_of_size(metadata, parse_protocol({}, "x"), photos[:1] * 200)
    assert "64 of 64 images that were looked at, of 200, are up to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "protocol", "expected"),
    [
        ({"augment": {"scale": [48, 32]}}, {"scale": [9, 9]}, (48, 32)),
        (None, {"scale": [64, 48]}, (64, 48)),
        ({"augment": []}, {"scale": [64, 48]}, None),
        ({"augment": {"scale": ["a", 1]}}, {}, None),
        ({"augment": {"scale": [0, 1]}}, {}, None),
        (None, {"scale": 7}, None),
    ],
)
def test_the_size_of_training(recipe: Any, protocol: Any, expected: tuple[int, int] | None) -> None:
    assert trained_scale({"recipe": recipe, "protocol": protocol}) == expected
    if expected == (48, 32):
        assert times_larger((64, 96), expected, parse_protocol({}, "x")) == 2
        assert times_larger((96, 64), expected, parse_protocol({"scale": [480, 320]}, "x")) == 10
