"""Logits that are not finite have no arg-max: they are an error that names the image, never class 0."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from parts import Unchanged
from PIL import Image
from torch import nn

from ssaseg.cli.main import cli
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.cli.scoring.evaluate import evaluate_model
from ssaseg.cli.scoring.inference import Inference, predict_labels
from ssaseg.cli.scoring.metrics import Confusion
from ssaseg.datasets import DataError, build_dataset
from ssaseg.models import Segmenter, build_model, save_model
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.recipes import Test, load_recipe, parse_protocol

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, MEAN, STD = torch.device("cpu"), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
PROTOCOLS: list[dict[str, Any]] = [
    {},
    {"flip": True, "ratios": [1.0, 1.5]},
    {"mode": "slide", "crop": [32, 32], "stride": [24, 24]},
    {"mode": "slide", "crop": [32, 32], "stride": [24, 24], "flip": True},
]


class Bright(nn.Module):
    """Finite for dark images; for a pixel of 255 the value that is given."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.where(pixels >= 255, self.value, pixels)


def network(value: float) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(Bright(value), Unchanged(3, stride=1), LinearClassifier(3, 4, 0.0)).eval()


def image(spot: int = 0) -> np.ndarray:
    made = np.random.RandomState(0).randint(0, 200, (40, 48, 3), np.uint8)
    made[17, 20] = spot
    return made


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_predict_names_the_image(protocol: dict[str, Any], value: float) -> None:
    """One pixel is enough. The next image is not blamed."""
    inference = Inference(TorchEngine(network(value), CPU), parse_protocol(protocol, "test"), MEAN, STD)
    for method in (inference.predict, inference.labels):
        dark = [torch.from_numpy(each) for each in inference.inputs(image(), "dark.png")]
        bright = [torch.from_numpy(each) for each in inference.inputs(image(255), "bright.png")]
        method(dark, (40, 48), name="dark.png")
        with pytest.raises(FloatingPointError, match=r"^bright\.png: the network's output is not finite"):
            method(bright, (40, 48), name="bright.png")
        method(dark, (40, 48), name="dark.png")
    predict_labels(network(value), image(), protocol, MEAN, STD, CPU)
    with pytest.raises(FloatingPointError, match=r"^image: "):
        predict_labels(network(value), image(255), protocol, MEAN, STD, CPU)


def test_a_gpu_is_asked_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """`labels` then notes the range of each view; here a CPU that the code takes for a GPU."""
    engine = TorchEngine(network(float("nan")), torch.device("meta"))
    inference = Inference(engine, parse_protocol({"flip": True}, "test"), MEAN, STD)
    monkeypatch.setattr(Inference, "_pixels", lambda self, each: each.permute(0, 3, 1, 2).float())
    for spot, name in ((0, "a"), (255, "b"), (0, "c")):
        inference.labels([torch.from_numpy(image(spot))], (40, 48), name)
    assert inference.names == ["a", "a", "b", "b", "c", "c"]
    with pytest.raises(FloatingPointError, match=r"^b: "):
        inference.require_finite()
    inference.require_finite()


@pytest.mark.parametrize("protocol", [{"ratios": [1e6]}, {"scale": [10**9, 10**9]}, {"ratios": [1.0, 500.0]}])
def test_inputs_that_would_fill_the_memory(protocol: dict[str, Any]) -> None:
    """A protocol comes with the checkpoint. The recipe's limits are wider: they do not know the images."""
    inference = Inference(
        TorchEngine(network(0.0), CPU), Test.model_construct(**{**Test().model_dump(), **protocol}), MEAN, STD
    )
    with pytest.raises(DataError, match=r"^big\.png: the network's input would have \d+x\d+ pixels\nexpected at most"):
        inference.inputs(image(), "big.png")


# ---- commands --------------------------------------------------------------------------------------------------------


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [*map(str, words), "--device", "cpu"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with damage of three kinds, and a folder of one image."""
    folder = tmp_path_factory.mktemp("nonfinite")
    changes = ["data.synthetic.val=1", "data.synthetic.train=1", "data.synthetic.height=64", "data.synthetic.width=64"]
    recipe = load_recipe("demo", changes)
    classes = list(build_dataset("synthetic", "val", root=folder, options=recipe.data.model_dump()).classes)
    metadata = {"classes": classes, "recipe": recipe.model_dump(mode="json")}
    model = build_model("seaformer_t", len(classes), "ssa")
    save_model(folder / "std.safetensors", model, {**metadata, "std": [0, 0, 0]})
    value = model.state_dict()["backbone.stem.norm.running_var"]
    before = value.clone()
    value.fill_(-1)  # finite, but its root is not
    save_model(folder / "overflow.safetensors", model, metadata)
    value.copy_(before).view(-1)[0] = torch.nan
    save_model(folder / "nan.safetensors", model, metadata)
    (folder / "in").mkdir()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8)).save(folder / "in" / "one.png")
    return folder


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("std", 2, "std in its header is a list of 3"),
        ("nan", 2, "backbone.stem.norm.running_var has 1 of"),
        ("overflow", 3, "the network's output is not finite"),
    ],
)
def test_commands_end_with_an_error(checkpoints: Path, tmp_path: Path, name: str, code: int, message: str) -> None:
    path = checkpoints / f"{name}.safetensors"
    result = run("predict", path, checkpoints / "in", "--out", tmp_path / "out", "--save", "index,probs")
    assert (result.exit_code, message in result.stderr) == (code, True), result.output
    assert "one.png" in result.stderr or code == 2
    assert not list((tmp_path / "out").rglob("*.png"))
    result = run("eval", path, "--json", tmp_path / "report.json")
    assert (result.exit_code, message in result.stderr) == (code, True), result.output
    assert not (tmp_path / "report.json").exists()


def test_results_and_eval_of_a_good_network_are_unchanged() -> None:
    """The check itself draws nothing and changes nothing."""
    recipe = load_recipe("demo", ["data.synthetic.val=2", "data.synthetic.height=64", "data.synthetic.width=64"])
    data = build_dataset("synthetic", "val", root=Path(), options=recipe.data.model_dump())
    torch.manual_seed(0)
    model = build_model("seaformer_t", len(data.classes), "ssa")
    values, mean, std = recipe.test.model_dump(), recipe.data.mean, recipe.data.std
    state = torch.random.get_rng_state()
    confusion = evaluate_model(model, data, values, mean, std, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    expected = Confusion(len(data.classes))
    for image_, label in (data.load(k) for k in range(2)):
        expected.update(predict_labels(model.eval(), image_, values, mean, std, CPU).labels, label)
    assert (confusion.matrix == expected.matrix).all()
