"""`ssaseg quantize`: calibration on training images, the search, the verdict, what is written and what is refused.

The graph is made by hand, as an export takes seconds: it labels each pixel by its brightest channel. With an outlier,
one of its layers gives a channel that nobody reads values so large that int8 leaves nothing of the others.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from calling import call
from networks import flat_network
from onnx import helper, numpy_helper
from PIL import Image

from ssaseg.cli.engine.opening import open_file
from ssaseg.cli.quantization import calibration, quantize
from ssaseg.cli.quantization.calibration import choose_images, cover, network_inputs
from ssaseg.cli.quantization.graph import Graph
from ssaseg.cli.quantization.search import Cost, fewest, rank_layers
from ssaseg.cli.quantization.verdict import Limits, judge
from ssaseg.cli.scoring.metrics import Confusion
from ssaseg.datasets import build_dataset
from ssaseg.models import build_model, save_model
from ssaseg.recipes import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["red", "green", "blue"]
SIDE = 32


def graph_bytes(layers: int = 5, outlier: float = 1.0, gate: bool = False) -> bytes:
    """Stem, `layers` convolutions with ReLU and a classifier, all 1×1; the first layer's fourth channel is `outlier`
    times as large. gate: the second has a HardSigmoid in place of the ReLU.
    """
    weights: dict[str, np.ndarray] = {
        "model.backbone.stem.weight": np.eye(4, 3),
        "model.backbone.stem.bias": np.ones(4),
    }
    for index in range(layers):
        weights[f"model.backbone.{index}.weight"] = np.eye(4)
        weights[f"model.backbone.{index}.bias"] = np.full(4, 0.01)
    weights["model.backbone.0.weight"] = np.diag([1, 1, 1, outlier])
    weights["model.backbone.1.weight"] = np.diag([1, 1, 1, 0])
    weights |= {"model.classifier.weight": np.eye(3, 4), "model.classifier.bias": np.zeros(3)}
    nodes, tensor = [], "images"
    for name in ("backbone.stem", *(f"backbone.{index}" for index in range(layers)), "classifier"):
        out = "logits" if name == "classifier" else f"{name}_sum"
        inputs = [tensor, f"model.{name}.weight", f"model.{name}.bias"]
        nodes.append(helper.make_node("Conv", inputs, [out], f"conv_{name}", kernel_shape=[1, 1]))
        tensor = out
        if name != "classifier":
            kind = "HardSigmoid" if gate and name == "backbone.1" else "Relu"
            tensor = f"{name}_out"
            nodes.append(helper.make_node(kind, [out], [tensor], f"act_{name}"))
    stored = [
        numpy_helper.from_array((each[..., None, None] if each.ndim == 2 else each).astype(np.float32), name)
        for name, each in weights.items()
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", channels, "height", "width"])
        for name, channels in (("images", 3), ("logits", 3))
    ]
    proto = helper.make_model(
        helper.make_graph(nodes, "network", ends[:1], ends[1:], stored), opset_imports=[helper.make_opsetid("", 18)]
    )
    proto.ir_version = 10
    header = {"format": "ssaseg-deploy-1", "model": "flat_x", "classifier": "linear", "classes": ["stale"] * 3}
    header |= {"palette": None, "mean": [0.0] * 3, "std": [1.0] * 3, "protocol": {"scale": None}, "range": None}
    header |= {"input": "normalized", "output": "logits", "size": None, "smallest": [1, 1], "step": 0, "recipe": None}
    helper.set_model_props(proto, {key: json.dumps(value) for key, value in header.items()})
    return proto.SerializeToString()


def scene(folder: Path, split: str, name: str, classes: Sequence[int], seed: int = 0) -> None:
    """An image in stripes of some classes, whose channels are far or near, and its mask."""
    rng = np.random.default_rng(seed)
    mask = np.resize(np.repeat(classes, SIDE // 4), (SIDE, SIDE)).astype(np.uint8)
    image = rng.integers(0, 90, (SIDE, SIDE, 3))
    np.put_along_axis(image, mask[..., None].astype(int), rng.integers(120, 256, (SIDE, SIDE, 1)), axis=2)
    for kind, pixels in (("images", image.astype(np.uint8)), ("masks", mask)):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / split / f"{name}.png")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a checkpoint, data and a recipe; its export is the graph without outlier."""
    for index, classes in enumerate([(0,), (0,), (0, 1), (2,), (1, 1)]):
        scene(tmp_path / "data", "train", f"t{index}", classes, index)
    for index in range(3):
        scene(tmp_path / "data", "val", f"v{index}", (0, 1, 2), 10 + index)
    folders = {split: {"images": f"images/{split}", "masks": f"masks/{split}"} for split in ("train", "val")}
    data = {"root": str(tmp_path / "data"), "classes": CLASSES, "palette": [[9, 0, 0], [0, 9, 0], [0, 0, 9]], **folders}
    recipe = {"extends": "camvid-seaformer_s-ssa", "data": data}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with flat_network():
        metadata = {"classes": CLASSES, "mean": [0.0] * 3, "std": [1.0] * 3, "protocol": {"scale": None}}
        save_model(tmp_path / "model.safetensors", build_model("flat_x", 3, "linear"), metadata)
        export(tmp_path, monkeypatch, graph_bytes())
        monkeypatch.setattr(quantize, "TIMED", 0.0)
        monkeypatch.setattr(quantize, "WORKERS", 0)
        yield tmp_path


def export(place: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    (place / "float.onnx").write_bytes(content)
    monkeypatch.setattr(quantize, "cached_export", lambda *arguments: place / "float.onnx")


def run(place: Path, *words: str | Path) -> Any:
    return call("quantize", place / "model.safetensors", place / "int8.onnx", "--data", place / "recipe.yaml", *words)


# ---- the whole command -------------------------------------------------------------------------------------------


def test_int8_is_written_with_its_verdict(place: Path) -> None:
    done = run(place, "--images", "3", "--json", place / "report.json")
    assert done.exit_code == 0, done.output
    assert "mIoU 100.00 % → 100.00 %: change +0.00 points, 95 % interval +0.00 to +0.00" in done.output
    assert "int8: 5 of 5 layers\n" in done.output
    assert all(word in done.output for word in ("red", "times as fast", "MiB", "val split, 3 images"))
    report = json.loads((place / "report.json").read_text())
    assert report["float_layers"] == []
    assert report["calibration"] == {"method": "minmax", "images": 3, "missing_classes": []}
    assert report["passes"]
    opened = open_file(place / "int8.onnx")  # for eval, predict and profile
    assert opened.metadata["classes"] == CLASSES
    made = onnx.load(place / "int8.onnx")
    kinds = [each.data_type for each in made.graph.initializer if each.name.endswith("weight_quantized")]
    assert kinds == [onnx.TensorProto.INT8] * 5
    assert [each.op_type for each in made.graph.node][:2] == ["Conv", "Relu"]  # the stem stays float32


def test_weights_have_seven_bits(place: Path) -> None:
    assert run(place).exit_code == 0
    stored = {each.name: each for each in onnx.load(place / "int8.onnx").graph.initializer}
    values = [numpy_helper.to_array(each) for name, each in stored.items() if name.endswith("weight_quantized")]
    assert max(np.abs(each.astype(int)).max() for each in values) == 64


def test_layers_that_cost_most_stay_float(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(place, monkeypatch, graph_bytes(outlier=1e6))
    done = run(place, "--json", place / "report.json")
    assert done.exit_code == 0, done.output
    assert "the mIoU drops by" in done.output
    report = json.loads((place / "report.json").read_text())
    assert sorted(report["float_layers"]) == ["backbone.0", "backbone.1"]
    assert "left in float32: backbone." in done.output
    assert report["change"] == pytest.approx(0)
    written = {each.key: each.value for each in onnx.load(place / "int8.onnx").metadata_props}
    assert json.loads(written["float_layers"]) == ["backbone.0", "backbone.1"]


def test_refuses_and_writes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(place, monkeypatch, graph_bytes(layers=3, outlier=1e6))  # more than half would have to stay float32
    (place / "int8.onnx").write_bytes(b"before")
    done = run(place, "--json", place / "report.json")
    assert done.exit_code == 3
    *_, first, second, third = done.output.strip().split("\n")
    assert "not written: with all layers in int8 the mIoU drops by" in first
    assert "backbone.0" in second
    assert "--max-drop" in third
    assert (place / "int8.onnx").read_bytes() == b"before"
    assert not (place / "report.json").exists()
    assert sorted(each.name for each in place.iterdir() if "partial" in each.name) == []


def test_a_limit_decides(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(place, monkeypatch, graph_bytes(layers=3, outlier=1e6))
    assert run(place, "--max-drop", "100").exit_code == 3  # a class drops too much
    assert run(place, "--max-drop", "100", "--max-class-drop", "100").exit_code == 0


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_other_methods(place: Path, method: str) -> None:
    assert run(place, "--method", method, "--max-drop", "100", "--max-class-drop", "100").exit_code == 0


def test_hard_sigmoid_becomes_int8(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = graph_bytes(gate=True)
    pixels = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
    bounded = Graph(content, {}).proto
    assert "HardSigmoid" not in {node.op_type for node in bounded.graph.node}
    got, expected = (
        onnxruntime.InferenceSession(each).run(None, {"images": pixels})[0]
        for each in (bounded.SerializeToString(), content)
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


# ---- calibration images ------------------------------------------------------------------------------------------


def test_images_are_chosen_by_their_labels(place: Path) -> None:
    recipe = load_recipe(str(place / "recipe.yaml"))
    dataset = build_dataset("folder", "train", root=place / "data", options=recipe.data.model_dump())
    assert choose_images(dataset, 2) == ([2, 3], [])  # red and green, blue
    assert choose_images(dataset, 1) == ([2], ["blue"])
    assert sorted(choose_images(dataset, 99).indices) == [0, 1, 2, 3, 4]


def test_cover_prefers_classes_that_few_images_have() -> None:
    present = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], bool)
    assert cover(present, 4) == [0, 3, 1, 2]
    assert cover(present[:, :2], 2) == [0, 1]
    assert cover(np.zeros((3, 2), bool), 2) == [0, 1]


def test_training_images_alone_are_calibrated_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(dataset: Any, *rest: Any) -> Any:
        seen.append([file.parent.name for file in dataset.image_files])
        return network_inputs(dataset, *rest)

    monkeypatch.setattr(quantize, "network_inputs", spy)
    assert run(place).exit_code == 0
    assert seen == [["train"] * 5]


def test_inputs_are_those_of_the_protocol(place: Path) -> None:
    recipe = load_recipe(str(place / "recipe.yaml"))
    dataset = build_dataset("folder", "train", root=place / "data", options=recipe.data.model_dump())
    windows = recipe.test.model_copy(
        update={"mode": "slide", "crop": (SIDE, SIDE), "stride": (16, 16), "scale": (48, 48)}
    )
    metadata = {"mean": [10.0] * 3, "std": [2.0] * 3, "classes": CLASSES}
    (found,) = network_inputs(dataset, [0], windows, metadata)
    assert [each.shape for each in found] == [(1, 3, SIDE, SIDE)] * 4
    (found,) = network_inputs(dataset, [0], recipe.test, metadata)
    expected = (dataset.load_image(0)[..., ::-1].astype(np.float32).transpose(2, 0, 1)[None] - 10) / 2
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


# ---- search and verdict --------------------------------------------------------------------------------------------


def test_layers_are_ranked_by_error(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"a": 0.1, "b": float("nan"), "c": 0.5}
    costs = rank_layers(list(errors), lambda layers: errors[layers[0]], 1000)
    assert [cost.layers for cost in costs] == [("b",), ("c",), ("a",)]
    together = rank_layers([str(n) for n in range(9)], lambda layers: len(layers), 0)
    assert [cost.layers for cost in together] == [tuple("12345678"), ("0",)]


@pytest.mark.parametrize(("needed", "tried"), [(1, [1]), (3, [1, 2, 4, 3]), (4, [1, 2, 4, 3]), (5, [1, 2, 4])])
def test_fewest_layers_are_left_out(needed: int, tried: list[int]) -> None:
    attempts: list[int] = []

    def attempt(floats: list[str]) -> int | None:
        attempts.append(len(floats))
        return len(floats) if len(floats) >= needed else None

    costs = [Cost((str(n),), 1.0) for n in range(8)]
    assert fewest(costs, attempt, float("inf")) == (needed if needed < 5 else None)
    assert attempts == tried
    attempts.clear()
    assert fewest(costs, attempt, 0) == (1 if needed == 1 else None)  # the time is over: one attempt
    assert attempts == [1]


def counted(*pairs: tuple[int, int]) -> Confusion:
    confusion = Confusion(3)
    for label, prediction in pairs:
        confusion.update(np.full((2, 2), prediction, np.uint8), np.full((2, 2), label, np.uint8))
    return confusion


def test_verdict_is_paired_and_names_classes() -> None:
    before, after = counted((0, 0), (1, 1), (0, 0)), counted((0, 0), (1, 0), (0, 0))
    verdict = judge(before, after, CLASSES, Limits(0.5, 2))
    assert verdict.classes == [("red", 100, pytest.approx(200 / 3)), ("green", 100, 0)]
    assert verdict.excess.startswith(
        "the mIoU drops by 66.67 points (allowed 0.5), green by 100.00 (allowed 2), red by"
    )
    assert judge(before, before, CLASSES, Limits(0, 0)).passes
    assert judge(before, before, CLASSES, Limits(0, 0)).interval[:2] == (0, 0)
    assert judge(after, before, CLASSES, Limits(0, 0)).change > 0
    assert judge(counted((0, 0)), counted((0, 0)), CLASSES, Limits(0, 0)).interval is None


# ---- bad input -----------------------------------------------------------------------------------------------------


def refused(place: Path, *words: str | Path, out: Path | None = None, code: int = 2) -> str:
    """The error of a call that must fail within three lines and write nothing."""
    before = sorted(place.rglob("*"))
    done = call("quantize", place / "model.safetensors", out or place / "int8.onnx", *words)
    assert done.exit_code == code, done.output
    assert sorted(place.rglob("*")) == before
    text = done.output[done.output.index("error:") :]
    assert text.count("\n") <= 3
    return text


def test_what_cannot_be_written_is_refused_before_any_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "folder.onnx").mkdir()
    monkeypatch.setattr(quantize, "open_file", lambda path: pytest.fail("work has started"))
    assert "is a folder" in refused(place, out=place / "folder.onnx")
    assert "ends in .onnx" in refused(place, out=place / "int8.pt2")
    assert "no such folder" in refused(place, out=place / "none" / "int8.onnx")
    (place / "file").write_text("a file")
    assert "no such folder" in refused(place, out=place / "file" / "int8.onnx")
    monkeypatch.setattr("ssaseg.cli.weights.export.find_spec", lambda name: None)
    assert "pip install onnx onnxscript onnxruntime" in refused(place)


def test_what_cannot_be_quantised_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "give --data RECIPE" in refused(place)  # the checkpoint has no recipe
    other = yaml.safe_load((place / "recipe.yaml").read_text())
    other["data"]["classes"] = ["red", "blue", "green"]
    (place / "other.yaml").write_text(yaml.safe_dump(other))
    assert "class 1 is 'green'" in refused(place, "--data", place / "other.yaml")
    other["data"] = {**other["data"], "classes": CLASSES, "train": None}
    (place / "other.yaml").write_text(yaml.safe_dump(other))
    assert "train" in refused(place, "--data", place / "other.yaml")
    export(place, monkeypatch, only_classifier())
    assert "no layer" in refused(place, "--data", place / "recipe.yaml")
    monkeypatch.setattr(quantize, "MASKS", "linear")
    assert "mask method" in refused(place, "--data", place / "recipe.yaml")
    (place / "model.safetensors").unlink()
    done = call("quantize", place / "float.onnx", place / "int8.onnx", "--data", place / "recipe.yaml")
    assert done.exit_code == 2
    assert "quantise the checkpoint" in done.output


def only_classifier() -> bytes:
    proto = onnx.load_from_string(graph_bytes(2))
    kept = [node for node in proto.graph.node if "backbone.0" not in node.name and "backbone.1" not in node.name]
    for node in kept:
        if "classifier" in node.name:
            node.input[0] = "backbone.stem_out"
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return proto.SerializeToString()


def test_missing_classes_and_too_many_images_are_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(place, "--images", "1")
    assert done.exit_code == 0, done.output
    assert "no calibration image has 1 of 3 classes: blue" in done.output
    assert "the training split has 5; all are used" in run(place, "--images", "6").output
    monkeypatch.setattr(calibration, "LOOKED_AT", 1)
    assert "2 of 3 classes: green, blue" in run(place, "--images", "2").output
