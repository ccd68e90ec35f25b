"""The look through a data set before training: everything at once, warnings apart from errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssaseg.datasets import DataError, check
from ssaseg.datasets.base import Problem
from ssaseg.datasets.check import Findings, check_dataset, look_through
from ssaseg.datasets.decoding import read_mask
from ssaseg.datasets.inspection import count_ids
from ssaseg.datasets.pairs import PairDataset
from ssaseg.datasets.synthetic import SyntheticScenes


def make(root: Path, masks: list[np.ndarray], **options: Any) -> PairDataset:
    for kind in ("images", "masks"):
        (root / kind).mkdir(exist_ok=True)
    for number, mask in enumerate(masks):
        Image.fromarray(np.full((8, 10, 3), 99, np.uint8)).save(root / f"images/{number:02d}.jpg")
        Image.fromarray(mask).save(root / f"masks/{number:02d}.png")
    return PairDataset(root / "images", root / "masks", ["sky", "road", "tree"], **options)


def mask(*values: int, height: int = 8, width: int = 10) -> np.ndarray:
    return np.resize(np.array(values, np.uint8), (height, width))


def texts(findings: Findings, severity: str) -> list[str]:
    assert all(len(problem.text.splitlines()) <= 3 for problem in findings.problems)
    return findings.messages(severity)


def test_sound_data_has_no_problem(tmp_path: Path) -> None:
    assert check_dataset(make(tmp_path, [mask(0, 1), mask(2, 255)])).problems == []
    assert check_dataset(SyntheticScenes(3, 64, 64), sample=2).problems == []


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    dataset = make(tmp_path, [mask(0, 1), mask(0, 9), mask(0, width=9), mask(0), mask(0), mask(0)])
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(dataset.mask_files[3])
    dataset.image_files[4].write_bytes(dataset.image_files[4].read_bytes()[:-50])
    dataset.image_files[5].unlink()
    errors = texts(check_dataset(dataset), "error")
    for number, part in (
        (1, "id 9 in 40 pixels"),
        (2, "9x8"),
        (3, "channels"),
        (4, "damaged image"),
        (5, "No such file"),
    ):
        assert f"{number:02d}." in errors[number - 1]
        assert part in errors[number - 1]
    assert len(errors) == 5


def test_a_pair_may_have_two_problems(tmp_path: Path) -> None:
    errors = texts(check_dataset(make(tmp_path, [mask(0, 9, width=9)])), "error")
    assert ["9x8" in errors[0], "id 9" in errors[1]] == [True, True]


def test_a_cause_is_told_once_with_a_count_and_three_examples(tmp_path: Path) -> None:
    dataset = make(tmp_path, [mask(3)] * 9 + [mask(0, 4, width=9)] * 2 + [mask(0, 4)])
    found = check_dataset(dataset)
    ids, sizes = texts(found, "error")
    assert ids.startswith(
        f"12 x ids out of range: 00, 01, 02, …; the first: {dataset.mask_files[0]}: id 3 in 80 pixels\n"
    )
    assert "data.reduce_zero_label" in ids
    assert sizes.startswith("2 x sizes that differ: 09, 10; the first: ")
    assert found.count("error") == 14


def test_the_list_is_bounded() -> None:
    problems = [Problem("error", f"{letter}.png: a reason {letter}", "odd", letter) for letter in "abcdefghijklmn"]
    errors = Findings(14, problems=problems).messages("error")
    assert len(errors) == 11
    assert errors[0] == "a.png: a reason a"
    assert errors[-1] == "4 more errors in the 14 pairs that were read: 4 x odd"


def test_classes_without_pixels_are_a_warning(tmp_path: Path) -> None:
    problems = check_dataset(make(tmp_path, [mask(0, 1), mask(2)], reduce_zero_label=True))
    assert texts(problems, "error") == []
    (warning,) = texts(problems, "warning")
    assert "1 of 3 classes" in warning
    assert "tree" in warning
    assert "0, 1, 2" in warning
    assert len(warning.splitlines()) == 1
    assert texts(check_dataset(make(tmp_path, [mask(0), mask(9)])), "warning") == [], "the error explains them"


@pytest.mark.parametrize(("values", "options"), [([255], {}), ([0], {"reduce_zero_label": True})])
def test_masks_in_which_nothing_is_labelled(tmp_path: Path, values: list[int], options: dict[str, Any]) -> None:
    (problem,) = check_dataset(make(tmp_path, [mask(*values)] * 2, **options)).problems
    assert problem.severity == "error"
    assert "no labelled pixel in the 2 masks" in problem.text
    assert "data.ignore_index" in problem.text


def test_masks_without_image_are_a_warning(tmp_path: Path) -> None:
    make(tmp_path, [mask(0, 1, 2)])
    Image.fromarray(mask(0)).save(tmp_path / "masks/stray.png")
    problems = check_dataset(make(tmp_path, [mask(0, 1, 2)])).problems
    assert [problem.severity for problem in problems] == ["warning"]
    assert problems[0].text == f"1 mask has no image: {tmp_path / 'masks/stray.png'}"


def test_sample_is_evenly_spaced_and_does_not_judge_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SMALL", 0)
    monkeypatch.setattr(check, "DECODED", 1)
    dataset = make(tmp_path, [mask(0), mask(9), mask(0), mask(9), mask(0), mask(9)])
    assert check_dataset(dataset, sample=3).problems == [], "0, 2 and 4 are sound; two classes may lie in the others"
    (error,) = texts(check_dataset(dataset, sample=6), "error")
    assert error.startswith("3 x ids out of range: 01, 03, 05; ")
    dataset.image_files[4].write_bytes(dataset.image_files[4].read_bytes()[:-50])
    assert len(check_dataset(dataset, sample=3).problems) == 1, (
        "an image that is not decoded is still known to be cut off"
    )


def test_turned_images_are_measured_as_they_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "DECODED", 0)
    dataset = make(tmp_path, [mask(0, 1, 2, height=10, width=8)])
    assert len(texts(check_dataset(dataset), "error")) == 1
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(dataset.image_files[0], exif=exif.tobytes())
    assert check_dataset(dataset).problems == []


# ---- the whole set, as `ssaseg data check` reads it ---------------------------------------------------------------


def test_counts_are_per_raw_id_and_per_class(tmp_path: Path) -> None:
    masks = [mask(0, 5), mask(5, 9), mask(9, 255)]
    dataset = make(tmp_path, masks, raw_to_train={0: 0, 5: 1, 9: 1, 7: 2})
    found = look_through(dataset)
    assert found.read == 3
    assert {int(raw): int(found.pixels[raw]) for raw in np.flatnonzero(found.pixels)} == {0: 40, 5: 80, 9: 80, 255: 40}
    assert found.masks[[0, 5, 9, 255]].tolist() == [1, 2, 2, 1]
    assert found.images[[0, 1, 2, 255]].tolist() == [1, 3, 0, 1], "two raw ids of one class count an image once"
    assert found.sizes == {(8, 10): 3}
    assert found.palettes == {}


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    dataset = make(tmp_path, [mask(0, 1), mask(0, 9), mask(2, width=9), mask(1)])
    dataset.image_files[3].write_bytes(b"no image")
    calls: list[int] = []
    one, two = look_through(dataset), look_through(dataset, workers=2, progress=calls.append)
    assert one.problems == two.problems
    assert [problem.kind for problem in one.problems] == [
        "ids out of range",
        "sizes that differ",
        "image that cannot be read",
    ]
    assert one.pixels.tolist() == two.pixels.tolist()
    assert calls == [1, 1, 1, 1]


def test_built_in_scenes_are_counted() -> None:
    found = look_through(SyntheticScenes(3, 64, 80))
    assert found.sizes == {(64, 80): 3}
    assert found.pixels.sum() == 3 * 64 * 80
    assert found.count("error") == 0


def test_incomplete_pairs_are_told_and_the_others_read(tmp_path: Path) -> None:
    make(tmp_path, [mask(0, 1, 2), mask(0), mask(1)])
    (tmp_path / "masks/01.png").unlink()
    found = look_through(PairDataset(tmp_path / "images", tmp_path / "masks", ["a", "b", "c"], partial=True))
    assert found.read == 2
    (problem,) = found.problems
    assert (problem.severity, problem.kind) == ("error", "incomplete")
    assert "1 of 3 images have no mask: 01" in problem.text


@pytest.mark.parametrize(
    ("values", "reduce", "part"),
    [
        ((1, 2), False, "label 0 is in 0 of 2 masks: class 0, sky"),
        ((1, 2), True, "label 0 is in 0 of 2 masks and id 3, the last class, in none"),
        ((0, 1, 2), True, "label 0 is in 2 of 2 masks and id 3, the last class, in none"),
        ((0, 0, 0, 0, 1, 2, 3), True, "59% of the pixels, all ignored"),
    ],
)
def test_doubts_about_label_0(tmp_path: Path, values: tuple[int, ...], reduce: bool, part: str) -> None:
    found = look_through(make(tmp_path, [mask(*values)] * 2, reduce_zero_label=reduce))
    doubts = [text for text in found.messages("warning") if "reduce_zero_label" in text and "label 0" in text]
    assert len(doubts) == 1
    assert part in doubts[0]


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ((0, 1, 2), {}),
        ((1, 2, 3), {"reduce_zero_label": True}),
        ((0, 1, 2, 3), {"reduce_zero_label": True}),
        ((1, 2, 3), {"raw_to_train": {1: 0, 2: 1, 3: 2}}),
    ],
)
def test_no_doubt_where_the_ids_fit(tmp_path: Path, values: tuple[int, ...], options: dict[str, Any]) -> None:
    assert look_through(make(tmp_path, [mask(*values)] * 2, **options)).problems == []


def test_data_that_the_decoder_guessed_is_told_by_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dataset = make(tmp_path, [mask(0, 1, 2, height=64, width=64)])
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(dataset.image_files[0])
    data = bytearray(dataset.image_files[0].read_bytes())
    data[1500:1600] = b"\xff\xc8" * 50
    dataset.image_files[0].write_bytes(data)
    (problem,) = look_through(dataset).problems
    assert problem.severity == "warning"
    assert problem.text.startswith(f"{dataset.image_files[0]}: damaged inside; its decoder says: Corrupt JPEG data")
    assert capfd.readouterr().err == ""


def test_ids_are_counted_exactly_in_large_masks() -> None:
    large = np.zeros((5000, 5000), np.uint8)  # more pixels than float32 counts
    large[4999, 4990:] = 7
    counts = count_ids(large)
    assert (int(counts[0]), int(counts[7]), int(counts.sum())) == (24_999_990, 10, 25_000_000)


def test_a_picture_of_10000_by_10000_pixels_is_no_fault(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        Image.new("L", (10_000, 10_000), 1).save(tmp_path / f"{kind}/large.{suffix}")
        Image.new("L", (1, 1), 0).save(tmp_path / f"{kind}/small.{suffix}")
    found = look_through(PairDataset(tmp_path / "images", tmp_path / "masks", ["a", "b"]), decoded=0)
    assert found.problems == []
    assert found.sizes == {(10_000, 10_000): 1, (1, 1): 1}
    assert found.pixels[:2].tolist() == [1, 10**8]
    assert [str(each.message) for each in recwarn if "bomb" in str(each.message)] == []


def test_reading_a_large_palette_mask_warns_of_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    mask = Image.new("P", (10_000, 9_500), 1)
    mask.putpalette([0, 0, 0, 9, 9, 9])
    mask.save(tmp_path / "mask.png")
    raw, colours, *_ = read_mask(tmp_path / "mask.png")
    assert (raw.shape, int(raw[0, 0])) == ((9_500, 10_000), 1)
    assert colours is not None
    assert [str(each.message) for each in recwarn] == []


def test_a_mask_with_alpha_is_to_lose_it(tmp_path: Path) -> None:
    Image.new("LA", (4, 3), (1, 255)).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match=r"2 channels \(mode LA\)(.|\n)*save the mask without alpha"):
        read_mask(tmp_path / "mask.png")


def test_what_is_not_a_file_is_named_first(tmp_path: Path) -> None:
    dataset = make(tmp_path, [mask(0, 1), mask(2)])
    for file in (dataset.image_files[0], dataset.mask_files[1]):
        file.unlink()
        os.mkfifo(file)
    assert texts(check_dataset(dataset), "error") == [
        f"{file}: not a regular file, but a FIFO" for file in (dataset.image_files[0], dataset.mask_files[1])
    ]
