"""Every kind of labels goes the whole way: `data init`, `data prepare` where it says so, `data check`, and the first
step of training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import call
from owndata import HEIGHT, WIDTH, command_for, photo, prepared, read_all, require_checked, save

NAMES = ["background", "road", "car"]
IDS = np.zeros((HEIGHT, WIDTH), np.uint8)
IDS[10:, 4:28], IDS[14:20, 8:20] = 1, 2
OUTLINES = {"road": [[4, 10], [27, 10], [27, 23], [4, 23]], "car": [[8, 14], [19, 14], [19, 19], [8, 19]]}
COLOURS = np.array([[0, 0, 0], [128, 64, 128], [0, 0, 142]], np.uint8)
STEMS = ("a", "b", "c")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting processes takes longer than reading a few small files."""
    monkeypatch.setattr("ssaseg.cli.data.reading.count_cores", lambda: 0)


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def photos(folder: Path) -> None:
    for stem in STEMS:
        photo(folder / f"{stem}.png")


# ---- pictures ----------------------------------------------------------------------------------------------------
def colours(root: Path) -> None:
    photos(root / "images")
    for stem in STEMS:
        save(root / f"masks/{stem}.png", COLOURS[IDS])
    lines = [f"{name},{','.join(map(str, colour))}" for name, colour in zip(NAMES, COLOURS.tolist(), strict=True)]
    write(root / "class_dict.csv", "\n".join(["name,r,g,b", *lines]))


def binary(root: Path) -> None:
    photos(root / "images")
    for stem in STEMS:
        save(root / f"masks/{stem}.png", np.dstack([(IDS > 0).astype(np.uint8) * 255] * 3))


def grey(root: Path) -> None:
    photos(root / "images")
    for stem in STEMS:
        save(root / f"masks/{stem}.png", np.dstack([IDS] * 3))
    write(root / "classes.txt", "\n".join(NAMES))


def layers(root: Path) -> None:
    photos(root / "images")
    for stem in STEMS:
        for value, name in enumerate(NAMES[1:], 1):
            save(root / f"masks/{stem}_{name}.png", (value == IDS).astype(np.uint8) * 255)


# ---- outlines ----------------------------------------------------------------------------------------------------
def yolo(root: Path) -> None:
    photos(root / "images/train")
    photos(root / "images/val")
    lines = [
        " ".join([str(at), *(f"{x / WIDTH:.5f} {y / HEIGHT:.5f}" for x, y in points)])
        for at, points in enumerate(OUTLINES.values())
    ]
    for split in ("train", "val"):
        for stem in STEMS:
            write(root / f"labels/{split}/{stem}.txt", "\n".join(lines))
    write(root / "data.yaml", "train: images/train\nval: images/val\nnames: [road, car]\n")


def labelme(root: Path) -> None:
    photos(root)
    shapes = [{"label": name, "points": points, "shape_type": "polygon"} for name, points in OUTLINES.items()]
    for stem in STEMS:
        size = {"imageHeight": HEIGHT, "imageWidth": WIDTH, "imageData": None}
        write(root / f"{stem}.json", {"version": "5.4.1", "shapes": shapes, "imagePath": f"{stem}.png", **size})


def coco_panoptic(root: Path) -> None:
    for split in ("train", "val"):
        photos(root / f"{split}2017")
        entries, images = [], []
        for number, stem in enumerate(STEMS):
            save(root / f"annotations/panoptic_{split}2017/{stem}.png", np.dstack([IDS * 70, IDS, IDS * 0]))
            images.append({"id": number, "file_name": f"{stem}.png", "height": HEIGHT, "width": WIDTH})
            segments = [{"id": 326 * value, "category_id": value, "iscrowd": 0} for value in (1, 2)]
            entries.append({"image_id": number, "file_name": f"{stem}.png", "segments_info": segments})
        categories = [{"id": value, "name": NAMES[value]} for value in (1, 2)]
        content = {"images": images, "annotations": entries, "categories": categories}
        write(root / f"annotations/panoptic_{split}2017.json", content)


def via(root: Path) -> None:
    photos(root)
    regions = [
        {
            "shape_attributes": {
                "name": "polygon",
                "all_points_x": [x for x, _ in points],
                "all_points_y": [y for _, y in points],
            },
            "region_attributes": {"class": name},
        }
        for name, points in OUTLINES.items()
    ]
    write(
        root / "via_region_data.json",
        {f"{stem}.png9": {"filename": f"{stem}.png", "size": 9, "regions": regions} for stem in STEMS},
    )


def supervisely(root: Path) -> None:
    photos(root / "ds/img")
    objects = [
        {"classTitle": name, "geometryType": "polygon", "points": {"exterior": points, "interior": []}}
        for name, points in OUTLINES.items()
    ]
    for stem in STEMS:
        write(root / f"ds/ann/{stem}.png.json", {"size": {"height": HEIGHT, "width": WIDTH}, "objects": objects})
    write(root / "meta.json", {"classes": [{"title": n, "shape": "any", "color": "#804080"} for n in OUTLINES]})


def cvat(root: Path) -> None:
    photos(root / "images")
    shapes = "".join(
        f'<polygon label="{name}" z_order="0" points="{";".join(f"{x},{y}" for x, y in points)}"></polygon>'
        for name, points in OUTLINES.items()
    )
    labels = "".join(f"<label><name>{name}</name></label>" for name in OUTLINES)
    text = f"<annotations><version>1.1</version><meta><job><labels>{labels}</labels></job></meta>"
    for at, stem in enumerate(STEMS):
        text += f'<image id="{at}" name="{stem}.png" width="{WIDTH}" height="{HEIGHT}">{shapes}</image>'
    write(root / "annotations.xml", f"{text}</annotations>")


def kitti(root: Path) -> None:
    for stem in STEMS:
        photo(root / f"training/image_2/{stem}_10.png")
        save(root / f"training/semantic/{stem}_10.png", np.where(IDS, 7, 11 + IDS).astype(np.uint8))


# ---- read directly -----------------------------------------------------------------------------------------------
def coco(root: Path) -> None:
    photos(root / "images")
    images = [{"id": at, "file_name": f"{s}.png", "height": HEIGHT, "width": WIDTH} for at, s in enumerate(STEMS)]
    outlines = [np.ravel(points).tolist() for points in OUTLINES.values()]
    regions = [
        {"id": 2 * at + value, "image_id": at, "category_id": value, "iscrowd": 0, "segmentation": [outline]}
        for at in range(len(STEMS))
        for value, outline in enumerate(outlines, 1)
    ]
    categories = [{"id": value, "name": name} for value, name in enumerate(OUTLINES, 1)]
    write(root / "labels.json", {"images": images, "annotations": regions, "categories": categories})


def pairs(root: Path) -> None:
    for scene in ("one", "two"):
        photos(root / scene / "images")
        for stem in STEMS:
            save(root / scene / f"masks/{stem}.png", IDS)


def require_step(recipe: Path) -> None:
    """The first step of training with the recipe that `init` wrote, small."""
    small = [
        "model.name=seaformer_t",
        "model.pretrained=null",
        "augment.scale=[64, 48]",
        "augment.crop=[32, 32]",
        "train.batch=2",
    ]
    words = [*small, "train.workers=0", "train.amp=off", "test.scale=[64, 48]"]
    result = call("train", recipe, *words, "--dry-run", "--device", "cpu", "--out", recipe.parent / "run")
    assert result.exit_code == 0, result.output
    assert "dry run: one step took" in result.output
    assert not (recipe.parent / "run").exists()


KINDS = [colours, binary, grey, layers, yolo, labelme, coco_panoptic, via, supervisely, cvat, kitti]
# One kind of pixels and one of outlines, as a step takes most of the time; the folders that are prepared are alike.
TRAINED = (colours, yolo)


@pytest.mark.parametrize("make", KINDS)
def test_prepared_kinds(make: Callable[[Path], None], tmp_path: Path, one_thread: None) -> None:
    make(tmp_path / "data")
    assert command_for(tmp_path / "data", tmp_path)[2] == make.__name__
    data, labels, _ = prepared(tmp_path / "data", tmp_path)
    if make is kitti:
        assert {len(np.unique(label)) for label in labels.values()} == {2}
    else:
        assert set(data.classes) <= {*NAMES, "object"}
        shown = np.array([list(data.classes).index(name) if name in data.classes else 255 for name in NAMES])
        shown = np.array([0, 1, 1]) if make is binary else shown
        for label in labels.values():
            # Tools differ in which pixels an edge belongs to.
            assert (label == shown[IDS]).mean() > (0.9 if make in (yolo, cvat) else 0.999)
    if make in TRAINED:
        require_step(tmp_path / "prepared.yaml")


@pytest.mark.parametrize("make", [coco, pairs])
def test_kinds_that_are_read_directly(make: Callable[[Path], None], tmp_path: Path, one_thread: None) -> None:
    make(tmp_path / "data")
    recipe = tmp_path / "own.yaml"
    result = call("data", "init", tmp_path / "data", "--out", recipe)
    assert result.exit_code == 0, result.output
    require_checked(recipe)
    _, labels = read_all(recipe)
    assert all(set(np.unique(label)) == {0, 1, 2} for label in labels.values())
    require_step(recipe)
