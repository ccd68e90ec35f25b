"""`ssaseg data suspects` and `ssaseg data pick`: their files, what they print, and wrong input."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from calling import call
from explaining import CLASSES, make_place
from networks import tiny_networks
from predicting import picture, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tiny_networks():
        yield make(tmp_path_factory.mktemp("curation"))


def make(folder: Path) -> Path:
    make_place(folder)
    for name in ("ssa", "linear"):
        (folder / name).rename(folder / f"{name}.safetensors")
    names = ", ".join(CLASSES)
    (folder / "own.yaml").write_text(
        f"extends: camvid-seaformer_s-ssa\ndata: {{root: '{folder}', classes: [{names}], palette: null,"
        " train: {images: images, masks: masks}, val: {images: images, masks: masks}}\ntest: {scale: null}\n"
    )
    return folder


def test_suspects_are_ranked_and_drawn(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = call(
        "data",
        "suspects",
        place / "linear.safetensors",
        place / "own.yaml",
        "--out",
        out,
        "--json",
        tmp_path / "r.json",
    )
    assert found.exit_code == 0, found.output
    rows = list(csv.DictReader((out / "suspects.csv").read_text().splitlines()))
    assert {row["image"] for row in rows} <= {"a/one", "two"}
    assert rows
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    best = rows[0]
    assert best["label"] != best["predicted"]
    x, y, width, height, pixels = (int(best[key]) for key in ("x", "y", "width", "height", "pixels"))
    assert 0 < pixels <= width * height
    assert x + width <= 72
    assert y + height <= 64
    sheet = cv2.imread(str(out / "suspects.png"))
    assert sheet.shape[1] == 3 * 324
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["image"] for row in report["suspects"]] == [row["image"] for row in rows]
    again = call("data", "suspects", place / "linear.safetensors", place / "own.yaml", "--out", out)
    assert again.exit_code == 2
    assert "has suspects.csv already" in again.output


def test_suspects_need_the_same_classes(place: Path, tmp_path: Path) -> None:
    found = call("data", "suspects", place / "linear.safetensors", "demo", "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert "3 classes; recipe demo" in found.output
    assert not (tmp_path / "out").exists()


def test_picked_images_are_listed(place: Path, tmp_path: Path) -> None:
    images = place / "images"
    found = call("data", "pick", place / "ssa.safetensors", images, "--count", 1, "--out", tmp_path / "list.txt")
    assert found.exit_code == 0, found.output
    (line,) = (tmp_path / "list.txt").read_text().splitlines()
    assert Path(line).is_file()
    found = call("data", "pick", place / "ssa.safetensors", images, "--count", "2", "--labelled", place / "own.yaml")
    assert found.exit_code == 0, found.output
    assert sorted(found.stdout.split()) == sorted(str(path) for path in images.rglob("*.png"))


def test_pick_skips_what_it_cannot_read(place: Path, tmp_path: Path) -> None:
    write(tmp_path / "in/good.png", picture(64, 72))
    (tmp_path / "in/bad.png").write_bytes(b"no image")
    found = call("data", "pick", place / "ssa.safetensors", tmp_path / "in", "--count", "2", "--json", "-")
    assert found.exit_code == 1
    report = json.loads(found.stdout)
    assert [Path(row["image"]).name for row in report["picked"]] == ["good.png"]
    assert report["skipped"] == 1
    assert "bad.png" in found.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--count", "3"], "there are only 2 images"),
        (["--count", "0"], "--count"),
        (["--count", "1", "--out", "own.yaml"], "exists"),
        (["--count", "1", "--labelled", "nothing.yaml"], "nothing.yaml"),
    ],
)
def test_pick_refuses(place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str) -> None:
    monkeypatch.chdir(place)
    found = call("data", "pick", "ssa.safetensors", "images", *words)
    assert found.exit_code == 2
    assert text in found.output
    assert np.size(found.output.splitlines()) <= 8
