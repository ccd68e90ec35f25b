"""`ssaseg data check` and `train --check`: what is wrong is told, all of it, with the right exit code."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import call, put
from PIL import Image

from ssaseg.cli.data.reading import read_through
from ssaseg.cli.errors import CommandError
from ssaseg.cli.training.preflight import check_labels
from ssaseg.datasets import check
from ssaseg.datasets.exporting import export_scenes
from ssaseg.datasets.pairs import PairDataset
from ssaseg.datasets.synthetic import SyntheticScenes

RECIPE = """
model: {{name: seaformer_t}}
data:
  root: {root}
  train: {{images: images/train, masks: masks/train}}
  val: {{images: images/val, masks: masks/val}}
  classes: [sky, road, tree]
augment: {{scale: [64, 64], crop: [64, 64]}}
optim: {{lr: 1.0e-3}}
train: {{steps: 1}}
"""


def make_pairs(root: Path, values: tuple[int, ...] = (0, 1, 2), count: int = 4) -> Path:
    """Pairs in images/ and masks/ with train and val, and a recipe for them."""
    for split in ("train", "val"):
        for number in range(count):
            put(root / f"images/{split}/{number}.jpg")
            put(root / f"masks/{split}/{number}.png", values)
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=json.dumps(str(root))), encoding="utf-8")
    return recipe


# ---- check -------------------------------------------------------------------------------------------------------


def test_clean_data_has_a_table_and_code_0(tmp_path: Path) -> None:
    result = call("data", "check", make_pairs(tmp_path))
    assert result.exit_code == 0, result.output
    assert "train split: 4 pairs, images of 50x40 pixels" in result.stdout
    row = next(line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["road"])
    assert row == ["road", "1", "2,668", "33.35", "4"]
    assert "no problems found" in result.stdout


def test_warnings_are_code_1_and_one_split_may_be_chosen(tmp_path: Path) -> None:
    recipe = make_pairs(tmp_path)
    put(tmp_path / "masks/val/stray.png", (0,))
    result = call("data", "check", recipe)
    assert result.exit_code == 1
    assert "warning, val split: 1 mask has no image" in result.stdout
    assert call("data", "check", recipe, "--split", "train").exit_code == 0


def test_all_troubles_are_reported_with_file_id_and_count(tmp_path: Path) -> None:
    recipe = make_pairs(tmp_path, count=8)
    masks, images = tmp_path / "masks/train", tmp_path / "images/train"
    (masks / "0.png").unlink()
    images.joinpath("1.jpg").write_bytes(images.joinpath("1.jpg").read_bytes()[:-100])
    put(masks / "2.png", (0, 1), size=(40, 49))
    put(masks / "3.png", (0, 9))
    put(masks / "4.png")  # in colours
    masks.joinpath("5.png").write_bytes(b"")
    result = call("data", "check", recipe, "--json", tmp_path / "report.json")
    assert result.exit_code == 2
    report = json.loads((tmp_path / "report.json").read_text())
    train, val = report["splits"]
    assert (train["pairs"], report["errors"], val["problems"]) == (7, 6, [])
    assert Counter(problem["kind"] for problem in train["problems"]) == {
        "incomplete": 1,
        "image that cannot be read": 1,
        "sizes that differ": 1,
        "ids out of range": 1,
        "mask that cannot be used": 2,
    }
    assert f"{masks}/3.png: id 9 in 1000 pixels" in result.stdout
    assert "3 channels (mode RGB)" in result.stdout
    assert "out of range: 10.04% of the pixels: id 9 (1,000 pixels in 1 mask)" in result.stdout
    assert {row["id"]: row["is"] for row in train["raw_ids"]} == {0: "sky", 1: "road", 2: "tree", 9: "out of range"}


def test_a_split_that_cannot_be_opened_does_not_hide_the_other(tmp_path: Path) -> None:
    recipe = make_pairs(tmp_path)
    (tmp_path / "images/train").rename(tmp_path / "images/elsewhere")
    result = call("data", "check", recipe, "--json", "-")
    assert result.exit_code == 2
    train, val = json.loads(result.stdout)["splits"]
    assert "no such folder" in train["problems"][0]["text"]
    assert (val["pairs"], len(val["classes"])) == (4, 3)


def test_recipe_words_and_a_folder_with_a_recipe_in_it(tmp_path: Path) -> None:
    make_pairs(tmp_path)
    (tmp_path / "other.yaml").write_text("services: {}\n")
    assert call("data", "check", tmp_path).exit_code == 0
    result = call("data", "check", tmp_path, "data.reduce_zero_label=true", "data.classes=[a,b]")
    assert result.exit_code == 0
    assert "ignored: 33.35% of the pixels: id 0" in result.stdout
    (tmp_path / "second.yaml").write_text((tmp_path / "recipe.yaml").read_text())
    assert "2 recipes: recipe.yaml, second.yaml" in call("data", "check", tmp_path).stderr


def test_published_layouts_are_recognised_and_counted(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        put(tmp_path / f"images/{split}/a.jpg")
        put(tmp_path / f"annotations/{split}/a.png", (0, 1, 150))
    result = call("data", "check", tmp_path, "--split", "val")
    assert result.exit_code == 1
    assert "the layout of data set ade20k" in result.stdout
    assert "1 pair; the published val split has 2000" in result.stdout


SETTABLE = ("data.reduce_zero_label", "data.classes", "raw_to_train", "mask_suffix", "ignore_index")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ((0, 1, 2), "0 ignored, classes 1..150"),  # reduced before
        ((0,), "0 ignored, classes 1..150"),
        ((0, 0, 0, 150), "149 of 150 classes have no pixel"),
    ],
)
def test_advice_for_published_data_is_what_can_be_done(tmp_path: Path, values: tuple[int, ...], part: str) -> None:
    for split in ("training", "validation"):
        put(tmp_path / f"images/{split}/a.jpg")
        put(tmp_path / f"annotations/{split}/a.png", values)
    result = call("data", "check", "ade20k-seaformer_b-ssa", f"data.root={tmp_path}")
    assert part in result.stdout
    assert not any(key in result.stdout for key in SETTABLE), result.stdout


def test_half_a_published_data_set_is_to_be_prepared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / f"images/train2014/{name}.jpg")
    put(tmp_path / "annotations/train2014/a_labelTrainIds.png", (0, 1))
    result = call("data", "check", "coco_stuff10k-seaformer_b-ssa", f"data.root={tmp_path}", "--split", "train")
    assert result.exit_code == 2
    assert "1 of 2 images have no mask: b" in result.stdout
    assert f"run `ssaseg data prepare coco_stuff10k --source DIR --root {tmp_path}`" in result.stdout
    assert not any(key in result.stdout for key in SETTABLE), result.stdout


def test_missing_data_in_the_usual_place_are_not_sent_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    missing = call("data", "check", "ade20k-seaformer_b-ssa").stdout
    assert "download ADEChallengeData2016 from its official site, or set its folder: data.root=DIR\n" in missing
    elsewhere = call("data", "check", "ade20k-seaformer_b-ssa", "data.root=here").stdout
    assert "data.root=DIR (often data/ade/ADEChallengeData2016)" in elsewhere


def test_anybodys_folder_is_not_taken_for_camvid(tmp_path: Path) -> None:
    for split in ("train", "val"):
        put(tmp_path / f"images/{split}/a.jpg")
        put(tmp_path / f"annotations/{split}/a.png", (0, 5, 255))
    result = call("data", "check", tmp_path)
    assert result.exit_code == 0
    assert "as `ssaseg data init` finds them" in result.stdout
    assert [line.split()[:2] for line in result.stdout.splitlines() if "class_" in line and "%" not in line] == [
        ["class_0", "0"],
        ["class_5", "1"],
    ] * 2


def test_built_in_scenes_are_checked_too() -> None:
    words = "data.synthetic={height: 64, width: 64, train: 3, val: 2}"
    result = call("data", "check", "demo", words, "--split", "train")
    assert result.exit_code in (0, 1)  # three small scenes may lack a class
    assert "train split: 3 pairs, images of 64x64 pixels" in result.stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["gone"], "no shipped recipe"),
        (["gone/away"], "no such folder"),
        (["gone.yaml"], "no such file"),
        (["."], "no images in this folder"),
        ([".", "data.root=x"], "a folder without recipe"),
    ],
)
def test_nothing_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], part: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("data", "check", *words)
    assert result.exit_code == 2
    assert part in result.stderr
    assert len(result.stderr.splitlines()) <= 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_check_cleanly(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = SyntheticScenes(200, 64, 64)
    load = scenes.load_raw

    def load_and_signal(index: int) -> Any:
        if index == 5:
            os.kill(os.getppid(), number)
        return load(index)

    monkeypatch.setattr(scenes, "load_raw", load_and_signal)
    with pytest.raises(SystemExit) as ended:
        read_through(scenes, "checked")
    assert ended.value.code == code
    assert "of 200 pairs" in capsys.readouterr().err


def test_train_looks_at_a_sample_or_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pairs(tmp_path, count=6)
    monkeypatch.setattr(check, "SMALL", 0)
    monkeypatch.setattr(check, "DECODED", 0)
    dataset = PairDataset(tmp_path / "images/train", tmp_path / "masks/train", ["sky", "road", "tree"])
    noise = np.random.RandomState(0).randint(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(noise).save(dataset.image_files[5])
    data = bytearray(dataset.image_files[5].read_bytes())
    data[1200:1300] = b"\xff\xc8" * 50
    dataset.image_files[5].write_bytes(data)
    check_labels({"training": dataset})
    assert capsys.readouterr().err == ""
    check_labels({"training": dataset}, "all")
    assert "warning, training split" in capsys.readouterr().err
    put(dataset.mask_files[5], (0, 1), size=(40, 49))
    put(dataset.mask_files[4], (0, 9))
    with pytest.raises(CommandError, match=r"4\.png: id 9 in 1000 pixels(.|\n)*the first of several problems"):
        check_labels({"training": dataset}, "all")


def test_coco_annotations_are_checked(tmp_path: Path) -> None:
    for split in ("train", "val"):
        export_scenes(tmp_path / "scenes", 2, split=split, height=64, width=64, layout="coco")
    words = [
        "data.dataset=coco_json",
        f"data.root={tmp_path / 'scenes'}",
        *(f"data.{s}={{images: images/{s}, annotations: annotations/instances_{s}.json}}" for s in ("train", "val")),
        "data.classes=[]",
    ]
    recipe = make_pairs(tmp_path)
    assert call("data", "check", recipe, *words).exit_code in (0, 1)  # two small scenes may lack a class
    file = tmp_path / "scenes/annotations/instances_val.json"
    file.write_bytes(file.read_bytes()[:-100])
    image = sorted((tmp_path / "scenes/images/train").iterdir())[1]
    image.write_bytes(image.read_bytes()[:-100])
    result = call("data", "check", recipe, *words)
    assert result.exit_code == 2
    assert f"train split: {image}: damaged image" in result.stdout
    assert f"val split: {file}: is cut off" in result.stdout


def test_splits_with_other_classes_are_an_error_as_in_training(tmp_path: Path) -> None:
    for split in ("train", "val"):
        export_scenes(tmp_path, 1, split=split, height=64, width=64, layout="coco")
    file = tmp_path / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "zebra"
    file.write_text(json.dumps(content))
    words = [
        "data.dataset=coco_json",
        f"data.root={tmp_path}",
        *(f"data.{s}={{images: images/{s}, annotations: annotations/instances_{s}.json}}" for s in ("train", "val")),
    ]
    result = call("data", "check", "demo", *words, "--json", tmp_path / "report.json")
    assert result.exit_code == 2
    train, val = json.loads((tmp_path / "report.json").read_text())["splits"]
    assert "other classes" not in {problem["kind"] for problem in train["problems"]}
    (problem,) = [problem for problem in val["problems"] if problem["kind"] == "other classes"]
    assert "only one of them has" in problem["text"]
    assert problem["text"].splitlines()[0] in result.stdout
    assert call("train", "demo", *words, "--dry-run", "--device", "cpu").exit_code == 2
