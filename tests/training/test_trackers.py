"""TensorBoard and Weights & Biases: what reaches them, and that a training does not depend on them."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from ssaseg.cli.errors import CommandError
from ssaseg.cli.main import cli
from ssaseg.cli.training import trackers as tracking
from ssaseg.cli.training.log import MetricsLog, read_metrics
from ssaseg.cli.training.trackers import Tracker, open_trackers
from ssaseg.recipes import load_recipe

RECIPE = load_recipe("demo")


def training(step: int, loss: float = 2.0) -> dict[str, Any]:
    return {"step": step, "lr": 1e-3, "loss": loss, "main_ce": loss}


def evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "mIoU": 50.0, "mAcc": None, "IoU": {"sky": 90.0, "boat": None}}


def start(name: str, folder: Path, step: int = 0, evaluated: int = 0) -> MetricsLog:
    trackers = open_trackers([name], folder, RECIPE)
    return MetricsLog(folder / "metrics.jsonl", step, evaluated, trackers)


def picture(folder: Path) -> Path:
    path = folder / "picture.jpg"
    cv2.imwrite(str(path), np.full((30, 50, 3), 100, np.uint8))
    return path


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda package: None)
    arguments = ["train", "demo", "--device", "cpu", "--track", name, "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert f"pip install 'ssaseg[{name}]'" in result.stderr
    assert "parameters" not in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorboard").mkdir()  # as TensorBoard and W&B leave it where one works
    namespace = ModuleSpec("tensorboard", None)
    monkeypatch.setattr(tracking, "find_spec", lambda package: namespace)
    with pytest.raises(CommandError, match="not installed"):
        open_trackers(["tensorboard"], tmp_path, RECIPE)


# ---- TensorBoard -------------------------------------------------------------------------------------------------


def read_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_has_figures_pictures_and_recipe(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log = start("tensorboard", tmp_path)
    log.write(training(5))
    log.write(evaluation(5))
    log.picture("predictions", picture(tmp_path), 5)
    for tracker in (*log.trackers, *log.trackers):
        tracker.close()
    events = read_events(tmp_path)
    expected = {"train/lr", "train/loss", "train/main_ce", "val/mIoU", "val/IoU/sky"}
    assert set(events.Tags()["scalars"]) == expected, "None is no scalar"
    assert [(each.step, each.value) for each in events.Scalars("val/mIoU")] == [(5, 50.0)]
    assert (events.Images("predictions")[0].width, events.Images("predictions")[0].height) == (50, 30)
    assert events.Images("predictions")[0].encoded_image_string == (tmp_path / "picture.jpg").read_bytes()
    assert "model:" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_takes_back_what_a_killed_run_wrote_beyond_its_state(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log = start("tensorboard", tmp_path)
    for step in (5, 10, 15):
        log.write(training(step, loss=1.0))
    log.write(evaluation(15))
    # Never closed: killed. Its last state is of step 10.
    log = start("tensorboard", tmp_path, step=10)
    log.write(training(15, loss=3.0))
    log.trackers[0].close()
    events = read_events(tmp_path)
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [(5, 1.0), (10, 1.0), (15, 3.0)]
    kept = events.Scalars("val/mIoU") if "val/mIoU" in events.Tags()["scalars"] else []
    assert kept == [], "the evaluation came after the state"
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [5, 10, 15]


# ---- Weights & Biases, by a stand-in -----------------------------------------------------------------------------


class FakeRun:
    def __init__(self, **options: Any) -> None:
        self.options, self.logged, self.metrics, self.finished = options, [], {}, 0

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics[name] = options

    def log(self, values: dict[str, Any]) -> None:
        if values["step"] == 13:
            raise ConnectionError("the network\nis gone")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


class FakeWandB(ModuleType):
    """As much of wandb 0.31 as is called; the calls were tried against that version in its offline mode."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[FakeRun] = []
        self.account = True

    def login(self) -> bool:
        if not self.account:
            raise ValueError("No API key configured. Use `wandb login` to log in.")
        return True

    def init(self, **options: Any) -> FakeRun:
        self.runs.append(FakeRun(**options))
        return self.runs[-1]

    def Image(self, path: str) -> str:
        return f"image {Path(path).name}"


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    module = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(tracking, "find_spec", lambda package: ModuleSpec(package, None, origin="there"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_wandb_has_figures_and_a_resumed_run_goes_on_in_the_same_one(tmp_path: Path, wandb: FakeWandB) -> None:
    log = start("wandb", tmp_path)
    log.write(training(5))
    log.write(evaluation(5))
    log.picture("iou", picture(tmp_path), 5)
    log.trackers[0].close()
    start("wandb", tmp_path, step=5, evaluated=5).trackers[0].close()
    first, second = wandb.runs
    assert first.logged == [
        {"step": 5, "train/lr": 1e-3, "train/loss": 2.0, "train/main_ce": 2.0},
        {"step": 5, "val/mIoU": 50.0, "val/IoU/sky": 90.0},
        {"step": 5, "iou": "image picture.jpg"},
    ]
    assert first.options["config"]["model"]["name"] == "seaformer_t"
    assert first.options["id"] == second.options["id"] == (tmp_path / "wandb-id").read_text()
    assert second.options["resume"] == "allow"
    # Its own counter would refuse the steps that a resumed run does again.
    assert first.metrics["*"] == {"step_metric": "step"}
    assert (first.finished, second.finished) == (1, 1)


def test_wandb_without_account(tmp_path: Path, wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.account = False
    with pytest.raises(CommandError, match=r"No API key configured(.|\n)*WANDB_MODE=offline"):
        open_trackers(["wandb"], tmp_path, RECIPE)
    monkeypatch.setenv("WANDB_MODE", "offline")
    start("wandb", tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    assert start("wandb", tmp_path, step=5).trackers, "a run that goes on does not end for it"


def test_a_tracker_that_fails_is_told_once_and_left_alone(
    tmp_path: Path, wandb: FakeWandB, capsys: pytest.CaptureFixture[str]
) -> None:
    log = start("wandb", tmp_path)
    for step in (5, 13, 13, 20):
        log.write(training(step))
    log.picture("iou", picture(tmp_path), 20)
    log.trackers[0].close()
    errors = capsys.readouterr().err
    assert errors.splitlines() == [
        "warning: wandb failed and is not used any more (ConnectionError: the network is gone)"
    ]
    assert [values["step"] for values in wandb.runs[0].logged] == [5]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 13, 13, 20]


def test_a_tracker_that_cannot_start_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Tracker):
        name = "broken"

        def _start(self, step: int) -> None:
            raise OSError(28, "No space left on device")

        def _log(self, values: dict[str, float], step: int) -> None:
            raise AssertionError("not started")

        def _picture(self, name: str, path: Path, step: int) -> None:
            raise AssertionError("not started")

        def _close(self) -> None:
            raise AssertionError("not started")

    trackers = [Broken(tmp_path, RECIPE)]
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, 0, trackers)
    log.write(training(1))
    trackers[0].close()
    assert capsys.readouterr().err.count("\n") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
