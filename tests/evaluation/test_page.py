"""`ssaseg eval --report`: the page, looked at in a browser; its figures; names that are HTML or terminal codes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from browser import look_at
from calling import call
from chromium import needs_chromium
from networks import tiny_networks
from predicting import picture

from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation import page, report
from ssaseg.cli.evaluation.page import DATA, MOST, PAGE, make_folder, matrix_table
from ssaseg.cli.ranks.messages import pack, unpack
from ssaseg.cli.scoring.gallery import KEPT, Gallery, Scene
from ssaseg.cli.scoring.metrics import Confusion, class_intervals, image_scores
from ssaseg.models import build_model, save_model

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ["<script>pwned()</script>", "\x1b[31mred\x1b[0m", '"onload="pwned()', "it's & {{ 7*7 }}", "W" * 300]
NAMES = ["<img src=x onerror=pwned()>", "\x1b[7m\u202egnp", "'plain\"", "last"]


@pytest.fixture(scope="module", autouse=True)
def no_processes_and_tiny_networks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, tiny_networks():
        patch.setattr(report, "WORKERS", 0)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its data, and a report."""
    folder = tmp_path_factory.mktemp("page")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for index, name in enumerate(NAMES):
        mask = np.random.default_rng(index).integers(0, 5, (4, 5)).astype(np.uint8)
        mask = np.where(mask == 4, 255, mask).astype(np.uint8)  # the last class has no pixel
        cv2.imwrite(str(folder / f"images/{name}.png"), picture(48, 64, seed=index))
        cv2.imwrite(str(folder / f"masks/{name}.png"), cv2.resize(mask, (64, 48), interpolation=cv2.INTER_NEAREST))
    split = {"images": "images", "masks": "masks"}
    recipe = {
        "model": {"name": "seaformer_t"},
        "data": {"dataset": "folder", "root": str(folder), "classes": CLASSES, "train": split, "val": split},
        "augment": {"scale": [64, 48], "crop": [32, 32]},
        "optim": {"lr": 0.001},
        "train": {"steps": 1},
    }
    torch.manual_seed(0)
    model = build_model("seaformer_y", len(CLASSES), "ssa")
    torch.nn.init.normal_(model.classifier.conv_seg.weight, 0.0, 2.0)
    save_model(folder / "<b>.safetensors", model, {"classes": CLASSES, "protocol": {}, "recipe": recipe})
    result = call("eval", folder / "<b>.safetensors", "--report", folder / "new/report", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"wrote {folder}/new/report/report.html" in result.stdout
    assert "calibration error (ECE) " in result.stdout
    return folder


def figures(place: Path) -> dict[str, Any]:
    return json.loads((place / "new/report" / DATA).read_text())


@needs_chromium
def test_the_page_in_a_browser(place: Path, tmp_path: Path) -> None:
    """At each width, light and dark: nothing runs, nothing is loaded, nothing is cut off, and all can be read."""
    found = look_at(place / "new/report" / PAGE, [400, 800, 1600], tmp_path)
    assert len(found) == 6
    for how, each in found.items():
        assert each["title"] == "seaformer_y ssa: <b>.safetensors", how
        assert each["overflow"] <= 0, how
        assert (each["scripts"], each["loaded"]) == ([], []), how
        assert (each["pictures"], each["broken"]) == (4 * len(NAMES), 0), how
        assert (each["out_of_reach"], each["dead"], each["twice"]) == (0, 0, 0), how
        assert each["contrast"][0] >= 4.5, (how, each["contrast"])
        assert (max(each["paper"]) < 60) == how.endswith("dark")
        for text in ("<script>pwned()</script>", r"\x1b[31mred\x1b[0m", NAMES[0], r"\x1b[7m\u202egnp", "{{ 7*7 }}"):
            assert text in each["text"], (how, text)


def test_the_file_is_whole_and_harmless(place: Path) -> None:
    text = (place / "new/report" / PAGE).read_text()
    assert not {"\x1b", "\u202e"} & set(text)
    assert "<script" not in text.lower()
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert "http:" not in text
    assert "https:" not in text
    assert sorted(path.name for path in (place / "new/report").iterdir()) == [PAGE, DATA]


def test_figures_are_those_of_the_labels(place: Path) -> None:
    """Against `predict`, whose labels before and after adaptation are counted here."""
    found = figures(place)
    words = ["--save", "index,coarse,probs", "--out", place / "out", "--device", "cpu"]
    assert call("predict", place / "<b>.safetensors", place / "images", *words).exit_code == 0
    counted: dict[str, Confusion] = {kind: Confusion(len(CLASSES)) for kind in ("index", "coarse")}
    scores, right, sure = {}, 0, 0.0
    for name in sorted(NAMES):
        mask = cv2.imread(str(place / f"masks/{name}.png"), cv2.IMREAD_UNCHANGED)
        alone = Confusion(len(CLASSES))
        for kind, confusion in counted.items():
            labels = page_labels(place / f"out/{kind}/{name}.png")
            confusion.update(labels, mask)
            if kind == "index":
                alone.update(labels, mask)
                right += int(((labels == mask) & (mask != 255)).sum())
        scores[name] = alone.scores()
        shares = np.load(place / f"out/probs/{name}.npz")["probabilities"].astype(np.float64)
        sure += shares.max(axis=0)[mask != 255].sum()
    pixels = counted["index"].matrix.sum()
    final, before = (counted[kind].scores() for kind in ("index", "coarse"))
    assert found["mIoU"] == pytest.approx(final["mIoU"])
    assert found["coarse"]["mIoU"] == pytest.approx(before["mIoU"])
    assert found["coarse"]["difference"] == pytest.approx(final["mIoU"] - before["mIoU"])
    assert found["coarse"]["difference"] != 0
    assert [row["coarse_IoU"] for row in found["classes"]][:4] == pytest.approx(list(before["IoU"][:4]))
    assert {each["name"]: each["mIoU"] for each in found["per_image"]} == pytest.approx(
        {name: each["mIoU"] for name, each in scores.items()}
    )
    assert [each["aAcc"] for each in found["per_image"]] == pytest.approx([scores[name]["aAcc"] for name in scores])
    assert found["calibration"]["accuracy"] == pytest.approx(100 * right / pixels)
    assert found["calibration"]["confidence"] == pytest.approx(100 * sure / pixels, abs=0.05)  # float16
    assert "mBoundaryIoU" in found
    assert len(found["sha256"]) == 64


def page_labels(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.array(image)


def test_a_folder_that_holds_something_is_refused(place: Path, tmp_path: Path) -> None:
    before = (place / "new/report" / PAGE).read_bytes()
    result = call("eval", place / "<b>.safetensors", "--report", place / "new/report", "--device", "cpu")
    assert result.exit_code == 2
    assert "already exists and holds report.html and 1 more\ngive a new or an empty folder" in result.stderr
    assert (place / "new/report" / PAGE).read_bytes() == before
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/\x1b[31m").mkdir()
    for name, message in {
        "link": "already exists and is not a folder",
        "file/x": "cannot be written to (Not a directory)",
        "evil": r"holds \x1b[31m",
    }.items():
        with pytest.raises(CommandError) as caught:
            make_folder(tmp_path / name)
        assert message in str(caught.value)
    make_folder(tmp_path / "new/empty")
    make_folder(tmp_path / "new/empty")
    assert list((tmp_path / "new/empty").iterdir()) == []


def test_a_report_is_of_one_file(place: Path, tmp_path: Path) -> None:
    file = place / "<b>.safetensors"
    result = call("eval", file, file, "--report", tmp_path / "x", "--device", "cpu")
    assert (result.exit_code, (tmp_path / "x").exists()) == (2, False)
    assert "--report is of one FILE" in result.stderr
    result = call("eval", file, file, "--calibration", "--limit", "1", "--device", "cpu", "--json", tmp_path / "x")
    assert result.stdout.count("calibration error (ECE) ") == 2
    one, two = json.loads((tmp_path / "x").read_text())["models"]
    assert one["calibration"] == two["calibration"]
    assert one["calibration"]["pixels"] == np.sum(one["confusion"])


def test_the_matrix_of_many_classes_keeps_the_confused_ones() -> None:
    matrix = np.diag(np.full(MOST + 10, 100))
    matrix[np.arange(MOST), (np.arange(MOST) + 1) % MOST] = 25
    table = matrix_table(matrix, [f"c{k}" for k in range(MOST + 10)])
    assert (table["left_out"], table["names"][-2:]) == (10, [f"c{MOST - 1}", "10 others"])
    first = table["rows"][0]["cells"]
    assert [(k, cell["text"]) for k, cell in enumerate(first) if cell["text"]] == [(0, "80.0"), (1, "20.0")]
    assert (first[0]["kind"], first[0]["level"]) == ("r", 8)
    assert (first[1]["kind"], first[1]["level"]) == ("w", 5)
    assert table["rows"][-1]["cells"][-1] == {"text": "100.0", "kind": "r", "level": 0}
    assert matrix_table(matrix[:5, :5], list("abcde"))["left_out"] == 0


def test_best_and_worst_images_of_all_ranks() -> None:
    scene = Scene.of(torch.zeros(40, 60, 4, dtype=torch.uint8), torch.zeros(80, 120), torch.ones(80, 120))
    assert (scene.image.shape, scene.label.shape) == ((80, 120, 3), (80, 120))
    large = Scene.of(torch.zeros(40, 60, 3, dtype=torch.uint8), torch.zeros(500, 1000), torch.ones(500, 1000))
    assert large.image.shape == (200, 400, 3)
    hits = np.random.default_rng(0).permutation(40)
    galleries = [Gallery(), Gallery(), Gallery()]
    for number, hit in enumerate(hits):
        row = np.array([[hit, 0], [40, 0]])
        galleries[0].add(number, row, scene)
        galleries[1 + number % 2].add(number, row, scene)
    galleries[0].add(99, np.zeros((2, 2), int), scene)  # nothing is labelled
    one, *ranks = galleries
    assert [entry.number for entry in one.best] == list(np.argsort(-hits)[:KEPT])
    assert [entry.number for entry in one.worst] == list(np.argsort(hits)[:KEPT])
    assert one.best[0].miou == pytest.approx(100 * 39 / 40)
    ranks[0].merge([unpack(pack(each.snapshot())) for each in ranks])
    for ours, theirs in ((one.best, ranks[0].best), (one.worst, ranks[0].worst)):
        assert [each[:2] for each in ours] == [each[:2] for each in theirs]
        assert all(map(np.array_equal, ours[0].scene, theirs[0].scene))


def test_scores_of_images_and_intervals_of_classes() -> None:
    rng = np.random.default_rng(0)
    confusion = Confusion(4)
    alone = []
    for _ in range(6):
        label, labels = rng.integers(0, 3, (2, 20, 30))
        label[:5] = 255
        confusion.update(labels, label)
        alone.append(Confusion(4))
        alone[-1].update(labels, label)
    found = image_scores(confusion.rows)
    for key in ("mIoU", "aAcc"):
        assert found[key] == pytest.approx([each.scores()[key] for each in alone])
    bounds = class_intervals(confusion.rows, resamples=200)
    assert np.isnan(bounds[3]).all()
    iou = confusion.scores()["IoU"]
    assert (bounds[:3, 0] < iou[:3]).all()
    assert (iou[:3] < bounds[:3, 1]).all()
    assert np.isnan(class_intervals(confusion.rows[:1])).all()
    # By hand: of two images, a resample has one of them twice, or both.
    two = np.array([[[1], [10]], [[3], [10]]])
    assert class_intervals(two)[0] == pytest.approx([10, 30])


def test_what_the_page_says_of_maps() -> None:
    assert page.main_classes(np.array([[0, 0, 1, 255]], np.uint8), ["a", "b"]) == "a 50 %, b 25 %"
    assert page.main_classes(np.array([[255]], np.uint8), ["a"]) == "no class"
    assert page.signed(-1.234) == "−1.23"
