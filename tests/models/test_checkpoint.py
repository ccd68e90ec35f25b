"""Checkpoints: what is saved comes back, what does not fit is refused, and a disk that refuses costs nothing."""

import errno
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssaseg.files.writing import write_atomic
from ssaseg.models import CheckpointError, Segmenter, build_model, load_model, save_model

METADATA: dict[str, Any] = {
    "classes": ["sky", "road", "Bäume"],
    "palette": [[0, 0, 0], [1, 2, 3], [255, 255, 255]],
    "mean": [1.5, 2.0, 3.0],
    "range": [0, 4095],
    "std": [1.0, 2.0, 4.0],
    "protocol": {"scale": [2048, 512], "multiple": 32},
    "recipe": {"name": "x", "optim": {"lr": 2.5e-4}},
    "step": 12,
    "scores": {"mIoU": 42.5},
}


def network(classes: int = 3, classifier: str = "ssa") -> Segmenter:
    """Weights and buffers unlike fresh ones."""
    torch.manual_seed(1)
    model = build_model("seaformer_t", classes, classifier)
    for value in model.state_dict().values():
        value.add_(0.01 * torch.rand_like(value) if value.is_floating_point() else 3)
    return model


def header(**changes: Any) -> dict[str, str]:
    """A header as `save_model` writes it, changed."""
    known = {"format": "ssaseg-1", "model": "seaformer_t", "classifier": "ssa", "classes": ["a", "b", "c"]}
    return {key: json.dumps(value) for key, value in {**known, **changes}.items()}


@pytest.mark.parametrize("classifier", ["ssa", "linear"])
def test_round_trip(tmp_path: Path, classifier: str) -> None:
    """Every tensor bit for bit, the teacher branch and BatchNorm's buffers too; every key of the metadata."""
    model = network(classifier=classifier)
    save_model(tmp_path / "new" / "model.safetensors", model, METADATA)
    loaded, metadata = load_model(tmp_path / "new" / "model.safetensors")
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in expected.items())
    assert ("classifier.teacher.merge.weight" in state) == (classifier == "ssa")
    assert "backbone.stem.norm.num_batches_tracked" in state
    assert metadata == {**METADATA, "format": "ssaseg-1", "model": "seaformer_t", "classifier": classifier}
    assert not any(module.training for module in loaded.modules())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))


def test_metadata_left_out_is_filled_in(tmp_path: Path) -> None:
    save_model(tmp_path / "model.safetensors", network(), {})
    metadata = load_model(tmp_path / "model.safetensors")[1]
    assert metadata["classes"] == ["class_0", "class_1", "class_2"]
    assert metadata["mean"] == [123.675, 116.28, 103.53]
    assert metadata["protocol"] == {"scale": None, "multiple": None}
    with pytest.raises(ValueError, match="names 2 classes, the model has 3"):
        save_model(tmp_path / "other.safetensors", network(), {"classes": ["a", "b"]})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated(tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, network(), METADATA)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_other_files(tmp_path: Path) -> None:
    """A pickle, another library's safetensors, an unknown format of ours, no file at all."""
    torch.save(network().state_dict(), tmp_path / "model.pth")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors", {"format": "pt"})
    save_file({"a": torch.zeros(2)}, tmp_path / "later.safetensors", header(format="ssaseg-2"))
    for name, message in (
        ("model.pth", "a .pth to convert"),
        ("other.safetensors", "other.safetensors"),
        ("later.safetensors", "ssaseg-2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_model(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["a", "b"]}, r"conv_seg.* is \(3,.*expected \(2,|spatial_prototypes is \(3"),
        ({"model": "seaformer_s"}, "does not fit the model"),
        ({"classifier": "linear"}, "unexpected"),
        ({"model": "resnet"}, "'resnet' is not known"),
        ({"classifier": "cosine"}, "'cosine' is not known"),
    ],
)
def test_header_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, network(), METADATA)
    save_file(load_file(path), path, header(**changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_one_key_too_few_or_too_many(tmp_path: Path) -> None:
    state = network().state_dict()
    few = {key: value for key, value in state.items() if key != "decoder.output.conv.weight"}
    for tensors, message in ((few, "decoder.output.conv.weight"), ({**state, "extra": torch.zeros(1)}, "first: extra")):
        save_file(tensors, tmp_path / "model.safetensors", header())
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "model.safetensors")


def full(*_arguments: Any, **_options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_write_that_stops_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    """The system itself ends the write, as a full disk would: no file may grow beyond 1000 bytes."""
    path = tmp_path / "model.safetensors"
    save_model(path, network(), METADATA)
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_model(path, build_model("seaformer_t", 3), METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_disk_full_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """The old checkpoint stays bit for bit, without a partial file, if any step of the writer fails."""
    path = tmp_path / "model.safetensors"
    save_model(path, network(), METADATA)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(OSError, match="No space left"):
            save_model(path, build_model("seaformer_t", 3), METADATA)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save_model(path, build_model("seaformer_t", 3), METADATA)  # the disk has room again
    assert path.read_bytes() != before


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        save_model(tmp_path / "file" / "model.safetensors", network(), METADATA)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_links_are_followed_and_devices_stay_devices(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"content"
    write_atomic(Path(os.devnull), b"content")
    assert Path(os.devnull).is_char_device()
