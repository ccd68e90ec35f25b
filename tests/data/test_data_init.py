"""`ssaseg data init`: folders as people have them, what their ids are taken to mean, and the recipe that is written."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import call, put
from PIL import Image

from ssaseg.cli.data import init, machine, recipe_text
from ssaseg.datasets import DataError, build_dataset
from ssaseg.datasets.exporting import export_scenes
from ssaseg.datasets.published import LAYOUTS
from ssaseg.datasets.survey import find_folders, split_names
from ssaseg.recipes import load_recipe


@pytest.mark.parametrize(
    ("files", "folders", "ending"),
    [
        (
            "images/train/a.jpg masks/train/a.png images/val/b.jpg masks/val/b.png",
            {"train": ("images/train", "masks/train"), "val": ("images/val", "masks/val")},
            ".png",
        ),
        (
            "train/img/x/a.jpg train/labels/x/a.png valid/img/b.JPG valid/labels/b.png",
            {"train": ("train/img", "train/labels"), "val": ("valid/img", "valid/labels")},
            ".png",
        ),
        (
            "train_images/a.jpg train_masks/a.png test_images/b.jpg test_masks/b.png",
            {"train": ("train_images", "train_masks"), "val": ("test_images", "test_masks")},
            ".png",
        ),
        (
            "train2014/a.jpg annotations/train2014/a_labelTrainIds.png val2014/b.jpg "
            "annotations/val2014/b_labelTrainIds.png",
            {"train": ("train2014", "annotations/train2014"), "val": ("val2014", "annotations/val2014")},
            "_labelTrainIds.png",
        ),
        ("train/a.jpg trainannot/a.png", {"all": ("train", "trainannot")}, ".png"),
        ("JPEGImages/a.jpg SegmentationClass/a.png more/z.jpg", {"all": ("JPEGImages", "SegmentationClass")}, ".png"),
        ("a.jpg a_mask.png b.jpg b_mask.png", {"all": (".", ".")}, "_mask.png"),
        ("1.png 10.png 1-gt.png 10-gt.png", {"all": (".", ".")}, "-gt.png"),
        ("data/a b ä.jpg data/a b ä.png", {"all": ("data", "data")}, ".png"),
        ("images/a.jpg images/a_mask.png", {"all": ("images", "images")}, "_mask.png"),
        ("0_image.jpg 0_mask.png 1_image.jpg 1_mask.png", {"all": (".", ".")}, "_mask.png"),
        ("0_image.png 0_mask.png 1_image.png 1_mask.png", {"all": (".", ".")}, "_mask.png"),
        ("img/x_sat.jpg labels/x_mask.png", {"all": ("img", "labels")}, "_mask.png"),
        ("photographs/a.jpg truth/a.png", {"all": ("photographs", "truth")}, ".png"),
    ],
)
def test_folders_are_found(tmp_path: Path, files: str, folders: dict[str, tuple[str, str]], ending: str) -> None:
    for name in files.replace("a b ä", "a?b?ä").split():
        file = tmp_path / name.replace("?", " ")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = find_folders(tmp_path)
    assert found.folders == folders
    assert found.mask_suffix == ending


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ("", "no images in this folder"),
        ("notes.txt", "no images in this folder"),
        ("photos/a.jpg", "images, but no masks"),
        ("images/a.jpg masks/a.jpg", "a mask in JPEG format"),
        ("images/im1.jpg masks/label1.png", "no mask has the name of an image"),
        ("0_rgb.png 0_depth.png", "images, but no masks"),
        ("img_0.jpg mask_0.png", "/img_0.jpg and .*/mask_0.png: .*does not start with"),
        ("images/img0.jpg masks/gt0.png", "/img0.jpg and .*/gt0.png: .*does not start with"),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, files: str, part: str) -> None:
    for name in files.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=part) as error:
        find_folders(tmp_path)
    assert len(str(error.value).splitlines()) <= 3


def test_one_pair_is_in_both_splits(tmp_path: Path) -> None:
    for folder, name in (("images", "a.jpg"), ("masks", "a.png")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        Image.fromarray(np.arange(48 * 40).reshape(40, 48).astype(np.uint8) % 2).save(tmp_path / "data" / folder / name)
    result = call("data", "init", tmp_path / "data", "--out", tmp_path / "one.yaml")
    assert result.exit_code == 0, result.output
    assert "there is one pair, for training and validation" in result.stdout


def test_weights_to_start_from_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / "data" / "images" / f"{name}.jpg")
        put(tmp_path / "data" / "masks" / f"{name}.png", (0, 1))
    done = call("data", "init", tmp_path / "data", "--model", "segnext_t", "--out", tmp_path / "own.yaml")
    assert done.exit_code == 0, done.output
    line = "  pretrained: null # ImageNet weights help a lot: ssaseg weights fetch mscan_t, then pretrained: mscan_t"
    assert line in (tmp_path / "own.yaml").read_text().splitlines()
    assert load_recipe(str(tmp_path / "own.yaml")).model.pretrained is None


def test_the_package_of_weights_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "data" / "images" / "a.jpg")
    put(tmp_path / "data" / "masks" / "a.png", (0, 1))
    monkeypatch.setattr(machine, "measure_step", lambda *_: 0.1)
    for here, name in ((None, "seaformer_s"), (Path("x.pth"), "lite0")):
        monkeypatch.setattr(machine, "find", lambda _, here=here: here)
        monkeypatch.setattr(recipe_text, "find", lambda _, here=here: here)
        done = call("data", "init", tmp_path / "data", "--out", tmp_path / f"{name}.yaml")
        assert done.exit_code == 0, done.output
        assert ("pip install 'ssaseg[imagenet]'" in done.stdout) == (here is None)
        model = load_recipe(str(tmp_path / f"{name}.yaml")).model
        assert (model.name, model.pretrained) == (name, here and "efficientnet_lite0")


def test_lists_of_pascal_voc_are_used(tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path / f"JPEGImages/{number}.jpg")
        put(tmp_path / f"SegmentationClass/{number}.png", (0, 1, 255))
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n2\n")
    (lists / "val.txt").write_text("3\n")
    out = tmp_path / "voc.yaml"
    assert call("data", "init", tmp_path, "--out", out).exit_code == 0
    recipe = load_recipe(str(out))
    assert recipe.test.scale == recipe.augment.scale, "also photos of another size then have that of training"
    data = recipe.data
    assert data.train is not None
    assert data.train.names == "ImageSets/Segmentation/train.txt"
    assert not list(tmp_path.glob("voc.*.txt"))


def test_a_list_of_which_no_image_has_a_mask(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"JPEGImages/{number}.jpg")
    put(tmp_path / "SegmentationClass/0.png", (0, 1))
    (tmp_path / "train.txt").write_text("0\n")
    (tmp_path / "val.txt").write_text("1\n2\n")
    result = call("data", "init", tmp_path, "--out", tmp_path / "voc.yaml")
    assert result.exit_code == 2
    assert "no image of the val split has a mask" in result.stderr


def test_splits_are_the_same_each_time_and_never_empty() -> None:
    names = [f"image {number}" for number in range(100)]
    splits = split_names(names)
    assert (len(splits["train"]), len(splits["val"])) == (80, 20)
    assert sorted([*splits["train"], *splits["val"]]) == sorted(names)
    assert split_names(names[::-1]) == splits
    assert split_names(["a"]) == {"train": ["a"], "val": ["a"]}
    assert [len(part) for part in split_names(["a", "b"]).values()] == [1, 1]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({(360, 480): 9}, ([480, 360], [352, 480])),
        ({(1000, 2000): 9}, ([1024, 512], [512, 512])),
        ({(300, 400): 3, (256, 400): 4, (200, 300): 1}, ([1024, 256], [256, 256])),
        ({(1, 1): 1}, ([32, 32], [32, 32])),
        ({(10_000, 10_000): 1, (1, 1): 1}, ([2048, 512], [512, 512])),
    ],
)
def test_sizes_follow_the_images(found: dict[tuple[int, int], int], expected: tuple[Any, ...]) -> None:
    assert recipe_text.sizes(Counter(found)) == expected


def test_init_train_predict_is_the_whole_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 4), ("val", 2)):
        export_scenes(tmp_path / "scenes", count, split=split, height=64, width=64)
    result = call("data", "init", "scenes", "--model", "seaformer_t")
    assert result.exit_code == 0, result.output
    assert "ssaseg predict runs/scenes/best.safetensors scenes/images/train" in result.stdout
    before = sorted(path.as_posix() for path in tmp_path.rglob("*"))
    assert call("data", "check", "scenes.yaml").exit_code in (0, 1)  # two small scenes may lack a class
    assert sorted(path.as_posix() for path in tmp_path.rglob("*")) == before, "a check writes nothing"
    words = ["train.steps=3", "train.batch=4", "train.amp=off", "train.workers=0", "--check", "all", "--device", "cpu"]
    assert call("train", "scenes.yaml", *words).exit_code == 0
    run = Path("runs/scenes")
    result = call("predict", run / "last.safetensors", "scenes/images/val", "--out", "labels", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert len(list(Path("labels/index").rglob("*.png"))) == 2


def test_init_of_strange_files(tmp_path: Path) -> None:
    """Names with spaces and letters of other scripts, links, 16 bits, alpha, grey, and one pixel."""
    real = tmp_path / "wirklich"
    for name, mode in {"ein bild ä": "RGB", "灰": "L", "alpha": "RGBA"}.items():
        put(real / f"photos/{name}.png", mode=mode)
        put(real / f"photos/{name}_mask.png", (0, 4, 255))
    Image.fromarray(np.full((40, 50), 40_000, np.uint16)).save(real / "photos/deep.png")
    Image.fromarray(np.full((40, 50), 4, np.uint16)).save(real / "photos/deep_mask.png")
    put(real / "photos/one.png", size=(1, 1))
    put(real / "photos/one_mask.png", (4,), size=(1, 1))
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "photos").symlink_to(real / "photos")
    out = tmp_path / "eigene Bilder.yaml"
    result = call("data", "init", linked, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"'{out}'" in result.stdout, "quoted for the shell"
    recipe = load_recipe(str(out))
    assert recipe.data.raw_to_train == {0: 0, 4: 1}
    names = (tmp_path / "eigene Bilder.train.txt").read_text("utf-8") + (tmp_path / "eigene Bilder.val.txt").read_text()
    assert sorted(names.splitlines()) == ["alpha", "deep", "ein bild ä", "one", "灰"]
    assert call("data", "check", out).exit_code in (0, 1)  # one validation mask may lack a class
    assert call("data", "init", linked, "--out", out).exit_code == 2, "never over a file that is there"


def test_images_without_mask_are_left_out_and_told(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number in range(5):
            put(tmp_path / f"images/{split}/{number}.jpg")
            put(tmp_path / f"masks/{split}/{number}.png", (0, 1))
    (tmp_path / "masks/train/3.png").unlink()
    out = tmp_path / "own.yaml"
    result = call("data", "init", tmp_path, "--out", out)
    assert result.exit_code == 1
    assert "1 of 5 images have no mask: 3" in result.stderr
    assert (tmp_path / "own.train.txt").read_text() == "0\n1\n2\n4\n"
    assert call("data", "check", out).exit_code == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["gone"], "no such folder"),
        ([".", "--out", "x.yaml"], "no images in this folder"),
        (["."], "--out"),
        (["sub", "--out", "x.txt"], "use x.yaml"),
        (["sub", "--out", "no/x.yaml"], "create it first"),
        (["sub", "--model", "seaformer_bb"], "did you mean seaformer_b?"),
    ],
)
def test_init_with_wrong_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], part: str) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    result = call("data", "init", *words)
    assert result.exit_code == 2
    assert part in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert [path.name for path in tmp_path.iterdir()] == ["sub"]


def test_masks_in_colour_are_told_with_their_colours(tmp_path: Path) -> None:
    put(tmp_path / "images/a.jpg")
    colours = np.zeros((40, 50, 3), np.uint8)
    colours[:30] = (128, 0, 255)
    (tmp_path / "masks").mkdir()
    Image.fromarray(colours).save(tmp_path / "masks/a.png")
    result = call("data", "init", tmp_path, "--out", tmp_path / "x.yaml")
    assert result.exit_code == 2
    assert "a mask in colours; 2 colours in 1 masks: #8000ff 75.0%, #000000 25.0%" in result.stderr
    assert not (tmp_path / "x.yaml").exists()


def test_grey_masks_in_three_channels_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path / "images/a.jpg")
    Image.new("RGB", (50, 40), (99, 99, 99)).save(put(tmp_path / "masks/a.png"))
    assert "its channels are equal" in call("data", "init", tmp_path, "--out", tmp_path / "x.yaml").stderr


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    put(tmp_path / "data/a.jpg")
    put(tmp_path / "data/a.png", (0, 1))
    calls: list[Path] = []

    def write(file: Path, content: bytes) -> None:
        calls.append(file)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        file.write_bytes(content)

    monkeypatch.setattr(init, "write_atomic", write)
    result = call("data", "init", tmp_path / "data", "--out", tmp_path / "x.yaml")
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == []


def test_names_that_are_no_text_are_told(tmp_path: Path) -> None:
    for number in range(2):
        put(tmp_path / f"data/{number}.jpg")
        put(tmp_path / f"data/{number}.png", (0, 1))
    try:
        for suffix in (b".jpg", b".png"):
            os.rename(bytes(tmp_path / "data/0") + suffix, bytes(tmp_path / "data") + b"/\xff" + suffix)
    except OSError:
        pytest.skip("this file system takes only text for names")
    result = call("data", "init", tmp_path / "data", "--out", tmp_path / "x.yaml")
    assert result.exit_code == 2
    assert "rename the files" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# Names of files, places, and data sets that are known


def names_in(recipe: Path) -> list[str]:
    """Names of all pairs, read through the recipe."""
    data = load_recipe(str(recipe)).data
    options = data.model_dump()
    sets = [build_dataset(data.dataset, split, root=Path(data.root), options=options) for split in ("train", "val")]
    return sorted(pairs.name(index) for pairs in sets for index in range(len(pairs)))


def test_images_whose_names_have_a_word_of_their_own(tmp_path: Path) -> None:
    for number in range(5):
        put(tmp_path / f"data/{number:03}_image.jpg")
        put(tmp_path / f"data/{number:03}_mask.png", (0, 1))
    out = tmp_path / "x.yaml"
    assert call("data", "init", tmp_path / "data", "--out", out).exit_code == 0
    assert load_recipe(str(out)).data.image_suffixes == ("_image.jpg",)
    assert names_in(out) == ["000", "001", "002", "003", "004"]


def test_strange_names_stand_in_lists_and_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces around a name, and letters that end a line for some readers; read from another folder."""
    root = tmp_path / "a\u2028b\x85c"
    for number in range(5):
        put(root / f"images/ \u2028{number}\x85 .jpg")
        put(root / f"masks/ \u2028{number}\x85 .png", (0, 1))
    monkeypatch.chdir(tmp_path)
    assert call("data", "init", root.name, "--out", "x.yaml").exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert names_in(tmp_path / "x.yaml") == [f" \u2028{number}\x85 " for number in range(5)]


def test_a_name_with_a_line_feed_is_told(tmp_path: Path) -> None:
    put(tmp_path / "data/a\nb.jpg")
    put(tmp_path / "data/a\nb.png", (0, 1))
    result = call("data", "init", tmp_path / "data", "--out", tmp_path / "x.yaml")
    assert result.exit_code == 2
    assert "cannot be written as one line" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("own_splits", [False, True])
def test_what_is_left_out_or_lacking_is_told(tmp_path: Path, own_splits: bool) -> None:
    names = [f"{number}" for number in range(5)]
    alone = "4" if own_splits else split_names(names)["val"][0]
    for name in names:
        folder = ("val/" if name == alone else "train/") if own_splits else ""
        put(tmp_path / f"images/{folder}{name}.jpg")
        put(tmp_path / f"masks/{folder}{name}.png", (0, 1, 7) if name == alone else (0, 1))
    put(tmp_path / f"masks/{'train/' if own_splits else ''}orphan.png", (0, 1))
    result = call("data", "init", tmp_path, "--out", tmp_path / "x.yaml")
    assert result.exit_code == 0, result.output
    for text in (result.stdout, (tmp_path / "x.yaml").read_text()):
        assert "without image, not used: 1 (orphan.png)" in text
        assert "only for validation, none for training: class_7" in text


def put_ade20k(root: Path) -> None:
    for split in ("training", "validation"):
        put(root / f"images/{split}/a.jpg")
        put(root / f"annotations/{split}/a.png", (0, 1, 2))


def test_a_published_data_set_is_known_by_its_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_ade20k(tmp_path / "ade")
    result = call("data", "init", tmp_path / "ade", "--out", tmp_path / "own.yaml")
    assert result.exit_code == 0, result.output
    assert "not read as ade20k" in result.stdout
    data = load_recipe(str(tmp_path / "own.yaml")).data
    assert (data.dataset, len(data.classes)) == ("folder", 3)
    monkeypatch.setitem(LAYOUTS, "ade20k", replace(LAYOUTS["ade20k"], counts={"train": 1, "val": 1}))
    result = call("data", "init", tmp_path / "ade", "--out", tmp_path / "known.yaml")
    assert result.exit_code == 0, result.output
    assert "this is ade20k" in result.stdout
    data = load_recipe(str(tmp_path / "known.yaml")).data
    assert (data.dataset, data.root, data.classes) == ("ade20k", str(tmp_path / "ade"), ())


def test_a_download_is_to_be_prepared(tmp_path: Path) -> None:
    put(tmp_path / "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png")
    put(tmp_path / "gtFine/train/ulm/ulm_0_gtFine_labelIds.png", (7, 8))
    result = call("data", "init", tmp_path, "--out", tmp_path / "x.yaml")
    assert result.exit_code == 2
    assert f"ssaseg data prepare cityscapes --source {tmp_path}" in result.stderr
    (tmp_path / "leftImg8bit/train/ulm").rename(tmp_path / "leftImg8bit/train/home")
    (tmp_path / "gtFine/train/ulm").rename(tmp_path / "gtFine/train/home")
    result = call("data", "init", tmp_path, "--out", tmp_path / "x.yaml")
    assert result.exit_code == 0, "a user's own data in this layout"


@pytest.mark.parametrize("scenes", [False, True])
def test_files_of_other_types_are_counted_once(tmp_path: Path, scenes: bool) -> None:
    """In two folders, and in lists of pairs. Texts are not expected to be images."""
    if scenes:  # of a suffix that only lists have, all of them in one split
        for place in ("a", "b"):
            put(tmp_path / "d" / place / "images/9.ppm")
            put(tmp_path / "d" / place / "masks/9.png", (0, 1))
    for place in ("a", "b") if scenes else (".",):
        put(tmp_path / "d" / place / "images/0.png")
        put(tmp_path / "d" / place / "masks/0.png", (0, 1))
        for name in ("1.heic", "2.HEIC", "3.cr2", "names.txt"):
            (tmp_path / "d" / place / "images" / name).write_text("x")
    result = call("data", "init", tmp_path / "d", "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    count, raw = ("4 .heic", "2 .cr2") if scenes else ("2 .heic", "1 .cr2")
    assert result.stdout.count("other types") == 1
    assert f"{6 if scenes else 3} files of other types are left out: {count}, {raw} in " in result.stdout
    assert ": 1.heic, 2.HEIC, 3.cr2" in result.stdout
