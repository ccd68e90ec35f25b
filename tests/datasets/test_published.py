"""Published data sets: the table against facts written down apart from it, and every reader on files made here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from places import PROJECT

from ssaseg.cli.errors import CommandError
from ssaseg.cli.main import cli
from ssaseg.cli.scoring.evaluate import evaluate_model
from ssaseg.cli.weights.classes import dataset_metadata
from ssaseg.datasets import DataError, Dataset, build_dataset, stated_classes
from ssaseg.datasets.base import pascal_palette
from ssaseg.datasets.exporting import export_scenes
from ssaseg.datasets.labels import label_space, list_label_spaces
from ssaseg.datasets.pairs import PairDataset, read_names
from ssaseg.datasets.published import LAYOUTS
from ssaseg.models import build_model
from ssaseg.recipes import RecipeError, load_recipe, parse_recipe

# name: image, mask and list of the training split's pair "a" (mmsegmentation's configurations), pairs published, ids in
# a mask and the train ids they mean.
FACTS: dict[str, tuple[tuple[str, ...], tuple[int, int], dict[int, int]]] = {
    "ade20k": (
        ("images/training/a.jpg", "annotations/training/a.png"),
        (20210, 2000),
        {0: 255, 1: 0, 150: 149, 255: 255},
    ),
    "coco_stuff10k": (
        ("images/train2014/a.jpg", "annotations/train2014/a_labelTrainIds.png"),
        (9000, 1000),
        {0: 255, 1: 0, 171: 170},
    ),
    "coco_stuff164k": (
        ("images/train2017/a.jpg", "annotations/train2017/a_labelTrainIds.png"),
        (118287, 5000),
        {0: 0, 170: 170, 255: 255},
    ),
    "pascal_context_59": (
        ("JPEGImages/a.jpg", "SegmentationClassContext/a.png", "ImageSets/SegmentationContext/train.txt"),
        (4998, 5105),
        {0: 255, 1: 0, 59: 58},
    ),
    "pascal_context_60": (
        ("JPEGImages/a.jpg", "SegmentationClassContext/a.png", "ImageSets/SegmentationContext/train.txt"),
        (4998, 5105),
        {0: 0, 1: 1, 59: 59},
    ),
    "cityscapes": (
        ("leftImg8bit/train/ulm/a_leftImg8bit.png", "gtFine/train/ulm/a_gtFine_labelTrainIds.png"),
        (2975, 500),
        {0: 0, 18: 18, 255: 255},
    ),
    "voc2012": (
        ("JPEGImages/a.jpg", "SegmentationClass/a.png", "ImageSets/Segmentation/train.txt"),
        (1464, 1449),
        {0: 0, 20: 20, 255: 255},
    ),
    "camvid": (("images/train/a.jpg", "annotations/train/a.png"), (367, 101), {0: 0, 10: 10, 255: 255}),
}
CLASSES = dict(zip(FACTS, (150, 171, 171, 59, 60, 19, 21, 11), strict=True))


def put(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def make(name: str, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """One training pair of a data set, beside files that must not be taken; its mask and the label meant."""
    (image, mask, *lists), _, ids = FACTS[name]
    raw = np.resize(np.array(list(ids), np.uint8), (6, 10))
    put(root / image, np.full((6, 10, 3), 90, np.uint8))
    put(root / mask, raw)
    for file in lists:
        (root / file).parent.mkdir(parents=True)
        (root / file).write_text("a\n")
        put((root / image).with_name("other.jpg"), np.zeros((2, 2, 3), np.uint8))
    if "_" in Path(mask).stem:  # as Cityscapes has X_gtFine_color.png, and COCO-Stuff the raw X.png
        put((root / mask).with_name("a_gtFine_color.png"), np.zeros((6, 10, 3), np.uint8))
    return raw, np.vectorize(ids.get)(raw).astype(np.uint8)


@pytest.mark.parametrize("name", FACTS)
def test_layouts_are_the_published_ones(name: str, tmp_path: Path) -> None:
    raw, meant = make(name, tmp_path)
    dataset = build_dataset(name, "train", root=tmp_path, options={"cache": True})
    assert (len(dataset), dataset.name(0).rpartition("/")[2]) == (1, "a")
    np.testing.assert_array_equal(dataset.load(0)[1], meant)
    np.testing.assert_array_equal(dataset.load_raw(0)[1], raw)
    assert dataset.load_image(0).shape == (6, 10, 3)
    assert not dataset.load_raw(0)[1].flags.writeable  # the recipe's cache is heeded
    assert (len(dataset.classes), len(set(dataset.classes))) == (CLASSES[name], CLASSES[name])
    assert [list(colour) for colour in dataset.palette] == label_space(LAYOUTS[name].labels).palette
    assert tuple(LAYOUTS[name].counts.values()) == FACTS[name][1]
    put(tmp_path / FACTS[name][0][1], np.full((6, 10), CLASSES[name] + 1, np.uint8))
    with pytest.raises(DataError, match=rf"(?s)id {CLASSES[name] + 1} in 60 pixels.*not the masks of {name}"):
        build_dataset(name, "train", root=tmp_path, options={}).load(0)


def test_the_table_is_complete() -> None:
    assert list(LAYOUTS) == list(FACTS)
    assert all(set(row.images) == set(row.masks) == set(row.counts) == {"train", "val"} for row in LAYOUTS.values())
    assert all(row.images["train"] != row.images["val"] or row.lists for row in LAYOUTS.values())
    assert list_label_spaces() == [
        "ade20k", "coco_stuff", "pascal_context_59", "pascal_context_60", "cityscapes", "voc2012", "camvid",
    ]  # fmt: skip


def test_public_definitions() -> None:
    """Cityscapes' and VOC's names and colours, by the fingerprint of mmsegmentation 1.2.2's; landmarks in clear."""
    cityscapes, voc = label_space("cityscapes"), label_space("voc2012")
    assert (cityscapes.classes[0], cityscapes.classes[7], cityscapes.classes[18]) == ("road", "traffic sign", "bicycle")
    assert (cityscapes.palette[0], cityscapes.palette[11]) == ([128, 64, 128], [220, 20, 60])
    assert (voc.classes[0], voc.classes[15], voc.classes[20]) == ("background", "person", "tvmonitor")
    assert [tuple(colour) for colour in voc.palette] == list(pascal_palette(21))
    fingerprints = [hashlib.sha256(json.dumps(space[:2]).encode()).hexdigest()[:16] for space in (cityscapes, voc)]
    assert fingerprints == ["fdc2c09f612a02c0", "3d61c831cd0012d4"]


@pytest.mark.parametrize("name", FACTS)
def test_a_missing_folder_is_told_with_the_layout_and_what_makes_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        build_dataset(name, "val", root=tmp_path / "gone", options={})
    text = str(error.value)
    assert len(text.splitlines()) == 3
    assert f"{LAYOUTS[name].images['val']}/*" in text
    assert LAYOUTS[name].root in text
    made = name not in ("ade20k", "voc2012", "camvid")  # these are downloaded so
    assert (f"`ssaseg data prepare {name} --source DIR --root {tmp_path / 'gone'}`" in text) == made


def test_a_half_finished_preparation_is_told(tmp_path: Path) -> None:
    make("coco_stuff10k", tmp_path)
    put(tmp_path / "images/train2014/b.jpg", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(DataError, match=r"(?s)1 of 2 images have no mask: b.*ssaseg data prepare coco_stuff10k"):
        build_dataset("coco_stuff10k", "train", root=tmp_path, options={})


def test_links_odd_names_and_odd_images(tmp_path: Path) -> None:
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    kinds = {
        "köln/a b": grey,
        "köln/alpha": np.dstack([grey] * 4),
        "köln/deep": grey.astype(np.uint16) * 256 + 3,
        "東京/one": grey[:1, 1:2],
    }
    for name, pixels in kinds.items():
        put(tmp_path / f"disk/pictures/{name}_leftImg8bit.png", pixels)
        put(tmp_path / f"disk/gtFine/train/{name}_gtFine_labelTrainIds.png", np.full(pixels.shape[:2], 18, np.uint8))
    mask = tmp_path / "disk/gtFine/train/東京/one_gtFine_labelTrainIds.png"
    mask.rename(tmp_path / "disk/elsewhere.png")
    mask.symlink_to(tmp_path / "disk/elsewhere.png")
    (tmp_path / "disk/leftImg8bit").mkdir()
    (tmp_path / "disk/leftImg8bit/train").symlink_to(tmp_path / "disk/pictures")
    (tmp_path / "mein städte").symlink_to(tmp_path / "disk")
    dataset = build_dataset("cityscapes", "train", root=tmp_path / "mein städte", options={})
    assert [dataset.name(index) for index in range(4)] == list(kinds)
    for index, pixels in enumerate([grey, grey, grey, grey[:1, 1:2]]):
        image, label = dataset.load(index)
        np.testing.assert_array_equal(image, np.dstack([pixels] * 3))
        np.testing.assert_array_equal(label, np.full(pixels.shape, 18))


def test_camvid_reads_whole() -> None:
    project = PROJECT
    root = next((place for place in (project / "data", project.parent / "shared/data") if place.is_dir()), project)
    root /= "camvid"
    if not root.is_dir():
        pytest.skip("CamVid is not in data/camvid")
    pixels = np.zeros(256, np.int64)
    for split, count in LAYOUTS["camvid"].counts.items():
        dataset = build_dataset("camvid", split, root=root, options={})
        assert len(dataset) == count
        for index in range(count):
            image, label = dataset.load(index)
            assert (image.shape, label.shape) == ((360, 480, 3), (360, 480))
            pixels += np.bincount(label.ravel(), minlength=256)
    assert np.flatnonzero(pixels).tolist() == [*range(11), 255]


# Lists of names


def test_lists_of_names(tmp_path: Path) -> None:
    for name in ("b ü", "a/東京", "left out"):
        put(tmp_path / f"images/{name}.png", np.zeros((2, 3, 3), np.uint8))
        put(tmp_path / f"masks/{name}.png", np.zeros((2, 3), np.uint8))
    put(tmp_path / "images/without mask.png", np.zeros((2, 3, 3), np.uint8))
    file = tmp_path / "train.txt"
    file.write_bytes("\ufeffb ü\r\n\r\n a/東京 \r\n".encode())  # as Windows' editor writes it
    options: dict[str, Any] = {
        "train": {"images": "images", "masks": "masks", "names": "train.txt"},
        "classes": ["sky", "road"],
    }
    dataset = build_dataset("folder", "train", root=tmp_path, options=options)
    assert [dataset.name(index) for index in range(len(dataset))] == ["a/東京", "b ü"]
    assert dataset.load(1)[1].shape == (2, 3)
    assert isinstance(dataset, PairDataset)
    assert dataset.unused_masks == []  # the other split's


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"a\nc\nd.png\n", ["2 of 3 names have no image: c, d.png", "images/c + one of", "without suffix"]),
        (b"a\nb\n", ["1 of 2 images have no mask: b", "masks/b.png"]),
        (b"a\nb\na\n", ["a is listed twice"]),
        (b"\n", ["no names in this file"]),
        (b"caf\xe9\n", ["not UTF-8"]),
        (None, ["train.txt: no such file", "one a line"]),
    ],
)
def test_lists_that_do_not_fit(tmp_path: Path, content: bytes | None, parts: list[str]) -> None:
    for name in "ab":
        put(tmp_path / f"images/{name}.png", np.zeros((2, 3, 3), np.uint8))
    put(tmp_path / "masks/a.png", np.zeros((2, 3), np.uint8))
    if content is not None:
        (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(DataError) as error:
        PairDataset(tmp_path / "images", tmp_path / "masks", ["x", "y"], names=tmp_path / "train.txt")
    assert len(str(error.value).splitlines()) <= 3
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_long_list_is_read_sorted(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("2\n10\n1")
    assert read_names(tmp_path / "val.txt") == ["1", "10", "2"]


# In recipes

REST: dict[str, Any] = {
    "model": {"name": "seaformer_t"},
    "augment": {"scale": [64, 64], "crop": [64, 64]},
    "optim": {"lr": 1e-3},
    "train": {"steps": 1},
}


@pytest.mark.parametrize("name", FACTS)
def test_a_recipe_needs_only_the_name(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    data = {"dataset": name, "root": str(tmp_path), "mean": [1, 2, 3], "std": [4, 5, 6], "cache": True}
    recipe = parse_recipe({**REST, "data": data}, "my.yaml")
    dataset = build_dataset(recipe.data.dataset, "train", root=tmp_path, options=recipe.data.model_dump())
    assert stated_classes(name, recipe.data.model_dump())[0] == list(dataset.classes)
    assert (recipe.data.mean, recipe.data.std) == ((1, 2, 3), (4, 5, 6))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", ["a", "b"]),
        ("train", {"images": "i", "masks": "m"}),
        ("image_suffixes", [".png"]),
        ("mask_suffix", "_mask.png"),
        ("reduce_zero_label", True),
        ("raw_to_train", {0: 1}),
        ("ignore_index", 7),
        ("background", "sky"),
    ],
)
def test_what_the_data_set_brings_cannot_be_said_otherwise(key: str, value: Any) -> None:
    with pytest.raises(
        RecipeError, match=rf"data\.{key}: expected no value, since dataset is ade20k, got .*\n.*folder|coco"
    ):
        parse_recipe({**REST, "data": {"dataset": "ade20k", key: value}}, "my.yaml")


def test_convert_knows_the_classes_by_data_set_and_by_recipe(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(json.dumps({**REST, "data": {"dataset": "coco_stuff10k"}}))
    for name in ("coco_stuff10k", "coco_stuff164k", "coco_stuff", str(tmp_path / "my.yaml")):
        known = dataset_metadata(name)
        assert (known["classes"], known["palette"]) == label_space("coco_stuff")[:2]
    coco = {"dataset": "coco_json"} | {key: {"images": "i", "annotations": "a.json"} for key in ("train", "val")}
    (tmp_path / "coco.yaml").write_text(json.dumps({**REST, "data": coco}))
    with pytest.raises(CommandError, match=r"annotation files\nadd data.classes"):
        dataset_metadata(str(tmp_path / "coco.yaml"))


def test_camvid_recipes_and_the_data_set_camvid_agree() -> None:
    data = load_recipe("camvid-seaformer_b-ssa").data
    classes, palette = stated_classes("camvid", {})
    assert stated_classes(data.dataset, data.model_dump()) == (classes, palette)
    if data.dataset == "folder":
        row = LAYOUTS["camvid"]
        for split in ("train", "val"):
            assert getattr(data, split).model_dump(exclude_none=True) == {
                "images": row.images[split],
                "masks": row.masks[split],
            }


# The built-in scenes through every reader


def readers(root: Path) -> dict[str, Dataset]:
    """The same scenes as ADE20K, PASCAL-Context, COCO-format and folder data sets."""
    for layout in ("ade20k", "pascal_context", "coco"):
        export_scenes(root / layout, 3, split="val", height=96, width=128, seed=4, layout=layout)
    scenes = stated_classes("synthetic", {})[0]
    masks = {"images": "images/validation", "masks": "annotations/validation"}
    coco = {"images": "images/val", "annotations": ["annotations/instances_val.json"]}
    built: dict[str, tuple[str, str, dict[str, Any]]] = {
        "ade20k": ("ade20k", "ade20k", {}),
        "pascal_context": ("pascal_context_59", "pascal_context", {}),
        "coco": ("coco_json", "coco", {"val": coco, "classes": []}),
        "coco, classes stated": ("coco_json", "coco", {"val": coco, "classes": scenes}),
        "folder": ("folder", "ade20k", {"val": masks, "classes": scenes, "reduce_zero_label": True}),
    }
    return {
        reader: build_dataset(dataset, "val", root=root / folder, options=options)
        for reader, (dataset, folder, options) in built.items()
    }


@pytest.mark.usefixtures("one_thread")
def test_every_reader_gives_the_same_pixels_and_the_same_score(tmp_path: Path) -> None:
    through = readers(tmp_path)
    scenes = build_dataset(
        "synthetic", "val", root=tmp_path, options={"synthetic": {"height": 96, "width": 128, "val": 3, "seed": 4}}
    )
    assert through["coco"].classes == scenes.classes
    for index in range(3):
        image, label = through["folder"].load(index)
        np.testing.assert_array_equal(label, scenes.load(index)[1])
        # JPEG: near the scene, and the same for all.
        assert np.abs(image.astype(int) - scenes.load(index)[0]).mean() < 8
        for reader, dataset in through.items():
            assert dataset.name(index) == scenes.name(index), reader
            np.testing.assert_array_equal(dataset.load(index)[0], image, reader)
            np.testing.assert_array_equal(dataset.load(index)[1], label, reader)
    torch.manual_seed(0)
    model = build_model("seaformer_t", len(scenes.classes), "ssa").eval()
    protocol = load_recipe("demo").test.model_dump()
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    scores = [evaluate_model(model, data, protocol, mean, std, torch.device("cpu")) for data in through.values()]
    assert scores[0].matrix.sum() == sum(np.count_nonzero(scenes.load(index)[1] != 255) for index in range(3))
    assert all(np.array_equal(score.matrix, scores[0].matrix) for score in scores)
    assert len({score.scores()["mIoU"] for score in scores}) == 1


@pytest.mark.parametrize(("layout", "name"), [("coco", "coco_json"), ("pascal_context", "pascal_context_59")])
def test_both_splits_may_be_exported_to_one_folder(tmp_path: Path, layout: str, name: str) -> None:
    for split, count in (("train", 2), ("val", 1)):
        words = ["data", "export", str(tmp_path), "--layout", layout, "--split", split, "--count", str(count)]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, result.output
        assert f"wrote {count} scenes to {tmp_path}" in result.output
        assert Path(result.output.split()[-1]).exists()
    options = {
        split: {"images": f"images/{split}", "annotations": [f"annotations/instances_{split}.json"]}
        for split in ("train", "val")
    }
    built = [build_dataset(name, split, root=tmp_path, options=options) for split in ("train", "val")]
    assert [len(dataset) for dataset in built] == [2, 1]
    assert [dataset.name(0) for dataset in built] == ["train_00000", "val_00000"]
