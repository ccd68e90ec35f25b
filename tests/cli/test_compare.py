"""`ssaseg compare` on run folders written by hand, so that every figure is known."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from ssaseg.cli.comparison import compare
from ssaseg.cli.main import cli
from ssaseg.cli.training.log import read_log
from ssaseg.recipes import dump_recipe, load_recipe

CLASSES = {"sky": 90.0, "road": 40.0, "boat": None}


def make_run(
    folder: Path, *overrides: str, mious: tuple[float | None, ...] = (10.0, 30.0, 20.0), **ious: float | None
) -> Path:
    """Three log lines of 10 steps at 16 images/s, each followed by an evaluation of 5 s; the demo's batch is 8."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_recipe(load_recipe("demo", ["train.steps=30", *overrides])))
    records: list[dict[str, Any]] = []
    for step, miou in zip((10, 20, 30), mious, strict=False):
        records.append({"step": step, "lr": 1e-3, "loss": 3.0, "main_ce": 2.0, "images_per_s": 16.0, "data_wait": 0.1})
        records.append({"step": step, "mIoU": miou, "eval_seconds": 5.0, "IoU": {**CLASSES, **ious}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_damaged_log_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3\nrubbish\n\n{"step": 40, "lo')  # the last one is only being written
    assert read_log(folder / "metrics.jsonl")[1] == 2
    notes = compare.remarks(compare.open_runs([folder]), {})
    assert "a: its log is damaged, lines left out: 2" in notes


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)])


def figures(tmp_path: Path, *runs: object) -> dict[str, Any]:
    """What --json says; the picture, seconds of work each, is left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "draw", lambda runs, classes, path: None)
        result = run(*runs, "--out", tmp_path / "out.png", "--json", "-")
    assert result.exit_code == 0, result.output
    assert "wrote" in result.stderr
    return json.loads(result.stdout)


def test_figures_and_differences(tmp_path: Path) -> None:
    linear = make_run(tmp_path / "linear", "model.classifier=linear", "optim.lr=1e-4", mious=(5.0, 7.5, None))
    ssa = make_run(tmp_path / "ssa", "train.workers=0", road=65.5)
    report = figures(tmp_path, linear, ssa)
    assert report["runs"][0] == {
        "run": "linear", "folder": str(linear), "model": "seaformer_t", "classifier": "linear", "step": 30, "steps": 30,
        "best_mIoU": 7.5, "best_step": 20, "last_mIoU": None, "images_per_s": 16.0,
        "hours": pytest.approx((30 * 8 / 16 + 3 * 5) / 3600),
    }  # fmt: skip
    assert (report["runs"][1]["best_mIoU"], report["runs"][1]["last_mIoU"]) == (30.0, 20.0)
    assert report["recipe_differences"] == {
        "model.classifier": {"linear": "linear", "ssa": "ssa"},
        "optim.lr": {"linear": 1e-4, "ssa": 2e-3},
    }
    road, *others = report["classes"]
    assert road == {"name": "road", "IoU": {"linear": 40.0, "ssa": 65.5}, "difference": 25.5, "spread": 25.5}
    assert [row["difference"] for row in others] == [0.0, None]
    assert report["notes"] == []


def test_table_and_picture(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run", f"train.seed={index}") for index, name in enumerate("abc")]
    result = run(*runs, "--out", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()]
    # Folders of one name are told apart by the folder above.
    assert ["b/run", "seaformer_t", "ssa", "30/30", "30.00", "20", "20.00", "16.0", "0.01"] in rows
    assert ["train.seed", "0", "1", "2"] in rows
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.info["Software"] == "ssaseg compare"
        assert picture.width > 1500
    assert run(runs[0], "--out", tmp_path / "out.png").exit_code == 0, "its own picture is drawn anew"


def test_pictures_of_others_stay(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    Image.new("RGB", (4, 4)).save(tmp_path / "holiday.png")
    before = (tmp_path / "holiday.png").read_bytes()
    (tmp_path / "notes.png").write_text("no picture at all")
    for name, word in [
        ("holiday.png", "already exists"),
        ("notes.png", "already exists"),
        ("curves.jpg", ".png"),
        ("nowhere/out.png", "not a folder"),
    ]:
        result = run(folder, "--out", tmp_path / name)
        assert result.exit_code == 2, name
        assert word in result.stderr
        assert len(result.stderr.splitlines()) <= 3
    assert (tmp_path / "holiday.png").read_bytes() == before


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / "empty", tmp_path / "gone", "--out", tmp_path / "out.png")
    assert result.exit_code == 2
    assert "empty: not a run folder (no metrics.jsonl in it)" in result.stderr
    result = run(tmp_path / "empty", make_run(tmp_path / "run"), "--out", tmp_path / "out.png")
    assert result.exit_code == 1, "done in part"
    assert "warning" in result.stderr
    assert "one run only" in result.stderr
    assert run().exit_code == 2


def test_the_same_run_twice_is_one(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert len(figures(tmp_path, folder, f"{folder}/../run")["runs"]) == 1


def test_runs_that_have_hardly_begun(tmp_path: Path) -> None:
    new = make_run(tmp_path / "new", mious=())
    young = make_run(tmp_path / "young")
    whole = (young / "metrics.jsonl").read_text()
    # A log line, no evaluation yet, and a line cut short; and what is no record at all.
    (young / "metrics.jsonl").write_text(whole.splitlines()[0] + '\n7\n{"step": "x"}\n{"step": 20, "lo')
    report = figures(tmp_path, new, young)
    assert [row["best_mIoU"] for row in report["runs"]] == [None, None]
    assert [row["step"] for row in report["runs"]] == [0, 10]
    assert report["runs"][0]["hours"] is None
    assert "new: no evaluation yet" in report["notes"]
    assert "new: no step of training is logged" in report["notes"]


def test_other_classes(tmp_path: Path) -> None:
    ours = make_run(tmp_path / "ours")
    theirs = make_run(tmp_path / "theirs", road=50.0, kiosk=1.0)
    report = figures(tmp_path, ours, theirs)
    assert [row["name"] for row in report["classes"]] == ["road", "sky", "boat"]
    assert any("different classes" in note and "3 classes have the same name" in note for note in report["notes"])


def test_other_protocols_and_other_images_are_told(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    flipped = make_run(tmp_path / "flipped", "test.flip=true")
    assert any("protocols" in note for note in figures(tmp_path, first, flipped)["notes"])
    shrunk = make_run(tmp_path / "shrunk")
    for folder, images in ((first, 48), (shrunk, 40)):
        (folder / "env.json").write_text(json.dumps({"data": {"val": {"images": images}}}))
    assert any("validation images" in note for note in figures(tmp_path, first, shrunk)["notes"])


def test_configs_of_other_versions_and_damaged_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, broken = make_run(tmp_path / "old"), make_run(tmp_path / "broken")
    plain = yaml.safe_load((old / "config.yaml").read_text())
    del plain["loss"]  # a section that came later
    (old / "config.yaml").write_text(yaml.safe_dump(plain))
    assert compare.recipe_differences([compare.open_run(old, "old"), compare.open_run(broken, "broken")]) == {}
    plain["optim"]["nesterov"] = True  # a key of another version
    (old / "config.yaml").write_text(yaml.safe_dump(plain))
    (broken / "config.yaml").write_text("model: [")
    (broken / "env.json").write_text("{")
    runs = [compare.open_run(old, "old"), compare.open_run(broken, "broken")]
    assert [run.recipe for run in runs] == [{}, {}]
    assert [run.figures()["best_mIoU"] for run in runs] == [30.0, 30.0], "the log tells as much as before"
    assert compare.recipe_differences(runs) == {}
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "optim.nesterov" in errors[0]
    assert "broken" in errors[1]
