"""Image/mask pairs on disk: what is read, and what each kind of bad input is answered with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from ssaseg.datasets import DataError, build_dataset, default_palette, list_datasets
from ssaseg.datasets.base import pascal_palette
from ssaseg.datasets.decoding import read_image, read_mask
from ssaseg.datasets.pairs import PairDataset, label_table

CLASSES = ("sky", "road", "tree")
PALETTE = ((10, 20, 30), (200, 0, 0), (0, 200, 0))


def put(file: Path, pixels: np.ndarray, **save: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **save)
    return file


def photo(height: int = 12, width: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ids(*values: int, height: int = 12, width: int = 20) -> np.ndarray:
    return np.resize(np.array(values, np.uint8), (height, width))


def folder(root: Path, mask: np.ndarray | None = None, image: np.ndarray | None = None, **options: Any) -> PairDataset:
    put(root / "images/a.png", photo() if image is None else image)
    put(root / "masks/a.png", ids(0, 1, 2, 255) if mask is None else mask)
    return pairs(root, **options)


def pairs(root: Path, **options: Any) -> PairDataset:
    return PairDataset(root / "images", root / "masks", options.pop("classes", CLASSES), **options)


def told(error: pytest.ExceptionInfo[DataError], *parts: str) -> None:
    """The message is short and holds every part."""
    text = str(error.value)
    assert len(text.splitlines()) <= 3, text
    for part in parts:
        assert part in text


# What is read


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".TIFF", ".webp"])
def test_lossless_formats_are_read_as_bgr(tmp_path: Path, suffix: str) -> None:
    put(tmp_path / f"images/a{suffix}", photo(), **({"lossless": True} if suffix == ".webp" else {}))
    put(tmp_path / "masks/a.png", ids(0, 1, 2, 255))
    dataset = pairs(tmp_path)
    image, label = dataset.load(0)
    np.testing.assert_array_equal(image[..., ::-1], photo())
    np.testing.assert_array_equal(label, ids(0, 1, 2, 255))
    assert (image.dtype, label.dtype, dataset.name(0), len(dataset)) == (np.uint8, np.uint8, "a", 1)


def test_jpeg_equals_opencv(tmp_path: Path) -> None:
    file = put(tmp_path / "a.JPG", photo(), format="JPEG")
    np.testing.assert_array_equal(read_image(file), cv2.imread(str(file)))


def test_exif_orientation_turns_the_image_and_not_the_mask(tmp_path: Path) -> None:
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    put(tmp_path / "images/a.jpg", upright, exif=exif.tobytes(), quality=95)
    put(tmp_path / "masks/a.png", ids(0, 1, height=16, width=8))
    image, label = pairs(tmp_path).load(0)
    assert image.shape == (16, 8, 3)
    assert label.shape == (16, 8)
    assert image[:8].mean() < 5
    assert image[8:].mean() > 250
    put(tmp_path / "masks/a.png", ids(0, 1, height=8, width=16))
    with pytest.raises(DataError) as error:
        pairs(tmp_path).load(0)
    told(error, "EXIF", "16x8", "8x16")


@pytest.mark.parametrize("kind", ["grey", "alpha", "sixteen bits"])
def test_grey_alpha_and_deep_images_become_bgr_bytes(tmp_path: Path, kind: str) -> None:
    grey = photo()[..., 0]
    pixels = {
        "grey": grey,
        "alpha": np.dstack([grey, grey, grey, grey]),
        "sixteen bits": grey.astype(np.uint16) * 256 + 77,
    }[kind]
    image = read_image(put(tmp_path / "a.png", pixels))
    np.testing.assert_array_equal(image, np.dstack([grey] * 3))


def test_masks_of_all_kinds(tmp_path: Path) -> None:
    palette = Image.fromarray(ids(0, 1, 2))
    palette.putpalette([9, 9, 9, 7, 7, 7, 200, 1, 1])
    palette.save(tmp_path / "palette.png")
    raw, colours, *_ = read_mask(tmp_path / "palette.png")
    np.testing.assert_array_equal(raw, ids(0, 1, 2))
    assert colours is not None
    assert colours[2].tolist() == [200, 1, 1]
    for name, pixels in (("bits", ids(0, 1) > 0), ("deep", ids(0, 1).astype(np.uint16))):
        raw, colours, *_ = read_mask(put(tmp_path / f"{name}.png", pixels))
        np.testing.assert_array_equal(raw, ids(0, 1))
        assert raw.dtype == np.uint8
        assert colours is None


def test_names_are_relative_sorted_and_independent_of_case_and_alphabet(tmp_path: Path) -> None:
    for name in ("b/ünï 東京", "a/x.y", "z"):
        put(tmp_path / f"images/{name}.PNG", photo())
        put(tmp_path / f"masks/{name}_labelTrainIds.png", ids(0))
    put(tmp_path / "images/._z.png", photo())  # macOS leaves such files behind
    dataset = pairs(tmp_path, mask_suffix="_labelTrainIds.png")
    assert [dataset.name(index) for index in range(3)] == ["a/x.y", "b/ünï 東京", "z"]
    assert dataset.load(1)[0].shape == (12, 20, 3)


def test_one_folder_may_hold_images_and_masks(tmp_path: Path) -> None:
    put(tmp_path / "a.png", photo())
    put(tmp_path / "a_mask.png", ids(0, 1))
    dataset = PairDataset(tmp_path, tmp_path, CLASSES, mask_suffix="_mask.png")
    assert [dataset.name(index) for index in range(len(dataset))] == ["a"]


def test_an_image_whose_mask_folder_is_missing(tmp_path: Path) -> None:
    put(tmp_path / "images/sub/a.jpg", photo())
    put(tmp_path / "masks/b.png", ids(0))
    with pytest.raises(DataError, match=r"1 of 1 images have no mask: sub/a\nexpected .*masks/sub/a.png"):
        PairDataset(tmp_path / "images", tmp_path / "masks", CLASSES)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    folder(tmp_path / "real")
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    os.symlink(tmp_path / "real/images", tmp_path / "images/city")
    os.symlink(tmp_path / "real/masks/a.png", put(tmp_path / "masks/city/b.png", ids(0)).with_name("a.png"))
    os.symlink(tmp_path / "images", tmp_path / "images/circle")
    os.symlink(tmp_path / "images", tmp_path / "real/images/back")
    os.symlink("itself", tmp_path / "images/itself")
    dataset = pairs(tmp_path)
    assert [dataset.name(index) for index in range(len(dataset))] == ["city/a"]
    assert dataset.load(0)[1].shape == (12, 20)


def test_devices_and_pipes_are_named(tmp_path: Path) -> None:
    folder(tmp_path)
    os.mkfifo(tmp_path / "images/b.png")
    put(tmp_path / "masks/b.png", ids(0))
    dataset = pairs(tmp_path)
    with pytest.raises(OSError, match=r"not a regular file, but a FIFO: '.*images/b.png'"):
        dataset.load(1)
    with pytest.raises(OSError, match="not a regular file, but a device: '/dev/zero'"):
        pairs(tmp_path, names=Path("/dev/zero"))


# What ids mean


def test_reduce_zero_label_as_mmsegmentation() -> None:
    table, valid = label_table(150, reduce_zero_label=True)
    expected = np.arange(256)
    expected[0] = 255  # mmsegmentation's three lines
    expected -= 1
    expected[expected == 254] = 255
    np.testing.assert_array_equal(table[valid], expected[valid])
    assert np.flatnonzero(valid).tolist() == [*range(151), 255]


def test_label_tables() -> None:
    table, valid = label_table(3)
    assert table[[0, 1, 2, 255]].tolist() == [0, 1, 2, 255]
    assert np.flatnonzero(valid).tolist() == [0, 1, 2, 255]
    table, valid = label_table(3, ignore_index=1)
    assert table[[0, 1, 2]].tolist() == [0, 255, 2]
    table, valid = label_table(3, ignore_index=7, raw_to_train={40: 2, 41: 0, 42: 255, 43: 7})
    assert table[[40, 41, 42, 43, 7, 255]].tolist() == [2, 0, 255, 255, 255, 255]
    assert np.flatnonzero(valid).tolist() == [7, 40, 41, 42, 43, 255]
    assert label_table(255)[0].tolist() == list(range(256))


def test_load_maps_and_load_raw_does_not(tmp_path: Path) -> None:
    dataset = folder(tmp_path, ids(0, 1, 3, 255), reduce_zero_label=True)
    raw = dataset.load_raw(0)[1]
    np.testing.assert_array_equal(raw, ids(0, 1, 3, 255))
    np.testing.assert_array_equal(dataset.load(0)[1], ids(255, 0, 2, 255))
    np.testing.assert_array_equal(dataset.label_lut[raw], dataset.load(0)[1])


def test_cache_reads_once_and_cannot_be_written(tmp_path: Path) -> None:
    dataset = folder(tmp_path, cache=True)
    dataset.preload()
    first = dataset.load(0)
    for file in (*dataset.image_files, *dataset.mask_files):
        file.unlink()
    np.testing.assert_array_equal(dataset.load(0)[0], first[0])
    with pytest.raises(ValueError, match="read-only"):
        dataset.load_raw(0)[0][:] = 0
    without_cache = folder(tmp_path)
    without_cache.image_files[0].unlink()
    with pytest.raises(FileNotFoundError):
        without_cache.load(0)


def test_default_palette_is_pascals_and_black_is_only_background() -> None:
    assert pascal_palette(4) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert pascal_palette(256)[255] == (224, 224, 192)
    assert default_palette(("background", "cat", "dog")) == pascal_palette(3)
    assert default_palette(("road", "Void", "car", "void")) == ((128, 0, 0), (0, 0, 0), (0, 128, 0), (128, 128, 0))
    many = default_palette([f"class {number}" for number in range(255)])
    assert len({*many, (0, 0, 0)}) == 256


# Bad input


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    put(tmp_path / "masks/a.png", ids(0))
    with pytest.raises(DataError) as error:
        pairs(tmp_path)
    told(error, str(tmp_path / "images"), "no such folder", "data.root")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/readme.txt").write_text("no image")
    with pytest.raises(DataError) as error:
        pairs(tmp_path)
    told(error, "no images", ".jpeg")


def test_images_without_mask_are_counted_and_the_suffix_is_suggested(tmp_path: Path) -> None:
    for name in "abcde":
        put(tmp_path / f"images/{name}.jpg", photo())
    put(tmp_path / "masks/a.png", ids(0))
    put(tmp_path / "masks/b_ids.png", ids(0))
    with pytest.raises(DataError) as error:
        pairs(tmp_path)
    told(error, "4 of 5", "b, c, d, …", str(tmp_path / "masks/b.png"), "b_ids.png", "data.mask_suffix")


def test_two_images_of_one_name(tmp_path: Path) -> None:
    folder(tmp_path)
    put(tmp_path / "images/a.jpg", photo())
    with pytest.raises(DataError) as error:
        pairs(tmp_path)
    told(error, "a.jpg", "a.png", "the same name")


@pytest.mark.parametrize(
    ("name", "keep"), [("a.jpg", 0.5), ("a.jpg", -2), ("a.png", 0.5), ("a.png", -12), ("a.png", 0)]
)
def test_truncated_images(tmp_path: Path, name: str, keep: float) -> None:
    file = put(tmp_path / name, photo(64, 64))
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if 0 <= keep < 1 else int(keep)])
    with pytest.raises(DataError) as error:
        read_image(file)
    told(error, str(file), "damaged image")


def test_truncated_jpeg_with_a_whole_thumbnail(tmp_path: Path) -> None:
    thumbnail = put(tmp_path / "thumbnail.jpg", photo()).read_bytes()
    data = put(tmp_path / "a.jpg", photo(64, 64)).read_bytes()
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    file = tmp_path / "b.jpg"
    file.write_bytes(data[:2] + segment + data[2:] + b"padding behind the end")
    assert read_image(file).shape == (64, 64, 3)
    file.write_bytes(data[:2] + segment + data[2:-200])
    with pytest.raises(DataError, match="end is missing"):
        read_image(file)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\nIEND", b"\xff\xd8\xff\xd9"])
def test_files_that_are_no_pictures(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(content)
    with pytest.raises(DataError, match="damaged image"):
        read_image(file)
    with pytest.raises(DataError, match=r"damaged mask|JPEG compression"):
        read_mask(file)
    file.write_bytes(content[:9])
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=r"damaged|JPEG compression") as error:
            read(file)
        assert "BytesIO" not in str(error.value)
        assert ("empty file" in str(error.value)) == (not content)


def test_truncated_mask(tmp_path: Path) -> None:
    file = put(tmp_path / "a.png", photo(64, 64)[..., 0])
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(DataError) as error:
        read_mask(file)
    told(error, str(file), "damaged mask")


def test_mask_of_another_size(tmp_path: Path) -> None:
    dataset = folder(tmp_path, ids(0, height=12, width=19))
    with pytest.raises(DataError) as error:
        dataset.load_raw(0)
    told(error, "19x12", "20x12", "masks/a.png")


def test_colour_masks(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        folder(tmp_path, photo()).load(0)
    told(error, "3 channels", "its class id")
    with pytest.raises(DataError, match="channels are equal"):
        folder(tmp_path, np.dstack([ids(0, 1)] * 3)).load(0)


def test_masks_with_large_or_broken_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_mask(put(tmp_path / "a.png", np.full((4, 4), 256, np.uint16)))
    told(error, "256", "0..255")
    with pytest.raises(DataError, match="float32"):
        read_mask(put(tmp_path / "a.tif", np.zeros((4, 4), np.float32)))


@pytest.mark.parametrize(
    ("mask", "options", "mend"),
    [
        (ids(1, 2, 3), {}, "data.reduce_zero_label=true"),
        (ids(0, 1, 2, 7), {}, "data.ignore_index=7"),
        (ids(0, 76, 150, 29), {}, "grey levels"),
        (ids(0, 4), {"reduce_zero_label": True}, "data.ignore_index=4"),
        (ids(5, 6), {"raw_to_train": {5: 0}}, "add 6 to data.raw_to_train"),
    ],
)
def test_ids_out_of_range(tmp_path: Path, mask: np.ndarray, options: dict[str, Any], mend: str) -> None:
    dataset = folder(tmp_path, mask, **options)
    bad = int(np.flatnonzero(~dataset.valid_raw & np.isin(np.arange(256), mask))[0])
    with pytest.raises(DataError) as error:
        dataset.load(0)
    told(error, str(dataset.mask_files[0]), f"id {bad} in {(mask == bad).sum()} pixels", "expected", mend)
    assert str(dataset.label_error(0)) == str(error.value)


@pytest.mark.parametrize("void", [False, True])
def test_palette_file_with_the_recipes_colours_in_another_order(tmp_path: Path, void: bool) -> None:
    mask = Image.fromarray(ids(0, 1, 2, *([255] if void else [])))
    mask.putpalette([channel for at in (2, 0, 1) for channel in PALETTE[at]] + [7] * 759 * void)
    dataset = folder(tmp_path, palette=PALETTE)
    mask.save(dataset.mask_files[0])
    with pytest.raises(DataError) as error:
        dataset.load(0)
    told(error, "id 0 (sky)", "colour of tree", "data.palette")
    assert 2 in pairs(tmp_path).load(0)[1], "colours nobody chose prove nothing"
    mask.putpalette([channel for colour in PALETTE for channel in colour] + [7] * 759 * void)
    mask.save(dataset.mask_files[0])
    assert 2 in dataset.load(0)[1]
    mask.putpalette([1, 1, 1, *PALETTE[0], 3, 3, 3] + [7] * 759 * void)  # one colour in common is chance
    mask.save(dataset.mask_files[0])
    assert 2 in dataset.load(0)[1]


def test_masks_that_merely_carry_pascals_palette_are_not_accused(tmp_path: Path) -> None:
    voc = pascal_palette(256)
    dataset = folder(tmp_path, palette=[voc[at] for at in (2, 0, 1)])
    for used in ((0, 1, 2), (255,)):
        mask = Image.fromarray(ids(*used))
        mask.putpalette([channel for colour in voc for channel in colour])
        mask.save(dataset.mask_files[0])
        assert set(np.unique(dataset.load(0)[1])) == set(used)


# By name


def test_build_dataset(tmp_path: Path) -> None:
    folder(tmp_path)
    options = {"train": {"images": "images", "masks": "masks"}, "val": None, "classes": list(CLASSES), "palette": None}
    dataset = build_dataset("folder", "train", root=tmp_path, options=options)
    assert dataset.classes == CLASSES
    assert dataset.load(0)[0].shape == (12, 20, 3)
    with pytest.raises(DataError, match=r"data\.val"):
        build_dataset("folder", "val", root=tmp_path, options=options)
    with pytest.raises(DataError, match="folder, coco_json, synthetic"):
        build_dataset("cityscape", "train", root=tmp_path, options=options)
    with pytest.raises(DataError, match="no such split"):
        build_dataset("folder", "test", root=tmp_path, options=options)
    assert list_datasets()[-3:] == ["folder", "coco_json", "synthetic"]
