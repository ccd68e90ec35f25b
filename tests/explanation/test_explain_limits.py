"""`ssaseg explain`: all classifiers, recipes for masks, odd names, results of earlier runs, errors, and Ctrl-C."""

import json
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from calling import call
from explaining import CLASSES, H, W, checkpoint, explain, make_place
from networks import tiny_networks
from predicting import picture, write
from torch.nn import functional as F

from ssaseg.cli.errors import CommandError
from ssaseg.cli.explanation import items, summary
from ssaseg.cli.explanation.explain import AGAIN, Work
from ssaseg.cli.explanation.probing import Prototypes, make_stage, open_probe
from ssaseg.cli.explanation.sums import Sums, edge_distance
from ssaseg.cli.prediction.skipping import skip_reason
from ssaseg.cli.prediction.sources import find_sources
from ssaseg.recipes import load_recipe


@pytest.fixture(autouse=True, scope="module")
def tiny() -> Iterator[None]:
    with tiny_networks():
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "draw_distance", lambda *_: None)
    monkeypatch.setattr(summary, "draw_classes", lambda *_: None)
    monkeypatch.setattr(summary, "draw_pairs", lambda *_: None)


@pytest.fixture(scope="module")
def place(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("explain"))


# ---- classifiers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("classifier", ["linear", "protoseg", "gmmseg", "dnc"])
def test_labels_and_a_classifier_that_does_not_adapt(place: Path, tmp_path: Path, classifier: str) -> None:
    """There is nothing to compare, so no row of changes."""
    file = checkpoint(tmp_path / "c", classifier)
    report = explain(tmp_path / "out", file, place / "images/two.png", "--masks", place / "masks")
    assert (report["images"], report["skipped"], report["changes"]) == (1, 0, [])
    assert report["pictures"] == ["activation/two.png"]


def test_semantic_prototypes_of_cac(place: Path, tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "cac", "cac")
    result = call("explain", file, place / "images", "--masks", place / "masks", "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "left out: spatial prototypes: cac has none" in result.stderr
    rows = json.loads((tmp_path / "explain.json").read_text())["prototypes"]
    assert [row["name"] for row in rows] == CLASSES
    probe = open_probe(file, torch.device("cpu"))
    network = probe.model
    images = [cv2.imread(str(place / f"images/{name}.png")) for name in ("a/one", "two")]
    adapted = []
    with torch.inference_mode():
        for image in images:
            feature = network.feature(probe.inference._pixels(torch.from_numpy(image)[None]))
            adapted.append(network.classifier.adapt(feature).semantic[0])
    fixed = network.classifier.conv_seg.weight[:, :, 0, 0]
    masks = [cv2.imread(str(place / f"masks/{name}.png"), cv2.IMREAD_UNCHANGED) for name in ("a/one", "two")]
    for index, row in enumerate(rows):
        seen = [each[index] for each, mask in zip(adapted, masks, strict=True) if (mask == index).any()]
        cosine = np.mean([F.cosine_similarity(each, fixed[index], dim=0).item() for each in seen])
        assert row["semantic_cosine"] == pytest.approx(cosine, abs=1e-5)
        directions = torch.stack([F.normalize(each, dim=0) for each in seen])
        assert row["consistency"] == pytest.approx(directions.mean(0).norm().item(), abs=1e-5)
        assert row["spatial_inside"] is row["spatial_outside"] is None
    drawn = cv2.imread(str(tmp_path / "summary/prototypes.png"))
    assert drawn is not None


def test_a_constant_logit_has_no_strength() -> None:
    """float32's rounding is not a deviation."""
    logits = torch.stack([torch.full((9, 9), 5.123), torch.linspace(0, 1, 81).view(9, 9)])[None]
    stage = make_stage(logits, (36, 36), (50, 47))
    assert not stage.probability_and_strength(0)[1].any()
    probability, strength = stage.probability_and_strength(1)
    assert strength.std() == pytest.approx(1, abs=1e-4)
    assert (probability == stage.probability(1)).all()


def test_an_error_adds_nothing_of_an_image() -> None:
    labels = np.repeat([[0, 1]], 4, axis=0).astype(np.uint8)
    stage = make_stage(torch.randn(1, 2, 4, 2), (4, 2), (4, 2))
    sums = Sums(2, ["coarse", "final"], [("coarse", "final")], known=True)
    stages = {"coarse": stage, "final": stage}
    good = Prototypes(torch.ones(2, 3), torch.ones(2, 3), None, (4, 2), (4, 2))
    sums.add(stages, labels, edge_distance(labels), good)
    before = pickle.dumps(sums)
    bad = good._replace(semantic=torch.ones(1, 3))  # the second class has none
    with pytest.raises(IndexError):
        sums.add(stages, labels, edge_distance(labels), bad)
    assert pickle.dumps(sums) == before
    assert (sums.images, int(sums.pixels.sum()), sums.prototypes.images.tolist()) == (1, 8, [1, 1])


# ---- masks -------------------------------------------------------------------------------------------------------
def recipe(folder: Path, classes: list[str]) -> Path:
    """A recipe of images a_rgb.png with masks a_ids.png."""
    split = "{images: x, masks: y}"
    lines = [
        "extends: demo",
        f"data: {{dataset: folder, root: {folder}, train: {split}, val: {split}, classes: {classes},",
        "  image_suffixes: [.png, _RGB.png], mask_suffix: _ids.png, reduce_zero_label: true}",
    ]
    file = folder / "r.yaml"
    file.write_text("\n".join(lines))
    return file


def test_a_recipes_suffixes_and_classes(place: Path, tmp_path: Path) -> None:
    write(tmp_path / "in/b/a_rgb.png", picture(H, W))
    write(tmp_path / "masks/b/a_ids.png", np.repeat([[1], [2]], [H - 9, 9], axis=0).repeat(W, axis=1).astype(np.uint8))
    words = (place / "ssa", tmp_path / "in", "--masks", tmp_path / "masks", "--data", recipe(tmp_path, CLASSES))
    rows = explain(tmp_path / "out", *words)["rim_and_middle"]["classes"]
    assert {row["name"]: row["rim"]["pixels"] + row["middle"]["pixels"] for row in rows} == {
        "road": (H - 9) * W,
        "car": 9 * W,
    }
    recipe(tmp_path, ["road", "tree", "car"])
    result = call("explain", *words, "--out", tmp_path / "other")
    assert result.exit_code == 2
    assert "class 1 is 'car'; recipe r: 'tree'" in result.stderr


def test_suffixes_of_published_data() -> None:
    cityscapes = load_recipe("demo", ["data={dataset: cityscapes}"])
    rules = items.rules_of(cityscapes, Path("gtFine"), 19)
    name = "ulm/ulm_000000_000019"
    assert rules.mask_of(f"{name}_leftImg8bit.png") == Path(f"gtFine/{name}_gtFine_labelTrainIds.png")
    assert items.rules_of(None, Path("m"), 3).mask_of("a.b/c.d.JPG") == Path("m/a.b/c.d.png")
    assert rules.mask_of("other.jpg") == Path("gtFine/other_gtFine_labelTrainIds.png")


def test_labels_that_are_all_ignored(place: Path, tmp_path: Path) -> None:
    write(tmp_path / "masks/two.png", np.full((H, W), 255, np.uint8))
    words = (place / "ssa", place / "images/two.png", "--masks", tmp_path / "masks", "--out", tmp_path / "out")
    result = call("explain", *words, "--device", "cpu")
    assert result.exit_code == 2
    assert "no labelled pixel in the masks in " in result.stderr
    assert not (tmp_path / "out/explain.json").exists()


# ---- names, and results of earlier runs --------------------------------------------------------------------------
def test_control_characters_in_names(place: Path, tmp_path: Path) -> None:
    write(tmp_path / "in/x.png", picture(H, W)).rename(tmp_path / "in/line\nfeed\x1b.png")
    file = checkpoint(tmp_path / "c", classes=["ro\nad", "c\x1bar", "tree"])
    report = explain(tmp_path / "out", file, tmp_path / "in")
    assert (report["images"], report["skipped"], len(report["pictures"])) == (1, 0, 1)


def test_results_of_both_commands_are_not_images(tmp_path: Path) -> None:
    for name in ("own.png", "activation/a.png", "summary/distance.png", "index/a.png", "coarse/a.png", "else/b.png"):
        write(tmp_path / name)
    assert [each.relative for each in find_sources([str(tmp_path)], tmp_path)] == ["own.png", "else/b.png"]


def test_summaries_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    names = ["distance", "rim_and_middle", "prototypes", "confused-coarse", "confused-against", "mine"]
    for name in names:
        write(tmp_path / f"{name}.png")
    summary.draw({"changes": [], "prototypes": []}, {}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


# ---- errors and signals ------------------------------------------------------------------------------------------
def test_a_picture_that_cannot_be_written(place: Path, tmp_path: Path) -> None:
    (tmp_path / "activation/a/one.png").mkdir(parents=True)
    result = call("explain", place / "ssa", place / "images", "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 1, result.output
    assert f"no picture: {tmp_path}/activation/a/one.png" in result.stderr
    report = json.loads((tmp_path / "explain.json").read_text())
    assert (report["images"], report["skipped"], report["pictures"]) == (2, 0, ["activation/two.png"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_the_report_so_far(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    real = Work.explain

    def explained(self: Work, item: Any) -> Any:
        signal.raise_signal(number)
        return real(self, item)

    monkeypatch.setattr(Work, "explain", explained)
    report = explain(tmp_path, place / "ssa", place / "images", "--pictures", "0", code=code)
    assert (report["images"], report["of_images"]) == (1, 2)


def test_the_fix_of_an_error_of_the_gpu() -> None:
    with pytest.raises(CommandError, match="run the command again, or with --device cpu"):
        skip_reason(RuntimeError("CUDA error: an illegal memory access"), Path("a.png"), again=AGAIN)
