"""`ssaseg data init` and `check` on folders with COCO-format annotations, as tools write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from calling import call
from PIL import Image

from ssaseg.datasets import DataError
from ssaseg.datasets.conventions.base import Tree
from ssaseg.datasets.conventions.coco import find_coco
from ssaseg.recipes import load_recipe

WIDTH, HEIGHT = 40, 50
ROBOFLOW = [
    {"id": 0, "name": "scenes", "supercategory": "none"},
    {"id": 1, "name": "road", "supercategory": "scenes"},
    {"id": 2, "name": "car", "supercategory": "scenes"},
]
HALF = [0, 0, WIDTH, 0, WIDTH, HEIGHT // 2, 0, HEIGHT // 2]
ALL = [0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT]


def coco(file: Path, *images: str, folder: Path | None, categories: Any = None, outline: Any = None) -> Path:
    """A file in which each image has one region of the second category; images are made in `folder`."""
    categories = categories or ROBOFLOW[1:]
    entries, annotations = [], []
    for number, name in enumerate(images):
        if folder is not None:
            (folder / name.replace("\\", "/")).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name.replace("\\", "/"))
        entries.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        region = {"id": number, "image_id": number, "category_id": categories[1]["id"], "iscrowd": 0}
        annotations.append(region | {"segmentation": [outline or HALF]})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": categories}))
    return file


def roboflow(root: Path) -> None:
    coco(root / "train/_annotations.coco.json", "a.jpg", "b.jpg", folder=root / "train", categories=ROBOFLOW)
    coco(root / "valid/_annotations.coco.json", "c.jpg", folder=root / "valid", categories=ROBOFLOW)


def published(root: Path) -> None:
    """COCO's own layout, with its other files."""
    for split, name in (("train2017", "a.jpg"), ("val2017", "b.jpg")):
        coco(root / f"annotations/instances_{split}.json", name, folder=root / split)
        coco(root / f"annotations/person_keypoints_{split}.json", name, folder=None)
        (root / f"annotations/captions_{split}.json").write_text('{"images": [], "annotations": [{"caption": "x"}]}')


def cvat(root: Path) -> None:
    coco(root / "annotations/instances_Train.json", "x/a.png", folder=root / "images/Train")
    coco(root / "annotations/instances_Validation.json", "x/a.png", folder=root / "images/Validation")


def stuff(root: Path) -> None:
    for split in ("train", "val"):
        coco(root / f"instances_{split}.json", "a.jpg", folder=root / split)
        coco(root / f"stuff_{split}.json", "a.jpg", folder=None, outline=ALL)


@pytest.mark.parametrize(
    ("make", "splits", "classes"),
    [
        (
            roboflow,
            {
                "train": ("train", ("train/_annotations.coco.json",)),
                "val": ("valid", ("valid/_annotations.coco.json",)),
            },
            ["road", "car"],
        ),
        (
            published,
            {
                "train": ("train2017", ("annotations/instances_train2017.json",)),
                "val": ("val2017", ("annotations/instances_val2017.json",)),
            },
            ["road", "car"],
        ),
        (
            cvat,
            {
                "train": ("images/Train", ("annotations/instances_Train.json",)),
                "val": ("images/Validation", ("annotations/instances_Validation.json",)),
            },
            ["road", "car"],
        ),
        (
            stuff,
            {
                "train": ("train", ("stuff_train.json", "instances_train.json")),
                "val": ("val", ("stuff_val.json", "instances_val.json")),
            },
            ["road", "car"],
        ),
    ],
)
def test_layouts(tmp_path: Path, make: Any, splits: dict[str, Any], classes: list[str]) -> None:
    make(tmp_path)
    found = find_coco(Tree(tmp_path))
    assert found is not None
    assert {split: (place.images, place.annotations) for split, place in found.splits.items()} == splits
    assert found.classes == classes


def test_a_group_with_annotations_stays_a_class(tmp_path: Path) -> None:
    """Only a group of others that has no annotation is dropped."""
    coco(tmp_path / "a.json", "a.jpg", folder=tmp_path, categories=[ROBOFLOW[1], ROBOFLOW[0]])
    found = find_coco(Tree(tmp_path))
    assert found is not None
    assert found.classes == ["scenes", "road"]


def test_two_files_about_the_same_images_are_refused(tmp_path: Path) -> None:
    coco(tmp_path / "labels.json", "a.jpg", folder=tmp_path)
    coco(tmp_path / "labels (1).json", "a.jpg", folder=None)
    with pytest.raises(DataError, match=r"labels \(1\).json and .*labels.json: both annotate a.jpg"):
        find_coco(Tree(tmp_path))


def test_images_that_are_nowhere(tmp_path: Path) -> None:
    coco(tmp_path / "labels.json", "a.jpg", folder=None)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "b.jpg")
    result = call("data", "init", tmp_path, "--out", tmp_path / "r.yaml")
    assert result.exit_code == 2
    assert "none of its images was found, such as 'a.jpg'" in result.output


def test_init_writes_a_recipe_with_background(tmp_path: Path) -> None:
    roboflow(tmp_path / "data")
    result = call("data", "init", tmp_path / "data", "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    assert "50% of pixels are in no region" in result.output
    assert "category scenes" in result.output
    data = load_recipe(str(tmp_path / "r.yaml")).data
    assert (data.dataset, data.background, data.classes) == ("coco_json", "background", ("background", "road", "car"))
    checked = call("data", "check", tmp_path / "r.yaml")
    assert "have no pixel" in checked.output  # of road
    assert "in no region" not in checked.output
    folder = call("data", "check", tmp_path / "data")
    assert "car" in folder.output, folder.output


def test_init_without_uncovered_pixels_and_without_splits(tmp_path: Path) -> None:
    """Label Studio's result.json, with Windows' backslashes: all images in one file, divided by lists of names."""
    names = [f"images\\{number}.png" for number in range(6)]
    coco(tmp_path / "data/result.json", *names, folder=tmp_path / "data", outline=ALL)
    result = call("data", "init", tmp_path / "data", "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    data = load_recipe(str(tmp_path / "r.yaml")).data
    assert (data.background, data.classes) == (None, ("road", "car"))
    lists = [(tmp_path / f"r.{split}.txt").read_text().split() for split in ("train", "val")]
    assert sorted(lists[0] + lists[1]) == [f"images/{number}" for number in range(6)]
    assert len(lists[1]) == 1
    assert "have no pixel" in call("data", "check", tmp_path / "r.yaml").output


def test_masks_are_read_where_there_are_both(tmp_path: Path) -> None:
    coco(tmp_path / "data/labels.json", "images/a.png", "images/b.png", folder=tmp_path / "data")
    for name in "ab":
        (tmp_path / "data/masks").mkdir(exist_ok=True)
        mask = Image.new("L", (WIDTH, HEIGHT))
        mask.paste(1, (0, 0, 9, 9))
        mask.save(tmp_path / f"data/masks/{name}.png")
    assert call("data", "init", tmp_path / "data", "--out", tmp_path / "r.yaml").exit_code == 0
    assert load_recipe(str(tmp_path / "r.yaml")).data.dataset == "folder"


def put_masks(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        mask = Image.new("L", (WIDTH, HEIGHT))
        mask.paste(1, (0, 0, 9, 9))
        mask.save(folder / name)


def test_annotations_that_are_not_used_are_named(tmp_path: Path) -> None:
    coco(tmp_path / "data/labels.json", "images/a.png", "images/b.png", folder=tmp_path / "data")
    put_masks(tmp_path / "data/masks", "a.png", "b.png")
    result = call("data", "init", tmp_path / "data", "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    assert "COCO-format annotations, not used, as there are masks: labels.json" in result.stdout
    assert "not used, as there are masks: labels.json" in call("data", "check", tmp_path / "data").output


def test_a_few_masks_do_not_hide_the_annotations(tmp_path: Path) -> None:
    names = [f"images/{number}.png" for number in range(6)]
    coco(tmp_path / "data/labels.json", *names, folder=tmp_path / "data")
    put_masks(tmp_path / "data/masks", "0.png", "1.png")
    result = call("data", "init", tmp_path / "data", "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    assert load_recipe(str(tmp_path / "r.yaml")).data.dataset == "coco_json"
    assert "masks, not used, as most of the annotated images have none: of 2 images" in result.stdout


def test_masks_that_fit_equally_well_are_an_error_beside_annotations_too(tmp_path: Path) -> None:
    coco(tmp_path / "data/labels.json", "images/a.png", "images/b.png", folder=tmp_path / "data")
    for folder in ("masks_one", "masks_two"):
        put_masks(tmp_path / "data" / folder, "a.png", "b.png")
    result = call("data", "init", tmp_path / "data", "--out", tmp_path / "r.yaml")
    assert result.exit_code == 2
    assert "masks_one and masks_two hold masks that fit equally well" in result.output
