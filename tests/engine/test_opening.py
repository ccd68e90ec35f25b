"""Every kind of file gives the labels of the checkpoint that it is from; what cannot be opened is one clear error."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import onnx
import pytest
import torch
from networks import flat_network, tiny_networks, tiny_swin
from places import FIXTURES

from ssaseg import Predictor
from ssaseg.cli.engine.opening import Opened, device_for, make_engine, open_file
from ssaseg.cli.errors import CommandError
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.cli.scoring.inference import Inference
from ssaseg.cli.weights import export
from ssaseg.cli.weights.convert import run_convert
from ssaseg.datasets import DataError
from ssaseg.models import build_model, save_model
from ssaseg.recipes import parse_protocol

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CLASSES = ["road", "car", "tree", "sky", "void"]
SAID = ("model", "classifier", "classes", "palette", "mean", "std", "range", "protocol", "recipe", "step")
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino, an extra, is not installed")
KINDS = [".onnx", ".pt2", pytest.param(".xml", marks=needs_openvino)]


@pytest.fixture(scope="module", autouse=True)
def networks() -> Iterator[None]:
    with flat_network(), tiny_networks():
        yield


@pytest.fixture
def folder() -> Path:
    """A checkpoint and its exports, also some that take RGB and give logits at full size; see make_graphs.py."""
    return FIXTURES / "graphs"


def picture(height: int = 70, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def labels(opened: Opened, engine: Any = None, **changes: Any) -> np.ndarray:
    metadata = opened.metadata
    protocol = parse_protocol({**metadata["protocol"], **changes}, "test")
    inference = Inference(engine or make_engine(opened, CPU), protocol, metadata["mean"], metadata["std"])
    image = picture()
    inputs = [torch.tensor(each) for each in inference.inputs(image, "image")]
    return inference.predict(inputs, image.shape[:2]).labels


def expected(folder: Path, **changes: Any) -> np.ndarray:
    opened = open_file(folder / "model.safetensors")
    assert opened.model is not None
    found = labels(opened, TorchEngine(opened.model, CPU), **changes)
    assert len(np.unique(found)) > 2
    return found


# ---- equal labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_of_graph_labels_as_the_checkpoint(folder: Path, suffix: str) -> None:
    ours, opened = open_file(folder / "model.safetensors"), open_file(folder / f"model{suffix}")
    for key in SAID:
        assert opened.metadata[key] == ours.metadata[key]
    engine = make_engine(opened, CPU)
    assert (engine.channels, engine.num_classes, engine.has_coarse) == (3, 5, False)
    assert ours.model is not None
    for batch, height, width in ((1, 64, 96), (3, 75, 101)):
        pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = ours.model(pixels)
        assert (engine.logits(pixels).final - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (labels(opened) == expected(folder)).mean() > 0.999
    slide = {"mode": "slide", "crop": [64, 64], "stride": [32, 32], "flip": True}
    assert (labels(opened, **slide) == expected(folder, **slide)).mean() > 0.999
    with pytest.raises(DataError, match="at least"):
        engine.logits(torch.zeros(1, 3, 2, 2))


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pth with official names, beside the checkpoint that it is from."""
    path = tmp_path_factory.mktemp("official") / "model.pth"
    torch.manual_seed(0)
    model = build_model("seaformer_y", len(CLASSES), "linear")
    save_model(path.with_suffix(".safetensors"), model, {"classes": CLASSES})
    run_convert(path.with_suffix(".safetensors"), path)
    return path


def test_official_weights_in_memory(official: Path, tmp_path: Path, capsys: Any) -> None:
    """The same network as after `convert`; what matched is said in at most two lines, and nothing is written."""
    opened, ours = open_file(official), open_file(official.with_suffix(".safetensors"))
    said = capsys.readouterr()
    assert said.out == ""
    assert "read as seaformer_y, linear, 5 classes" in said.err
    assert "(100.0 %)" in said.err
    assert len(said.err.splitlines()) <= 2
    assert opened.metadata == ours.metadata
    assert opened.model is not None
    assert ours.model is not None
    assert not opened.model.training
    state = opened.model.state_dict()
    for key, value in ours.model.state_dict().items():
        assert torch.equal(state[key], value)
    named = open_file(official, "a,b,c,d,e", recipe(tmp_path / "my.yaml"))
    assert (named.metadata["classes"], named.metadata["mean"]) == ([*"abcde"], [1, 2, 3])
    assert "5 classes, --classes names 2" in refusal(official, "a,b")
    assert len([*official.parent.iterdir()]) == 2


def test_a_folder_of_transformers(tmp_path: Path, capsys: Any) -> None:
    with tiny_swin():
        model = build_model("upernet_swin_x", 2, "linear").eval()
        save_model(tmp_path / "model.safetensors", model, {"classes": ["land", "water"]})
        run_convert(tmp_path / "model.safetensors", tmp_path / "folder")
        capsys.readouterr()
        opened = open_file(tmp_path / "folder")
    assert opened.metadata["classes"] == ["land", "water"]
    assert opened.model is not None
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(opened.model(pixels), model(pixels))
    assert len(capsys.readouterr().err.splitlines()) <= 2


@pytest.mark.parametrize("suffix", KINDS)
def test_graphs_that_normalise_and_upsample(folder: Path, suffix: str) -> None:
    opened = open_file(folder / f"rgb{suffix}")
    assert make_engine(opened, CPU).takes == "rgb"
    assert (labels(opened) == expected(folder)).mean() > 0.999
    slide = {"mode": "slide", "crop": [64, 64], "stride": [16, 32], "flip": True, "ratios": [1.0, 1.5]}
    assert (labels(opened, **slide) == expected(folder, **slide)).mean() > 0.999


def test_predictor_takes_any_file(folder: Path, tmp_path: Path) -> None:
    image = picture()
    expected = Predictor(folder / "model.safetensors")(image)
    assert (Predictor(folder / "model.onnx")(image) == expected).mean() > 0.999
    path = foreign(tmp_path / "other.onnx")
    predictor = Predictor(path, classes="land,water", protocol=recipe(tmp_path / "my.yaml"))
    assert predictor.classes == ("land", "water")
    assert predictor(image).shape == (70, 90)
    with pytest.raises(ValueError, match="backend is 'tensorrt'"):
        Predictor(path, backend="tensorrt")


@pytest.mark.parametrize("suffix", KINDS)
def test_several_threads(folder: Path, suffix: str) -> None:
    opened = open_file(folder / f"model{suffix}")
    engine = make_engine(opened, CPU)
    batches = [torch.full((1, 3, 64, 64 + 32 * k), float(k)) for k in range(4)] * 4
    alone = [engine.logits(each).final for each in batches]
    with ThreadPoolExecutor(4, initializer=lambda: torch.set_num_threads(1)) as pool:
        together = list(pool.map(lambda each: engine.logits(each).final, batches))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)


# ---- files of others ---------------------------------------------------------------------------------------------


def foreign(path: Path, classes: int = 2, type_: int = onnx.TensorProto.FLOAT, **changes: Any) -> Path:
    """An ONNX file without our metadata: one convolution of stride 8."""
    shape = changes.get("shape", ["n", 3, "h", "w"])
    weights = onnx.numpy_helper.from_array(np.arange(classes * 192, dtype=np.float32).reshape(classes, 3, 8, 8), "w")
    made = [onnx.helper.make_node("Conv", ["images", "w"], ["found"], strides=[8, 8])]
    result = onnx.helper.make_tensor_value_info("found", onnx.TensorProto.FLOAT, [shape[0], classes, "a", "b"])
    if changes.get("labels"):
        made.append(onnx.helper.make_node("ArgMax", ["found"], ["labels"], axis=1))
        result = onnx.helper.make_tensor_value_info("labels", onnx.TensorProto.INT64, None)
    images = onnx.helper.make_tensor_value_info("images", type_, shape)
    graph = onnx.helper.make_graph(made, "graph", [images], [result], [weights])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(proto.SerializeToString())
    return path


def recipe(path: Path) -> str:
    path.write_text(
        "name: other\nextends: demo\ntest: {scale: [64, 64]}\ndata: {mean: [1, 2, 3], std: [4, 5, 6]}\n",
        encoding="utf-8",
    )
    return str(path)


def test_foreign_graph(tmp_path: Path) -> None:
    path = foreign(tmp_path / "other.onnx")
    names = tmp_path / "names.txt"
    names.write_text("land\nwater\n", encoding="utf-8")
    opened = open_file(path, str(names), recipe(tmp_path / "my.yaml"))
    assert opened.metadata["classes"] == ["land", "water"]
    assert (opened.metadata["mean"], opened.metadata["protocol"]["scale"]) == ([1, 2, 3], [64, 64])
    assert labels(opened).shape == (70, 90)
    assert open_file(path, "land,water", recipe(tmp_path / "my.yaml")).metadata["classes"] == ["land", "water"]
    many = foreign(tmp_path / "many.onnx", 19)
    assert open_file(many, "cityscapes").metadata["protocol"]["scale"] == [2048, 1024]  # a data set has a protocol


def test_foreign_graph_of_one_batch_and_size(tmp_path: Path) -> None:
    path = foreign(tmp_path / "other.onnx", shape=[2, 3, 64, 96])
    opened = open_file(path, "land,water", recipe(tmp_path / "my.yaml"))
    engine = make_engine(opened, CPU)
    pixels = torch.rand(5, 3, 64, 96)
    found = engine.logits(pixels).final
    assert found.shape == (5, 2, 8, 12)
    assert torch.equal(engine.logits(pixels[4:]).final, found[4:])
    with pytest.raises(DataError, match=r"only 64 x 96 pixels .*, got 96 x 64 as"):
        engine.logits(torch.rand(1, 3, 96, 64))


# ---- what is refused ---------------------------------------------------------------------------------------------


def refusal(*arguments: Any, of: Any = open_file) -> str:
    with pytest.raises((CommandError, OSError, ValueError)) as caught:
        of(*arguments)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def test_foreign_graphs_that_are_refused(folder: Path, tmp_path: Path) -> None:
    path, protocol = foreign(tmp_path / "other.onnx"), recipe(tmp_path / "my.yaml")
    assert "--classes and --protocol" in refusal(path)
    assert "give --protocol" in refusal(path, "land,water")
    assert "give --classes" in refusal(path, None, protocol)
    assert "2 classes, but 3 have names" in refusal(path, "land,water,sky", protocol)
    assert "no such data set" in refusal(path, "atlantis", protocol)
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\xfd")
    assert "names.txt: cannot be read" in refusal(path, str(tmp_path / "names.txt"), protocol)
    for name in ("model.safetensors", "model.onnx"):
        assert "leave out --classes" in refusal(folder / name, "land,water", protocol)
    doubles = foreign(tmp_path / "doubles.onnx", type_=onnx.TensorProto.DOUBLE)
    assert "takes double (?,3,?,?)" in refusal(doubles, "land,water", protocol)
    last = foreign(tmp_path / "last.onnx", shape=[1, 64, 64, 3])
    assert "expected one input" in refusal(last, "land,water", protocol)
    given = foreign(tmp_path / "labels.onnx", labels=True)
    assert "--output logits" in refusal(given, "land,water", protocol)
    bands = foreign(tmp_path / "bands.onnx", shape=["n", 4, "h", "w"])
    assert "takes 4 channels, but mean has 3" in refusal(bands, "land,water", protocol)
    wrong = make_engine(open_file(bands.with_name("other.onnx"), "land,water", protocol), CPU)
    with pytest.raises(DataError, match="cannot compute"):
        wrong.logits(torch.rand(1, 5, 64, 64))


def test_weights_in_other_files_are_not_opened(tmp_path: Path) -> None:
    path = foreign(tmp_path / "other.onnx")
    proto = onnx.load_model(path)
    onnx.save_model(proto, tmp_path / "outside.onnx", save_as_external_data=True, size_threshold=0)
    protocol = recipe(tmp_path / "my.yaml")
    assert "in other files" in refusal(tmp_path / "outside.onnx", "land,water", protocol)
    outside = onnx.load_model(tmp_path / "outside.onnx", load_external_data=False)
    inner = onnx.helper.make_graph([], "inner", [], [], outside.graph.initializer)
    proto.graph.node.append(onnx.helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner))
    (tmp_path / "inside.onnx").write_bytes(proto.SerializeToString())
    assert "in other files" in refusal(tmp_path / "inside.onnx", "land,water", protocol)


@pytest.mark.parametrize("suffix", KINDS)
def test_damaged_files(folder: Path, tmp_path: Path, suffix: str) -> None:
    content = (folder / f"model{suffix}").read_bytes()
    path = tmp_path / f"bad{suffix}"
    if suffix == ".xml":
        path.with_suffix(".bin").write_bytes((folder / "model.bin").read_bytes())
    for bad in (b"", b"PK\x03\x04", content[: len(content) // 2], bytes(1000), content[::-1]):
        path.write_bytes(bad)
        assert str(path) in refusal(path)
    path.unlink()
    assert str(path) in refusal(path)


@needs_openvino
def test_an_xml_without_its_weights(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_bytes((folder / "model.xml").read_bytes())
    assert "model.bin, are not beside it" in refusal(path)
    path.with_suffix(".bin").write_bytes(b"123")
    assert str(path) in refusal(path)


def repacked(path: Path, into: Path, record: str, change: Any) -> Path:
    """A .pt2 with another content of one of its JSON records."""
    with ZipFile(path) as old, ZipFile(into, "w", ZIP_STORED) as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith(record):
                value = json.loads(content)
                change(value)
                content = json.dumps(value).encode()
            new.writestr(info.filename, content)
    return into


def test_a_pt2_runs_nothing_but_operations(folder: Path, tmp_path: Path) -> None:
    """What PyTorch's own loader would call, unpickle or evaluate."""

    def call(model: Any, target: str) -> None:
        node = model["graph_module"]["graph"]["nodes"][-1]
        node["target"] = target
        node["inputs"] = [{"name": "path", "arg": {"as_string": str(tmp_path / "called")}, "kind": 1}]

    def pickled(config: Any) -> None:
        next(iter(config["config"].values()))["use_pickle"] = True

    def beyond(config: Any) -> None:
        next(iter(config["config"].values()))["tensor_meta"]["storage_offset"] = {"as_int": 10**9}

    def guarded(model: Any) -> None:
        model["guards_code"] = [f"__import__('os').mkdir({str(tmp_path / 'called')!r})"]

    source = folder / "model.pt2"
    for target in ("torch.os.mkdir", "torch.ops.aten.from_file.default", "builtins.exec", "torch.ops.aten.__class__"):
        bad = repacked(
            source,
            tmp_path / "call.pt2",
            "models/model.json",
            partial(call, target=target),
        )
        assert f"not known: {target}" in refusal(bad)
    assert "pickle" in refusal(repacked(source, tmp_path / "pickle.pt2", "model_weights_config.json", pickled))
    assert "cannot be read" in refusal(repacked(source, tmp_path / "far.pt2", "model_weights_config.json", beyond))
    opened = open_file(repacked(source, tmp_path / "guards.pt2", "models/model.json", guarded))
    assert (labels(opened) == expected(folder)).mean() > 0.999  # texts of Python are never looked at
    assert not (tmp_path / "called").exists()


def test_weights_that_are_no_network(official: Path, tmp_path: Path) -> None:
    content = torch.load(official, weights_only=True)
    weights = content["state_dict"]
    torch.save({key: value for key, value in weights.items() if key.startswith("backbone")}, tmp_path / "backbone.pth")
    assert "only a backbone" in refusal(tmp_path / "backbone.pth")
    del weights["decode_head.conv_seg.bias"]
    torch.save(content, tmp_path / "part.pth")
    assert "ssaseg convert" in refusal(tmp_path / "part.pth")


def test_options_that_do_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, ours = open_file(folder / "model.onnx"), open_file(folder / "model.safetensors")
    assert "--exact" in refusal(graph, CPU, "float32", "auto", True, of=make_engine)
    assert "use onnxruntime or openvino" in refusal(graph, CPU, "float32", "torch", of=make_engine)
    assert "use one of: auto, float32" in refusal(graph, CPU, "bf16", of=make_engine)
    assert "use one of: auto, float32" in refusal(ours, CPU, "fp16", of=make_engine)
    assert "--device cuda: " in refusal(graph, "cuda", of=device_for)
    assert device_for(graph, "auto") == CPU
    assert "not with --exact" in refusal(ours, CPU, "float32", "onnxruntime", True, of=make_engine)
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else name)
    assert refusal(folder / "model.onnx").endswith("pip install onnxruntime")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "openvino" else name)
    assert refusal(folder / "model.xml").endswith("pip install openvino")
    assert refusal(graph, CPU, "float32", "openvino", of=make_engine).endswith("pip install openvino")
    assert refusal(ours, CPU, "float32", "openvino", of=make_engine).endswith("pip install openvino")
