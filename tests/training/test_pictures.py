"""What a run shows of itself: curves, bars, confused pairs, pictures of batches and predictions."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure

from ssaseg.cli.drawing import bars, curves, panels
from ssaseg.cli.drawing.panels import LINE, RIGHTED, STILL_WRONG, WIDTH, WORSENED, Panel
from ssaseg.cli.evaluation import confused
from ssaseg.cli.main import cli
from ssaseg.cli.scoring import inference
from ssaseg.cli.scoring.metrics import Confusion
from ssaseg.cli.training import pictures as of_run
from ssaseg.cli.training.log import MetricsLog, read_metrics
from ssaseg.datasets.labels import label_space
from ssaseg.datasets.synthetic import SyntheticScenes
from ssaseg.models import build_model
from ssaseg.models.checkpoint import read_header
from ssaseg.recipes import load_recipe

TINY = [
    "data.synthetic.height=64", "data.synthetic.width=64", "data.synthetic.train=8", "data.synthetic.val=3",
    "augment.scale=[64,64]", "augment.crop=[64,64]", "train.batch=4", "train.steps=4", "train.workers=0",
    "train.log_every=1", "train.eval_every=2", "optim.warmup=0",
]  # fmt: skip


# ---- a run -------------------------------------------------------------------------------------------------------


def test_a_run_draws_everything(tmp_path: Path, pictures: None) -> None:
    out = tmp_path / "run"
    track = ["--track", "tensorboard"] if find_spec("tensorboard") else []
    result = CliRunner().invoke(cli, ["train", "demo", *TINY, "--device", "cpu", "--out", str(out), *track])
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    assert (out / "tensorboard").is_dir() == bool(track)
    assert result.stderr.count("most confused: ") == 2
    assert {path.suffix for path in out.iterdir()} >= {".png", ".json", ".jsonl"}
    for name in ("curves", "iou", "confused", "predictions", "batch"):
        assert cv2.imread(str(out / f"{name}.png")) is not None, name
    kept = sorted(path.name for path in (out / "predictions").iterdir())
    assert kept == ["step-000002.jpg", "step-000004.jpg"]
    latest = cv2.imread(str(out / "predictions.png")).astype(int)
    assert latest.shape[1] == 5 * (WIDTH + 4), "image, label, coarse, adapted, changed"
    # The last one kept, but for JPEG's losses; the one before, of other weights, is farther away.
    first, last = (cv2.imread(str(out / "predictions" / name)).astype(int) for name in kept)
    assert abs(last - latest).mean() < 8
    content = json.loads((out / "confused.json").read_text())
    assert content["step"] == 4
    assert {"true", "predicted", "share", "pixels"} == content["pairs"][0].keys()
    assert first.shape == last.shape
    best = read_header(out / "best.safetensors")[0]
    card = (out / "best.md").read_text()
    assert f"mIoU {best['scores']['mIoU']:.2f} % (95 % interval over images: " in card
    assert f"the weights of step {best['step']} of 4, " in card
    assert card.count("\n| train | 8 | `") == card.count("\n| val | 3 | `") == 1
    result = CliRunner().invoke(cli, ["eval", str(out / "last.safetensors"), "--device", "cpu"])
    assert confused.most_confused(content["pairs"], 5) in result.stdout.splitlines()


def make_job(folder: Path, classifier: str, images: int = 2) -> Any:
    """As much of a job as pictures need, with a network that was not trained."""
    torch.manual_seed(0)
    scenes = SyntheticScenes(images, 64, 64, split="val")
    model = build_model("seaformer_t", len(scenes.classes), classifier).train()
    recipe = load_recipe("demo", TINY)
    progress = SimpleNamespace(step=7)
    device = torch.device("cpu")
    return SimpleNamespace(
        recipe=recipe, folder=folder, model=model, device=device, train_set=scenes, val_set=scenes, progress=progress,
        log=None,
    )  # fmt: skip


def test_a_plain_classifier_has_one_prediction(tmp_path: Path) -> None:
    job = make_job(tmp_path, "linear")
    of_run.write_predictions(job)
    assert job.model.training, "the mode is as before"
    picture = cv2.imread(str(tmp_path / "predictions.png"))
    assert picture.shape[1] == 3 * (WIDTH + 4)
    assert picture.shape[0] > 2 * (WIDTH + LINE)
    assert (tmp_path / "predictions" / "step-000007.jpg").stat().st_size < 300_000


def test_pictures_change_nothing_that_training_draws_from(tmp_path: Path) -> None:
    job = make_job(tmp_path, "ssa", images=1)
    weights = {key: value.clone() for key, value in job.model.state_dict().items()}
    before = torch.random.get_rng_state()
    of_run.write_batch(job)
    of_run.write_predictions(job)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, weights[key]) for key, value in job.model.state_dict().items())


def test_no_training_ends_for_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, "linear")
    (tmp_path / "metrics.jsonl").write_text("")
    confusion = Confusion(len(job.val_set.classes))
    confusion.update(np.zeros((4, 4), np.uint8), np.full((4, 4), 255, np.uint8))  # nothing labelled: mIoU is NaN

    def broken(*_: object) -> None:
        raise ValueError("no such\nfont")

    monkeypatch.setattr(bars, "draw_ious", broken)
    monkeypatch.setattr(curves, "save_figure", lambda *_: None)
    monkeypatch.setattr(bars, "save_figure", lambda *_: None)
    of_run.after_evaluation(job, confusion)
    assert capsys.readouterr().err.splitlines() == [
        "most confused: none, no pixel is wrong",
        "warning: iou.png could not be written (ValueError: no such font)",
    ]
    assert (tmp_path / "predictions.png").exists()
    monkeypatch.setattr(inference, "predict_labels", broken)
    of_run.after_evaluation(job, confusion)
    assert "warning: predictions could not be written" in capsys.readouterr().err
    assert job.model.training, "as before"
    with pytest.raises(KeyboardInterrupt), of_run.drawing("x"):
        raise KeyboardInterrupt


# ---- confused pairs ----------------------------------------------------------------------------------------------


def test_confused_pairs_of_a_table_by_hand() -> None:
    #                 sky  road  boat      predicted
    table = np.array([[90, 10, 0], [50, 40, 10], [0, 0, 0]])
    pairs = confused.confused_pairs(table, ("sky", "road", "boat"))
    assert pairs == [
        {"true": "road", "predicted": "sky", "share": 50.0, "pixels": 50},
        # Shares are equal: the one of more pixels first, then in the order of the classes.
        {"true": "sky", "predicted": "road", "share": 10.0, "pixels": 10},
        {"true": "road", "predicted": "boat", "share": 10.0, "pixels": 10},
    ]
    assert confused.confused_pairs(table, ("sky", "road", "boat"), most=1) == pairs[:1]
    assert confused.most_confused(pairs, 1) == "most confused: road → sky 50.0 % (50 pixels)"
    assert table[0, 0] == 90, "the table is as it was"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that would have been written."""
    drawn: list[Figure] = []
    for module in (bars, curves):
        monkeypatch.setattr(module, "save_figure", lambda figure, *_: drawn.append(figure))
    return drawn


def words(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize(("name", "columns"), [("camvid", 1), ("coco_stuff", 3)])
def test_every_class_has_a_bar(figures: list[Figure], name: str, columns: int) -> None:
    labels = label_space(name)
    count = len(labels.classes)
    iou = np.linspace(0, 100, count)
    labelled = np.full(count, 9)
    iou[3], labelled[3], labelled[0] = np.nan, 0, 0
    bars.draw_ious(iou, labelled, labels.classes, labels.palette, "title", Path("iou.png"))
    (figure,) = figures
    assert len(figure.axes) == columns
    names = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert sorted(names) == sorted(labels.classes)
    assert (names[0], names[-1]) == (labels.classes[-1], labels.classes[3]), "best first, unknown last"
    texts = words(figure)
    assert (texts[0], texts[-2:]) == ("100.0", ["0.0  no ground truth, predicted", "no ground truth"])
    rows = max(len(axes.patches) for axes in figure.axes)
    assert figure.get_figheight() / rows > 0.2, "room for a name each"


def test_names_that_mean_something_to_matplotlib(tmp_path: Path) -> None:
    classes = ["$x_{", "<b>&", "\u6d77", "a" * 80]
    table = np.arange(16).reshape(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bars.draw_pairs(confused.confused_pairs(table, classes), "title", tmp_path / "pairs.png")
        bars.draw_pairs([], "title", tmp_path / "none.png")
    assert cv2.imread(str(tmp_path / "pairs.png")) is not None
    assert cv2.imread(str(tmp_path / "none.png")) is not None


# ---- curves ------------------------------------------------------------------------------------------------------


def write_records(folder: Path, count: int, **change: Any) -> None:
    lines = []
    for step in range(1, count + 1):
        record = {"step": step, "lr": 1e-3, "loss": 3.0, "main_ce": 2.5, "response": 0.5, "spatial": 0.0}
        lines += [{**record, "grad_norm": 10.0 ** (step % 9), "images_per_s": 10.0, "data_wait": 0.5, **change}]
    lines += [{"step": 1, "mIoU": None}, {"step": count, "mIoU": 40.0, "IoU": {"sky": 1.0}}] if count else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
    (folder / "env.json").write_text(json.dumps({"resumed": [{"step": 1}]}))


@pytest.mark.parametrize("count", [0, 1, 2, 1500])
def test_curves_of_few_and_of_many_records(figures: list[Figure], tmp_path: Path, count: int) -> None:
    write_records(tmp_path, count, grad_norm=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_run.draw_log(tmp_path, "title")
    losses, score = figures[0].axes[0], figures[0].axes[1]
    if count == 0:
        assert words(figures[0]).count("nothing logged") == 5
        return
    named = [each.get_label() for each in losses.get_lines() if not each.get_label().startswith("_")]
    assert named == ["loss 3", "main_ce 2.5", "response 0.5"], "spatial is switched off"
    points = [len(each.get_xdata()) for each in losses.get_lines() if each.get_label() in named]
    assert points == [min(count, 300)] * 3
    assert losses.get_yscale() == "log"
    assert "best 40.00" in score.get_title()
    assert any(each.get_linestyle() == ":" and each.get_xdata()[0] == 1 for each in score.get_lines()), "resumed"


def test_losses_that_are_negative_or_not_finite(figures: list[Figure], tmp_path: Path) -> None:
    write_records(tmp_path, 3, main_ce=float("nan"), response=-1.0, loss=float("inf"), lr=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_run.draw_log(tmp_path)
    losses, norm = figures[0].axes[0], next(axes for axes in figures[0].axes if "norm" in axes.get_title())
    assert (losses.get_yscale(), norm.get_yscale()) == ("linear", "log")


def test_many_records_become_means() -> None:
    values = np.repeat(np.arange(300.0), 5)
    values[::5] = np.nan
    values[:5] = np.nan
    smoothed = curves.smooth(curves.Line(np.arange(1500.0), values))
    assert len(smoothed.values) == 300
    assert np.isnan(smoothed.values[0])
    assert smoothed.values[1:].tolist() == list(range(1, 300))
    assert smoothed.steps[0] == 2.0


def test_best_evaluation() -> None:
    def scored(*mious: float | None) -> list[dict[str, Any]]:
        return [{"step": step, "mIoU": miou} for step, miou in enumerate(mious)]

    assert curves.best_of(scored(1.0, 5.0, None, 5.0)) == (1, 5.0)
    assert curves.best_of(scored(None, float("nan"))) is None
    assert curves.best_of([]) is None


def test_metrics_beyond_the_state_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, 0)
    for record in ({"step": 2, "loss": 1}, {"step": 2, "mIoU": 3}, {"step": 4, "loss": 1}, {"step": 4, "mIoU": 3}):
        log.write(record)
    with path.open("ab") as file:
        file.write(b'[1]\n{"loss": 1}\n\xff\xfe\n{"step": 6, "loss": 1}\n{"step"')
    assert [record["step"] for record in read_metrics(path)] == [2, 2, 4, 4, 6]
    MetricsLog(path, 4, 2)
    assert path.read_text() == '{"step": 2, "loss": 1}\n{"step": 2, "mIoU": 3}\n{"step": 4, "loss": 1}\n'


# ---- panels ------------------------------------------------------------------------------------------------------


def test_what_adaptation_changed() -> None:
    #          ignored, kept right, righted, worsened, wrong both times, kept wrong
    labels = np.array([[255, 1, 1, 1, 1, 1]], np.uint8)
    coarse = np.array([[0, 1, 0, 1, 2, 0]], np.uint8)
    final = np.array([[1, 1, 1, 0, 0, 0]], np.uint8)
    panel = panels.changes(np.zeros((1, 6, 3), np.uint8), labels, coarse, final)
    ground = [100, 100, 100]
    expected = [ground, ground, *(list(colour[::-1]) for colour in (RIGHTED, WORSENED, STILL_WRONG)), ground]
    assert panel.image[0].tolist() == expected
    assert panel.caption == "changed: 20.0 % now right, 20.0 % now wrong"


def test_class_colours_and_hatched_gaps() -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 32:] = 255
    picture = panels.coloured(np.full((64, 64, 3), 80, np.uint8), labels, [(200, 100, 0)])
    # Three quarters colour, one quarter grey; colours are RGB, pictures BGR.
    assert abs(picture[0, 0].astype(int) - [20, 95, 170]).max() <= 1
    assert (picture[:, 32:] == 0).all(axis=2).mean() == 0.25
    assert (picture[:, 32:] == 80).all(axis=2).mean() == 0.75


def test_legend_has_what_is_seen() -> None:
    maps = [np.array([[2, 2, 0]], np.uint8), np.array([[255]], np.uint8)]
    palette = [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    legend = panels.legend_of(maps, ["sky", "road", "boat"], palette)
    assert legend == [("boat", (3, 3, 3)), ("sky", (1, 1, 1)), ("hatched: not labelled", ())]
    crowd = panels.legend_of(
        [np.arange(171, dtype=np.uint8)], [str(k) for k in range(171)], [(k, k, k) for k in range(171)]
    )
    assert len(crowd) == panels.MOST_NAMES + 1
    assert crowd[-1] == (f"and {171 - panels.MOST_NAMES} more", ())


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3), (40, 40)])
def test_panels_of_any_shape(size: tuple[int, int]) -> None:
    odd = Panel("a/very/long/path/" * 9 + "\u6d77", np.zeros((*size, 3), np.uint8))
    plain = Panel("", np.zeros((32, 64, 3), np.uint8))
    legend = [("a class with a name that does not end at all", (1, 2, 3)), ("\u6d77", ())]
    picture = panels.grid([[odd, plain], [plain]], legend)
    assert picture.shape[1] == 2 * (WIDTH + 4)
    assert picture.shape[0] <= 2 * (panels.TALLEST + LINE + 4) + 2 * LINE + 8
    assert panels.encode(picture, ".jpg")[:2] == b"\xff\xd8"
