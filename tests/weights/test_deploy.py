"""The deploy form of a checkpoint: small, the same labels, read by every command, refused where it would not do."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open

from ssaseg.cli.main import cli
from ssaseg.cli.weights.pretrained import load_pretrained
from ssaseg.datasets.synthetic import SyntheticScenes
from ssaseg.models import Segmenter, build_model, load_model, save_model
from ssaseg.models.checkpoint import deploy_tensors, save_deploy
from ssaseg.models.deploy import fold

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = list(SyntheticScenes.classes)


def network(name: str = "seaformer_t", classifier: str = "ssa") -> Segmenter:
    """Norms that know their data, and no fresh row."""
    torch.manual_seed(3)
    model = build_model(name, len(CLASSES), classifier)
    torch.nn.init.normal_(model.classifier.conv_seg.weight, 0.0, 0.1)
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    return model.eval()


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [*map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, `ours.safetensors`, and its deploy form, `small.safetensors`."""
    found = tmp_path_factory.mktemp("weights")
    save_model(found / "ours.safetensors", network(), {"classes": CLASSES, "step": 7})
    result = run("convert", found / "ours.safetensors", found / "small.safetensors", "--deploy")
    assert result.exit_code == 0, result.output
    (found / "told.txt").write_text(result.output)
    return found


def test_the_file_is_half_as_large_and_says_what_it_is(folder: Path) -> None:
    before, after = ((folder / f"{name}.safetensors").stat().st_size for name in ("ours", "small"))
    assert after < 0.55 * before
    with safe_open(folder / "small.safetensors", framework="pt") as file:
        header, keys = file.metadata(), set(file.keys())
        assert file.get_tensor("backbone.stem.conv.weight").dtype == torch.float16
        assert file.get_tensor("backbone.stem.norm.running_var").dtype == torch.float32
    assert json.loads(header["deploy"]) == {"weights": "float16", "without": ["classifier.teacher"]}
    assert json.loads(header["classes"]) == CLASSES
    assert not any("teacher" in key for key in keys)
    told = (folder / "told.txt").read_text()
    assert f"{before / 2**20:.1f} MiB" in told
    assert f"{after / 2**20:.1f} MiB, float16, without 7 training-only tensors" in told
    assert "largest difference of the logits on random images: " in told


def test_it_loads_as_float32_without_the_teacher(folder: Path) -> None:
    (whole, _), (small, metadata) = (load_model(folder / f"{name}.safetensors") for name in ("ours", "small"))
    assert (metadata["step"], small.training) == (7, False)
    state = small.state_dict()
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())
    assert state.keys() == {key for key in whole.state_dict() if ".teacher." not in key}
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected, got, coarse = whole(images), small(images), small.classifier.stages(small.feature(images))[1]
        folded = fold(small)(images)  # of which exports are made
    assert 0 < (got - expected).abs().max() < 0.01 * expected.abs().max()
    assert (got.argmax(1) == expected.argmax(1)).float().mean() > 0.98
    assert coarse is not None
    assert torch.allclose(folded, got, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("afformer_t", "ssa"),
        ("segnext_t", "ssa"),
        ("cgrseg_t", "ssa"),
        ("cgrseg_t", "linear"),
        ("seaformer_t", "linear"),
    ],
)
def test_every_family_has_the_form(tmp_path: Path, name: str, classifier: str) -> None:
    model = network(name, classifier)
    save_deploy(tmp_path / "small.safetensors", model, {"classes": CLASSES})
    small, _ = load_model(tmp_path / "small.safetensors")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        assert 0 < (small(images) - expected).abs().max() < 0.02 * expected.abs().max()


def test_commands_take_it(folder: Path) -> None:
    cv2.imwrite(str(folder / "image.png"), np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8))
    small = folder / "small.safetensors"
    words = ("--out", folder / "labels", "--save", "index,coarse", "--device", "cpu")
    assert run("predict", small, folder / "image.png", *words).exit_code == 0
    assert (folder / "labels" / "coarse" / "image.png").exists()
    told = run("profile", small, "--size", 64, 64, "--runs", 1, "--device", "cpu", "--json", folder / "profile.json")
    assert told.exit_code == 0, told.output
    told = run("eval", small, "--data", "demo", "--limit", 1, "--device", "cpu")
    assert told.exit_code == 0, told.output


def test_training_may_start_from_it(folder: Path) -> None:
    torch.manual_seed(9)
    model = build_model("seaformer_t", len(CLASSES))
    fresh = model.classifier.teacher.merge.weight.clone()
    report = load_pretrained(model, folder / "small.safetensors", CLASSES)
    assert report.backbone_share == 1
    whole, _ = load_model(folder / "ours.safetensors")
    assert torch.equal(model.backbone.stem.conv.weight, whole.backbone.stem.conv.weight.half().float())
    assert torch.equal(model.classifier.teacher.merge.weight, fresh)
    losses = model.train()(torch.randn(4, 3, 64, 64), torch.randint(0, len(CLASSES), (4, 64, 64)))
    assert sum(losses.values()).isfinite()


def test_what_float16_does_not_hold_is_refused(tmp_path: Path) -> None:
    model = network("seaformer_t", "linear")
    with torch.no_grad():
        model.decoder.output.conv.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"decoder.output.conv.weight has values up to 1e\+05"):
        deploy_tensors(model)
    save_model(tmp_path / "large.safetensors", model, {})
    result = run("convert", tmp_path / "large.safetensors", tmp_path / "small.safetensors", "--deploy")
    assert (result.exit_code, "the largest float16 is 65504" in result.stderr) == (3, True)

    model = network("seaformer_t", "linear")
    with torch.no_grad():
        model.classifier.conv_seg.weight.mul_(1e-9)  # becomes 0
        model.classifier.conv_seg.bias.zero_()
    save_model(tmp_path / "tiny.safetensors", model, {})
    result = run("convert", tmp_path / "tiny.safetensors", tmp_path / "small.safetensors", "--deploy")
    assert (result.exit_code, "float16 changes the logits too much" in result.stderr) == (3, True)
    assert not (tmp_path / "small.safetensors").exists()


@pytest.mark.parametrize(
    ("source", "words", "part"),
    [
        ("small", ["again.safetensors", "--deploy"], "is a deploy form, without the weights that only training needs"),
        ("small", ["official.pth"], "is a deploy form, without the weights that only training needs"),
        (
            "small",
            ["other.safetensors", "--classes", "sky,car"],
            "is a deploy form, without the weights that only training needs",
        ),
        ("ours", ["small.onnx", "--deploy"], "exported files never have training-only weights"),
        ("ours", ["other.safetensors", "--deploy", "--classes", "sky,car"], "--classes: not with --deploy"),
        ("ours", ["other.safetensors", "--deploy", "--model", "segnext_t"], "its header says seaformer_t"),
    ],
)
def test_wrong_words(folder: Path, source: str, words: list[str], part: str) -> None:
    result = run("convert", folder / f"{source}.safetensors", folder / words[0], *words[1:])
    assert result.exit_code == 2
    assert part in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert not (folder / words[0]).exists()
