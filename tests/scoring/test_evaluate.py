"""Evaluation: the protocol's pixels against a plain formulation, and the command on a tiny checkpoint."""

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation import report as evaluate
from ssaseg.cli.evaluation.tables import print_any
from ssaseg.cli.main import cli
from ssaseg.cli.profiling.memory import LiveTensors
from ssaseg.cli.scoring.evaluate import evaluate_model
from ssaseg.cli.scoring.inference import Inference, predict_labels
from ssaseg.cli.scoring.metrics import BLOCK
from ssaseg.models import Segmenter, build_model, labelling, save_model
from ssaseg.models.labelling import label_map

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def run_eval(
    file: Path, data: str | None, root: Path | None, split: str, json_out: str | None, device: str, **more: Any
) -> int:
    return evaluate.run_eval([file], evaluate.Request(data, root, split, **more), json_out, device)


class Pairs:
    """Random images and labels of odd sizes."""

    def __init__(self, classes: int = 5, sizes: tuple = ((37, 50), (64, 45), (33, 71))) -> None:
        rng = np.random.default_rng(0)
        self.classes = tuple("abcdefgh"[:classes])
        self.palette = tuple((40 * i, 255 - 40 * i, 7 * i) for i in range(classes))
        self.images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        self.labels = [rng.integers(0, classes, size, dtype=np.uint8) for size in sizes]
        for label in self.labels:
            label[rng.random(label.shape) < 0.1] = 255

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image{index}"

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.images[index], self.labels[index]


@pytest.fixture(scope="module", params=["ssa", "linear"])
def model(request: Any) -> Segmenter:
    torch.manual_seed(0)
    return build_model("seaformer_t", 5, request.param).eval()


def plain_logits(model: Segmenter, image: np.ndarray, scale: tuple | None, multiple: int | None) -> torch.Tensor:
    """The protocol as mmsegmentation words it: whole image, logits to the input's size, then to the image's."""
    height, width = image.shape[:2]
    resized = image
    if scale is not None:
        factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
        resized = cv2.resize(resized, (int(width * factor + 0.5), int(height * factor + 0.5)))
    if multiple is not None:
        sides = [int(np.ceil(side / multiple)) * multiple for side in resized.shape[:2]]
        resized = cv2.resize(resized, (sides[1], sides[0]))
    rgb = cv2.cvtColor(resized, cv2.COLOR_BGR2RGB).astype(np.float32)
    pixels = (torch.from_numpy(rgb) - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        logits = model(pixels.permute(2, 0, 1)[None])
    logits = F.interpolate(logits, resized.shape[:2], mode="bilinear", align_corners=False)
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)


@pytest.mark.parametrize(("scale", "multiple"), [(None, None), ((96, 48), None), ((120, 60), 32), (None, 32)])
def test_labels_follow_the_protocol(model: Segmenter, scale: tuple | None, multiple: int | None) -> None:
    dataset, protocol = Pairs(), {"scale": scale, "multiple": multiple}
    expected = np.zeros((5, 5), np.int64)
    for index in range(len(dataset)):
        image, label = dataset.load(index)
        logits = plain_logits(model, image, scale, multiple)
        labels = logits.argmax(dim=1)[0].numpy()
        result = predict_labels(model, image, protocol, MEAN, STD, CPU, probabilities=True)
        np.testing.assert_array_equal(result.labels, labels)
        assert result.labels.dtype == np.uint8
        np.testing.assert_allclose(result.probabilities, logits.softmax(dim=1)[0].numpy(), atol=5e-4)
        np.add.at(expected, (label[label != 255], labels[label != 255]), 1)
    confusion = evaluate_model(model, dataset, protocol, MEAN, STD, CPU)
    np.testing.assert_array_equal(confusion.matrix, expected)


def test_coarse_labels_come_from_before_the_adaptation(model: Segmenter) -> None:
    image = Pairs().images[0]
    result = predict_labels(model, image, {"scale": None, "multiple": None}, MEAN, STD, CPU)
    if model.classifier_name == "linear":
        assert result.coarse is None
        return
    with torch.no_grad():
        rgb = torch.from_numpy(image[..., ::-1].copy()).float()
        pixels = ((rgb - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
        coarse = model.classifier.conv_seg(model.decoder(model.backbone(pixels)))
    expected = F.interpolate(coarse, image.shape[:2], mode="bilinear", align_corners=False).argmax(dim=1)[0]
    np.testing.assert_array_equal(result.coarse, expected)
    assert (result.coarse != result.labels).any()


@pytest.mark.parametrize("elements", [1, 3 * 40 * 30, 2**30])
def test_the_running_maximum_is_the_arg_max(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(labelling, "CPU_ELEMENTS", elements)
    logits = torch.randn(1, 11, 5, 4, generator=torch.Generator().manual_seed(0))
    middle = F.interpolate(logits, (40, 30), mode="bilinear", align_corners=False)
    for size in ((40, 30), (23, 57)):
        expected = F.interpolate(middle, size, mode="bilinear", align_corners=False).numpy().argmax(axis=1)[0]
        np.testing.assert_array_equal(label_map(logits, (40, 30), size), expected)


def test_of_equal_logits_the_lower_class_wins() -> None:
    logits = torch.zeros(1, 7, 4, 4)
    logits[:, 3:5] = 1
    assert (label_map(logits, (4, 4), (4, 4)) == 3).all()


def test_full_size_logits_of_all_classes_never_exist() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        label_map(torch.randn(1, 20, 40, 40), (320, 320), (700, 800))
    assert largest == 700 * 800


def test_limit_progress_workers_and_mode() -> None:
    model, dataset, protocol = build_model("seaformer_t", 5, "ssa"), Pairs(), {"scale": None, "multiple": None}
    assert model.training
    calls: list[int] = []
    first = evaluate_model(model, dataset, protocol, MEAN, STD, CPU, limit=2, progress=calls.append)
    assert model.training
    assert calls == [1, 1]
    assert first.matrix.sum() == sum(int((label != 255).sum()) for label in dataset.labels[:2])
    threaded = evaluate_model(model, dataset, protocol, MEAN, STD, CPU, limit=2, workers=1)
    np.testing.assert_array_equal(threaded.matrix, first.matrix)


def test_memory_grows_by_the_counts_of_an_image_alone() -> None:
    """Tensors alive between two images: a block of counts more for every 64 images, and nothing else."""
    torch.manual_seed(0)  # what is predicted decides which tensors there are: with one start in twenty, 24 bytes stay
    model = build_model("seaformer_t", 5, "linear")
    dataset = Pairs(sizes=((32, 40),) * (2 * BLOCK + 1))
    held = [*model.parameters(), *model.buffers()]
    alive: list[int] = []
    with LiveTensors(held) as live:
        confusion = evaluate_model(
            model, dataset, {"scale": None, "multiple": None}, MEAN, STD, CPU, progress=lambda _: alive.append(live.now)
        )
    assert confusion.matrix.sum() > 0
    assert len(alive) == 2 * BLOCK + 1
    steps = [after - before for before, after in itertools.pairwise(alive)]
    # `LiveTensors` sometimes misses the end of one storage of three numbers, so that much may remain in all.
    small = [step for step in steps if abs(step) <= 64]
    assert 0 <= sum(small) <= 64
    assert {index + 1: step for index, step in enumerate(steps) if abs(step) > 64} == {
        BLOCK: BLOCK * 8 * 5,
        2 * BLOCK: BLOCK * 8 * 5,
    }


RECIPE = {
    "model": {"name": "seaformer_t"},
    "data": {"dataset": "synthetic", "synthetic": {"height": 64, "width": 96, "train": 2, "val": 3, "seed": 0}},
    "augment": {"scale": [96, 64], "crop": [64, 64]},
    "test": {"scale": None, "multiple": 32},
    "optim": {"lr": 0.001},
    "train": {"steps": 1},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors")


def write_checkpoint(path: Path, **changes: Any) -> Path:
    from ssaseg.datasets.synthetic import CLASSES, PALETTE

    torch.manual_seed(0)
    metadata = {
        "classes": list(CLASSES),
        "palette": [list(colour) for colour in PALETTE],
        "protocol": RECIPE["test"],
        "recipe": RECIPE,
        "step": 7,
        **changes,
    }
    model = build_model("seaformer_t", len(metadata["classes"]))
    with torch.no_grad():  # otherwise all pixels are one class
        model.classifier.conv_seg.weight.normal_()
        noise = model.eval().feature(torch.randn(1, 3, 64, 96))
        model.classifier.conv_seg.bias.copy_(-model.classifier.conv_seg(noise).mean(dim=(0, 2, 3)))
    save_model(path, model, metadata)
    return path


def test_command_prints_a_table_and_the_protocol(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_eval(checkpoint, None, None, "val", None, "cpu") == 0
    out = capsys.readouterr().out
    assert "step 7" in out
    for said in ("mIoU", "aAcc", "mAcc", "images/s", "val split, 3 images", "multiples of 32", "two bilinear steps"):
        assert said in out, said
    assert "nan" not in out.lower().replace("nant", "")
    table = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "sky" in table


def test_json_on_stdout_is_pure_and_complete(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_eval(checkpoint, None, None, "val", "-", "cpu", limit=2) == 0
    report = json.loads(capsys.readouterr().out)
    confusion = np.array(report["confusion"])
    assert confusion.shape == (13, 13)
    assert report["checkpoint"] == str(checkpoint)
    assert (report["step"], report["images"], report["of_images"]) == (7, 2, 3)
    whole = {"mode": "whole", "crop": None, "stride": None, "ratios": [1.0], "flip": False}
    assert report["protocol"] == {"scale": None, "multiple": 32, **whole}
    assert "the first 2 of 3 images" in report["statement"]
    hits = np.diagonal(confusion)
    assert report["aAcc"] == pytest.approx(100 * hits.sum() / confusion.sum())
    sky = report["classes"][0]
    assert sky["name"] == "sky"
    assert sky["IoU"] == pytest.approx(100 * hits[0] / (confusion[0].sum() + confusion[:, 0].sum() - hits[0]))
    assert sky["pixels"] == confusion[0].sum()
    assert 0 < report["majority_miou"] < 20
    interval = report["mIoU_interval"]
    assert interval["low"] <= report["mIoU"] <= interval["high"]
    assert (interval["level"], interval["resamples"]) == (95, 1000)
    shares = np.array([row["pixel_share"] for row in report["classes"]]) / 100
    ious = np.array([row["IoU"] or 0 for row in report["classes"]])
    assert report["fwIoU"] == pytest.approx(shares @ ious)
    assert "mBoundaryIoU" not in report


def test_options_change_the_protocol_and_the_report_says_so(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(*options: str) -> dict[str, Any]:
        result = CliRunner().invoke(cli, ["eval", str(checkpoint), "--device", "cpu", "--json", "-", *options])
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    plain = report()
    several = report("--ratios", "0.75,1", "--flip", "--boundary")
    assert (several["protocol"]["ratios"], several["protocol"]["flip"]) == ([0.75, 1.0], True)
    assert "scales 0.75, 1, with horizontal flip, mean of probabilities" in several["statement"]
    assert "within 2 % of the image's diagonal" in several["statement"]
    assert "boundary" not in plain["statement"]
    assert several["mIoU"] != plain["mIoU"]
    per_class = [row["BoundaryIoU"] for row in several["classes"] if row["BoundaryIoU"] is not None]
    assert several["mBoundaryIoU"] == pytest.approx(np.mean(per_class))
    slid = report("--slide", "48", "32", "--limit", "1")
    assert (slid["protocol"]["mode"], slid["protocol"]["crop"], slid["protocol"]["stride"]) == (
        "slide",
        [48] * 2,
        [32] * 2,
    )
    assert "sliding windows of 48x48 every 32x32 pixels" in slid["statement"]
    capsys.readouterr()
    print_any(several)
    told = capsys.readouterr().out
    for said in ("mIoU 95 % interval", "1000 resamples", "fwIoU", "mBoundaryIoU", "boundary [%]"):
        assert said in told, said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slide", "16", "8"], "protocol: test.crop[0]: expected 32 or more, got 16"),
        (["--slide", "64", "80"], "protocol: test.stride: expected at most test.crop, [64, 64], got [80, 80]"),
        (["--slide", "64", "32", "--whole"], "give either --slide or --whole"),
        (["--ratios", "0.5;1"], "'0.5;1' is not a list of numbers such as 0.5,1,1.5"),
        (["--ratios", "0"], "protocol: test.ratios[0]: expected 0.01 or more"),
    ],
)
def test_options_that_are_no_protocol(checkpoint: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["eval", str(checkpoint), "--device", "cpu", *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_image_too_small_for_the_network_is_named(checkpoint: Path) -> None:
    from ssaseg.datasets import DataError

    changes = {"multiple": None, "ratios": [0.25]}
    with pytest.raises(DataError, match=r"too small: got 24x16 pixels as the network's input, expected 32x32"):
        run_eval(checkpoint, None, None, "val", None, "cpu", changes=changes)


def test_a_sliding_checkpoint_is_evaluated_so_and_whole_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = {"mode": "slide", "crop": [48, 64], "stride": [16, 32], "flip": True}
    path = write_checkpoint(tmp_path / "slide.safetensors", protocol=test)
    assert run_eval(path, None, None, "val", "-", "cpu", limit=1) == 0
    slid = json.loads(capsys.readouterr().out)
    assert "sliding windows of 48x64 every 16x32 pixels" in slid["statement"]
    changes = {"mode": "whole", "crop": None, "stride": None, "flip": False}
    assert run_eval(path, None, None, "val", "-", "cpu", limit=1, changes=changes) == 0
    whole = json.loads(capsys.readouterr().out)
    assert "whole image, single scale, no flip" in whole["statement"]
    assert whole["confusion"] != slid["confusion"]


def test_json_to_a_file(checkpoint: Path, tmp_path: Path) -> None:
    destination = tmp_path / "scores.json"
    assert run_eval(checkpoint, None, None, "train", str(destination), "cpu", limit=1) == 0
    assert json.loads(destination.read_text())["split"] == "train"
    with pytest.raises(CommandError, match="no such folder"):
        run_eval(checkpoint, None, None, "val", str(tmp_path / "missing" / "scores.json"), "cpu")


def test_a_signal_stops_between_two_images(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Inference.maps

    def maps(*given: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*given, **options)

    monkeypatch.setattr(Inference, "maps", maps)
    with pytest.raises(SystemExit) as caught:
        run_eval(checkpoint, None, None, "val", None, "cpu")
    assert caught.value.code == 143
    assert capsys.readouterr() == ("", "stopped after 1 of 3 images\n")


def test_built_in_scenes_have_no_root(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="built-in scenes, not files"):
        run_eval(checkpoint, None, tmp_path, "val", None, "cpu")


def test_a_split_without_a_labelled_pixel(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = evaluate.build_dataset

    def all_ignored(*given: Any, **options: Any) -> Any:
        dataset = real(*given, **options)
        load = dataset.load
        monkeypatch.setattr(dataset, "load", lambda index: (load(index)[0], np.full_like(load(index)[1], 255)))
        return dataset

    monkeypatch.setattr(evaluate, "build_dataset", all_ignored)
    with pytest.raises(CommandError, match=r"(?s)no labelled pixel in the val split of recipe .* data.ignore_index"):
        run_eval(checkpoint, None, None, "val", None, "cpu")


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    from ssaseg.datasets.synthetic import CLASSES

    swapped = list(CLASSES)
    swapped[2], swapped[3] = swapped[3], swapped[2]
    path = write_checkpoint(tmp_path / "swapped.safetensors", classes=swapped)
    with pytest.raises(CommandError, match=r"class 2 is 'water'.*'grass'"):
        run_eval(path, None, None, "val", None, "cpu")
    path = write_checkpoint(tmp_path / "fewer.safetensors", classes=list(CLASSES[:5]), palette=None)
    with pytest.raises(CommandError, match=r"5 classes; recipe .*: 13 classes"):
        run_eval(path, None, None, "val", None, "cpu")


def test_a_checkpoint_without_recipe_needs_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    path = write_checkpoint(tmp_path / "bare.safetensors", recipe=None, step=0)
    with pytest.raises(CommandError, match="give --data RECIPE"):
        run_eval(path, None, None, "val", None, "cpu")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "test": {"scale": [128, 64]}}))
    assert run_eval(path, str(recipe), None, "val", "-", "cpu", limit=1) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["recipe"], report["protocol"]["scale"]) == ("mine", [128, 64])
    assert report["step"] is None
    print_any(report)
    assert ", step" not in capsys.readouterr().out


def test_absent_classes_are_marked_not_nan(capsys: pytest.CaptureFixture[str]) -> None:
    from ssaseg.cli.scoring.metrics import Confusion

    confusion = Confusion(3)
    confusion.update(np.array([[0, 1]]), np.array([[0, 0]]))
    figures = evaluate._figures(confusion, ("a", "b", "c"))
    assert [row["remark"] for row in figures["classes"]] == ["", "predicted but absent", "no ground truth"]
    assert [row["IoU"] for row in figures["classes"]] == [50, 0, None]
    assert json.dumps(figures, allow_nan=False)
