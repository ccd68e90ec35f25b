"""Checkpoints in another runtime: when, and the folder of exports."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import convert, done
from networks import flat_network
from places import FIXTURES

from ssaseg.cli.engine import exports
from ssaseg.cli.engine.exports import LONG, LONG_IF_THERE, cache_folder, choose_backend, export_path
from ssaseg.cli.engine.opening import make_engine, open_file
from ssaseg.cli.errors import CommandError
from ssaseg.cli.weights import export
from ssaseg.cli.weights.export import Made

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
GRAPHS = FIXTURES / "graphs"  # of one network, see make_graphs.py


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SSASEG_CACHE", str(tmp_path / "cache"))
    with flat_network():
        path = tmp_path / "model.safetensors"
        path.write_bytes((GRAPHS / "model.safetensors").read_bytes())
        yield path


def test_an_export_is_made_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    content = (GRAPHS / "model.onnx").read_bytes()  # to make it takes seconds
    monkeypatch.setattr(exports, "make_export", lambda *arguments: Made(content, None, (16, 16)))
    opened = open_file(checkpoint)
    engine = make_engine(opened, CPU, backend="onnxruntime")
    assert engine.what == "onnxruntime, float32"
    pixels = torch.rand(1, 3, 64, 96)
    assert opened.model is not None
    with torch.no_grad():
        torch.testing.assert_close(engine.logits(pixels).final, opened.model(pixels), rtol=1e-4, atol=1e-4)
    (kept,) = (checkpoint.parent / "cache" / "exports").iterdir()
    said = capsys.readouterr()
    assert said.out == ""
    assert str(kept) in said.err
    assert f"rm -r {kept.parent}" in said.err
    assert [each.name for each in checkpoint.parent.iterdir()] == ["cache", checkpoint.name]

    def fails(*arguments: object) -> Made:
        raise CommandError("not again", 3)

    monkeypatch.setattr(exports, "make_export", fails)
    make_engine(opened, CPU, backend="onnxruntime")
    assert capsys.readouterr().err == ""
    kept.unlink()
    with pytest.raises(CommandError, match="not again"):
        make_engine(opened, CPU, backend="onnxruntime")
    monkeypatch.setattr("ssaseg.cli.engine.opening.choose_backend", lambda *arguments: "onnxruntime")
    assert make_engine(opened, CPU).what == "torch, folded, float32"  # auto needs none
    assert "torch is used" in capsys.readouterr().err


def test_auto_exports_for_long_runs_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_file(checkpoint).model
    assert model is not None
    installed = {"onnx", "onnxscript", "onnxruntime"}
    monkeypatch.setattr(exports, "find_spec", lambda name: name if name in installed else None)
    assert choose_backend(model, CPU, LONG) == "onnxruntime"
    assert choose_backend(model, CPU, LONG - 1) == "torch"
    assert choose_backend(model, torch.device("cuda"), LONG) == "torch"
    export_path(model).parent.mkdir(parents=True)
    export_path(model).touch()
    assert choose_backend(model, CPU, LONG_IF_THERE) == "onnxruntime"
    assert choose_backend(model, CPU, LONG_IF_THERE - 1) == "torch"
    assert choose_backend(model, CPU, LONG, "bf16") == "torch"
    installed.add("openvino")
    monkeypatch.setattr(exports.openvino_files, "computes_in", lambda precision: precision != "fp16")
    assert choose_backend(model, CPU, LONG) == choose_backend(model, CPU, LONG, "bf16") == "openvino"
    monkeypatch.setattr(exports.openvino_files, "computes_in", lambda precision: precision == "float32")
    assert choose_backend(model, CPU, LONG) == "onnxruntime"
    installed.remove("onnxscript")
    assert choose_backend(model, CPU, LONG) == "torch"


def test_the_folder_of_exports(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_file(checkpoint).model
    assert model is not None
    before = export_path(model)
    with torch.no_grad():
        model.classifier.conv_seg.bias[0] += 1e-3
    assert export_path(model) != before
    monkeypatch.delenv("SSASEG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/ssaseg")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "ssaseg"


def test_openvinos_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The .xml and its .bin, verified against PyTorch; the graph and the ONNX before them are those of the fixtures."""
    pytest.importorskip("openvino", reason="openvino, an extra, is not installed")
    monkeypatch.setattr(export, "_program", lambda *arguments: None)
    monkeypatch.setattr(export, "smallest", lambda program: (16, 16))
    monkeypatch.setattr(export, "onnx_bytes", lambda *arguments: (GRAPHS / "model.onnx").read_bytes())
    with flat_network():
        said = done(GRAPHS / "model.safetensors", tmp_path / "new" / "made.xml")
        assert "made.xml and its .bin" in said
        assert "scene val_00001 1x3x192x256" in said
        opened, ours = open_file(tmp_path / "new" / "made.xml"), open_file(GRAPHS / "model.safetensors")
        assert opened.metadata["protocol"] == ours.metadata["protocol"]
        assert opened.metadata["classes"] == ours.metadata["classes"]
        monkeypatch.setattr(export, "onnx_bytes", lambda *arguments: (GRAPHS / "rgb.onnx").read_bytes())
        refused = convert(GRAPHS / "model.safetensors", tmp_path / "wrong.xml")
    assert refused.exit_code == 3
    assert "wrong.xml: not written" in refused.stderr
    assert not (tmp_path / "wrong.xml").exists()
    assert not (tmp_path / "wrong.bin").exists()
