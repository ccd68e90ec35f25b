"""Confidence and its calibration: of the logits that decide the labels, against torchmetrics and the plain formula."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import call
from parts import Unchanged
from PIL import Image
from predicting import save_checkpoint, write
from torch import nn
from torch.nn import functional as F

from ssaseg.cli.scoring.calibration import BINS, Calibration
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.cli.scoring.inference import Inference
from ssaseg.models import Segmenter, labelling
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.labelling import confidence_map, label_map
from ssaseg.recipes import parse_protocol

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
# MulticlassCalibrationError(num_classes=4, n_bins=15, norm="l1", ignore_index=255) of torchmetrics 1.9.0, on `case`.
TORCHMETRICS = 0.11705779284238815


def case() -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (3,4,40,50) and labels (3,40,50) of three images; a tenth is ignored."""
    rng = np.random.default_rng(0)
    logits = 4 * rng.random((3, 4, 40, 50))
    label = rng.integers(0, 4, (3, 40, 50)).astype(np.uint8)
    label = np.where(rng.random(label.shape) < 0.3, logits.argmax(axis=1), label).astype(np.uint8)
    label[rng.random(label.shape) < 0.1] = 255
    return torch.from_numpy(logits).float().softmax(dim=1), torch.from_numpy(label)


def test_the_error_is_that_of_torchmetrics() -> None:
    calibration = Calibration(4)
    for shares, label in zip(*case(), strict=True):
        confidence, labels = shares.max(dim=0)
        calibration.counts += calibration.count(labels.byte(), confidence, label)
    found = calibration.figures(["a", "b", "c", "d"])
    assert found["ECE"] == pytest.approx(100 * TORCHMETRICS, abs=2e-5)
    shares, label = case()
    known = label != 255
    confidence, labels = (each[known] for each in shares.max(dim=1))
    right = (labels == label[known]).double()
    assert found["pixels"] == known.sum()
    assert found["accuracy"] == pytest.approx(100 * right.mean())
    assert found["confidence"] == pytest.approx(100 * confidence.double().mean())
    assert len(found["bins"]) == BINS
    inside = (confidence > 8 / 15) & (confidence <= 9 / 15)
    assert (found["bins"][8]["from"], found["bins"][8]["to"]) == pytest.approx((160 / 3, 60))
    assert found["bins"][8]["pixels"] == inside.sum() > 0
    assert found["bins"][8]["accuracy"] == pytest.approx(100 * right[inside].mean())
    of_b = labels == 1
    assert found["classes"][1]["pixels"] == of_b.sum()
    assert found["classes"][1]["confidence"] == pytest.approx(100 * confidence[of_b].double().mean())


def test_the_ends_of_bins_and_nothing_at_all() -> None:
    """A bin has its upper end: with certainty, pixels are in the last bin, not in one of their own."""
    calibration = Calibration(2)
    assert calibration.figures("ab")["ECE"] is None
    confidence = torch.tensor([[1.0, 0.97, 5 / 15, 0.5]])
    labels, label = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 255]], dtype=torch.uint8)
    calibration.counts += calibration.count(labels, confidence, label)
    found = calibration.figures("ab")
    assert {place: each["pixels"] for place, each in enumerate(found["bins"]) if each["pixels"]} == {4: 1, 14: 2}
    assert found["ECE"] == pytest.approx(100 * (abs(1 - 1.97) + abs(1 - 1 / 3)) / 3)
    assert found["classes"][1] == pytest.approx(
        {"name": "b", "ECE": 200 / 3, "pixels": 1, "confidence": 100 / 3, "accuracy": 100}, abs=1e-5
    )


@pytest.mark.parametrize("elements", [1, 3 * 40 * 30, 2**30])
def test_confidence_is_the_softmax_at_full_size(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(labelling, "CPU_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    logits = 9 * torch.randn(1, 11, 5, 4, generator=generator) - 200  # far below 0, where exp() is 0
    given = logits.clone()
    for middle, size in (((40, 30), (23, 57)), ((5, 4), (5, 4))):
        maps = F.interpolate(F.interpolate(logits, middle, mode="bilinear"), size, mode="bilinear")[0]
        found = confidence_map(logits, middle, size)
        torch.testing.assert_close(found, maps.softmax(dim=0).amax(dim=0), rtol=1e-4, atol=1e-6)
        assert found.max() <= 1
        torch.testing.assert_close(
            found, maps.softmax(dim=0).gather(0, label_map(logits, middle, size)[None].long())[0], rtol=1e-4, atol=1e-6
        )
        scores = maps - maps.amin()
        positive = confidence_map(logits - maps.amin(), middle, size, scores=True)
        torch.testing.assert_close(positive, scores.amax(dim=0) / scores.sum(dim=0), rtol=1e-4, atol=1e-6)
    assert torch.equal(logits, given)


@pytest.mark.parametrize(
    "protocol", [{}, {"ratios": [1.0, 1.5], "flip": True}, {"mode": "slide", "crop": [32, 32], "stride": [16, 16]}]
)
def test_confidence_is_of_what_decides_the_labels(protocol: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = Segmenter(nn.Conv2d(3, 6, 4, stride=4), Unchanged(6, stride=4), LinearClassifier(6, 5, 0.0)).eval()
    nn.init.normal_(network.classifier.conv_seg.weight, 0.0, 2.0)
    inference = Inference(TorchEngine(network, CPU), parse_protocol(protocol, ""), (120.0,) * 3, (60.0,) * 3)
    image = np.random.default_rng(0).integers(0, 256, (40, 52, 3), np.uint8)
    inputs = [torch.from_numpy(each) for each in inference.inputs(image, "image")]
    (found,) = inference.maps([inputs], [(40, 52)], ["image"], probabilities=True, confidence=True)
    torch.testing.assert_close(found.confidence, found.probabilities.amax(dim=0), rtol=0, atol=1e-6)
    assert torch.equal(found.labels, inference.labels(inputs, (40, 52)))
    assert found.labels.unique().numel() > 1
    assert found.coarse is None
    assert inference.maps([inputs], [(40, 52)], ["image"])[0].confidence is None


def test_predict_saves_it_as_grey_of_eight_bits(tmp_path: Path) -> None:
    checkpoint, image = save_checkpoint(tmp_path / "m.safetensors"), write(tmp_path / "in/a.png")
    words = ["--save", "confidence,probs", "--out", tmp_path / "out", "--exact", "--device", "cpu"]
    assert call("predict", checkpoint, image, *words).exit_code == 0
    with Image.open(tmp_path / "out/confidence/a.png") as stored:
        assert stored.mode == "L"
        grey = np.array(stored)
    shares = np.load(tmp_path / "out/probs/a.npz")["probabilities"].astype(np.float64).max(axis=0)
    assert grey.shape == (40, 56)
    assert np.abs(grey - 255 * shares).max() < 0.5 + 255 * 2**-12 + 1e-6  # rounded, as are probabilities in float16
    assert len(np.unique(grey)) > 1
