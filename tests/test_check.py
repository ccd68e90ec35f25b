"""The look through a data set before training: everything at once, warnings apart from errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssaseg.datasets import check
from ssaseg.datasets.check import Problem, check_dataset
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


def texts(problems: list[Problem], severity: str) -> list[str]:
    assert all(len(problem.text.splitlines()) <= 3 for problem in problems)
    return [problem.text for problem in problems if problem.severity == severity]


def test_sound_data_has_no_problem(tmp_path: Path) -> None:
    assert check_dataset(make(tmp_path, [mask(0, 1), mask(2, 255)])) == []
    assert check_dataset(SyntheticScenes(3, 64, 64), sample=2) == []


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


def test_the_list_is_bounded(tmp_path: Path) -> None:
    errors = texts(check_dataset(make(tmp_path, [mask(3)] * 14)), "error")
    assert len(errors) == 11
    assert "data.reduce_zero_label" in errors[0]
    assert errors[-1].startswith("4 more errors in the 14 pairs")


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
    (problem,) = check_dataset(make(tmp_path, [mask(*values)] * 2, **options))
    assert problem.severity == "error"
    assert "no labelled pixel in the 2 masks" in problem.text
    assert "data.ignore_index" in problem.text


def test_masks_without_image_are_a_warning(tmp_path: Path) -> None:
    make(tmp_path, [mask(0, 1, 2)])
    Image.fromarray(mask(0)).save(tmp_path / "masks/stray.png")
    problems = check_dataset(make(tmp_path, [mask(0, 1, 2)]))
    assert [problem.severity for problem in problems] == ["warning"]
    assert problems[0].text == f"1 mask has no image: {tmp_path / 'masks/stray.png'}"


def test_sample_is_evenly_spaced_and_does_not_judge_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SMALL", 0)
    monkeypatch.setattr(check, "DECODED", 1)
    dataset = make(tmp_path, [mask(0), mask(9), mask(0), mask(9), mask(0), mask(9)])
    assert check_dataset(dataset, sample=3) == [], "0, 2 and 4 are sound; two classes may lie in the others"
    assert len(texts(check_dataset(dataset, sample=6), "error")) == 3
    dataset.image_files[4].write_bytes(dataset.image_files[4].read_bytes()[:-50])
    assert len(check_dataset(dataset, sample=3)) == 1, "an image that is not decoded is still known to be cut off"


def test_turned_images_are_measured_as_they_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "DECODED", 0)
    dataset = make(tmp_path, [mask(0, 1, 2, height=10, width=8)])
    assert len(texts(check_dataset(dataset), "error")) == 1
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(dataset.image_files[0], exif=exif.tobytes())
    assert check_dataset(dataset) == []
