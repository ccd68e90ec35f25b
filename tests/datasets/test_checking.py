"""What is seen only when the files of a data set are compared with one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from raw_files import png, tiff

from ssaseg.datasets.check import Findings, compare_images, compare_masks, look_through
from ssaseg.datasets.checking.splits import too_small
from ssaseg.datasets.checking.storage import is_object, is_soft
from ssaseg.datasets.coco import CocoDataset
from ssaseg.datasets.pairs import PairDataset
from ssaseg.datasets.transforms import input_sizes, scaled_inputs

RNG = np.random.default_rng(0)
RED, BLUE, GREY = [200, 0, 0], [0, 0, 200], [9, 9, 9]
PHOTO = RNG.integers(0, 256, (8, 10, 3), dtype=np.uint8)


def ids(*values: int) -> np.ndarray:
    return np.resize(np.array(values, np.uint8), (8, 10))


def palette(values: np.ndarray, *colours: list[int]) -> Image.Image:
    picture = Image.fromarray(values)
    picture.putpalette([part for colour in colours for part in colour])
    return picture


def put(root: Path, masks: list[Image.Image | np.ndarray | bytes], images: list[np.ndarray] | None = None) -> None:
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for number, mask in enumerate(masks):
        photo = images[number] if images else RNG.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(photo).save(root / f"images/{number}.png")
        file = root / f"masks/{number}.png"
        if isinstance(mask, bytes):
            file.write_bytes(mask)
        else:
            (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(file)


def make(root: Path, masks: list[Any], images: list[np.ndarray] | None = None, **options: Any) -> PairDataset:
    put(root, masks, images)
    return PairDataset(root / "images", root / "masks", ["a", "b", "c", "d"], **options)


def compared(*splits: PairDataset) -> list[tuple[str, str]]:
    """Severity and text of what is wrong with all masks together."""
    found = [look_through(each) for each in splits]
    problems = compare_masks(splits, found)
    assert all(len(problem.text.splitlines()) <= 3 for problem in problems)
    return [(problem.severity, problem.text) for problem in problems]


# ---- palettes ----------------------------------------------------------------------------------------------------
def test_one_id_with_two_colours_and_one_colour_with_two_ids(tmp_path: Path) -> None:
    first, second = palette(ids(0, 1, 2), GREY, RED, BLUE), palette(ids(0, 1, 2), GREY, BLUE, RED)
    (one, other) = compared(make(tmp_path, [first, second]))
    assert one[0] == other[0] == "error"
    assert f"{tmp_path}/masks/0.png: id 1 is #c80000" in one[1]
    assert f"#0000c8 in {tmp_path}/masks/1.png" in one[1]
    assert "#c80000 is id 1" in other[1]
    assert "id 2 in" in other[1]


def test_palettes_are_compared_across_the_splits(tmp_path: Path) -> None:
    """Each file numbers what is in it from 1: no colour has two ids, but id 1 has two colours."""
    train = make(tmp_path / "train", [palette(ids(0, 1), GREY, RED)])
    val = make(tmp_path / "val", [palette(ids(0, 1), GREY, BLUE)])
    assert compared(train) == compared(val) == []
    ((severity, text),) = compared(train, val)
    assert (severity, "id 1 is" in text) == ("error", True)


@pytest.mark.parametrize(
    "masks",
    [
        [palette(ids(0, 1), GREY, RED), palette(ids(0, 2), GREY, BLUE, BLUE)],  # id 1 is not in the second
        [palette(ids(0, 1), GREY, RED), ids(0, 1)],  # grey levels have no colour
        [
            palette(ids(0, 1, 255), GREY, RED, *[BLUE] * 254),
            palette(ids(0, 1, 255), GREY, RED, *[GREY] * 254),
        ],  # ignored
        [palette(ids(0, 1), GREY, RED), palette(ids(0, 1), [0, 0, 0], [1, 1, 1])],  # a ramp of grey
        [palette(ids(0, 1), GREY, RED), palette(ids(0, 1), [0, 0, 0], [0, 0, 0])],  # empty
    ],
    ids=["unused", "grey", "ignored", "ramp", "empty"],
)
def test_palettes_that_agree_or_say_nothing(tmp_path: Path, masks: list[Any]) -> None:
    assert compared(make(tmp_path, masks)) == []


def test_published_masks_are_not_doubted(tmp_path: Path) -> None:
    dataset = make(tmp_path, [palette(ids(0, 1), GREY, RED), palette(ids(0, 1), GREY, BLUE)])
    dataset.fix = "unpack the download again"
    assert compared(dataset) == []


# ---- 1 and 255 ---------------------------------------------------------------------------------------------------
ONE_BIT, EIGHT_BIT = png(ids(0, 1), 1), ids(0, 255)


@pytest.mark.parametrize("first", [ONE_BIT, palette(ids(0, 1), [0] * 3, [255] * 3)], ids=["1-bit", "palette"])
def test_white_is_1_in_one_file_and_255_in_another(tmp_path: Path, first: Any) -> None:
    ((severity, text),) = [each for each in compared(make(tmp_path, [first, EIGHT_BIT])) if "raw_to_train" in each[1]][
        :1
    ]
    assert severity == "error"
    assert "0.png: white is id 1; in" in text
    assert "data.raw_to_train={0: 0, 1: 1, 255: 1}" in text
    mapped = make(tmp_path, [first, EIGHT_BIT], raw_to_train={0: 0, 1: 1, 255: 1})
    assert compared(mapped) == []
    assert (mapped.load(0)[1] == mapped.load(1)[1]).all()


@pytest.mark.parametrize(
    "masks",
    [
        [ONE_BIT, ids(0, 1)],
        [png(ids(0), 1), ids(0, 2, 255)],
        [ONE_BIT, ids(0, 1, 2, 1, 1, 255)],
        [ids(0, 1, 1, 1, 255), ids(0, 1, 2)],
    ],
)
def test_255_that_is_ignored_by_right(tmp_path: Path, masks: list[Any]) -> None:
    assert compared(make(tmp_path, masks)) == []


def test_two_eight_bit_ways_are_a_warning(tmp_path: Path) -> None:
    severities = [severity for severity, text in compared(make(tmp_path, [ids(0, 1), EIGHT_BIT])) if "both" in text]
    assert severities == ["warning"]


def test_255_as_the_only_object(tmp_path: Path) -> None:
    ((severity, text),) = compared(make(tmp_path, [EIGHT_BIT]))
    assert severity == "warning"
    assert "255 is ignored, and has 50.0% of the pixels; the only other id is 0" in text
    assert compared(make(tmp_path, [EIGHT_BIT], raw_to_train={0: 0, 255: 1})) == []


def counts(**pixels: int) -> np.ndarray:
    found = np.zeros(256, np.int64)
    for name, count in pixels.items():
        found[int(name[1:])] = count
    return found


@pytest.mark.parametrize(
    ("pixels", "soft", "thing"),
    [
        (counts(i0=800, i255=180, i1=9, i254=9), True, True),  # JPEG
        (counts(i0=800, i255=100, **{f"i{k}": 2 for k in range(20, 240, 10)}), True, False),  # anti-aliased
        (counts(i0=500, i255=300, **{f"i{k}": 7 for k in range(1, 255, 10)}), True, False),  # thin objects
        (counts(i0=900, i255=5600, **{f"i{k}": 6 for k in range(1, 151)}), False, False),  # 150 classes, few labelled
        (counts(i0=100, i255=9600, **{f"i{k}": 1 for k in range(1, 151)}), False, True),
        (counts(i0=800, i255=100, i85=30, i170=30), False, False),  # four classes as grey levels
        (counts(i0=800, i255=100, i1=20), False, True),  # a rare class, perhaps
        (counts(i0=800, i255=100, i128=30, i200=30), False, False),  # classes as grey levels
        (counts(i0=500, i1=300, i2=100, i255=50), False, False),
        (counts(i0=500, i255=300), False, True),
        (counts(i1=500, i255=300), False, False),
    ],
)
def test_soft_edges_and_rare_classes(pixels: np.ndarray, soft: bool, thing: bool) -> None:
    assert is_soft(pixels) == soft
    assert is_object(pixels) == thing


def test_soft_edges_are_a_warning(tmp_path: Path) -> None:
    values = np.zeros((8, 10), np.uint8)
    values[2:6, 2:8] = 255
    values[1, 1:4], values[6, 3:6] = (3, 4, 5), (252, 251, 250)
    dataset = make(
        tmp_path, [values], raw_to_train={0: 0, **dict.fromkeys((3, 4, 5), 1), **dict.fromkeys((250, 251, 252), 2)}
    )
    ((severity, text),) = compared(dataset)
    assert severity == "warning"
    assert "soft edges: 0 and 255, and 6 other values with 7.5% of the pixels" in text


# ---- images ------------------------------------------------------------------------------------------------------
def texts(findings: Findings) -> dict[str, str]:
    return {problem.kind: f"{problem.severity}: {problem.text}" for problem in findings.problems}


@pytest.mark.parametrize(
    ("orientation", "square", "warned"), [(1, True, 0), (3, False, 2), (6, True, 2), (6, False, 0)]
)
def test_turned_images_whose_size_stays_are_counted(
    tmp_path: Path, orientation: int, square: bool, warned: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    shape = (8, 8) if square else (8, 10) if orientation < 5 else (10, 8)
    make(
        tmp_path, [ids(0, 1, 2, 3)[: shape[0], : shape[1]] if shape[0] == 8 else np.resize(ids(0, 1, 2, 3), shape)] * 2
    )
    stored = shape if orientation < 5 else shape[::-1]
    for number in range(2):
        file = tmp_path / f"images/{number}.png"
        Image.fromarray(np.zeros((*stored, 3), np.uint8)).save(file, exif=exif)
    found = texts(look_through(PairDataset(tmp_path / "images", tmp_path / "masks", ["a", "b", "c", "d"])))
    assert ("turned" in found) == bool(warned)
    if warned:
        assert found["turned"].startswith("warning: 2 images have an EXIF orientation")
        assert "0.png, …" in found["turned"]


def test_coco_images_are_looked_at_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(PHOTO).save(tmp_path / "a.jpg", exif=exif)
    region = (
        '{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 6, 1, 6, 6]], "area": 12, "iscrowd": 0}'
    )
    (tmp_path / "a.json").write_text(
        '{"images": [{"id": 1, "file_name": "a.jpg", "width": 10, "height": 8}], "annotations": [' + region + "],"
        '"categories": [{"id": 1, "name": "x"}]}'
    )
    found = texts(look_through(CocoDataset(tmp_path, [tmp_path / "a.json"], background="none")))
    assert "1 image has an EXIF orientation" in found["turned"]


def deep(high: int) -> np.ndarray:
    pixels = RNG.integers(0, high + 1, (8, 10)).astype(np.uint16)
    pixels[0, 0] = high
    return pixels


@pytest.mark.parametrize(
    ("high", "levels", "part"),
    [
        (4000, None, "16 bits, largest value 4000: only 16 grey levels are left\nset data.range: [0, 4095]"),
        (3000, None, "set data.range: [0, 3000]"),
        (60000, None, None),
        (4000, (0, 4095), None),
        (200, (0, 4095), "largest value 200, with data.range: [0, 4095]"),
    ],
)
def test_16_bits_of_which_few_are_used(
    tmp_path: Path, high: int, levels: tuple[int, int] | None, part: str | None
) -> None:
    images = [deep(high)] * 2
    found = texts(look_through(make(tmp_path, [ids(0, 1, 2, 3)] * 2, images, levels=levels), decoded=0))
    assert ("bits" in found) == (part is not None)
    assert part is None or part in found["bits"]


@pytest.mark.parametrize("high", [None, 4000])
def test_range_has_no_effect_only_where_no_split_has_16_bits(tmp_path: Path, high: int | None) -> None:
    splits = [
        make(tmp_path / name, [ids(0, 1, 2, 3)], [pixels], levels=(0, 4095))
        for name, pixels in (("train", PHOTO if high is None else deep(high)), ("val", PHOTO))
    ]
    found = [look_through(split) for split in splits]
    assert not any("bits" in texts(each) for each in found)
    problems = compare_masks(splits, found)
    assert ["data.range has no effect" in problem.text for problem in problems] == [True] * (high is None)


def test_dark_bands_that_are_stored_apart_are_noticed(tmp_path: Path) -> None:
    put(tmp_path, [ids(0, 1, 2, 3)])
    (tmp_path / "images/0.tif").write_bytes(tiff(np.dstack([deep(4100)] * 3), 2, apart=True))
    dataset = PairDataset(tmp_path / "images", tmp_path / "masks", list("abcd"), image_suffixes=[".tif"])
    assert "1 image has 16 bits, largest value 4096" in texts(look_through(dataset))["bits"]


def test_single_bright_pixels_do_not_hide_dark_images(tmp_path: Path) -> None:
    pixels = np.resize(deep(900), (200, 200))
    pixels[9, 9] = 65535
    found = texts(look_through(make(tmp_path, [np.resize(ids(0, 1, 2, 3), (200, 200))], [pixels])))
    assert "99.9 % of them up to 900" in found["bits"]
    assert "[0, 900]" in found["bits"]


def test_a_fourth_band_pages_and_other_types(tmp_path: Path) -> None:
    make(tmp_path, [ids(0, 1, 2, 3)] * 2, [np.dstack([PHOTO, PHOTO[..., :1]]), PHOTO])
    Image.fromarray(PHOTO).save(tmp_path / "images/1.png", save_all=True, append_images=[Image.fromarray(PHOTO[::-1])])
    for name in ("b.heic", "c.heic", "notes.txt"):
        (tmp_path / "images" / name).write_text("x")
    found = texts(look_through(PairDataset(tmp_path / "images", tmp_path / "masks", ["a", "b", "c", "d"])))
    assert found["bands"].startswith("note: 1 image has a further band")
    assert found["paged"].startswith("warning: 1 image has more than one page")
    assert found["other types"].startswith("note: 2 files of other types are left out: 2 .heic in ")


def test_masks_of_several_pages_are_named(tmp_path: Path) -> None:
    put(tmp_path, [ids(0, 1, 2, 3)])
    for kind, file in (("TIFF", tmp_path / "masks/0.tif"), ("GIF", tmp_path / "masks/0.gif")):
        Image.fromarray(ids(0, 1, 2, 3)).save(
            file, kind, save_all=True, append_images=[Image.fromarray(ids(3, 2, 1, 0))]
        )
        dataset = PairDataset(tmp_path / "images", tmp_path / "masks", list("abcd"), mask_suffix=file.suffix)
        found = texts(look_through(dataset))
        assert found["mask of several pages"].startswith(f"warning: {file}: a mask of more than one page")


def test_masks_beside_images_are_not_left_out(tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.jpg")
    Image.fromarray(ids(0, 1, 2, 3)).save(tmp_path / "a.png")
    dataset = PairDataset(tmp_path, tmp_path, ["a", "b", "c", "d"], image_suffixes=[".jpg"])
    assert "other types" not in texts(look_through(dataset))


# ---- two splits --------------------------------------------------------------------------------------------------
def test_images_in_both_splits(tmp_path: Path) -> None:
    """The same file by another path, a copy, another image of the same size in bytes."""
    other = PHOTO.copy()
    other[0, 0] ^= 1
    flat = [np.full((8, 10, 3), value, np.uint8) for value in (1, 2, 3)]
    train = make(tmp_path / "train", [ids(0, 1, 2, 3)] * 3, [PHOTO, flat[0], flat[1]])
    val = make(tmp_path / "val", [ids(0, 1, 2, 3)] * 4, [flat[2], PHOTO, other, flat[2]])
    assert val.image_files[0].stat().st_size == train.image_files[1].stat().st_size
    assert compare_images(train, val) == []
    (problem,) = compare_images(train, val, content=True)
    assert problem.text.startswith("1 of 4 validation image is a training image too: 1;")
    val.image_files[0].unlink()
    val.image_files[0].symlink_to(train.image_files[1])
    (problem,) = compare_images(train, val)
    assert problem.text.startswith("1 of 4 validation image is a training image too: 0;")
    (problem,) = compare_images(train, val, content=True)
    assert problem.text.startswith("2 of 4 validation images are training images too: 0, 1;")
    val.image_files[2].unlink()
    assert len(compare_images(train, val, content=True)) == 1, "a file that is missing is reported elsewhere"


@pytest.mark.parametrize("scale", [None, (128, 96), (33, 64)])
@pytest.mark.parametrize("multiple", [None, 32])
def test_sizes_of_inputs_are_those_that_are_made(scale: tuple[int, int] | None, multiple: int | None) -> None:
    for size in ((24, 128), (20, 1000), (7, 7), (64, 48)):
        ratios = (0.5, 1.0, 1.75)
        made = scaled_inputs(np.zeros((*size, 3), np.uint8), scale, multiple, ratios)
        assert input_sizes(size, scale, multiple, ratios) == [each.shape[:2] for each in made]


def test_images_that_are_too_small_for_validation() -> None:
    sizes = {(24, 128): "strip", (96, 128): "whole"}
    (problem,) = too_small(sizes, 32, None, None, (1.0,))
    assert problem.severity == "error"
    assert "strip: too small for validation: 128x24 pixels give the network 128x24 (test.scale=null" in problem.text
    assert list(too_small(sizes, 32, None, 32, (1.0,))) == []
    assert list(too_small(sizes, 32, (512, 96), None, (1.0,))) == []
    assert len(list(too_small(sizes, 32, (512, 96), None, (0.25, 1.0)))) == 2
