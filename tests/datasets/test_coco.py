"""COCO-format files: what is painted, against pycocotools' own masks, and what each mistake is answered with."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from ssaseg.datasets import DataError, build_dataset, default_palette
from ssaseg.datasets.annotations import run_lengths
from ssaseg.datasets.check import check_dataset, require_same_classes
from ssaseg.datasets.coco import CocoDataset
from ssaseg.recipes import RecipeError, parse_recipe

HEIGHT, WIDTH = 30, 40
CATEGORIES = [
    {"id": 7, "name": "dog"},
    {"id": 3, "name": "cat"},
    {"id": 900, "name": "sofa"},
]  # in order: cat, dog, sofa


def square(top: int, left: int, side: int) -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[top : top + side, left : left + side] = 1
    return pixels


def rle(pixels: np.ndarray, text: bool = True) -> dict[str, Any]:
    counts = mask_utils.encode(np.asfortranarray(pixels))["counts"].decode()
    return {"size": list(pixels.shape), "counts": counts if text else run_lengths(counts).tolist()}


def document(*annotations: tuple[int, Any], **changes: Any) -> dict[str, Any]:
    """A file of one image "a.png" with annotations (category, segmentation)."""
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": category, "segmentation": segmentation, "iscrowd": 0}
            for number, (category, segmentation) in enumerate(annotations, 1)
        ],
        "categories": CATEGORIES,
    }
    return {**content, **changes}


def dataset(root: Path, *documents: Any, **options: Any) -> CocoDataset:
    """The data set of these files, whose images are made as they say."""
    files = []
    for number, content in enumerate(documents):
        files.append(root / f"{number}.json")
        files[-1].write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        for image in content.get("images", []) if isinstance(content, dict) else []:
            put(root / "images" / str(image.get("file_name")), image["height"], int(image.get("width", 1)))
    return CocoDataset(root / "images", files, **options)


def put(file: Path, height: int, width: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        Image.fromarray(np.full((height, width, 3), 7, np.uint8)).save(file, "PNG")


def label(root: Path, *documents: Any, **options: Any) -> np.ndarray:
    return dataset(root, *documents, **options).load(0)[1]


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        act()
    assert len(str(caught.value).splitlines()) <= 3, str(caught.value)
    return str(caught.value)


# What is painted


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_polygons_and_run_lengths_are_pycocotools_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    polygons = [rng.uniform(-5, 45, (2, count)).T.ravel().tolist() for count in (3, 4, 9)]
    for number, segmentation in enumerate(
        [
            polygons[:1],
            polygons,  # several parts of one thing
            [*polygons[:2], [1, 1, 5, 5], []],  # two points have no inside
            [[2, 3, 5, 3, 5, 7, 2, 7]],  # whole numbers: 3 by 4 pixels
            rle(square(4, 5, 6)),
            rle(square(4, 5, 6), text=False),
            rle(square(0, 0, 3)),  # begins inside
            rle(square(0, 0, 50), text=False),
        ]
    ):
        if isinstance(segmentation, dict):
            packed = mask_utils.frPyObjects(segmentation, HEIGHT, WIDTH) if number in (5, 7) else segmentation
        else:
            parts = [part for part in segmentation if len(part) > 4]
            packed = mask_utils.merge(mask_utils.frPyObjects(parts, HEIGHT, WIDTH))
        expected = np.where(mask_utils.decode([packed])[..., 0], 1, 255)
        np.testing.assert_array_equal(label(tmp_path, document((7, segmentation))), expected, str(number))
    assert (label(tmp_path, document((7, [[2, 3, 5, 3, 5, 7, 2, 7]]))) == 1).sum() == 12
    for nothing in ([[1, 1, 5, 5]], [[3, 3]], [[]]):
        assert (label(tmp_path, document((7, nothing))) == 255).all()


def test_run_lengths_of_any_mask() -> None:
    rng = np.random.default_rng(1)
    for height, width in ((1, 1), (1, 9), (7, 3), (64, 50), (1500, 300)):
        for share in (0, 0.01, 0.5, 1):
            pixels = np.asfortranarray(rng.random((height, width)) < share, dtype=np.uint8)
            lengths = run_lengths(mask_utils.encode(pixels)["counts"].decode())
            flat = np.repeat(np.arange(len(lengths)) % 2, lengths)
            np.testing.assert_array_equal(flat, pixels.ravel(order="F"))


def test_the_smaller_lies_on_the_larger_and_of_equals_the_later(tmp_path: Path) -> None:
    large, small, equal = square(5, 5, 12), square(8, 8, 4), square(8, 10, 4)
    seen = label(tmp_path, document((3, rle(small)), (7, rle(large)), (900, rle(equal))))
    expected = np.full((HEIGHT, WIDTH), 255)
    for train_id, pixels in ((1, large), (0, small), (2, equal)):
        expected[pixels > 0] = train_id
    np.testing.assert_array_equal(seen, expected)


def test_a_stated_area_decides_nothing(tmp_path: Path) -> None:
    content = document((3, rle(square(8, 8, 4))), (7, rle(square(5, 5, 12))))
    for annotation, area in zip(content["annotations"], (10**6, 1), strict=True):
        annotation["area"] = area  # some tools state the box's
    assert label(tmp_path, content)[9, 9] == 0


def test_crowds_lie_below_everything_else(tmp_path: Path) -> None:
    content = document((3, rle(square(8, 8, 4), text=False)), (7, rle(square(5, 5, 12))))
    content["annotations"][0]["iscrowd"] = 1
    assert label(tmp_path, content)[9, 9] == 1
    content["annotations"][1]["iscrowd"] = 1
    assert label(tmp_path, content)[9, 9] == 0


def test_things_are_painted_on_stuff_whatever_their_size(tmp_path: Path) -> None:
    """Two files, as COCO's stuff_*.json and instances_*.json: the later one lies on the earlier."""
    wall = [{"id": 172, "name": "wall"}, {"id": 183, "name": "other"}]
    stuff = document((172, rle(square(8, 8, 4))), (183, rle(square(5, 5, 12))), categories=wall)
    things = document((7, rle(square(5, 5, 12))), categories=[{"id": 7, "name": "dog"}])
    things["images"][0]["id"] = 77  # images are the same by file name
    things["annotations"][0]["image_id"] = 77
    seen = dataset(tmp_path, stuff, things, classes=["dog", "wall"])
    assert (seen.classes, len(seen)) == (("dog", "wall"), 1)
    assert seen.load(0)[1][9, 9] == 0
    swapped = CocoDataset(tmp_path / "images", seen.annotation_files[::-1])
    assert swapped.classes == ("dog", "wall", "other")  # by id
    assert swapped.load(0)[1][9, 9] == 1
    assert swapped.load(0)[1][6, 6] == 2


# Classes


def test_classes_are_the_categories_by_id(tmp_path: Path) -> None:
    seen = dataset(tmp_path, document((900, rle(square(0, 0, 2)))))
    assert seen.classes == ("cat", "dog", "sofa")
    assert seen.palette == default_palette(seen.classes)
    assert np.unique(seen.load(0)[1]).tolist() == [2, 255]
    assert np.flatnonzero(seen.valid_raw).tolist() == [0, 1, 2, 255]
    assert seen.label_lut[[0, 2, 3, 255]].tolist() == [0, 2, 255, 255]
    np.testing.assert_array_equal(seen.load_raw(0)[1], seen.load(0)[1])


def test_classes_may_be_fewer_and_in_another_order(tmp_path: Path) -> None:
    content = document((7, rle(square(2, 2, 9))), (900, rle(square(4, 4, 3))), (3, rle(square(15, 15, 2))))
    seen = dataset(tmp_path, content, classes=["cat", "dog"], palette=[[1, 2, 3], [4, 5, 6]])
    assert (seen.classes, seen.palette) == (("cat", "dog"), ((1, 2, 3), (4, 5, 6)))
    assert seen.load(0)[1][[2, 4, 15, 29], [2, 4, 15, 29]].tolist() == [1, 255, 0, 255]  # the sofa hides the dog
    seen = dataset(tmp_path, content, classes=["rest", "dog"], background="rest")
    assert seen.load(0)[1][[2, 4, 15, 29], [2, 4, 15, 29]].tolist() == [1, 0, 0, 0]


def test_a_background_from_nowhere_comes_first(tmp_path: Path) -> None:
    content = document((3, rle(square(2, 2, 9))))
    seen = dataset(tmp_path, content, background="nothing")
    assert seen.classes == ("nothing", "cat", "dog", "sofa")
    assert np.unique(seen.load(0)[1]).tolist() == [0, 1]
    seen = dataset(tmp_path, content, background="sofa")  # a category may take the rest
    assert seen.classes == ("cat", "dog", "sofa")
    assert np.unique(seen.load(0)[1]).tolist() == [0, 2]


def test_categories_of_one_name_are_one_class(tmp_path: Path) -> None:
    two = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 5, "name": "cat"}]
    seen = dataset(tmp_path, document((1, rle(square(0, 0, 2))), (5, rle(square(9, 9, 2))), categories=two))
    assert seen.classes == ("cat", "dog")
    assert seen.load(0)[1][[0, 9], [0, 9]].tolist() == [0, 0]


def test_one_category_needs_a_background(tmp_path: Path) -> None:
    content = document((3, rle(square(0, 0, 2))), categories=CATEGORIES[1:2])
    assert "set data.background" in refusal(lambda: dataset(tmp_path, content))
    assert dataset(tmp_path, content, background="none").classes == ("none", "cat")


def test_classes_and_backgrounds_that_do_not_exist(tmp_path: Path) -> None:
    content = document((3, rle(square(0, 0, 2))))
    message = refusal(lambda: dataset(tmp_path, content, classes=["cat", "Dog", "cow"]))
    assert "2 of 3 are not categories" in message
    assert "Dog, cow" in message
    assert "cat, dog, sofa" in message
    assert "no such class" in refusal(lambda: dataset(tmp_path, content, classes=["cat", "dog"], background="sky"))
    many = [{"id": number, "name": str(number)} for number in range(256)]
    assert "256 classes" in refusal(lambda: dataset(tmp_path, document((3, []), categories=many)))


def test_splits_must_have_the_same_classes() -> None:
    require_same_classes(["cat", "dog"], ("cat", "dog"))
    with pytest.raises(DataError, match=r"only one of them has dog, cow\nset data.classes"):
        require_same_classes(["cat", "dog"], ["cat", "cow"])
    with pytest.raises(DataError, match="their order differs"):
        require_same_classes(["cat", "dog"], ["dog", "cat"])


# Images


def test_images_of_all_kinds_and_names(tmp_path: Path) -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    kinds = {
        "ü ber/東京 1.png": grey,
        "alpha.png": np.dstack([grey] * 4),
        "deep.png": grey.astype(np.uint16) * 256 + 9,
        "one.png": np.array([[5]], np.uint8),
    }
    images = []
    for number, (name, pixels) in enumerate(kinds.items()):
        file = tmp_path / "elsewhere" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        images.append({"id": f"#{number}", "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]})
    (tmp_path / "images").symlink_to(tmp_path / "elsewhere")
    region = {"id": 1, "image_id": "#3", "category_id": 3, "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}
    seen = dataset(tmp_path, document(images=images, annotations=[region]), cache=True)
    seen.preload()
    assert [seen.name(index) for index in range(4)] == ["alpha", "deep", "one", "ü ber/東京 1"]
    for index, name in enumerate(("alpha.png", "deep.png", "one.png", "ü ber/東京 1.png")):
        image, painted = seen.load(index)
        expected = np.dstack([kinds[name] if kinds[name].ndim == 2 else grey] * 3)
        np.testing.assert_array_equal(image, expected // 256 if name == "deep.png" else expected)
        assert painted.tolist() == ([[0]] if name == "one.png" else [[255] * 4] * 3)  # no annotation: all ignored
        assert not image.flags.writeable
        assert seen.load(index)[0] is image


def test_images_of_another_size(tmp_path: Path) -> None:
    content = document((3, rle(square(0, 0, 2))))
    put(tmp_path / "images/a.png", HEIGHT, WIDTH + 1)
    message = refusal(lambda: label(tmp_path, content))
    assert "41x30" in message
    assert "expected 40x30" in message
    (tmp_path / "images/a.png").unlink()
    put(tmp_path / "images/a.png", WIDTH, HEIGHT)
    assert "EXIF" in refusal(lambda: label(tmp_path, content))


def test_missing_images_are_counted(tmp_path: Path) -> None:
    content = document((3, rle(square(0, 0, 2))))
    content["images"] += [{**content["images"][0], "id": number, "file_name": f"{number}.png"} for number in (2, 3)]
    seen = dataset(tmp_path, content)
    (tmp_path / "images/2.png").unlink()
    (tmp_path / "images/3.png").unlink()
    message = refusal(lambda: CocoDataset(tmp_path / "images", seen.annotation_files))
    assert "2 of 3 images are missing: 2.png, 3.png" in message
    assert f"expected {tmp_path / 'images/2.png'}" in message


def test_no_decoded_mask_is_held(tmp_path: Path) -> None:
    side, count = 500, 12
    images = [{"id": n, "file_name": f"{n}.png", "height": side, "width": side} for n in range(count)]
    outline = [[1, 1, 450, 2, 400, 450]]
    regions = [{"id": n, "image_id": n, "category_id": 3, "segmentation": outline} for n in range(count)]
    seen = dataset(tmp_path, document(images=images, annotations=regions))
    seen.load(0)
    tracemalloc.start()
    try:
        for index in range(count):
            seen.load(index)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < side * side / 4  # a quarter of one label


# Files that are wrong

GOOD = document((3, rle(square(0, 0, 2))))


def without(part: str, key: str) -> dict[str, Any]:
    return {**GOOD, part: [{name: value for name, value in GOOD[part][0].items() if name != key}]}


def changed(part: str, **values: Any) -> dict[str, Any]:
    return {**GOOD, part: [{**GOOD[part][0], **values}]}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["0.json: is cut off", "export it again"]),
        (json.dumps(GOOD)[:-1], ["0.json: is cut off", "line 1"]),
        (json.dumps(GOOD)[:150], ["0.json: is cut off", "of 150 characters"]),
        ('{"images": "a.png', ["0.json: is cut off"]),
        ("images: []", ["0.json: is not JSON"]),
        ("[]", ["a JSON list", "hold predictions"]),
        ({"info": {}}, ["`categories` is missing"]),
        ({**GOOD, "annotations": []}, ["`annotations` is empty"]),
        ({**GOOD, "images": {}}, ["`images` is dict, not a list"]),
        ({**GOOD, "annotations": [3]}, ["annotations, entry 0: id, image_id, category_id, segmentation missing"]),
        (without("annotations", "category_id"), ["annotations, id 1: category_id missing"]),
        (without("annotations", "segmentation"), ["annotations, id 1: segmentation missing"]),
        (without("images", "file_name"), ["images, id 1: file_name missing"]),
        (without("images", "width"), ["images, id 1: width missing"]),
        (without("categories", "name"), ["categories, id 7: name missing"]),
        (changed("categories", id="7"), ["categories, id 7", "whole number"]),
        (changed("images", width=40.5), ["images, id 1: width 40.5", "whole numbers of pixels"]),
        (changed("images", file_name=None), ["images, id 1: file_name is None"]),
        (changed("annotations", category_id=4), ["category_id 4 is not the id of a category", "3, 7, 900", "0.json"]),
        (changed("annotations", category_id=None), ["category_id is None"]),
        (changed("annotations", image_id="1"), ["no annotation belongs to an image", "an image: 1"]),
        ({**GOOD, "images": GOOD["images"] * 2}, ["images, id 1: a.png", "twice"]),
        ({**GOOD, "categories": [*CATEGORIES, {"id": 3, "name": "cow"}]}, ["id 3 is used for cat and cow"]),
    ],
)
def test_a_wrong_file_is_answered_with_the_entry_and_the_key(tmp_path: Path, content: Any, parts: list[str]) -> None:
    message = refusal(lambda: dataset(tmp_path, content))
    assert all(part in message for part in parts), message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in refusal(lambda: CocoDataset(tmp_path, [tmp_path / "gone.json"]))
    (tmp_path / "latin.json").write_bytes(b'{"images": "caf\xe9"}')
    assert "not UTF-8 text" in refusal(lambda: CocoDataset(tmp_path, [tmp_path / "latin.json"]))
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    put(tmp_path / "a.png", HEIGHT, WIDTH)
    assert len(CocoDataset(tmp_path, [tmp_path / "bom.json"])) == 1


@pytest.mark.parametrize(
    ("segmentation", "parts"),
    [
        ([], ["the segmentation is empty", "a box does not say"]),
        (None, ["the segmentation is None"]),
        ([[1, 1, 5, 1, 5]], ["a polygon of 5 numbers"]),
        ([[1, 1, 5, 1, "5", 5]], ["a polygon of [1, 1, 5"]),
        ([[1, 1, 5, 1, float("nan"), 5]], ["a polygon from"]),
        ([[1, 1, 5, 1, 1e9, 5]], ["a polygon from 1 to 1000000000.0", "longer side is 40"]),  # would end the process
        (rle(square(0, 0, 2)[:20]), ["run lengths of size [20, 40]", "[30, 40]"]),
        ({"size": [30, 40], "counts": [5, 5]}, ["run lengths of 10 pixels in total", "expected 1200"]),
        ({"size": [30, 40], "counts": [5, -5, 1200]}, ["no run lengths"]),
        ({"size": [30, 40], "counts": [1 << 70]}, ["no run lengths"]),
        ({"size": [30, 40], "counts": "zz"}, ["no run lengths"]),
        ({"size": [30, 40], "counts": "PPP"}, ["no run lengths"]),
        ({"size": [30, 40], "counts": rle(square(3, 3, 9))["counts"][:-3]}, ["run lengths of", "expected 1200"]),
        ({"size": [30, 40]}, ["no run lengths"]),
    ],
)
def test_regions_that_cannot_be_painted(tmp_path: Path, segmentation: Any, parts: list[str]) -> None:
    message = refusal(lambda: label(tmp_path, document((3, segmentation))))
    assert all(part in message for part in [*parts, "0.json: annotations, id 1"]), message


def test_two_files_that_disagree(tmp_path: Path) -> None:
    other = changed("images", height=HEIGHT + 1)
    assert "a.png has 40x31 pixels (width x height), 40x30 in" in refusal(lambda: dataset(tmp_path, GOOD, other))


def test_annotations_of_images_that_are_not_listed_are_passed_over(tmp_path: Path) -> None:
    content = document((3, rle(square(0, 0, 2))), (7, rle(square(9, 9, 2))))
    content["annotations"][1]["image_id"] = 5  # of another split
    assert np.unique(label(tmp_path, content)).tolist() == [0, 255]


# By name


def test_a_recipe_names_folder_and_files(tmp_path: Path) -> None:
    dataset(tmp_path, GOOD)
    rest = {"model": {"name": "a"}, "augment": {"scale": [64, 64], "crop": [64, 64]}, "optim": {"lr": 1}}
    data: dict[str, Any] = {"dataset": "coco_json", "root": str(tmp_path), "background": "none"}
    data |= {split: {"images": "images", "annotations": "0.json"} for split in ("train", "val")}
    recipe = parse_recipe({**rest, "train": {"steps": 1}, "data": data}, "my.yaml")
    built = build_dataset("coco_json", "val", root=tmp_path, options=recipe.data.model_dump())
    assert built.classes == ("none", "cat", "dog", "sofa")
    assert np.unique(built.load(0)[1]).tolist() == [0, 1]
    with pytest.raises(DataError, match=r"data\.train: not given"):
        build_dataset("coco_json", "train", root=tmp_path, options={"train": None})
    for wrong, message in (
        ({"val": {"images": "images", "masks": "masks"}}, r"data\.val: expected a key annotations"),
        ({"val": {"images": "i", "annotations": "0.json", "masks": "m"}}, r"data\.val\.masks: expected no value"),
        ({"ignore_index": 7}, r"data\.ignore_index: expected no value, since dataset is coco_json"),
        ({"val": None}, r"data\.val: expected the folders of the split, since dataset is coco_json"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe({**rest, "train": {"steps": 1}, "data": {**data, **wrong}}, "my.yaml")


def test_backslashes_in_file_names_are_slashes(tmp_path: Path) -> None:
    put(tmp_path / "images/b/a.png", HEIGHT, WIDTH)
    content = document((3, [[1, 1, 9, 1, 9, 9]]))
    content["images"][0]["file_name"] = "b\\a.png"
    (tmp_path / "0.json").write_text(json.dumps(content))
    found = CocoDataset(tmp_path / "images", [tmp_path / "0.json"])
    assert found.name(0) == "b/a"
    assert found.load(0)[0].shape == (HEIGHT, WIDTH, 3)


def test_a_list_of_names_chooses_images(tmp_path: Path) -> None:
    content = document((3, [[1, 1, 9, 1, 9, 9]]))
    content["images"] += [
        {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH} for number in (2, 3)
    ]
    dataset(tmp_path, content)
    names = tmp_path / "names.txt"
    names.write_text("a\n3.png\n")
    found = CocoDataset(tmp_path / "images", [tmp_path / "0.json"], names=names)
    assert [found.name(index) for index in range(len(found))] == ["3", "a"]
    names.write_text("a\n4\n")
    message = refusal(lambda: CocoDataset(tmp_path / "images", [tmp_path / "0.json"], names=names))
    assert "1 of 2 names have no image in" in message
    assert message.splitlines()[0].endswith(": 4")


def test_pixels_in_no_region_are_said(tmp_path: Path) -> None:
    content = document((3, rle(square(0, 0, 20))), (7, rle(square(20, 0, 10))))
    (warning,) = [problem for problem in check_dataset(dataset(tmp_path, content)).problems if "region" in problem.text]
    assert warning.text == "58% of pixels are in no region: ignored; `data.background` makes them a class"
    problems = check_dataset(dataset(tmp_path, content, background="b")).problems
    assert not [each for each in problems if "region" in each.text]


DEEP = "[" * 900 + "]" * 900
TEETH = [value for k in range(20_000) for value in (k % 2 * 600, k % 2 * 600)]  # from corner to corner, for ever


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"height": 10**12}, ["height 1000000000000", "pixels"]),
        ({"height": 20_000, "width": 20_000}, ["at most 268,435,456 pixels"]),
        ({"width": True}, ["whole numbers"]),
        ({"file_name": "../a.png"}, ["a path with `..`"]),
        ({"file_name": "b/../../a.png"}, ["a path with `..`"]),
        ({"file_name": "/etc/a.png"}, ["a path from the root"]),
        ({"file_name": "C:/a.png"}, ["a path from the root"]),
        ({"file_name": "b\\..\\..\\a.png"}, ["a path with `..`"]),
        ({"file_name": "C:\\a.png"}, ["a path from the root"]),
        ({"file_name": "a\0.png"}, ["a control character", "x00"]),
        ({"file_name": "\x1b[2J.png"}, ["a control character", "x1b"]),
        ({"file_name": "x" * 300}, ["more than 255 characters"]),
        ({"file_name": ""}, ["an empty name"]),
    ],
)  # fmt: skip
def test_images_that_no_file_can_have(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    content = document((3, [[1, 1, 9, 1, 9, 9]]))
    content["images"][0] |= change
    (tmp_path / "0.json").write_text(json.dumps(content))
    message = refusal(lambda: CocoDataset(tmp_path / "images", [tmp_path / "0.json"]))
    assert all(part in message for part in parts), message
    assert message.isprintable() or "\n" in message


@pytest.mark.parametrize(
    ("segmentation", "parts"),
    [
        ([[10**400, 1, 2, 3, 4, 5]], ["from 1 to 1000"]),
        ([[float("nan"), 1, 2, 3, 4, 5]], ["a polygon from"]),
        ({"size": [HEIGHT, WIDTH], "counts": [2**39] * 2**4}, ["run lengths of"]),
        ({"size": [[[[[[[[1]]]]]]]], "counts": "0"}, ["run lengths of size"]),
    ],
)  # fmt: skip
def test_numbers_that_no_region_has(tmp_path: Path, segmentation: Any, parts: list[str]) -> None:
    made = dataset(tmp_path, document((3, segmentation)))
    message = refusal(lambda: made.load(0))
    assert all(part in message for part in parts), message


def test_an_outline_that_would_fill_the_memory(tmp_path: Path) -> None:
    big = {"id": 1, "file_name": "a.png", "height": 600, "width": 600}
    made = dataset(tmp_path, document((3, [TEETH]), images=[big]))
    assert "pixels of outline" in refusal(lambda: made.load(0))
    (tmp_path / "few").mkdir()
    few = dataset(tmp_path / "few", document((3, [TEETH[:4000]]), images=[big]))
    assert few.load(0)[1].shape == (600, 600)


def test_run_lengths_of_an_image_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssaseg.datasets.coco.MOST_RUNS", 20)
    made = dataset(tmp_path, document(*[(3, [[1, 1, 9, 1, 9, 9]])] * 9))
    assert "run lengths" in refusal(lambda: made.load(0))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"images": ' + "9" * 5000 + "}", json.dumps(document((3, 7))).replace(": 7", f": {DEEP}"),
     json.dumps(document((3, []))).replace('"id": 1,', f'"id": {DEEP},', 1),
     json.dumps(document((3, []))).replace('"category_id": 3', '"category_id": [3]')],
)  # fmt: skip
def test_json_that_is_nested_or_too_long(tmp_path: Path, text: str) -> None:
    def act() -> None:
        (tmp_path / "0.json").write_text(text)
        put(tmp_path / "images" / "a.png", HEIGHT, WIDTH)
        CocoDataset(tmp_path / "images", [tmp_path / "0.json"]).load(0)

    refusal(act)


def test_a_pipe_in_place_of_the_annotations(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.json")
    with pytest.raises(OSError, match="FIFO"):
        CocoDataset(tmp_path, [tmp_path / "0.json"])
