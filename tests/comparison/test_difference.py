"""`ssaseg compare` of label files: whether they differ, in words and figures, and what cannot be compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import call
from labelled import write_data, write_labels

from ssaseg.cli.comparison.blocks import blocks_of, sequences_in
from ssaseg.cli.errors import CommandError

NAMES = ["sky", "road", "car", "boat"]
FRAMES = [f"{sequence}/{sequence}_{frame:04}" for sequence in ("east", "west") for frame in range(1, 7)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve frames with labels of three of four classes, and label files of various quality."""
    place = tmp_path_factory.mktemp("difference")
    rng = np.random.default_rng(0)
    truth = {name: rng.integers(0, 3, (12, 16)).astype(np.uint8) for name in FRAMES}
    write_data(place / "data", truth, NAMES)
    for folder, right in (("poor", 0.5), ("good", 0.8), ("alike", 0.51)):
        maps = {n: np.where(rng.random(i.shape) < right, i, rng.integers(0, 3, i.shape)) for n, i in truth.items()}
        write_labels(place / folder, {name: ids.astype(np.uint8) for name, ids in maps.items()})
    return place


def compare(place: Path, *words: str | Path, json_file: bool = True) -> tuple[dict[str, Any], str, str]:
    options = ["--json", place / "out.json"] if json_file else []
    result = call("compare", *words, "--data", place / "data/recipe.yaml", *options)
    assert result.exit_code == 0, result.stderr
    return json.loads((place / "out.json").read_text())["test"], result.stdout, result.stderr


def test_a_difference_is_shown(place: Path) -> None:
    report, printed, told = compare(place, place / "poor", place / "good")
    mean = report["mIoU"]
    assert mean["shown"]
    assert mean["interval"]["low"] > 0
    assert mean["p"] == 2 / 2**12, "both all swapped and none"
    assert report["permutations"] == {"count": 2**12, "all": True}
    assert "difference shown, if the images are independent: good is better than poor. good minus poor: +" in printed
    assert f"p = {mean['p']:.2g}" in printed
    for row in report["classes"][:3]:
        assert row["shown"]
        assert row["holm"] == pytest.approx(3 * 2 / 2**12), "of three labelled classes"
    assert report["classes"][3] == {
        "name": "boat", "a": None, "b": None, "difference": None, "interval": None, "p": None, "holm": None,
        "smallest": None, "shown": False,
    }  # fmt: skip
    assert "classes with a difference (Holm's correction over 3 classes): " in printed
    assert "the names are numbered (6 begin with 'east/east_')" in told
    assert "not two methods: another seed" in told
    back, *_ = compare(place, place / "good", place / "poor")
    assert back["mIoU"]["difference"] == pytest.approx(-mean["difference"])
    assert "good is better than poor. poor minus good: -" in back["verdict"]


def test_no_difference_is_shown(place: Path) -> None:
    report, printed, _ = compare(place, place / "poor", place / "alike")
    assert not report["mIoU"]["shown"]
    assert report["mIoU"]["p"] > 0.05
    smallest = f"{report['mIoU']['smallest']:.2f} points is found in 80 of 100 cases"
    for text in ("no difference shown. alike minus poor: ", "does not show that they are equal", smallest):
        assert text in printed
    assert "no class with a difference (Holm's correction over 3 classes)" in printed
    same, printed, _ = compare(place, place / "poor", place / "poor/../poor")
    assert same["mIoU"]["p"] == 1
    assert "have the same counts in every image" in printed


def test_blocks_are_swapped_and_drawn_as_wholes(place: Path) -> None:
    report, printed, told = compare(place, place / "poor", place / "good", "--blocks", "3")
    assert report["blocks"] == {"rule": "3", "count": 4, "largest": 3}
    assert report["mIoU"]["p"] == 2 / 2**4
    assert not report["mIoU"]["shown"], "four blocks can show nothing at 5 %"
    assert "4 blocks cannot show a difference at 5 %: 6 or more are needed" in told
    assert "no difference shown." in printed
    assert "12 images in 4 blocks of up to 3" in printed
    assert "the names are numbered" not in told
    pairs, *_ = compare(place, place / "poor", place / "good", "--blocks", "2")
    assert pairs["mIoU"]["shown"]


def test_the_rules_of_blocks() -> None:
    assert blocks_of(FRAMES, "sequence").tolist() == [0] * 6 + [1] * 6
    assert blocks_of(FRAMES, "4").tolist() == [0] * 4 + [1] * 2 + [2] * 4 + [3] * 2
    assert blocks_of(FRAMES, r"_000([1-3])|_").tolist() == [0, 1, 2, 3, 3, 3] * 2, "the group, else the match"
    cityscapes = [f"{city}/{city}_000{n}_000019_leftImg8bit" for city in ("bonn", "ulm") for n in (0, 1)]
    assert blocks_of(cityscapes, "sequence").tolist() == [0, 1, 2, 3]
    assert blocks_of([f"s{n}_{frame}_1080p" for n in (1, 2) for frame in (7, 8)], "sequence").tolist() == [0, 0, 1, 1]
    assert blocks_of(cityscapes, "^[a-z]+").tolist() == [0, 0, 1, 1]
    assert blocks_of(["0016E5_0010", "0016E5_0020", "0001TP_0010"], "sequence").tolist() == [0, 0, 1]
    assert sequences_in(["a1", "a2", "b1"]) == {"a": 2}
    assert sequences_in(["a1", "photo"]) == {}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("north", "does not match the image 'east/east_0001'"),
        ("(", "not a regular expression"),
        ("0", "not a number of images"),
        ("400", None),
        ("t/", "one block of all 12 images"),
        (".", None),
    ],
)
def test_rules_that_do_not_fit(rule: str, message: str | None) -> None:
    if message is None:
        assert len(set(blocks_of(FRAMES, rule).tolist())) == 2
    else:
        with pytest.raises(CommandError) as raised:
            blocks_of(FRAMES, rule)
        assert message in str(raised.value)
        assert len(str(raised.value).splitlines()) == 2
    with pytest.raises(CommandError, match="does not end with a number"):
        blocks_of(["one", "two"], "sequence")


def test_what_cannot_be_compared(place: Path) -> None:
    data, labels = ["--data", place / "data/recipe.yaml"], [place / "poor", place / "good"]
    (place / "empty").mkdir(exist_ok=True)
    for words, message in (
        (labels, "folders of label files do not say which images they are of\ngive --data RECIPE"),
        ([*labels, place / "alike", *data], "got 3 files or folders of labels; expected two"),
        ([place / "poor", *data], "got 1 files or folders of labels; expected two"),
        ([place / "poor", place / "empty", *data], "empty: holds no run, network or label PNGs"),
        ([place / "poor", place / "gone", *data], "gone: no such file or folder"),
        ([*labels, *data, "--limit", "1"], "a test needs two or more"),
        ([*labels, *data, "--out", place / "a.png"], "curves are drawn of runs only"),
        ([*labels, "--no-test"], "files and folders of labels can only be tested"),
        ([*labels, *data, "--no-test"], "--data: belongs to the test; leave out --no-test"),
        ([*labels, *data, "--json", place / "gone/x.json"], "no such folder"),
    ):
        result = call("compare", *words)
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) <= 3


def test_names_cannot_change_a_terminal(place: Path) -> None:
    for index, folder in enumerate(("poor", "good")):
        link = place / f"<i>\x1b[3{index}m{folder}"
        if not link.exists():
            link.symlink_to(place / folder)
    report, printed, told = compare(place, *(place / f"<i>\x1b[3{k}m{f}" for k, f in enumerate(("poor", "good"))))
    assert "\x1b" not in printed + told
    assert r"<i>\x1b[31mgood is better than <i>\x1b[30mpoor" in report["verdict"]
