"""Networks for images of other than three channels: their stems, weights from RGB, and checkpoints."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import call
from networks import BUILT, TINY, tiny_networks
from safetensors.torch import save_file

from ssaseg.cli.errors import CommandError
from ssaseg.cli.weights.matching import outline
from ssaseg.cli.weights.pretrained import load_pretrained
from ssaseg.models import CheckpointError, build_model, list_models, load_model, save_model
from ssaseg.models.checkpoint import read_checkpoint, save_deploy
from ssaseg.models.deploy import fold
from ssaseg.models.masks.base import MASKS
from ssaseg.models.official import official_keys
from ssaseg.models.segmenter import Segmenter
from ssaseg.models.stem import MOST_CHANNELS, inflate

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "seaformer_y"


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_networks():
        yield


def network(channels: int = 3, name: str = NAME, seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    return build_model(name, 3, "linear", channels=channels).eval()


def header(channels: int, **more: Any) -> dict[str, Any]:
    return {"mean": [100.0] * channels, "std": [50.0] * channels, **more}


def stems(model: Segmenter) -> list[torch.Tensor]:
    return [model.get_submodule(name).weight for name in model.stems]  # type: ignore[misc]


@pytest.mark.parametrize("name", [*TINY, *BUILT])
def test_every_family_is_built_for_four_channels(name: str) -> None:
    """All weights but the stems' have the same shapes, and every channel changes the output."""
    three, four = network(3, name), network(4, name)
    expected = 2 if "adapter" in name else 1
    assert len(four.stems) == len(three.stems) == expected
    own, other = three.state_dict(), four.state_dict()
    differ = [key for key in own if own[key].shape != other[key].shape]
    assert differ == [f"{stem}.weight" for stem in four.stems]
    for rgb, wide in zip(stems(three), stems(four), strict=True):
        assert wide.shape[1] == 4
        assert wide.std().item() == pytest.approx(rgb.std().item(), rel=0.15)
    images = torch.randn(1, 4, 64, 64, requires_grad=True)
    four(images).square().sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().amax(dim=(0, 2, 3)) > 0).all()


def test_three_channels_are_built_bit_for_bit_as_ever() -> None:
    """Values and the state of the random generator, whether the number is given or not."""
    torch.manual_seed(3)
    plain = build_model(NAME, 3, "ssa")
    after = torch.get_rng_state()
    torch.manual_seed(3)
    given = build_model(NAME, 3, "ssa", channels=3)
    assert torch.equal(torch.get_rng_state(), after)
    state = given.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert state[f"{plain.stems[0]}.weight"].shape[1] == 3


@pytest.mark.slow
def test_every_network_has_the_stems_of_its_kind() -> None:
    """No other convolution of a real network has three inputs: such a layer would be widened by mistake."""
    for name in list_models():
        assert len(outline(name).stems) == (2 if "adapter" in name else 1), name


@pytest.mark.parametrize("channels", [0, -1, MOST_CHANNELS + 1])
def test_numbers_out_of_range(channels: int) -> None:
    with pytest.raises(ValueError, match=f"channels is {channels}, expected 1 to 16"):
        network(channels)


def test_mask_methods_take_no_channels() -> None:
    with pytest.raises(ValueError, match="it takes no channels: leave this out"):
        build_model("yoso_r50", 3, MASKS, channels=4)


# ---- weights for RGB -------------------------------------------------------------------------------------------------


def test_new_channels_get_the_mean_of_red_green_and_blue() -> None:
    weight = torch.randn(5, 3, 3, 3)
    six = inflate(weight, 6)
    assert torch.equal(six[:, :3], weight)
    assert torch.equal(six[:, 3:], weight.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1))
    assert torch.equal(inflate(weight, 3), weight)
    image = torch.rand(1, 1, 9, 9)
    grey = torch.nn.functional.conv2d(image.expand(-1, 3, -1, -1), weight)
    for channels in (1, 2):
        found = torch.nn.functional.conv2d(image.expand(-1, channels, -1, -1), inflate(weight, channels))
        torch.testing.assert_close(found, grey)


@pytest.mark.parametrize(("name", "ours"), [(NAME, True), ("upernet_vit_adapter_x", False)])
def test_pretrained_weights_for_rgb_are_inflated(name: str, ours: bool, tmp_path: Path) -> None:
    """Of a file of ours and an official one; it is said in one line of the report."""
    source = network(3, name, seed=1)
    path = tmp_path / ("a.safetensors" if ours else "a.pth")
    if ours:
        save_model(path, source, {})
    else:
        names = official_keys(source)
        torch.save({"state_dict": {names[key]: value for key, value in source.state_dict().items()}}, path)
    model = network(5, name)
    found = load_pretrained(model, path)
    assert found.backbone_share == 1
    (note,) = [line for line in found.notes if "channels" in line]
    assert re.search(r"from 3 to 5 channels; of each new channel: the mean of red, green and blue$", note)
    for wide, rgb in zip(stems(model), stems(source), strict=True):
        assert torch.equal(wide, inflate(rgb, 5))
    gray = network(1, name)
    assert any("of each channel: the sum of red, green and blue" in line for line in load_pretrained(gray, path).notes)
    assert torch.equal(stems(gray)[0], stems(source)[0].sum(dim=1, keepdim=True))


def test_weights_of_the_same_channels_are_taken_as_they_are(tmp_path: Path) -> None:
    source, model = network(4, seed=1), network(4)
    save_model(tmp_path / "a.safetensors", source, header(4))
    assert load_pretrained(model, tmp_path / "a.safetensors").notes == []
    assert torch.equal(stems(model)[0], stems(source)[0])


@pytest.mark.parametrize("wanted", [3, 5])
def test_weights_of_a_third_number_are_refused(wanted: int, tmp_path: Path) -> None:
    save_model(tmp_path / "a.safetensors", network(4), header(4))
    model = network(wanted)
    before = stems(model)[0].clone()
    with pytest.raises(CommandError) as error:
        load_pretrained(model, tmp_path / "a.safetensors")
    text = str(error.value).splitlines()
    assert text[0].endswith(f"a network for images of 4 channels; data.channels is {wanted}")
    assert text[1] == f"expected weights for {'3' if wanted == 3 else '3 or 5'} channels"
    assert len(text) == 3
    assert torch.equal(stems(model)[0], before)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4])
def test_a_checkpoint_knows_its_channels(channels: int, tmp_path: Path) -> None:
    model, images = network(channels), torch.randn(1, channels, 64, 64)
    save_model(tmp_path / "a.safetensors", model, header(channels))
    again, metadata = load_model(tmp_path / "a.safetensors")
    assert metadata["channels"] == again.channels == channels
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
        folded = fold(again)
        assert folded.channels == channels
        torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)
    save_deploy(tmp_path / "small.safetensors", again, metadata)
    assert load_model(tmp_path / "small.safetensors")[0].channels == channels


def test_a_checkpoint_for_rgb_has_no_new_key(tmp_path: Path) -> None:
    save_model(tmp_path / "a.safetensors", network(), {})
    assert "channels" not in read_checkpoint(tmp_path / "a.safetensors")[1]
    assert load_model(tmp_path / "a.safetensors")[0].channels == 3


def test_mean_and_std_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 numbers as mean, the model has 4 channels"):
        save_model(tmp_path / "a.safetensors", network(4), {})


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("channels", 0, "channels in its header is 0\nexpected a whole number from 1 to 16"),
        ("channels", 17, "channels in its header is 17"),
        ("channels", True, "channels in its header is True"),
        ("channels", 5, "mean in its header has 4 numbers\nexpected 5, one for each channel of the images"),
        ("mean", [1.0] * 3, "mean in its header has 3 numbers\nexpected 4"),
        ("std", [1.0] * 5, "std in its header has 5 numbers\nexpected 4"),
    ],
)
def test_headers_that_contradict_themselves(key: str, value: object, text: str, tmp_path: Path) -> None:
    save_model(tmp_path / "a.safetensors", network(4), header(4))
    tensors, metadata = read_checkpoint(tmp_path / "a.safetensors")
    metadata[key] = value
    save_file(tensors, tmp_path / "b.safetensors", {each: json.dumps(metadata[each]) for each in metadata})
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "b.safetensors")
    assert text in str(error.value)


def test_official_weights_of_four_channels(tmp_path: Path) -> None:
    """mean and std of such images are nowhere but in a recipe."""
    source = network(4, seed=1)
    names = official_keys(source)
    torch.save({"state_dict": {names[key]: value for key, value in source.state_dict().items()}}, tmp_path / "a.pth")
    words = ["convert", tmp_path / "a.pth", tmp_path / "a.safetensors", "--model", NAME]
    result = call(*words)
    assert result.exit_code != 0
    assert "a network for images of 4 channels, whose mean and std are not known\ngive --dataset" in result.output
    data = "train: {images: i, masks: m}, val: {images: i, masks: m}, classes: [a, b, c]"
    numbers = "channels: 4, mean: [1, 2, 3, 4], std: [1, 1, 1, 1]"
    recipe = f"model: {{name: {NAME}}}\ndata: {{{data}, {numbers}}}\n"
    rest = "augment: {scale: [64, 64], crop: [64, 64]}\noptim: {lr: 0.1}\ntrain: {steps: 1}\n"
    (tmp_path / "r.yaml").write_text(recipe + rest)
    result = call(*words, "--dataset", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    again, metadata = load_model(tmp_path / "a.safetensors")
    assert metadata["mean"] == [1, 2, 3, 4]
    assert torch.equal(stems(again)[0], stems(source)[0])
    assert call("convert", tmp_path / "a.safetensors", tmp_path / "b.pth").exit_code == 0


def test_folders_of_transformers_are_for_colours(tmp_path: Path) -> None:
    save_model(tmp_path / "a.safetensors", network(4, "segformer_nvidia_x"), header(4))
    result = call("convert", tmp_path / "a.safetensors", tmp_path / "folder")
    assert result.exit_code != 0
    assert "the network is for images of 4 channels\nexpected 3" in result.output
