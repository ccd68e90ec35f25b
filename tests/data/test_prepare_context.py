"""`ssaseg data prepare pascal_context_*`: what `detail`'s `getMask` paints, from JSON in PASCAL in Detail's form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pycocotools import mask as mask_utils

from ssaseg.cli.main import cli
from ssaseg.datasets import build_dataset
from ssaseg.datasets.published import LAYOUTS

HEIGHT, WIDTH = 9, 14


def prepare(name: str, source: Path, root: Path) -> Result:
    words = ["data", "prepare", name, "--source", str(source), "--root", str(root), "--workers", "0"]
    return CliRunner().invoke(cli, words)


def mask_of(root: Path, name: str) -> np.ndarray:
    with Image.open(root / f"SegmentationClassContext/{name}.png") as image:
        return np.array(image)


def make_context(source: Path) -> np.ndarray:
    """Two images in PASCAL in Detail's form; returns the category ids of the first, painted here."""
    (source / "JPEGImages").mkdir(parents=True)
    for name in ("2008_000002", "2008_000003", "2008_000007", "2010_000001"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(source / f"JPEGImages/{name}.jpg")
    painted, annotations = np.zeros((HEIGHT, WIDTH), int), []

    def paint(number: int, category: int, rows: slice, columns: slice, form: str = "packed", crowd: int = 0) -> None:
        area = np.zeros((HEIGHT, WIDTH), np.uint8)
        area[rows, columns] = 1
        packed = mask_utils.encode(np.asfortranarray(area))
        changes = np.flatnonzero(np.diff(area.ravel(order="F"), prepend=0, append=2))
        top, bottom, left, right = rows.start, rows.stop, columns.start, columns.stop
        segmentation: Any = {
            "packed": {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()},
            "plain": {"size": [HEIGHT, WIDTH], "counts": np.diff(changes, prepend=0).tolist()},
            "polygon": [[left, top, right, top, right, bottom, left, bottom]],
        }[form]
        row = {"id": number, "image_id": 2008000002, "category_id": category, "segmentation": segmentation}
        annotations.append({**row, "iscrowd": crowd, "area": 1.0, "bbox": [0, 0, 1, 1], "parts": []})
        painted[rows, columns] = category

    paint(7, 2, slice(0, 9), slice(0, 14))  # aeroplane everywhere, then covered in part
    paint(3, 458, slice(2, 6), slice(1, 8), "plain", crowd=1)  # window; crowds count
    paint(4, 284, slice(4, 9), slice(5, 11), "polygon")
    paint(5, 100, slice(0, 2), slice(0, 3))  # none of the 59: background
    images = [
        {"image_id": int(name.replace("_", "")), "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH}
        | {"phase": phase, "date_captured": "31-Dec-2010"}
        for name, phase in (("2008_000003", "val"), ("2008_000002", "train"), ("2010_000001", "test"))
    ]
    content = {"info": {}, "images": images, "annos_segmentation": annotations, "annos_occlusion": []}
    content |= {"annos_boundary": [], "parts": [], "categories": [{"category_id": 2, "name": "aeroplane"}]}
    (source / "trainval_merged.json").write_text(json.dumps(content), encoding="utf-8")
    return painted


@pytest.mark.parametrize("name", ["pascal_context_59", "pascal_context_60"])
def test_pascal_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    layout = dataclasses.replace(LAYOUTS[name], counts={"train": 1, "val": 1})
    monkeypatch.setitem(LAYOUTS, name, layout)
    painted = make_context(tmp_path / "VOCdevkit/VOC2010")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    root = tmp_path / "prepared"
    result = prepare(name, tmp_path / "VOCdevkit", root)
    assert result.exit_code == 0, result.output
    assert {file: file.read_bytes() for file in (tmp_path / "VOCdevkit").rglob("*") if file.is_file()} == before
    mask = mask_of(root, "2008_000002")
    numbers = {0: 0, 2: 1, 284: 37, 458: 59, 100: 0}  # mmsegmentation's `_mapping`, sorted: the place in it
    np.testing.assert_array_equal(mask, np.vectorize(numbers.__getitem__)(painted))
    assert set(np.unique(mask)) == {0, 1, 37, 59}
    assert not mask_of(root, "2008_000003").any()
    lists = {split: (root / f"ImageSets/SegmentationContext/{split}.txt").read_text() for split in ("train", "val")}
    assert lists == {"train": "2008_000002\n", "val": "2008_000003\n"}
    assert sorted(file.name for file in (root / "JPEGImages").iterdir()) == ["2008_000002.jpg", "2008_000003.jpg"]
    pairs = build_dataset(name, "train", root=root, options={})
    assert len(pairs) == 1
    expected = mask.astype(int) - 1 if name.endswith("59") else mask
    np.testing.assert_array_equal(pairs.load(0)[1], np.where(expected < 0, 255, expected))


def test_of_two_annotations_with_one_id_the_second_takes_the_first_ones_place(tmp_path: Path) -> None:
    """As in `detail`, which keeps annotations by id."""
    make_context(tmp_path)
    file = tmp_path / "trainval_merged.json"
    content = json.loads(file.read_text())
    full, window, *_ = content["annos_segmentation"]
    content["annos_segmentation"] = [full, window, {**full, "category_id": 9}]
    file.write_text(json.dumps(content))
    assert prepare("pascal_context_60", tmp_path, tmp_path).exit_code == 1
    assert set(np.unique(mask_of(tmp_path, "2008_000002"))) == {2, 59}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda text: text[: len(text) // 2], ["cut off", "expected a whole trainval_merged.json of PASCAL in Detail"]),
        (lambda text: "", ["cut off"]),
        (lambda text: "[1]", ["list"]),
        (lambda text: text.replace('"phase"', '"split"'), ["no 'phase'", "PASCAL in Detail"]),
        (lambda text: text.replace("annos_segmentation", "annotations"), ["no 'annos_segmentation'"]),
        (lambda text: text.replace('"category_id": 458', '"category_id": "458"'), ["category_id is '458'"]),
        (lambda text: text.replace('"category_id": 458', '"category_id": 460'), ["2008_000002", "id 460 in"]),
        (
            lambda text: text.replace('"size": [9, 14]', '"size": [14, 9]'),
            ["annos_segmentation, id", "[14, 9]", "[9, 14]"],
        ),
    ],
)
def test_wrong_context_annotations(tmp_path: Path, change: Any, parts: list[str]) -> None:
    make_context(tmp_path)
    file = tmp_path / "trainval_merged.json"
    file.write_text(change(file.read_text()))
    result = prepare("pascal_context_59", tmp_path, tmp_path / "root")
    assert result.exit_code == 2, result.output
    error = result.stderr[result.stderr.index("error: ") :]
    assert len(error.splitlines()) <= 3
    for part in ["trainval_merged.json", *parts]:
        assert part in error
    assert not (tmp_path / "root/SegmentationClassContext/2008_000002.png").exists()


def test_lists_that_were_there_before_are_never_overwritten(tmp_path: Path) -> None:
    make_context(tmp_path)
    file = tmp_path / LAYOUTS["pascal_context_59"].lists["val"]  # type: ignore[index]
    assert prepare("pascal_context_59", tmp_path, tmp_path).exit_code == 1  # as it isn't the whole data set
    names = file.read_text().split()
    reversed_names = "\r\n".join(reversed(names))
    file.write_text(reversed_names, newline="")
    assert prepare("pascal_context_59", tmp_path, tmp_path).exit_code == 1
    assert file.read_bytes() == reversed_names.encode()
    file.write_text("\n".join([*names, "mine"]))
    told = prepare("pascal_context_59", tmp_path, tmp_path)
    assert told.exit_code == 2
    assert f"{file}: this list already exists and differs" in told.stderr
    assert len(told.stderr.partition("error:")[2].splitlines()) <= 3
    assert file.read_text().split()[-1] == "mine"


def test_without_root_the_folder_with_the_images_is_completed(tmp_path: Path) -> None:
    make_context(tmp_path / "VOCdevkit/VOC2010")
    words = ["data", "prepare", "pascal_context_60", "--source", str(tmp_path / "VOCdevkit"), "--workers", "0"]
    assert CliRunner().invoke(cli, words).exit_code == 1  # fewer pairs than published
    assert (tmp_path / "VOCdevkit/VOC2010/SegmentationClassContext/2008_000002.png").is_file()
    assert [path.name for path in (tmp_path / "VOCdevkit").iterdir()] == ["VOC2010"]


def test_a_mask_of_another_size_than_its_image_is_wrong(tmp_path: Path) -> None:
    make_context(tmp_path)
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(tmp_path / "JPEGImages/2008_000002.jpg")
    result = prepare("pascal_context_59", tmp_path, tmp_path / "root")
    assert result.exit_code == 2, result.output
    error = result.stderr[result.stderr.index("error: ") :]
    assert f"image 2008_000002: mask of {WIDTH}x{HEIGHT} pixels" in error
    assert f"expected {WIDTH + 1}x{HEIGHT}, as its image {tmp_path / 'JPEGImages/2008_000002.jpg'}" in error
    assert len(error.splitlines()) <= 3
    assert not (tmp_path / "root/SegmentationClassContext/2008_000002.png").exists()
    assert (tmp_path / "root/SegmentationClassContext/2008_000003.png").exists(), "the others are made"
