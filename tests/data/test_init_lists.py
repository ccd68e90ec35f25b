"""Lists of pairs from `data init` to the data set; choosing folders; names that lie beside the masks; CamVid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import call, put
from PIL import Image

from ssaseg.datasets import DataError, build_dataset
from ssaseg.datasets.pairs import PairDataset
from ssaseg.recipes import Recipe, RecipeError, load_recipe, parse_recipe


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting processes takes longer than reading a few small files."""
    monkeypatch.setattr("ssaseg.cli.data.reading.count_cores", lambda: 0)


def open_split(recipe: Path, split: str, **options: Any) -> PairDataset:
    data = load_recipe(str(recipe)).data
    dataset = build_dataset(data.dataset, split, root=Path(data.root), options={**data.model_dump(), **options})
    assert isinstance(dataset, PairDataset)
    return dataset


def put_domains(root: Path) -> None:
    """As LoveDA: a folder for each split, then one for each domain, in which frames have the same numbers."""
    for number, place in enumerate(("Train/Rural", "Train/Urban", "Val/Rural", "Val/Urban")):
        put(root / place / "images_png/0.png")
        put(root / place / "masks_png/0.png", (1, number + 2))


def test_domains_are_written_as_lists(tmp_path: Path) -> None:
    put_domains(tmp_path / "data")
    out = tmp_path / "own.yaml"
    result = call("data", "init", tmp_path / "data", "--out", out)
    assert result.exit_code == 0, result.output
    assert "found 2 training and 2 validation pairs" in result.stdout
    assert "pairs in 4 pairs of folders: written as lists" in result.stdout
    assert (tmp_path / "own.train.txt").read_text() == (
        "Train/Rural/images_png/0.png\tTrain/Rural/masks_png/0.png\n"
        "Train/Urban/images_png/0.png\tTrain/Urban/masks_png/0.png\n"
    )
    pairs = open_split(out, "val")
    assert [pairs.name(index) for index in range(2)] == ["Val/Rural/images_png/0", "Val/Urban/images_png/0"]
    assert [sorted(np.unique(pairs.load_raw(index)[1])) for index in range(2)] == [[1, 4], [1, 5]]
    assert call("data", "check", out).exit_code in (0, 1)  # a class has no pixel in one of the splits


def test_a_column_of_training_and_test_is_read_as_folders_are(tmp_path: Path) -> None:
    """Test rows, which have masks, are for validation, as they are where folders or lists say the split."""
    rows = ["image,mask,split"]
    for number, split in enumerate(("train", "train", "eval", "tst", "tst")):
        put(tmp_path / f"data/a/{number}.png")
        put(tmp_path / f"data/b/{number}_x.png", (0, 1))
        rows.append(f"a/{number}.png,b/{number}_x.png,{split}")
    out = tmp_path / "own.yaml"
    for wanted, changed in (([3, 4], [row for row in rows if "eval" not in row]), ([2], rows)):
        (tmp_path / "data/all.csv").write_text("\n".join(changed) + "\n")
        result = call("data", "init", tmp_path / "data", "--out", out)
        assert result.exit_code == 0, result.output
        assert ("the test images, which have labels, are used instead" in result.stdout) == (len(wanted) == 2)
        pairs = open_split(out, "val")
        assert [pairs.name(index) for index in range(len(pairs))] == [f"a/{number}" for number in wanted]
        for file in tmp_path.glob("own*"):
            file.unlink()


def test_all_pairs_in_lists_are_divided(tmp_path: Path) -> None:
    for number in range(5):
        put(tmp_path / f"data/s{number}/images/0.png")
        put(tmp_path / f"data/s{number}/labels/0.png", (0, 1))
    out = tmp_path / "own.yaml"
    assert call("data", "init", tmp_path / "data", "--out", out).exit_code == 0
    splits = {split: open_split(out, split) for split in ("train", "val")}
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 4, "val": 1}


def test_strange_names_stand_in_lists(tmp_path: Path) -> None:
    """Names with spaces, separators, quotes, backslashes, and a sign of comments."""
    names = [" a ", "#1", "a b", "a,b;c", "a\tb", 'q"x"', "a\\b", "e\u0301\u2028"]
    for place in ("s1", "s2"):
        for name in names:
            put(tmp_path / f"data/{place}/images/{name}.png")
            put(tmp_path / f"data/{place}/labels/{name}.png", (0, 1))
    out = tmp_path / "own.yaml"
    result = call("data", "init", tmp_path / "data", "--out", out)
    assert result.exit_code == 0, result.output
    read = [open_split(out, split) for split in ("train", "val")]
    for pairs in read:
        assert all(image.name == mask.name for image, mask in zip(pairs.image_files, pairs.mask_files, strict=True))
    assert sum(map(len, read)) == 2 * len(names)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A recipe of two lists of pairs, whose names have only the number in common."""
    for number in range(4):
        put(tmp_path / f"data/a/{number}.jpg")
        put(tmp_path / f"data/b/gt-{number}-final.png", (0, 1, number))
    (tmp_path / "data/train.txt").write_text("".join(f"a/{n}.jpg b/gt-{n}-final.png\n" for n in (0, 1, 3)))
    (tmp_path / "data/val.txt").write_text("a/2.jpg b/gt-2-final.png\n")
    (tmp_path / "data/labels.txt").write_text("sky\nroad\ntree\ncar\n")
    out = tmp_path / "own.yaml"
    result = call("data", "init", tmp_path / "data", "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_lists_that_exist_are_used(listed: Path) -> None:
    data = load_recipe(str(listed)).data
    assert data.train is not None
    assert (data.train.pairs, data.train.images, data.classes) == ("train.txt", None, ("sky", "road", "tree", "car"))
    assert not list(listed.parent.glob("own.*.txt"))
    train = open_split(listed, "train")
    assert [file.name for file in train.mask_files] == ["gt-0-final.png", "gt-1-final.png", "gt-3-final.png"]
    assert set(np.unique(train.load(2)[1])) == {0, 1, 3}
    sizes = [file.stat().st_size for file in (*train.image_files, *train.mask_files)]
    assert train.identity() == list(map(str, sizes))
    assert not train.unused_masks


def test_a_list_may_miss_files_only_where_it_is_checked(listed: Path) -> None:
    (listed.parent / "data/b/gt-1-final.png").unlink()
    with pytest.raises(DataError, match=r"line 2: 'a/1.jpg b/gt-1-final.png': no such file: 'b/gt-1-final.png'"):
        open_split(listed, "train")
    partial = open_split(listed, "train", partial=True)
    assert (len(partial), len(partial.incomplete)) == (2, 1)
    result = call("data", "check", listed)
    assert result.exit_code == 2
    assert "line 2" in result.output


def test_how_a_list_is_read_is_said(listed: Path) -> None:
    (listed.parent / "data/val.txt").write_text("/X/a/2.jpg /X/b/gt-2-final.png\n")
    result = call("data", "check", listed, "--split", "val")
    assert "note, val split: val.txt: paths are read without X/ before them" in result.stderr


def test_a_list_is_cached(listed: Path) -> None:
    train = open_split(listed, "train", cache=True)
    for file in (*train.image_files, *train.mask_files):
        file.unlink()
    assert train.load(0)[0].shape == (40, 50, 3)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (", images: a", "data.train.images"),
        (", masks: b", "since pairs is given"),
        (", names: c.txt", "data.train.names"),
        (", annotations: c.json", r"write data.train: \{pairs: t.txt\}"),
    ],
)
def test_keys_that_a_list_does_not_use(tmp_path: Path, changes: str, part: str) -> None:
    def load(train: str = "", data: str = "", val: str = "pairs: v.txt") -> Recipe:
        (tmp_path / "own.yaml").write_text(
            "model: {name: seaformer_t}\noptim: {lr: 1e-3}\ntrain: {steps: 10}\n"
            "augment: {scale: [64, 48], crop: [48, 64]}\n"
            f"data: {{train: {{pairs: t.txt{train}}}, val: {{{val}}}, classes: [a, b]{data}}}\n"
        )
        return load_recipe(str(tmp_path / "own.yaml"))

    stored = load().model_dump(mode="json")
    assert parse_recipe(stored, "own") == load()
    with pytest.raises(RecipeError, match=part):
        load(changes)
    with pytest.raises(RecipeError, match="all pairs are in lists"):
        load(data=", mask_suffix: _mask.png")
    assert load(data=", mask_suffix: _mask.png", val="images: i, masks: m").data.mask_suffix == "_mask.png"


def test_a_list_of_pairs_in_place_of_names_is_named(listed: Path) -> None:
    """Lists of pairs, also as CSV, under the key of a list of names."""
    text = "image,mask\na/0.jpg,b/gt-0-final.png\n"
    for name, content in (("spaces.txt", "a/0.jpg b/gt-0-final.png\n"), ("with.csv", text)):
        (listed.parent / "data" / name).write_text(content)
        words = ["data", "check", listed, f"data.train={{images: a, masks: b, names: {name}}}", "--split", "train"]
        result = call(*words)
        assert result.exit_code == 2
        assert "this is a list of pairs: write pairs: FILE in place of images, masks and names" in result.output
        assert "no such file or directory" not in result.output.lower()


def test_names_of_other_compositions_belong_together(tmp_path: Path) -> None:
    """As macOS writes é in two characters, and most other programs in one."""
    put(tmp_path / "images/e\u0301.png")
    put(tmp_path / "masks/\u00e9.png", (0, 1))
    (tmp_path / "names.txt").write_text("\u00e9\n", encoding="utf-8")
    for names in (None, tmp_path / "names.txt"):
        pairs = PairDataset(tmp_path / "images", tmp_path / "masks", ["a", "b"], names=names)
        assert (len(pairs), pairs.unused_masks) == (1, [])
        assert pairs.load(0)[1].max() == 1


def test_the_user_names_the_masks(tmp_path: Path) -> None:
    for number in range(2):
        put(tmp_path / f"data/images/{number}.jpg")
        put(tmp_path / f"data/labels_ann/{number}.png", (0, 1))
        put(tmp_path / f"data/labels_bob/{number}.png", (0, 1))
    out = tmp_path / "own.yaml"
    result = call("data", "init", tmp_path / "data", "--out", out)
    assert result.exit_code == 2
    assert "labels_ann and labels_bob hold masks that fit equally well" in result.stderr
    assert call("data", "init", tmp_path / "data", "--out", out, "--masks", "labels_bob").exit_code == 0
    assert open_split(out, "train").mask_files[0].parent.name == "labels_bob"


def test_several_masks_of_an_image_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "data/images/0.jpg")
    for number in range(2):
        put(tmp_path / f"data/masks/0_m{number}.png", (0, 255))
    result = call("data", "init", tmp_path / "data", "--out", tmp_path / "own.yaml")
    assert result.exit_code == 2
    assert not (tmp_path / "own.yaml").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train/_classes.csv", "Pixel Value, Class\n0, sky\n1, road"),
        ("label_colors.txt", "0 0 0 sky\n1 2 3 road\n"),
        ("train/masks/data.yaml", "names: [sky, road]\n"),
        ("train/meta.json", json.dumps({"classes": [{"title": "sky"}, {"title": "road"}], "tags": []})),
    ],
)
def test_names_are_found_beside_the_masks(tmp_path: Path, name: str, text: str) -> None:
    for split in ("train", "valid"):
        put(tmp_path / f"{split}/images/0.jpg")
        put(tmp_path / f"{split}/masks/0.png", (0, 1))
    (tmp_path / name).write_text(text)
    assert call("data", "init", tmp_path, "--out", tmp_path / "own.yaml").exit_code == 0
    assert load_recipe(str(tmp_path / "own.yaml")).data.classes == ("sky", "road")


def put_camvid(root: Path) -> None:
    ids = np.resize(np.arange(12, dtype=np.uint8), (6, 8))
    for split, names in {
        "train": ("0001TP_006690", "0006R0_f00930"),
        "val": ("0016E5_07959",),
        "test": ("Seq05VD_f1",),
    }.items():
        for name in names:
            put(root / f"{split}/{name}.png", size=(6, 8))
            (root / f"{split}annot").mkdir(exist_ok=True)
            Image.fromarray(ids).save(root / f"{split}annot/{name}.png")


def test_camvid_of_segnet_is_known(tmp_path: Path) -> None:
    put_camvid(tmp_path / "CamVid")
    result = call("data", "init", tmp_path / "CamVid", "--out", tmp_path / "own.yaml")
    assert result.exit_code == 0, result.output
    assert "SegNet's CamVid (2/1/1 frames)" in result.stdout
    train = open_split(tmp_path / "own.yaml", "train")
    assert (len(train.classes), train.classes[0], train.label_lut[[0, 10, 11]].tolist()) == (11, "sky", [0, 10, 255])


def test_camvid_of_segnet_is_prepared(tmp_path: Path) -> None:
    put_camvid(tmp_path / "CamVid")
    words = ["prepare", "camvid", "--source", tmp_path / "CamVid", "--root", tmp_path / "out", "--workers", "0"]
    assert call("data", *words).exit_code == 1, "some of the published files are missing"
    pairs = build_dataset("camvid", "train", root=tmp_path / "out", options={})
    assert len(pairs) == 2
    assert sorted(np.unique(pairs.load(0)[1])) == [*range(11), 255]
