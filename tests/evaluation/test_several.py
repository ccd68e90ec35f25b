"""`ssaseg eval` of several files: one pass over the images, differences to the first, and what cannot be compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from calling import call

from ssaseg.cli.comparison import compare
from ssaseg.cli.evaluation import report
from ssaseg.cli.evaluation.report import Request, run_eval
from ssaseg.cli.evaluation.several import short_names
from ssaseg.cli.scoring.metrics import Confusion, difference_interval
from ssaseg.datasets.synthetic import CLASSES, SyntheticScenes
from ssaseg.models import build_model, save_model

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = {
    "model": {"name": "seaformer_t"},
    "data": {"dataset": "synthetic", "synthetic": {"height": 64, "width": 96, "train": 1, "val": 3, "seed": 0}},
    "augment": {"scale": [96, 64], "crop": [64, 64]},
    "test": {"scale": None, "multiple": 32},
    "optim": {"lr": 0.001},
    "train": {"steps": 1},
}


def save(path: Path, nudge: float = 0.0, **changes: Any) -> Path:
    torch.manual_seed(0)
    header = {"classes": list(CLASSES), "protocol": RECIPE["test"], "recipe": RECIPE, "step": 7, **changes}
    model = build_model("seaformer_t", len(header["classes"]))
    with torch.no_grad():  # otherwise all pixels are one class
        model.classifier.conv_seg.weight.normal_()
        noise = model.eval().feature(torch.randn(1, 3, 64, 96))
        model.classifier.conv_seg.bias.copy_(-model.classifier.conv_seg(noise).mean(dim=(0, 2, 3)))
        model.classifier.conv_seg.bias.add_(nudge * torch.randn(len(header["classes"])))
    save_model(path, model, header)
    return path


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "WORKERS", 0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("several")
    return [save(folder / "a.safetensors"), save(folder / "b.safetensors", nudge=1.0)]


def scored(files: list[Path], tmp_path: Path, **request: Any) -> dict[str, Any]:
    assert run_eval(files, Request(**request), str(tmp_path / "report.json"), "cpu") == 0
    return json.loads((tmp_path / "report.json").read_text())


def test_side_by_side_is_each_alone(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, real = [], SyntheticScenes.load
    monkeypatch.setattr(SyntheticScenes, "load", lambda self, index: read.append(index) or real(self, index))
    both = scored([*pair, pair[0]], tmp_path, boundary=True)
    assert read == [0, 1, 2], "each image is read once"
    printed = capsys.readouterr().out
    alone = [scored([file], tmp_path, boundary=True) for file in pair]
    for each in (*alone, *both["models"]):
        del each["images_per_s"], each["recipe"]
    assert both["models"] == [*alone, alone[0]]
    other, same = both["differences"]
    assert (same["mIoU"], same["equal_labels"]) == (0, 100)
    assert (same["mIoU_interval"]["low"], same["mIoU_interval"]["high"]) == (0, 0)
    assert other["mIoU"] == pytest.approx(alone[1]["mIoU"] - alone[0]["mIoU"])
    assert other["mIoU_interval"]["low"] <= other["mIoU"] <= other["mIoU_interval"]["high"]
    assert 0 < other["equal_labels"] < 100
    assert (other["checkpoint"], other["against"]) == (str(pair[1]), str(pair[0]))
    words = (" ".join(row.split()) for row in printed.splitlines())
    assert f"mIoU {alone[0]['mIoU']:.2f} {alone[1]['mIoU']:.2f} {alone[0]['mIoU']:.2f}" in list(words)
    for said in (
        "100.000 % of labels are equal",
        "points (95 % interval",
        "torch, folded, float32",
        "protocol: val split",
    ):
        assert said in printed


def test_what_differs_is_printed_and_the_first_protocol_is_used(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save(tmp_path / "c.safetensors", protocol={"scale": [128, 64]}, mean=[1.0, 2.0, 3.0])
    both = scored([pair[0], other], tmp_path, limit=1)
    told = capsys.readouterr().err
    assert f"{other}: its protocol is another: resized to fit 128x64" in told
    assert f"used for all: that of {pair[0]}" in told
    assert "each file's own are used" in told
    assert [each["protocol"]["multiple"] for each in both["models"]] == [32, 32]
    alone = scored([other], tmp_path, limit=1, changes=RECIPE["test"])
    assert both["models"][1]["confusion"] == alone["confusion"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([*CLASSES[:2], "lake", *CLASSES[3:]], "b.safetensors: class 2 is 'lake'; "),
        (list(CLASSES[:5]), "b.safetensors: 5 classes; "),
    ],
)
def test_files_of_other_classes_are_refused(pair: list[Path], tmp_path: Path, classes: list[str], message: str) -> None:
    other = save(tmp_path / "b.safetensors", classes=classes)
    result = call("eval", pair[0], other, "--device", "cpu")
    assert result.exit_code == 2
    assert message in result.stderr
    assert str(pair[0]) in result.stderr
    assert len(result.stderr.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--exact", "--precision", "bf16"], "--exact computes in float32; leave out --precision"),
        (["--precision", "fp16"], "--precision fp16: this device (cpu) does not compute in it"),
        (["gone.safetensors"], "'gone.safetensors' does not exist"),
    ],
)
def test_options_that_do_not_fit(pair: list[Path], words: list[str], message: str) -> None:
    result = call("eval", pair[0], "--device", "cpu", *words)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_data_are_those_of_the_first_file_that_knows_them(pair: list[Path], tmp_path: Path) -> None:
    """As exports often do not."""
    bare = save(tmp_path / "bare.safetensors", recipe=None, step=0)
    both = scored([bare, pair[0]], tmp_path, limit=1)
    assert both["models"][0]["step"] is None
    assert both["models"][0]["confusion"] == both["models"][1]["confusion"]


def test_exact_and_engine_are_in_the_report(pair: list[Path], tmp_path: Path) -> None:
    folded, exact = (scored(pair[:1], tmp_path, exact=exact) for exact in (False, True))
    assert (folded["engine"], folded["precision"]) == ("torch, folded, float32", "float32")
    assert exact["engine"] == "torch, exact, float32"
    assert exact["statement"].endswith("; computed by torch, exact, float32")
    moved = np.abs(np.array(folded["confusion"]) - np.array(exact["confusion"])).sum() / 2
    assert moved <= 0.002 * np.sum(exact["confusion"])


def test_the_interval_of_a_difference_is_paired() -> None:
    """What all images of a hard kind have in common cancels out; here a constant is all that is left."""
    rng = np.random.default_rng(0)
    first, second = Confusion(2), Confusion(2)
    for _ in range(20):
        label = np.repeat([[0, 1]], 500, axis=0)
        wrong = rng.random() < 0.5
        worse = label.copy()
        worse[: 200 if wrong else 50] = 1 - label[: 200 if wrong else 50]
        better = worse.copy()
        better[:10] = label[:10]
        first.update(worse, label)
        second.update(better, label)
    found, alone = difference_interval(first, second), first.interval()
    assert found is not None
    assert alone is not None
    difference = second.scores()["mIoU"] - first.scores()["mIoU"]
    assert found.low <= difference <= found.high
    assert found.low > 0
    assert found.high - found.low < 0.2 * (alone.high - alone.low)
    second.update(label, label)
    with pytest.raises(ValueError, match="20 and 21 images"):
        difference_interval(first, second)


def test_short_names_differ() -> None:
    assert short_names(["x/a.onnx", "y/b.onnx"]) == ["a.onnx", "b.onnx"]
    assert short_names(["x/a.onnx", "y/a.onnx"]) == ["x/a.onnx", "y/a.onnx"]
    assert short_names(["a", "a"]) == ["1: a", "2: a"]


# ---- `ssaseg compare`, which counts in the same way --------------------------------------------------------------
def as_run(folder: Path, checkpoint: Path | None) -> Path:
    """A run folder with this checkpoint."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "mIoU": 5.0}\n')
    (folder / "config.yaml").write_text(yaml.safe_dump(RECIPE))
    if checkpoint is not None:
        (folder / "best.safetensors").symlink_to(checkpoint)
    return folder


def test_compare_tests_what_eval_counts(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = scored(pair, tmp_path)
    monkeypatch.setattr(compare, "draw", lambda runs, classes, path: None)
    runs = [as_run(tmp_path / name, file) for name, file in zip("ab", pair, strict=True)]
    result = call("compare", *runs, "--out", tmp_path / "out.png", "--json", tmp_path / "runs.json", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "runs.json").read_text())
    assert [row["run"] for row in report["runs"]] == ["a", "b"]
    test, difference = report["test"], both["differences"][0]
    assert test["mIoU"]["difference"] == pytest.approx(difference["mIoU"])
    assert test["mIoU"]["interval"] == difference["mIoU_interval"]
    assert [row["a"] for row in test["classes"]] == pytest.approx([row["IoU"] for row in both["models"][0]["classes"]])
    assert (test["a"]["kind"], test["images"], test["permutations"]["count"]) == ("run", 3, 8)
    assert "no difference shown. b minus a: " in result.stdout
    assert "names are numbered" not in result.stderr, "scenes are no frames of a video"


def test_runs_that_cannot_be_tested_are_drawn(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "draw", lambda runs, classes, path: None)
    runs = [as_run(tmp_path / "a", pair[0]), as_run(tmp_path / "b", None)]
    result = call("compare", *runs, "--out", tmp_path / "out.png")
    assert result.exit_code == 0
    assert f"note: no test whether the runs differ: {runs[1]}: has no best.safetensors" in result.stderr
    assert call("compare", *runs, "--out", tmp_path / "out.png", "--blocks", "2").exit_code == 2
    twice = call("compare", runs[0], runs[0], "--out", tmp_path / "out.png", "--split", "val")
    assert "a test is of two runs; got 1" in twice.stderr
    assert "no test" not in call("compare", *runs, "--out", tmp_path / "out.png", "--no-test").stderr


def test_protocols_and_data_that_differ_are_refused(pair: list[Path], tmp_path: Path) -> None:
    flipped = save(tmp_path / "flip.safetensors", protocol={**RECIPE["test"], "flip": True})
    data = {**RECIPE, "data": {"dataset": "synthetic", "synthetic": {**RECIPE["data"]["synthetic"], "seed": 4}}}
    other = save(tmp_path / "other.safetensors", recipe=data)
    for file, message in ((flipped, "these protocols differ"), (other, "their images or labels differ")):
        result = call("compare", pair[0], file, "--device", "cpu")
        assert result.exit_code == 2
        assert message in result.stderr
        assert "give --data RECIPE, whose images and protocol are used for both" in result.stderr
        assert len(result.stderr.splitlines()) == 3
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert call("compare", pair[0], flipped, "--data", tmp_path / "recipe.yaml", "--device", "cpu").exit_code == 0
