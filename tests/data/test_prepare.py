"""`ssaseg data prepare`: downloads in their true raw formats, made here, become what recipes read, pixel for pixel."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changes import command as run_command
from changes import slow_masks
from click.testing import CliRunner, Result
from forked import Forked
from PIL import Image
from scipy.io import savemat

from ssaseg.cli.data import prepare as command
from ssaseg.cli.main import cli
from ssaseg.datasets import DataError, build_dataset
from ssaseg.datasets.conventions.downloads import DOWNLOADS
from ssaseg.datasets.pairs import read_names
from ssaseg.datasets.published import LAYOUTS
from ssaseg.datasets.workers import WorkerError

NAMES = ("COCO_train2014_000000000077", "mit Leerzeichen", "Straße_日本")
# (first raw id, last, what to add) of COCO-Stuff-10K, from mmsegmentation's tools/dataset_converters/coco_stuff10k.py.
STUFF_RUNS = [(0, 11, 0), (13, 25, -1), (27, 28, -2), (31, 44, -4), (46, 65, -5), (67, 67, -6), (70, 70, -8)]
STUFF_RUNS += [(72, 82, -9), (84, 90, -10), (92, 182, -11)]
STUFF = {raw: raw + shift for first, last, shift in STUFF_RUNS for raw in range(first, last + 1)}
rng = np.random.default_rng(4)


def prepare(name: str, source: Path, root: Path | None = None, workers: int = 0) -> Result:
    words = ["data", "prepare", name, "--source", str(source), "--workers", str(workers)]
    return CliRunner().invoke(cli, words + ([] if root is None else ["--root", str(root)]))


def assert_told(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    error = result.stderr[result.stderr.find("error: ") :]
    assert len(error.splitlines()) <= 3, error
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.output.replace("\n", " "), result.output


def table(result: Result) -> dict[str, list[int]]:
    """Numbers of images, masks, pairs, published and missing pairs by split, as printed."""
    rows = [line.split() for line in result.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 6 and row[0] in ("train", "val")]
    return {split: [int(cell.replace(",", "")) for cell in cells] for split, *cells in rows}


def published(monkeypatch: pytest.MonkeyPatch, name: str, train: int, val: int) -> None:
    """As if the data set had been published with so few pairs."""
    monkeypatch.setitem(LAYOUTS, name, dataclasses.replace(LAYOUTS[name], counts={"train": train, "val": val}))


def put(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def photo() -> np.ndarray:
    return rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)


def ids_of(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        assert image.mode == "L"
        return np.array(image)


def tree(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Content and time of every file below a folder."""
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    return {file: ((folder / file).read_bytes(), (folder / file).stat().st_mtime_ns) for file in files}


def contents(files: dict[Path, tuple[bytes, int]]) -> dict[Path, bytes]:
    return {file: content for file, (content, _) in files.items()}


def save_mat(file: Path, labels: np.ndarray, key: str = "S") -> None:
    """A file with the keys that COCO-Stuff-10K's have."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = np.array([["unlabeled"], ["person"]], object)
    regions = {"regionMapStuff": labels, "regionLabelsStuff": np.arange(9, dtype=np.uint16)[:, None]}
    savemat(file, {key: labels, "names": cells, "captions": cells, **regions}, do_compression=True)


def make_stuff10k(source: Path, train: tuple[str, ...] = NAMES[:2], val: tuple[str, ...] = NAMES[2:]) -> dict[str, Any]:
    """The download; returns raw ids by name. Together the masks hold all ids."""
    raw = {}
    for name in train + val:
        raw[name] = rng.permutation(np.resize(sorted(STUFF), 192)).reshape(12, 16).astype(np.uint16)
        put(source / f"images/{name}.jpg", photo())
        save_mat(source / f"annotations/{name}.mat", raw[name])
    (source / "imageLists").mkdir()
    for file, names in (("train", train), ("test", val), ("all", train + val)):
        (source / f"imageLists/{file}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return raw


def test_coco_stuff_10k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(monkeypatch, "coco_stuff10k", 2, 1)
    source, root = tmp_path / "down load", tmp_path / "röot"
    raw = make_stuff10k(source)
    before = tree(source)
    result = prepare("coco_stuff10k", source, root, workers=2)
    assert_told(result, 0)
    assert tree(source) == before
    assert table(result) == {"train": [2, 2, 2, 2, 0], "val": [1, 1, 1, 1, 0]}
    layout = LAYOUTS["coco_stuff10k"]
    seen: set[int] = set()
    for split, names in (("train", NAMES[:2]), ("val", NAMES[2:])):
        for name in names:
            expected = np.vectorize(STUFF.__getitem__)(raw[name])
            mask = ids_of(root / layout.masks[split] / f"{name}_labelTrainIds.png")
            np.testing.assert_array_equal(mask, expected)
            assert (root / layout.images[split] / f"{name}.jpg").samefile(source / f"images/{name}.jpg")  # no room
        pairs = build_dataset("coco_stuff10k", split, root=root, options={})
        assert [pairs.name(index) for index in range(len(pairs))] == sorted(names)
        for index in range(len(pairs)):
            label = pairs.load(index)[1]
            np.testing.assert_array_equal(label[raw[pairs.name(index)] == 182], 170)
            np.testing.assert_array_equal(label[raw[pairs.name(index)] == 0], 255)
            seen |= set(label.ravel().tolist())
    assert seen == {*range(171), 255}


def test_coco_stuff_164k_in_place(tmp_path: Path) -> None:
    """All archives unpacked into one folder, which is the root too, twice over."""
    known = sorted({raw - 1 for raw in STUFF if raw} | {255})
    raw = rng.permutation(np.resize(known, 192)).reshape(12, 16).astype(np.uint8)
    for split, name in (("train2017", "000000000009"), ("train2017", "000000000025"), ("val2017", "000000000139")):
        put(tmp_path / f"{split}/{name}.jpg", photo())
        put(tmp_path / f"{split}/{name}.png", raw)
    before = tree(tmp_path)
    assert_told(prepare("coco_stuff164k", tmp_path), 1, "118,287", "5,000")
    first = tree(tmp_path)
    assert {file: first[file] for file in before} == before
    expected = np.where(raw == 255, 255, np.vectorize(lambda value: STUFF.get(value + 1, 0) - 1)(raw))
    label = build_dataset("coco_stuff164k", "val", root=tmp_path, options={}).load(0)[1]
    np.testing.assert_array_equal(label, expected)
    for file in ("train2017/000000000009", "train2017/000000000025", "val2017/000000000139"):
        np.testing.assert_array_equal(ids_of(tmp_path / f"annotations/{file}_labelTrainIds.png"), expected)
    assert len(first) == 6 + 3 + 3
    (tmp_path / "images/train2017/000000000009.jpg").unlink()  # as if it had stopped before
    (tmp_path / "annotations/val2017/000000000139_labelTrainIds.png").unlink()
    assert_told(prepare("coco_stuff164k", tmp_path), 1)
    assert contents(tree(tmp_path)) == contents(first)


def test_cityscapes(tmp_path: Path) -> None:
    ids = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    train_ids = {raw: train_id for train_id, raw in enumerate(ids)}
    raw = rng.permutation(np.resize([*range(34), 255], 192)).reshape(12, 16).astype(np.uint8)
    source, root = tmp_path / "source", tmp_path / "root"
    for split, name in (("train", "aachen/aachen_000000_000019"), ("val", "lindau/lindau_000000_000019")):
        put(source / f"leftImg8bit/{split}/{name}_leftImg8bit.png", photo())
        put(source / f"gtFine/{split}/{name}_gtFine_labelIds.png", raw)
        put(source / f"gtFine/{split}/{name}_gtFine_color.png", photo())
    assert_told(prepare("cityscapes", source, root), 1, "2,975", "2,974", "500", "499")
    mask = ids_of(root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png")
    np.testing.assert_array_equal(mask, np.vectorize(lambda value: train_ids.get(value, 255))(raw))
    pairs = build_dataset("cityscapes", "val", root=root, options={})
    np.testing.assert_array_equal(pairs.load(0)[1], mask)

    labels = source / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png"
    labels.rename(labels.with_name("lindau_000000_000019_gtFine_polygons.json"))
    result = prepare("cityscapes", source, tmp_path / "other")
    assert_told(result, 2, labels.name, "only its polygons", "gtFine_trainvaltest")


def test_sets_that_are_read_as_downloaded_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, names in (("training", "abc"), ("validation", "de")):
        for name in names:
            put(tmp_path / f"images/{split}/{name}.jpg", photo())
            put(tmp_path / f"annotations/{split}/{name}.png", photo()[..., 0])
    published(monkeypatch, "ade20k", 3, 2)
    before = tree(tmp_path)
    assert prepare("ade20k", tmp_path, tmp_path / ".").exit_code == 0
    (tmp_path / "images/training/b.jpg").unlink()
    (tmp_path / "annotations/validation/e.png").unlink()
    del before[Path("images/training/b.jpg")], before[Path("annotations/validation/e.png")]
    result = prepare("ade20k", tmp_path)
    assert_told(result, 1, "train: 1 of 3 masks have no image: b", "val: 1 of 2 images have no mask: e")
    assert table(result) == {"train": [2, 3, 2, 3, 1], "val": [2, 1, 1, 2, 1]}
    assert_told(prepare("ade20k", tmp_path.parent), 2, "not the download of ade20k", "images/training/")
    assert_told(prepare("ade20k", tmp_path, tmp_path / "elsewhere"), 2, "nothing to prepare", "remove --root")
    assert tree(tmp_path) == before


def test_lists_decide_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VOC 2012 has many images without a mask, which are in no list."""
    for name in "abcd":
        put(tmp_path / f"JPEGImages/{name}.jpg", photo())
    for name in "ab":
        put(tmp_path / f"SegmentationClass/{name}.png", photo()[..., 0])
    assert_told(prepare("voc2012", tmp_path), 1, "train: the list", "train.txt")
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for split, name in (("train", "a"), ("val", "b")):
        (lists / f"{split}.txt").write_text(f"{name}\n")
    published(monkeypatch, "voc2012", 1, 1)
    assert_told(prepare("voc2012", tmp_path), 0)
    (lists / "val.txt").write_text("b\nz\n")
    assert_told(prepare("voc2012", tmp_path), 1, "val: 1 of 2 listed names have no image: z")


# Stopping and going on


def test_a_second_run_makes_only_what_is_not_whole(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    make_stuff10k(source)
    prepare("coco_stuff10k", source, root)
    whole = tree(root)
    half, gone = (root / f"annotations/train2014/{name}_labelTrainIds.png" for name in NAMES[:2])
    half.write_bytes(half.read_bytes()[:-20])  # as a program leaves it that was killed while it wrote
    gone.unlink()
    prepare("coco_stuff10k", source, root)
    assert contents(again := tree(root)) == contents(whole)
    assert sum(again[name][1] != whole[name][1] for name in whole) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_stopped_anywhere_it_goes_on(tmp_path: Path, number: int, code: int) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    names = tuple(f"{index:03}" for index in range(40))
    make_stuff10k(source, names[:-1], names[-1:])
    words = ["data", "prepare", "coco_stuff10k", "--source", str(source), "--root", str(root), "--workers", "1"]
    process = Forked(run_command, words, partial(slow_masks, "coco_stuff10k", 0.03), errors=tmp_path / "errors")
    masks = root / "annotations/train2014"
    process.wait_until(lambda: masks.is_dir() and len(list(masks.glob("*_labelTrainIds.png"))) >= 3)
    process.send_signal(number)
    ended, error = process.finish()
    assert ended == code, error
    made = list(masks.glob("*.png"))
    assert 3 <= len(made) < 40
    assert all(ids_of(file).shape == (12, 16) for file in made)
    assert ("of 80 files are done; run the command again" in error) == (number == signal.SIGTERM)
    assert "Traceback" not in error
    assert_told(prepare("coco_stuff10k", source, root), 1, "train")
    assert len(list(masks.glob("*.png"))) == 39
    assert not list(root.rglob("*.partial"))


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    make_stuff10k(source)
    whole, room = command.write_atomic, [2]

    def write(path: Path, content: bytes, sync: bool = True) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device (0.1 MiB were to be written)", str(path))
        whole(path, content, sync)

    monkeypatch.setattr(command, "write_atomic", write)
    parts = [
        f"{NAMES[2]}_labelTrainIds.png: No space left on device",
        "5 of 6 files are done, and no incomplete file",
        "free space",
    ]
    assert_told(prepare("coco_stuff10k", source, root), 2, *parts)
    assert len(list(root.rglob("*.png"))) == 2
    room[0] = 9
    assert prepare("coco_stuff10k", source, root).exit_code == 1  # counts of so small a set differ
    assert len(list(root.rglob("*.png"))) == 3


def test_a_process_that_is_killed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_stuff10k(tmp_path)
    error = WorkerError("a process that reads images ended with SIGKILL while it read image x\nmemory\nfewer")
    monkeypatch.setattr(command, "make_masks", lambda *_: (_ for _ in ()).throw(error))
    assert_told(prepare("coco_stuff10k", tmp_path), 2, "SIGKILL while it read image x", "3 of 6 files", "--workers 1")


def test_images_are_copied_where_links_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    source, root = tmp_path / "source", tmp_path / "root"
    make_stuff10k(source)
    monkeypatch.setattr(os, "link", link)
    prepare("coco_stuff10k", source, root)
    copy, original = root / f"images/train2014/{NAMES[0]}.jpg", source / f"images/{NAMES[0]}.jpg"
    assert copy.read_bytes() == original.read_bytes()
    assert not copy.samefile(original)
    copy.write_bytes(b"my own")
    assert_told(prepare("coco_stuff10k", source, root), 2, str(copy), "6 bytes", "remove the file")
    assert copy.read_bytes() == b"my own"


def test_links_in_the_download_are_followed(tmp_path: Path) -> None:
    raw = make_stuff10k(tmp_path / "real")
    (tmp_path / "store").mkdir()
    image = tmp_path / f"real/images/{NAMES[0]}.jpg"
    image.rename(tmp_path / "store/x.jpg")
    image.symlink_to("../../store/x.jpg")
    (tmp_path / "source").symlink_to("real")
    prepare("coco_stuff10k", tmp_path / "source", tmp_path / "root")
    made = tmp_path / f"root/images/train2014/{NAMES[0]}.jpg"
    assert made.samefile(tmp_path / "store/x.jpg")
    assert not made.is_symlink()  # it stays whole when the download goes
    mask = ids_of(tmp_path / f"root/annotations/train2014/{NAMES[0]}_labelTrainIds.png")
    np.testing.assert_array_equal(mask, np.vectorize(STUFF.__getitem__)(raw[NAMES[0]]))


# Bad input


def without_s(file: Path) -> None:
    save_mat(file, np.ones((12, 16), np.uint16), key="labels")


def with_unknown_ids(file: Path) -> None:
    labels = np.ones((12, 16), np.uint16)
    labels[0, :5], labels[3, 3], labels[5] = 12, 1000, 182
    save_mat(file, labels)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (without_s, ["no key S", "labels", "captions"]),
        (with_unknown_ids, ["id 12 in 5 pixels; id 1000 in 1 pixels", "expected", "0..182"]),
        (lambda file: save_mat(file, np.full((12, 16), 0.5)), ["an array of float64"]),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), ["damaged .mat file"]),
        (lambda file: file.write_bytes(b""), ["damaged .mat file"]),
        (lambda file: file.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\x02IM" + bytes(400)), ["damaged"]),
    ],
    ids=["without S", "unknown ids", "fractions", "cut off", "empty", "HDF5"],
)
def test_a_wrong_mat_file_is_named_and_the_others_are_made(tmp_path: Path, spoil: Any, parts: list[str]) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    make_stuff10k(source)
    spoil(source / f"annotations/{NAMES[1]}.mat")
    assert_told(
        prepare("coco_stuff10k", source, root), 2, f"{NAMES[1]}.mat", "1 mask cannot be made; 5 of 6 files", *parts
    )
    assert len(list(root.rglob("*_labelTrainIds.png"))) == 2
    save_mat(source / f"annotations/{NAMES[1]}.mat", np.ones((12, 16), np.uint16))
    assert prepare("coco_stuff10k", source, root).exit_code == 1
    assert len(list(root.rglob("*_labelTrainIds.png"))) == 3


def test_ten_wrong_files_are_enough(tmp_path: Path) -> None:
    names = tuple(f"{index:03}" for index in range(14))
    make_stuff10k(tmp_path, names[:-1], names[-1:])
    for file in (tmp_path / "annotations").iterdir():
        without_s(file)
    result = prepare("coco_stuff10k", tmp_path)
    assert_told(result, 2, "10 masks cannot be made, and the others were not tried; 14 of 28 files are done")
    assert result.stderr.count("left out: ") == 10


def test_a_download_that_lacks_files_is_done_in_part(tmp_path: Path) -> None:
    make_stuff10k(tmp_path)
    (tmp_path / f"annotations/{NAMES[0]}.mat").unlink()
    assert_told(
        prepare("coco_stuff10k", tmp_path),
        1,
        f"missing in the download: 1 file, {tmp_path}",
        "train: 1 of 2 images have no mask",
    )


def test_wrong_maps_are_named(tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        put(tmp_path / f"images/{split}/a.jpg", photo())
        put(tmp_path / f"stuffthingmaps/{split}/a.png", np.full((12, 16), 11 if split == "val2017" else 3, np.uint8))
    assert_told(prepare("coco_stuff164k", tmp_path), 2, "stuffthingmaps/val2017/a.png: id 11 in 192 pixels", "0..181")
    put(tmp_path / "stuffthingmaps/val2017/a.png", photo())
    assert_told(prepare("coco_stuff164k", tmp_path), 2, "a mask of 3 channels")


def test_every_set_is_either_prepared_or_read_as_it_is_downloaded() -> None:
    assert {name for name, layout in LAYOUTS.items() if layout.prepared} == set(DOWNLOADS)


def test_wrong_words_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_told(prepare("coco", tmp_path), 2, "'coco': neither a data set nor a kind", "coco_stuff10k")
    assert_told(prepare("coco_stuff10k", tmp_path / "gone"), 2, "does not exist")
    for name in DOWNLOADS:
        assert_told(prepare(name, tmp_path), 2, "files of the download are not in this folder", "--source")
    make_stuff10k(tmp_path)
    (tmp_path / "file").touch()
    assert_told(prepare("coco_stuff10k", tmp_path, tmp_path / "file/below"), 2, "file/below")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert_told(prepare("coco_stuff10k", tmp_path), 2, "scipy", "pip install 'ssaseg[mat]'")


OUTSIDE = ["../../../evil", "/tmp/evil", "a/../../evil", "..", "C:/evil", "a\\evil", "a\0evil", "\x1b[31m", "x" * 300]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_list_with_a_name_outside_is_refused(tmp_path: Path, name: str) -> None:
    source, root = tmp_path / "down" / "a" / "b", tmp_path / "root"
    make_stuff10k(source)
    for suffix in (".jpg", ".mat"):  # such files exist: a download can bring them
        shutil.copy(next(source.rglob(f"*{suffix}")), tmp_path / f"evil{suffix}")
    before = set(tmp_path.iterdir())
    (source / "imageLists" / "train.txt").write_text(f"{NAMES[0]}\n{name}\n")
    assert_told(prepare("coco_stuff10k", source, root), 2, "train.txt: ", "expected a path below the folder of images")
    assert set(tmp_path.iterdir()) == before
    with pytest.raises(DataError, match="expected a path below"):
        read_names(source / "imageLists" / "train.txt")


def test_a_mask_that_claims_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssaseg.datasets.conventions.downloads.MAX_PIXELS", 100)
    save_mat(tmp_path / "a.mat", np.zeros((20, 20), np.uint8))
    monkeypatch.setattr("scipy.io.loadmat", None)  # not reached
    with pytest.raises(DataError, match="400 values, expected at most 100"):
        DOWNLOADS["coco_stuff10k"].read(tmp_path / "a.mat")
