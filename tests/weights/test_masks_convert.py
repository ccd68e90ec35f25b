"""A mask method through the commands: official files, predictions, scores, measurements, and what is refused.

The network is PEM with few channels, whose official files have the names of the whole one.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import call
from masks import in_detectron2
from predicting import write
from safetensors.torch import load_file
from torch import Tensor

from ssaseg.cli.evaluation import report
from ssaseg.cli.profiling import counting, latency
from ssaseg.cli.scoring.inference import predict_labels
from ssaseg.cli.weights.matching import outline
from ssaseg.datasets.colour import normalize
from ssaseg.datasets.synthetic import SyntheticScenes
from ssaseg.models import build_model, load_model
from ssaseg.models.build import family_of
from ssaseg.models.masks import peers, pem
from ssaseg.models.masks.base import MASKS
from ssaseg.models.networks import resnet
from ssaseg.models.official import official_entries

CLASSES = SyntheticScenes(1, height=64, width=64).classes


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "PLANES", (4, 4, 8, 8))
    monkeypatch.setitem(resnet.DEPTHS, "r50", (1, 1, 1, 1))
    for name in ("CHANNELS", "WIDTH", "FEED"):
        monkeypatch.setattr(pem, name, 16)
    monkeypatch.setattr(latency, "WARM_UP", 0)
    monkeypatch.setattr(report, "WORKERS", 0)


def official(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = build_model("pem_r50", len(CLASSES), MASKS)
    state = model.state_dict()
    return {key: value for entry in official_entries(model) for key, value in entry.give(state).items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save({"model": official()}, tmp_path / "official.pth")
    made = call("convert", tmp_path / "official.pth", tmp_path / "ours.safetensors", "--dataset", "demo")
    assert made.exit_code == 0, made.output
    assert f"read as pem_r50, masks, {len(CLASSES)} classes" in made.output
    return tmp_path / "ours.safetensors"


def test_official_files_both_ways(tmp_path: Path, checkpoint: Path) -> None:
    """Also with detectron2's names, as a plain pickle of arrays, without the norms' counters."""
    ours, given = load_file(checkpoint), official()
    assert call("convert", checkpoint, tmp_path / "back.pth").exit_code == 0
    back = torch.load(tmp_path / "back.pth")["state_dict"]
    assert back.keys() == given.keys()
    assert all(torch.equal(back[key], value) for key, value in given.items())
    arrays = {
        in_detectron2("pem_r50", key): value.numpy() for key, value in given.items() if not key.endswith("_tracked")
    }
    arrays |= {"criterion.empty_weight": np.ones(len(CLASSES) + 1, np.float32), "pixel_mean": np.ones((3, 1, 1))}
    (tmp_path / "authors.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "authors"}))
    made = call("convert", tmp_path / "authors.pkl", tmp_path / "again.safetensors", "--dataset", "demo")
    assert made.exit_code == 0, made.output
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[key], value) for key, value in ours.items())


def test_predict_eval_and_profile(tmp_path: Path, checkpoint: Path) -> None:
    write(tmp_path / "in" / "a.png")
    out = tmp_path / "out"
    assert call("predict", checkpoint, tmp_path / "in", "--out", out, "--save", "index,probs").exit_code == 0
    shares = np.load(out / "probs" / "a.npz")["probabilities"].astype(np.float64)
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=2e-3)
    words = ("--data", "demo", "--limit", "1", "--flip", "--slide", "160", "160", "--json", "-", "--device", "cpu")
    scored = json.loads(call("eval", checkpoint, *words).stdout)
    assert scored["classifier"] == "masks"
    assert "scores averaged" in scored["statement"]
    assert "mean of scores; two bilinear steps: scores to the size" in scored["statement"]
    measured = call("profile", checkpoint, "--size", "64", "64", "--runs", "1", "--json", "-", "--device", "cpu")
    (column,) = json.loads(measured.stdout)["columns"]
    product = 100 * len(CLASSES) * 64 * 64 / 1e9  # of masks and classes
    assert column["gmacs"][counting.EVERY_OPERATION] > product
    deployed = call("convert", checkpoint, tmp_path / "small.safetensors", "--deploy").output
    assert "largest difference of the scores" in deployed
    assert "logits" not in deployed
    named = call("profile", "pem_r50", "--size", "64", "64", "--runs", "1", "--json", "-", "--device", "cpu")
    assert json.loads(named.stdout)["classes"] == 150


def test_scores_are_not_put_through_a_softmax(checkpoint: Path) -> None:
    """Views are averaged as scores; probabilities are scores divided by their sum."""
    model, metadata = load_model(checkpoint)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    how: dict[str, Any] = {"mean": metadata["mean"], "std": metadata["std"], "device": torch.device("cpu")}
    one = predict_labels(model, image, {"scale": None, "multiple": None}, **how, probabilities=True)
    both = predict_labels(model, image, {"scale": None, "multiple": None, "flip": True}, **how, probabilities=True)
    pixels = normalize(torch.from_numpy(image)[None], how["mean"], how["std"])
    with torch.inference_mode():
        scores, mirrored = model(pixels)[0], model(pixels.flip(3))[0].flip(2)
    for found, expected in ((one, scores), (both, (scores + mirrored) / 2)):
        assert found.probabilities is not None
        np.testing.assert_allclose(found.probabilities, expected / expected.sum(dim=0), atol=1e-3)
        assert (found.labels == expected.argmax(dim=0).numpy()).mean() > 0.999


def test_what_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    source = tmp_path / "official.pth"
    for words, reason in (
        (
            ("train", "demo", "model.name=pem_r50"),
            "recipe demo, model.name: pem_r50 is a mask method, which ssaseg does",
        ),
        (("train", "demo", "model.name=pem_r50", "loss.weights.main_ce=2"), "which ssaseg does not train"),
        (("convert", source, tmp_path / "a.safetensors", "--classifier", "ssa"), "no classifier to choose, got ssa"),
        (
            ("convert", checkpoint, tmp_path / "a.safetensors", "--classes", "a,b"),
            "--classes is only for networks with",
        ),
        (("convert", checkpoint, tmp_path / "a.onnx"), ".onnx is only for networks with a classifier"),
        (("profile", "pem_r50", "--classifier", "linear"), "it has no classifier to choose, got linear"),
        (("explain", checkpoint, source, "--out", tmp_path / "o"), "pem_r50 is a mask method, without logits"),
        (("profile", "pem_r5"), "did you mean pem_r50?"),
        (("predict", checkpoint, source, "--out", tmp_path / "o", "--save", "coarse"), "does not adapt labels"),
    ):
        result = call(*words)
        assert result.exit_code == 2, words
        assert reason in result.output
        assert len(result.output.strip().splitlines()) <= 3


@pytest.mark.parametrize("name", ["maskformer_r50", "mask2former_r50"])
def test_a_file_whose_packages_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The network is recognised, but not built: no traceback, but what to install."""
    monkeypatch.setattr(peers, "find_spec", lambda package: None)
    outline.cache_clear()
    mark = family_of(name).mark
    tensors = {f"{mark}weight": torch.zeros(4), "backbone.conv1.weight": torch.zeros(64, 3, 7, 7)}
    torch.save({"model": tensors | {"predictor.class_embed.weight": torch.zeros(3, 8)}}, tmp_path / "x.pth")
    result = call("convert", tmp_path / "x.pth", tmp_path / "y.safetensors")
    assert result.exit_code == 2
    assert f"{name} needs the packages transformers and scipy" in result.stderr
    assert "pip install 'ssaseg[peers]'" in result.stderr
