"""The test-time protocol against mmsegmentation's stored labels and probabilities, and its parts by hand."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from parts import Unchanged
from PIL import Image
from places import FIXTURES
from torch import nn
from torch.nn import functional as F

from ssaseg.cli.prediction.predict import run_predict
from ssaseg.cli.profiling.memory import LiveTensors
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.cli.scoring.inference import Inference, predict_labels, slide, state_views, windows
from ssaseg.datasets import DataError
from ssaseg.datasets.transforms import scaled_inputs
from ssaseg.models import Segmenter, build_model, load_model, save_model
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.recipes import RecipeError, parse_protocol

pytestmark = pytest.mark.usefixtures("one_thread")
STORED = np.load(FIXTURES / "mmseg_inference.npz")
CASES = [json.loads(str(STORED[f"case{i}"])) for i in range(sum(key.endswith("_labels") for key in STORED.files))]
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored_network() -> Segmenter:
    """The network of the fixture: one convolution and the classifier's."""
    backbone = nn.Conv2d(3, 6, 5, stride=4, padding=2)
    classifier = LinearClassifier(6, 5, 0.0)
    weights = {
        "backbone.weight": "weight",
        "backbone.bias": "bias",
        "classifier.conv_seg.weight": "head_weight",
        "classifier.conv_seg.bias": "head_bias",
    }
    network = Segmenter(backbone, Unchanged(6, stride=4), classifier)
    network.load_state_dict({key: torch.from_numpy(STORED[name]) for key, name in weights.items()})
    return network.eval()


@pytest.fixture(scope="module", params=["ssa", "linear"])
def model(request: Any) -> Segmenter:
    torch.manual_seed(0)
    return build_model("seaformer_t", 5, request.param).eval()


def test_the_fixture_has_all_that_the_protocol_knows() -> None:
    assert len(CASES) == 10
    protocols = [parse_protocol(case["protocol"], "case") for case in CASES]
    both = [(each.mode, len(each.ratios) > 1 or each.flip) for each in protocols]
    assert set(both) == {("whole", False), ("whole", True), ("slide", False), ("slide", True)}
    assert any(each.multiple and each.mode == "slide" for each in protocols)
    assert any(each.multiple and each.flip and len(each.ratios) == 6 for each in protocols)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: state_views(parse_protocol(CASES[i]["protocol"], "")))
def test_labels_and_probabilities_equal_those_of_mmsegmentation(stored_network: Segmenter, case: int) -> None:
    image, expected = STORED[f"image{CASES[case]['image']}"], STORED[f"case{case}_labels"]
    inference = Inference(TorchEngine(stored_network, CPU), parse_protocol(CASES[case]["protocol"], "case"), MEAN, STD)
    inputs = [torch.from_numpy(each) for each in inference.inputs(image, "image")]
    result = inference.predict_batch([inputs], [image.shape[:2]], ["image"], probabilities=True, confidence=True)[0]
    np.testing.assert_allclose(result.confidence, result.probabilities.max(axis=0), rtol=0, atol=5e-4)  # float16
    # None of these labels is as close to another class as float32 rounds.
    np.testing.assert_array_equal(result.labels, expected)
    np.testing.assert_array_equal(inference.labels(inputs, image.shape[:2]).numpy(), expected)
    shares = STORED[f"case{case}_probabilities"]
    np.testing.assert_allclose(result.probabilities[:, ::7, ::7].astype(np.float32), shares, atol=5e-4)  # float16
    if inference.views > 1:
        with torch.inference_mode():
            exact, _ = inference._probabilities(inputs, image.shape[:2], coarse=False)
        np.testing.assert_allclose(exact[:, ::7, ::7].numpy(), shares, rtol=0, atol=1e-6)


def test_windows_are_those_of_mmsegmentation() -> None:
    assert windows(100, 48, 32) == [slice(0, 48), slice(32, 80), slice(52, 100)]  # the last shifted inside
    assert windows(96, 32, 32) == [slice(0, 32), slice(32, 64), slice(64, 96)]
    assert windows(48, 48, 7) == [slice(0, 48)]
    assert windows(40, 48, 32) == [slice(0, 40)]
    assert windows(49, 48, 32) == [slice(0, 48), slice(1, 49)]
    for length in range(32, 130):
        for crop, stride in ((32, 32), (32, 1), (48, 20), (64, 43)):
            seen = np.zeros(length, int)
            for part in windows(length, crop, stride):
                assert part.stop - part.start == min(crop, length)
                seen[part] += 1
            assert seen.min() >= 1


def test_windows_of_a_real_network_are_averaged(model: Segmenter) -> None:
    pixels = torch.randn(1, 3, 70, 90, generator=torch.Generator().manual_seed(1))
    total, count = torch.zeros(1, 5, 70, 90), torch.zeros(70, 90)
    with torch.inference_mode():
        for top in (0, 22):
            for left in (0, 40, 42):
                window = pixels[..., top : top + 48, left : left + 48]
                logits = F.interpolate(model(window), (48, 48), mode="bilinear", align_corners=False)
                total[..., top : top + 48, left : left + 48] += logits
                count[top : top + 48, left : left + 48] += 1
        result = slide(TorchEngine(model, CPU), pixels, (48, 48), (32, 40), coarse=True)
    torch.testing.assert_close(result.final, total / count, rtol=0, atol=1e-6)
    assert (result.coarse is not None) == model.classifier.has_coarse
    if result.coarse is not None:
        assert result.coarse.shape == (1, 5, 70, 90)
        assert (result.coarse != result.final).any()


def test_scales_round_down_as_in_mmsegmentation_0() -> None:
    image = np.random.default_rng(0).integers(0, 256, (75, 101, 3), dtype=np.uint8)
    # 0.75 of (131, 77) is (98.25, 57.75); 101x75 fits (98, 57) by 0.76: 77x57. Then up to multiples of 32.
    assert [each.shape for each in scaled_inputs(image, (131, 77), None, (0.75, 1.0))] == [(57, 77, 3), (77, 104, 3)]
    assert [each.shape for each in scaled_inputs(image, (131, 77), 32, (0.75,))] == [(64, 96, 3)]
    # Without a scale: of the image's own size.
    assert [each.shape for each in scaled_inputs(image, None, None, (0.5, 1.5))] == [(37, 50, 3), (112, 151, 3)]
    assert scaled_inputs(image, None, None)[0] is image


def test_mirrored_views_make_mirrored_labels(model: Segmenter) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    protocol = {"scale": None, "multiple": None, "flip": True}
    upright, mirrored = (
        predict_labels(model, each, protocol, MEAN, STD, CPU) for each in (image, image[:, ::-1].copy())
    )
    assert upright.probabilities is upright.confidence is upright.coarse_confidence is None
    np.testing.assert_array_equal(mirrored.labels, upright.labels[:, ::-1])
    plain = predict_labels(model, image, {"scale": None, "multiple": None}, MEAN, STD, CPU)
    assert (plain.labels != upright.labels).any()
    assert (upright.coarse is None) == (not model.classifier.has_coarse)
    if upright.coarse is not None:
        np.testing.assert_array_equal(mirrored.coarse, upright.coarse[:, ::-1])


def test_keys_that_older_checkpoints_lack_have_their_defaults() -> None:
    protocol = parse_protocol({"scale": [2048, 512], "multiple": 32}, "old.safetensors")
    assert protocol == parse_protocol(protocol.model_dump(mode="json"), "new.safetensors")
    assert protocol.model_dump(mode="json") == {
        "scale": [2048, 512],
        "multiple": 32,
        "mode": "whole",
        "crop": None,
        "stride": None,
        "ratios": [1.0],
        "flip": False,
    }


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ({"mode": "slide"}, "test.crop: expected [height, width], as mode is slide, got nothing"),
        ({"mode": "slide", "crop": [64, 64]}, "test.stride: expected [height, width], as mode is slide"),
        ({"crop": [64, 64]}, "test.crop: expected null, as mode is whole, got [64, 64]"),
        ({"mode": "slide", "crop": [64, 64], "stride": [65, 1]}, "test.stride: expected at most test.crop, [64, 64]"),
        ({"mode": "slide", "crop": [16, 64], "stride": [1, 1]}, "test.crop[0]: expected 32 or more, got 16"),
        ({"mode": "tiles"}, "test.mode: expected 'whole' or 'slide', got 'tiles'"),
        ({"ratios": []}, "test.ratios: expected a list of at least 1, got []"),
        ({"ratios": [1.0, 0.0]}, "test.ratios[1]: expected 0.01 or more, got 0.0"),
        ({"size": 3}, "unknown key test.size"),
    ],
)
def test_protocols_that_are_none(protocol: dict, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_protocol(protocol, "x.safetensors")
    assert str(caught.value).startswith(f"x.safetensors: {message}")
    assert len(str(caught.value).splitlines()) <= 3


def test_protocols_in_words() -> None:
    words = {
        state_views(parse_protocol(each, ""))
        for each in (
            {"scale": [2048, 512], "multiple": 32},
            {"mode": "slide", "crop": [512, 768], "stride": [341, 512]},
            {"ratios": [0.5, 1, 1.75], "flip": True},
            {"ratios": [0.5]},
        )
    }
    assert words == {
        "resized to fit 2048x512, aspect kept, then to multiples of 32; whole image, single scale, no flip",
        "not resized; sliding windows of 512x768 every 341x512 pixels (height x width), logits averaged, single scale, "
        "no flip",
        "not resized; whole image, scales 0.5, 1, 1.75, with horizontal flip, mean of probabilities",
        "not resized; whole image, scales 0.5, no flip",
    }


def test_views_too_small_for_a_network_are_named(model: Segmenter) -> None:
    protocol = parse_protocol({"ratios": [1.0, 0.5]}, "")
    inference = Inference(TorchEngine(model, CPU), protocol, MEAN, STD)
    with pytest.raises(
        DataError, match=r"a/b\.jpg: too small: got 40x25 pixels as the network's input, expected 32x32"
    ):
        inference.inputs(np.zeros((50, 80, 3), np.uint8), "a/b.jpg")


def peak_memory(model: Segmenter, protocol: dict, image: torch.Tensor, size: tuple[int, int]) -> int:
    """Bytes that tensors take at most while an image is labelled."""
    inference = Inference(TorchEngine(model, CPU), parse_protocol(protocol, ""), MEAN, STD)
    held = [image, *model.parameters(), *model.buffers()]
    inference.labels([image] * len(inference.protocol.ratios), size)  # what is cached between images does not count
    with LiveTensors(held) as live:
        inference.labels([image] * len(inference.protocol.ratios), size)
    return live.peak


def test_memory_is_what_is_said(stored_network: Segmenter) -> None:
    image, classes, size = torch.zeros(64, 96, 3, dtype=torch.uint8), 5, (640, 960)
    full, small = classes * 640 * 960 * 4, classes * 64 * 96 * 4
    whole = peak_memory(stored_network, {}, image, size)
    windows = peak_memory(stored_network, {"mode": "slide", "crop": [48, 48], "stride": [24, 24]}, image, size)
    several = {"ratios": [1.0, 1.0], "flip": True}
    views = peak_memory(stored_network, several, image, size)
    assert whole < full
    assert windows < full
    # The sum, what is added to it, and three maps of a single class at most.
    assert 2 * full <= views < (2 + 3 / classes) * full + 10 * small
    # However many views.
    assert peak_memory(stored_network, {**several, "ratios": [1.0] * 6}, image, size) < 1.02 * views


def save_checkpoint(path: Path, protocol: dict) -> Path:
    torch.manual_seed(0)
    save_model(path, build_model("seaformer_t", 5), {"protocol": protocol})
    return path


def test_the_checkpoint_says_how_and_predict_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    protocol = {
        "scale": [96, 64],
        "mode": "slide",
        "crop": [48, 48],
        "stride": [32, 32],
        "ratios": [1.0, 1.5],
        "flip": True,
    }
    checkpoint = save_checkpoint(tmp_path / "m.safetensors", protocol=protocol)
    source, out = tmp_path / "a.png", tmp_path / "out"
    cv2.imwrite(str(source), np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8))
    assert run_predict(checkpoint, [str(source)], out, ("index", "coarse", "probs"), False, "cpu", exact=True) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == (
        "protocol of the checkpoint: resized to fit 96x64, aspect kept; sliding windows of 48x48 every 32x32 pixels "
        "(height x width), logits averaged, scales 1, 1.5, with horizontal flip, mean of probabilities"
    )
    model, metadata = load_model(checkpoint)
    image = cv2.imread(str(source))
    expected = predict_labels(model, image, protocol, metadata["mean"], metadata["std"], CPU, probabilities=True)
    np.testing.assert_array_equal(np.array(Image.open(out / "index/a.png")), expected.labels)
    np.testing.assert_array_equal(np.array(Image.open(out / "coarse/a.png")), expected.coarse)
    probabilities = np.load(out / "probs/a.npz")["probabilities"]
    np.testing.assert_array_equal(probabilities, expected.probabilities)
    np.testing.assert_allclose(probabilities.astype(np.float32).sum(axis=0), 1, atol=2e-3)


def test_a_protocol_that_is_none_is_told(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "m.safetensors", protocol={"scale": [96, 64], "mode": "tiles"})
    source = tmp_path / "a.png"
    cv2.imwrite(str(source), np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(RecipeError, match=r"m.safetensors: protocol: test.mode: expected 'whole' or 'slide'"):
        run_predict(checkpoint, [str(source)], tmp_path / "out", ("index",), False, "cpu")
    assert not (tmp_path / "out").exists()
