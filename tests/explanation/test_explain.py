"""`ssaseg explain`: its figures against a computation of its own, its pictures, and its errors."""

import json
import pickle
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
from tiny import TINY
from torch.nn import functional as F

from ssaseg.cli.drawing import panels
from ssaseg.cli.drawing.panels import LINE, WIDTH
from ssaseg.cli.explanation import summary
from ssaseg.cli.explanation.pictures import PROBABILITY, cosine_scale
from ssaseg.cli.explanation.probing import open_probe
from ssaseg.cli.explanation.sums import EDGES, Sums, edge_distance
from ssaseg.cli.scoring.boundary import reach
from ssaseg.datasets import build_dataset
from ssaseg.models import load_model
from ssaseg.recipes import load_recipe


@pytest.fixture(autouse=True, scope="module")
def tiny() -> Iterator[None]:
    with tiny_networks():
        yield


@pytest.fixture(autouse=True)
def quick(full: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures over all images take most of the time: only `full` has them."""
    monkeypatch.setattr(summary, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def place(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("explain"))


@pytest.fixture(scope="module")
def full(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """OUT and the report with everything: labels, and a second checkpoint."""
    out = tmp_path_factory.mktemp("full")
    words = (place / "ssa", place / "images", "--masks", place / "masks", "--against", place / "linear")
    return out, explain(out, *words)


# ---- a computation of its own ------------------------------------------------------------------------------------
def by_hand(place: Path, name: str, file: str) -> dict[str, Any]:
    """Logits at full size (K,H,W) of an image, and SSA's prototypes."""
    model, header = load_model(place / file)
    image = cv2.imread(str(place / f"images/{name}.png"))[..., ::-1].astype(np.float32)
    pixels = torch.from_numpy((image - np.float32(header["mean"])) / np.float32(header["std"])).permute(2, 0, 1)[None]
    with torch.no_grad():
        feature = model.feature(pixels)
        final, coarse = model.classifier.stages(feature)
        found = {"final": F.interpolate(final, (H, W), mode="bilinear")[0]}
        if coarse is not None:
            found["coarse"] = F.interpolate(coarse, (H, W), mode="bilinear")[0]
            found["adapted"] = model.classifier.adapt(feature)
            found["fixed"] = model.classifier.conv_seg.weight[:, :, 0, 0]
    return found


def all_by_hand(place: Path) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Labels and logits of both images, those of the second checkpoint as `against`."""
    found = []
    for name in ("a/one", "two"):
        labels = cv2.imread(str(place / f"masks/{name}.png"), cv2.IMREAD_UNCHANGED)
        logits = by_hand(place, name, "ssa") | {"against": by_hand(place, name, "linear")["final"]}
        found.append((labels, logits))
    return found


def far(labels: np.ndarray) -> np.ndarray:
    """`edge_distance`, pixel by pixel."""
    rows, columns = np.indices(labels.shape)
    result = np.ones(labels.shape)
    for y, x in zip(*np.nonzero(labels != 255), strict=True):
        others = labels != labels[y, x]
        squares = (rows - y) ** 2 + (columns - x) ** 2
        result[y, x] = np.sqrt(squares[others].min()) if others.any() else 1e9
    return result


def test_the_curve_from_rim_to_middle(place: Path, full: tuple[Path, dict[str, Any]]) -> None:
    pixels = np.zeros(len(EDGES))
    sums = {name: np.zeros((3, len(EDGES))) for name in ("coarse", "final", "against")}
    sides = {name: np.zeros((2, 2)) for name in sums}  # rim, middle × pixels, probability
    for labels, logits in all_by_hand(place):
        distance = far(labels)
        known = labels != 255
        place_in_bins = np.digitize(distance[known], EDGES) - 1
        pixels += np.bincount(place_in_bins, minlength=len(EDGES))
        own = np.where(known, labels, 0)[None].astype(int)
        for name, total in sums.items():
            values = logits[name].double().numpy()
            probability = logits[name].softmax(0).numpy()
            standard = (values - values.mean((1, 2), keepdims=True)) / values.std((1, 2), keepdims=True)
            right = (values.argmax(0) == labels).astype(float)
            maps = [np.take_along_axis(each, own, 0)[0] for each in (probability, standard)] + [right]
            for row, each in zip(total, maps, strict=True):
                row += np.bincount(place_in_bins, each[known], minlength=len(EDGES))
            for side, part in enumerate((distance <= reach(labels.shape), distance > reach(labels.shape))):
                sides[name][side] += (known & part).sum(), maps[0][known & part].sum()
    report = full[1]
    bins = [b for b in range(len(EDGES)) if pixels[b]]
    assert len(bins) > 5
    assert [each["from"] for each in report["confidence_by_distance"]] == [EDGES[b] for b in bins]
    assert [each["pixels"] for each in report["confidence_by_distance"]] == [pixels[b] for b in bins]
    for name, total in sums.items():
        for key, row in zip(("confidence", "strength", "agreement"), total, strict=True):
            got = [each[key][name] for each in report["confidence_by_distance"]]
            np.testing.assert_allclose(got, (row / np.maximum(pixels, 1))[bins], atol=2e-5)
        parts = report["rim_and_middle"]["all_pixels"]
        for side, part in zip(sides[name], ("rim", "middle"), strict=True):
            assert parts[part]["pixels"] == side[0]
            assert parts[part]["confidence"][name] == pytest.approx(side[1] / side[0], abs=2e-5)


@pytest.mark.parametrize("first", ["coarse", "against"])
def test_changed_pixels_and_confused_pairs(place: Path, full: tuple[Path, dict[str, Any]], first: str) -> None:
    counts = {"pixels_changed": 0, "better": 0, "worse": 0}
    cells: dict[tuple[str, str], list[int]] = {}
    for labels, logits in all_by_hand(place):
        before, after = (logits[name].argmax(0).numpy() for name in (first, "final"))
        for true, old, new in zip(labels.ravel(), before.ravel(), after.ravel(), strict=True):
            if true == 255:
                continue
            counts["pixels_changed"] += old != new
            counts["better"] += old != new == true
            counts["worse"] += new != old == true
            for index, wrong in ((2, old), (3, new)):  # all errors, before and after
                if wrong != true:
                    cells.setdefault((CLASSES[true], CLASSES[wrong]), [0, 0, 0, 0])[index] += 1
            if old != true == new:
                cells[CLASSES[true], CLASSES[old]][0] += 1
            if new != true == old:
                cells[CLASSES[true], CLASSES[new]][1] += 1
    (report,) = (each for each in full[1]["changes"] if each["from"] == first)
    assert min(counts.values()) > 0
    assert {key: report[key] for key in counts} == counts
    rest = counts["pixels_changed"] - counts["better"] - counts["worse"]
    assert report["wrong_both_times"] == rest
    keys = ("fixed", "broken", "before", "after")
    got = {(pair["true"], pair["predicted"]): [pair[key] for key in keys] for pair in report["pairs"]}
    assert got == {pair: cell for pair, cell in cells.items() if cell[0] != cell[1]}
    for pair in report["both_ways"]:
        one, other = (cells.get(each, [0, 0, 0, 0]) for each in (tuple(pair["classes"]), tuple(pair["classes"][::-1])))
        assert (pair["before"], pair["after"]) == (one[2] + other[2], one[3] + other[3])
    assert {frozenset(pair["classes"]) for pair in report["both_ways"]} == {frozenset(pair) for pair in cells}
    gains = [pair["fixed"] - pair["broken"] for pair in report["pairs"]]
    assert gains == sorted(gains, reverse=True)


def test_prototypes(place: Path, full: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["name"]: row for row in full[1]["prototypes"]}
    for index, name in enumerate(CLASSES):
        cosines, inside, outside, directions = [], [], [], []
        for labels, found in all_by_hand(place):
            mask = torch.from_numpy(labels == index)
            if not mask.any():
                continue
            adapted = found["adapted"]
            cosines.append(F.cosine_similarity(adapted.semantic[0, index], found["fixed"][index], dim=0).item())
            directions.append(F.normalize(adapted.semantic[0, index], dim=0))
            gaze = F.cosine_similarity(adapted.spatial_feature[0], adapted.spatial[0, index, :, None, None], dim=0)
            gaze = F.interpolate(gaze[None, None], (H, W), mode="bilinear")[0, 0]
            inside.append(gaze[mask].mean().item())
            outside.append(gaze[~mask].mean().item())
        row = rows[name]
        assert row["images"] == len(cosines) > 0
        assert row["semantic_cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
        assert row["consistency"] == pytest.approx(torch.stack(directions).mean(0).norm().item(), abs=1e-5)
        assert row["spatial_inside"] == pytest.approx(np.mean(inside), abs=1e-5)
        assert row["spatial_outside"] == pytest.approx(np.mean(outside), abs=1e-5)


def test_distance_to_the_edge() -> None:
    labels = np.zeros((9, 40), np.uint8)
    assert edge_distance(labels).min() > 1000  # no edge: the image's border is none
    labels[:, 20:] = 1
    labels[4, 30] = 255
    np.testing.assert_allclose(edge_distance(labels), far(labels), rtol=1e-6)


# ---- pictures ----------------------------------------------------------------------------------------------------
def test_pictures_exist_and_have_one_scale(place: Path, full: tuple[Path, dict[str, Any]]) -> None:
    out, report = full
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    figures = {"distance", "rim_and_middle", "confused-coarse", "confused-against", "prototypes"}
    assert names == {"activation/a/one.png", "activation/two.png", *(f"summary/{name}.png" for name in figures)}
    assert report["images"] == 2
    drawn = cv2.imread(str(out / "activation/two.png"))
    # Columns: image, three classifiers, label or spatial prototype. Rows: labels, changes, one for each class.
    height = round(H * WIDTH / W)
    row = LINE + height + 4
    assert drawn.shape[1] == 5 * (WIDTH + 4)
    labels, logits = all_by_hand(place)[1]
    pixels = np.bincount(labels.ravel(), minlength=256)[:3]
    assert 5 * row < drawn.shape[0] < 6 * row + 200
    for line, index in enumerate(np.argsort(-pixels, kind="stable")):
        for column, name in enumerate(("coarse", "final", "against"), 1):
            probability = logits[name].softmax(0)[index].numpy()
            panel = panels.heat(probability, PROBABILITY)
            wanted = cv2.resize(panel, (WIDTH, height), interpolation=cv2.INTER_NEAREST).astype(int)
            top, left = (line + 2) * row + LINE, column * (WIDTH + 4)
            got = drawn[top : top + height, left : left + WIDTH].astype(int)
            mask = cv2.resize((labels == index).astype(np.uint8), (WIDTH, height), interpolation=cv2.INTER_NEAREST)
            free = cv2.erode(1 - mask, np.ones((3, 3))) > 0  # beside the mask, whose edge is drawn
            assert np.abs(got - wanted)[free].max() <= 8, (name, index)


def test_scales_and_outlines() -> None:
    low, high = panels.heat(np.array([[0.0, -5.0], [1.0, 5.0]]), PROBABILITY).reshape(2, 2, 3)
    assert (low[0] == low[1]).all()
    assert (high[0] == high[1]).all()
    assert low.sum() < high.sum()
    assert (cosine_scale([np.array([0.21, -0.33])]).low, cosine_scale([np.array([0.21])]).high) == (-0.4, 0.3)
    mask = np.zeros((8, 8), bool)
    mask[:, :4] = True
    edge = (panels.outlined(np.zeros((8, 8, 3), np.uint8), mask, (1, 2, 3)) == (3, 2, 1)).all(axis=2)
    assert np.argwhere(edge.any(axis=0)).ravel().tolist() == [3]  # beyond the image's border the mask continues


# ---- what is left out --------------------------------------------------------------------------------------------
def test_a_plain_classifier_without_labels(place: Path, tmp_path: Path) -> None:
    images = place / "images/a/one.png"
    result = call("explain", place / "linear", images, place / "images/two.png", "--out", tmp_path, "--class", "car",
                  "--pictures", "1", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    for part in (
        "classifier linear does not adapt",
        "semantic and spatial prototypes: linear has none",
        "there are no labels",
    ):
        assert part in result.stderr
    report = json.loads((tmp_path / "explain.json").read_text())
    assert report["changes"] == report["prototypes"] == []
    assert "scores" not in report
    assert len(report["left_out"]) == 3
    assert report["rim_and_middle"]["all_pixels"]["rim"]["agreement"] == {"final": 1.0}  # the masks are its own
    assert [path.name for path in (tmp_path / "activation").rglob("*.png")] == ["one.png"]
    drawn = cv2.imread(str(tmp_path / "activation/one.png"))
    assert drawn.shape[1] == 2 * (WIDTH + 4)
    assert drawn.shape[0] < 3 * (LINE + round(H * WIDTH / W) + 4)  # labels, and the one class


def test_without_labels_nothing_is_better_or_worse(place: Path, tmp_path: Path) -> None:
    report = explain(tmp_path, place / "ssa", place / "images", "--against", place / "linear")
    assert [each["from"] for each in report["changes"]] == ["coarse", "against"]
    assert all(each.keys() == {"from", "to", "pixels_changed"} for each in report["changes"])
    found = all_by_hand(place)
    changed = sum(int((each["coarse"].argmax(0) != each["final"].argmax(0)).sum()) for _, each in found)
    assert report["changes"][0]["pixels_changed"] == changed > 0
    assert not list((tmp_path / "summary").glob("confused-*.png"))


def test_a_split_of_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("demo", [*TINY, "data.synthetic.val=3"])
    data = recipe.data
    scenes = build_dataset("synthetic", "val", root=Path("."), options=data.model_dump())
    file = checkpoint(tmp_path / "c", classes=list(scenes.classes), recipe=recipe.model_dump(mode="json"))
    report = explain(tmp_path / "out", file, "--limit", "2", "--pictures", "0")
    assert (report["images"], report["labels"]) == (2, "val split of recipe demo")
    labelled = sum(int((scenes.load(index)[1] != 255).sum()) for index in range(2))
    assert report["changes"][0]["pixels_labelled"] == labelled
    assert not list((tmp_path / "out/activation").iterdir())


def test_one_input_where_the_protocol_has_windows(place: Path, tmp_path: Path) -> None:
    protocol = {"scale": None, "multiple": None, "mode": "slide", "crop": [32, 32], "stride": [32, 32], "flip": True}
    file = checkpoint(tmp_path / "c", protocol=protocol)
    result = call("explain", file, place / "images/two.png", "--out", tmp_path / "out", "--device", "cpu")
    assert "here an image is one input" in result.stderr
    image = cv2.imread(str(place / "images/two.png"))
    whole, windows = (open_probe(each, torch.device("cpu")) for each in (place / "ssa", file))
    assert (windows.changed, whole.changed) == (True, False)
    assert torch.equal(windows.look(image, "x").final.logits, whole.look(image, "x").final.logits)


def test_a_second_run_does_not_take_results_as_images(place: Path, tmp_path: Path) -> None:
    write(tmp_path / "x.png", picture(H, W))
    write(tmp_path / "summary/distance.png", picture(H, W))
    for _ in range(2):
        assert explain(tmp_path, place / "ssa", tmp_path)["images"] == 1
    assert [path.name for path in (tmp_path / "activation").iterdir()] == ["x.png"]


def test_memory_does_not_depend_on_the_number_of_images(place: Path) -> None:
    probe = open_probe(place / "ssa", torch.device("cpu"))
    sums, sizes = Sums(3, ["coarse", "final"], [("coarse", "final")], known=False), []
    for seed in range(30):
        seen = probe.look(picture(H, W, seed), "x")
        assert seen.coarse is not None
        labels = seen.final.labels
        sums.add({"coarse": seen.coarse, "final": seen.final}, labels, edge_distance(labels), seen.prototypes)
        held = {name: value for name, value in vars(probe.inference).items() if isinstance(value, list)}
        assert len(held) > 1
        sizes.append(len(pickle.dumps((sums, held))) // 64)
    assert sizes[2] == sizes[29]
    assert sums.images == 30


# ---- bad input ---------------------------------------------------------------------------------------------------
def test_an_image_that_cannot_be_used_is_skipped(place: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/broken.png").write_bytes(b"no image")
    write(tmp_path / "in/good.png", picture(H, W))
    write(tmp_path / "in/unlabelled.png", picture(H, W))
    write(tmp_path / "in/wrong.png", picture(H, W))
    write(tmp_path / "in/small.png", picture(H, W))
    write(tmp_path / "masks/good.png", np.zeros((H, W), np.uint8))
    write(tmp_path / "masks/wrong.png", np.full((H, W), 7, np.uint8))
    write(tmp_path / "masks/small.png", np.zeros((H, W - 1), np.uint8))
    words = ("explain", place / "ssa", tmp_path / "in", "--masks", tmp_path / "masks", "--device", "cpu")
    result = call(*words, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.count("skipped: ") == 4
    for part in ("not an image", "unlabelled.png: no mask", "id 7 has no class", f"mask of {W - 1}x{H} pixels"):
        assert part in result.stderr
    report = json.loads((tmp_path / "out/explain.json").read_text())
    assert (report["images"], report["skipped"]) == (1, 4)
    (tmp_path / "in/good.png").unlink()
    result = call(*words, "--out", tmp_path / "none")
    assert result.exit_code == 2
    assert "none of the 4 images could be used" in result.stderr
    assert not (tmp_path / "none/explain.json").exists()


def test_errors_in_three_lines(place: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", classes=["road", "tree", "car"])
    fewer = checkpoint(tmp_path / "fewer", classes=["road", "tree"])
    image = place / "images/two.png"
    for words, part in {
        (image, "--class", "Cars"): "did you mean car?",
        (image, "--class", "zzz"): "correct the name",
        (image, "--against", other): "class 1 is 'tree'",
        (image, "--against", fewer): "2 classes",
        (image, "--masks", tmp_path / "gone"): "gone: not a folder",
        (image, "--root", tmp_path): "leave out IMAGE",
        (image, "--split", "val"): "leave out IMAGE",
        (image, "--data", "demo"): "--data with IMAGE says how --masks is read",
        ("--masks", tmp_path): "--masks needs IMAGE",
        (tmp_path / "nothing",): "no image found",
        (): "the checkpoint has no recipe",
    }.items():
        result = call("explain", place / "ssa", *words, "--out", tmp_path / "out", "--device", "cpu")
        assert result.exit_code == 2, words
        assert part in result.stderr
        lines = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
        assert len(lines) <= 3, lines
    assert not (tmp_path / "out").exists()
