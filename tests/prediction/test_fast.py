"""What makes `predict` fast: precision, batches of equal sizes, and where the time goes."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from calling import call
from predicting import files, picture, save_checkpoint, write
from torch import Tensor

from ssaseg.cli.engine import opening
from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction import batches, labelling, predict, preparing
from ssaseg.cli.prediction.batches import count_batch, gathered
from ssaseg.cli.prediction.precision import choose
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.cli.scoring.inference import Inference
from ssaseg.cli.scoring.timings import STAGES, Timings
from ssaseg.datasets.decoding import read_mask
from ssaseg.models import load_model
from ssaseg.recipes import parse_protocol

CPU = torch.device("cpu")


# ---- precision ---------------------------------------------------------------------------------------------------


class Sleeper:
    """An engine that takes this many seconds, and labels `wrong` of 1000 pixels otherwise."""

    now = 0.0

    def __init__(self, seconds: float, wrong: int = 0) -> None:
        self.seconds, self.wrong = seconds, wrong

    def label(self, image: int) -> np.ndarray:
        Sleeper.now += self.seconds
        if self.wrong < 0:
            raise FloatingPointError("NaN")
        labels = np.full((10, 100), image, np.uint8)
        labels.flat[: self.wrong] += 1
        return labels


@pytest.mark.parametrize(
    ("seconds", "wrong", "taken", "said"),
    [
        (0.001, 5, True, "precision: bf16, .* times as fast, 99.50 % of labels as in float32, on the first 4 images"),
        (0.001, 6, False, "precision: float32, as bf16 is not enough better: .*, 99.40 % of labels"),
        (0.02, 0, False, "precision: float32, as bf16 is not enough better: .*, 100.00 % of labels"),
        (0.001, -1, False, "precision: float32; in bf16 the network's output is not finite"),
    ],
)
def test_bf16_is_taken_where_it_is_faster_and_nearly_equal(
    monkeypatch: pytest.MonkeyPatch, seconds: float, wrong: int, taken: bool, said: str
) -> None:
    monkeypatch.setattr("ssaseg.cli.prediction.precision.time", SimpleNamespace(perf_counter=lambda: Sleeper.now))
    slow: Any = Sleeper(0.02)
    other: Any = Sleeper(seconds, wrong)
    engine, line = choose(slow, lambda name: other, range(4), lambda engine, image: engine.label(image))  # type: ignore[attr-defined]
    assert (engine is other) == taken
    assert re.fullmatch(said + ".*", line), line


def test_nothing_is_tried_where_the_device_cannot() -> None:
    def make(name: str) -> Any:
        raise CommandError("no such units")

    def images() -> Any:
        raise AssertionError("read, but not needed")
        yield

    slow: Any = Sleeper(0)
    assert choose(slow, make, images(), lambda engine, image: image) == (slow, "")


def test_auto_tries_bf16_on_the_first_images_of_a_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that seems to compute in it, and a threshold that any speed meets."""
    checkpoint = save_checkpoint(tmp_path / "a.safetensors")
    for index in range(3):
        write(tmp_path / f"in/{index}.png", picture(seed=index))
    (tmp_path / "in/0.png").write_bytes(b"no image")
    monkeypatch.setattr(opening, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(labelling, "FEWEST", 3)
    monkeypatch.setattr("ssaseg.cli.prediction.precision.FASTER", 0.0)
    monkeypatch.setattr("ssaseg.cli.prediction.precision.ENOUGH", 0.5)
    used, real = [], TorchEngine.logits

    def logits(self: TorchEngine, pixels: Tensor, coarse: bool = False) -> Any:
        used.append(self.dtype)
        return real(self, pixels, coarse)

    monkeypatch.setattr(TorchEngine, "logits", logits)
    result = call("predict", checkpoint, tmp_path / "in", "--out", tmp_path / "out")
    assert re.search(
        r"precision: bf16, [\d.]+ times as fast, [\d.]+ % of labels as in float32, on the first 2 im", result.stderr
    )
    assert used == 3 * [torch.float32] + 3 * [torch.bfloat16] + 2 * [torch.bfloat16]
    used.clear()
    call("predict", checkpoint, tmp_path / "in", "--out", tmp_path / "out", "--exact")
    assert used == 2 * [torch.float32]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--precision", "bf16"), "--precision bf16: this device"),
        (("--precision", "fp16"), "--precision fp16: this device"),
        (("--precision", "bf16", "--exact"), "--precision bf16: --exact and mask methods compute in float32"),
    ],
)
def test_a_precision_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(opening, "has_bfloat16", lambda device: False)
    checkpoint = save_checkpoint(tmp_path / "a.safetensors")
    image = write(tmp_path / "a.png")
    result = call("predict", checkpoint, image, "--out", tmp_path / "out", *words, "--device", "cpu")
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert not (tmp_path / "out").exists()


# ---- batches -----------------------------------------------------------------------------------------------------


def test_images_that_follow_one_another_with_one_size_are_a_batch() -> None:
    items = [(key, index) for index, key in enumerate(["a", "a", "a", "b", None, None, "b", "a", "a"])]
    assert [*gathered(items, 2)] == [[0, 1], [2], [3], [4], [5], [6], [7, 8]]
    assert [*gathered(items, 1)] == [[index] for index in range(9)]
    assert [*gathered([], 3)] == []


def test_a_batch_is_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 << 30, 0))
    assert count_batch(gpu, 480 * 360) == batches.MOST
    assert count_batch(gpu, 1024 * 2048) == 2
    assert count_batch(gpu, 10**9) == count_batch(CPU, 480 * 360) == 1


def test_a_batch_gives_the_labels_of_its_images_one_by_one(tmp_path: Path) -> None:
    model, metadata = load_model(save_checkpoint(tmp_path / "a.safetensors"))
    protocols: list[dict[str, Any]] = [
        {"scale": None, "multiple": None},
        {"scale": None, "multiple": None, "mode": "slide", "crop": [32, 32], "stride": [24, 24]},
        {"scale": None, "multiple": None, "ratios": [1.0, 1.5], "flip": True},
    ]
    images = [picture(40, 56, seed) for seed in range(3)]
    for protocol in protocols:
        inference = Inference(
            TorchEngine(model.eval(), CPU), parse_protocol(protocol, "test"), metadata["mean"], metadata["std"]
        )
        inputs = [[torch.from_numpy(each) for each in inference.inputs(image, "a")] for image in images]
        sizes, names = [(40, 56)] * 3, ["a", "b", "c"]
        together = inference.predict_batch(inputs, sizes, names, probabilities=True)
        for one, given in zip(together, inputs, strict=True):
            alone = inference.predict(given, (40, 56), probabilities=True)
            assert (one.labels == alone.labels).mean() > 0.99
            assert one.coarse is not None
            assert (one.coarse == alone.coarse).mean() > 0.99
            np.testing.assert_allclose(one.probabilities, alone.probabilities, atol=2e-3)


def test_batches_of_a_run_are_as_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of two sizes with a damaged one between them, and one whose batch finds no memory."""
    checkpoint = save_checkpoint(tmp_path / "a.safetensors")
    for index in range(8):
        write(tmp_path / f"in/{index}.png", picture(40 + 8 * (index // 6), 56, index))
    (tmp_path / "in/2.png").write_bytes(b"no image")
    words = ("predict", checkpoint, tmp_path / "in", "--out")
    call(*words, tmp_path / "alone", "--exact")
    monkeypatch.setattr(labelling.Labeller, "plan", lambda self, sources: (1, 3))
    sizes, real = [], Inference.predict_batch

    def predict_batch(self: Inference, inputs: Any, *given: Any) -> Any:
        sizes.append(len(inputs))
        if len(inputs) == 2 and sizes.count(2) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, inputs, *given)

    monkeypatch.setattr(Inference, "predict_batch", predict_batch)
    result = call(*words, tmp_path / "together")
    assert result.exit_code == 1
    assert "labelled 7 of 8 images" in result.stdout
    assert sizes == [2, 1, 1, 3, 2], "0 and 1 in one pass, then alone; 3, 4, 5; 6, 7"
    names = files(tmp_path / "alone")
    assert files(tmp_path / "together") == names
    for name in names:
        one, other = (read_mask(tmp_path / out / name).ids for out in ("alone", "together"))
        assert (one == other).mean() > 0.99


# ---- timings -----------------------------------------------------------------------------------------------------


def test_timings_say_where_the_time_went(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "a.safetensors")
    image = write(tmp_path / "a.png")
    words = ("predict", checkpoint, image, "--out", tmp_path / "out")
    printed = call(*words, "--timings").stdout
    rows = dict(re.findall(r"^ *(\w+) {2,}.*? ([\d.]+) *$", printed, re.MULTILINE))
    assert [*rows] == [*STAGES, "waiting"]
    assert sum(map(float, rows.values())) == pytest.approx(100, abs=0.5)
    assert float(rows["network"]) > 0
    assert "bound by: " in printed
    assert "bound by" not in call(*words).stdout


def test_a_stage_inside_another_is_not_counted_twice() -> None:
    times = Timings(CPU, on=True)
    with times.stage("reading"):
        work(0.02)
        with times.stage("encoding"):
            work(0.04)
        with times.stage("writing"):
            work(0.03)
    assert times.seconds["reading"] == pytest.approx(0.02, abs=0.01)
    assert times.seconds["encoding"] == pytest.approx(0.04, abs=0.01)
    assert times.seconds["writing"] == pytest.approx(0.03, abs=0.01)


def work(seconds: float) -> None:
    """Uses the processor for this long."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


# ---- options that change the labels -----------------------------------------------------------------------------


def test_windows_in_place_of_the_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels are those of a checkpoint with these windows; results without windows do not count as done."""
    inside = {"scale": None, "multiple": None, "mode": "slide", "crop": [32, 32], "stride": [24, 24]}
    plain = save_checkpoint(tmp_path / "plain.safetensors")
    windows = save_checkpoint(tmp_path / "windows.safetensors", protocol=inside)
    write(tmp_path / "in/a.png")
    said = []
    monkeypatch.setattr(preparing, "warn_of_attention", lambda name, inference, files, fix: said.append((name, files)))
    words = ("predict", plain, tmp_path / "in", "--skip-existing", "--out", tmp_path / "out")
    call(*words)
    whole = read_mask(tmp_path / "out/index/a.png").ids
    result = call(*words, "--slide", "32", "24")
    assert "labelled 1 of 1 images" in result.stdout
    assert "sliding windows of 32x32 every 24x24 pixels" in result.stdout
    assert "labelled 0 of 1 images" in call(*words, "--slide", "32", "24").stdout
    call("predict", windows, tmp_path / "in", "--out", tmp_path / "other")
    found, expected = (read_mask(tmp_path / out / "index/a.png").ids for out in ("out", "other"))
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, whole)
    assert said[0] == ("seaformer_t", [tmp_path / "in/a.png"])
    assert "test.stride" in call(*words, "--slide", "32", "64").stderr


def test_coarse_labels_need_pytorch(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "a.safetensors")
    image = write(tmp_path / "a.png")
    words = ("predict", checkpoint, image, "--out", tmp_path / "out", "--save", "coarse", "--backend", "onnxruntime")
    result = call(*words)
    assert result.exit_code == 2
    assert "only checkpoints in PyTorch give labels from before SSA adapts them" in result.stderr


def test_a_checkpoint_in_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes and stages are those of any engine. The export is replaced by PyTorch: other tests make one."""
    checkpoint = save_checkpoint(tmp_path / "a.safetensors")
    for index in range(4):
        write(tmp_path / f"in/{index}.png", picture(seed=index))
    asked, real = [], predict.make_engine

    def make_engine(opened: Any, device: Any, precision: str, **given: Any) -> Any:
        asked.append((precision, given["backend"], given["pixels"]))
        return real(opened, device, precision, backend="torch")

    monkeypatch.setattr(predict, "make_engine", make_engine)
    monkeypatch.setattr(labelling, "count_lanes", lambda images, pixels: 2)
    words = ("predict", checkpoint, tmp_path / "in", "--out", tmp_path / "out")
    assert "computed by torch, folded, float32" in call(*words, "--backend", "onnxruntime").stdout
    assert asked == [("float32", "onnxruntime", 4 * 40 * 56)]
    assert len(files(tmp_path / "out")) == 4
