"""A checkpoint of ours from anywhere: the header is checked before a network is built, and tensors before reading."""

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssaseg.models import CheckpointError, build_model, load_model, save_model
from ssaseg.models.checkpoint import read_header
from ssaseg.models.header import DEFAULTS

METADATA: dict[str, Any] = {
    "classes": ["a", "b", "c"],
    "palette": [[0, 0, 0], [1, 2, 3], [255, 255, 255]],
    "recipe": {"name": "x"},
    "step": 12,
    "scores": {"mIoU": 42.5},
}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    torch.manual_seed(0)
    save_model(path, build_model("seaformer_t", 3, "linear"), METADATA)
    return path.read_bytes()


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def whole(head: Any, data: bytes) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def changed(path: Path, content: bytes, key: str, text: str | None) -> Path:
    """The checkpoint with another text under one key of its header; None: without the key."""
    head, data = parts(content)
    head["__metadata__"].pop(key)
    if text is not None:
        head["__metadata__"][key] = text
    path.write_bytes(whole(head, data))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) <= 3
    assert len(message) < 900
    return message


WRONG = {
    "model": ["[1]", "null", "3", '{"a": 1}', '"' + "a" * 2000 + '"', '"a\\u001b[31m"', '"\\ud800"', DEEP],
    "classifier": ["[]", "null", "true", '"cosine"'],
    "classes": ["5", "null", "[]", "[1, 2, 3]", '{"a": 1, "b": 2, "c": 3}', '["a", "b", null]', '"abc"', 
                '["a", "\\ud800", "c"]', json.dumps(["x"] * 5000), DEEP],
    "palette": ["[[256, 0, 0]]", "[[0, 0, 0]]", "[]", "5", "[[0, 0], [0, 0], [0, 0]]",
                "[[0, 0, -1], [0, 0, 0], [0, 0, 0]]",
                "[[0, 0, 0.5], [0, 0, 0], [0, 0, 0]]", "[[true, 0, 0], [0, 0, 0], [0, 0, 0]]", '["red", "red", "red"]'],
    "mean": ["[1, 2]", "[1, 2, null]", "5", "null", "[NaN, 1, 1]", "[Infinity, 1, 1]", "[1e39, 1, 1]",
             '["1", "2", "3"]', "[true, 1, 1]", f"[1{'0' * 400}, 1, 1]", f"[1{'0' * 5000}, 1, 1]"],
    "std": ["[0, 0, 0]", "[1, 1, 0]", "[-1, 1, 1]", "[NaN, 1, 1]", "[Infinity, 1, 1]", "[1e-40, 1, 1]", "[1, 1]", "{}"],
    "range": ["[1]", "[5, 5]", "[9, 1]", "[0, 65536]", "[0.5, 9]", "[true, 9]", "5", "{}", "[NaN, 9]", DEEP],
    "protocol": ["null", "[1]", "5", '"whole"', DEEP],
    "recipe": ["[1]", "5", '"demo"', "false", "{", DEEP],
    "step": ["-1", "1.5", "null", "true", '"3"', "[]", "1e400", f"1{'0' * 400}"],
    "scores": ["[]", "null", "5", DEEP],
    "format": ['"ssaseg-2"', "5", "[]", "null", "nonsense", DEEP],
}  # fmt: skip


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in WRONG.items() for text in texts])
def test_values_of_another_type_or_range(tmp_path: Path, content: bytes, key: str, text: str) -> None:
    message = refusal(changed(tmp_path / "odd.safetensors", content, key, text))
    assert key in message
    assert "\x1b" not in message


@pytest.mark.parametrize("deploy", ["5", "null", "{}", '{"weights": "int4", "without": []}', '{"weights": "float16"}',
                                    '{"weights": "float16", "without": [5]}'])  # fmt: skip
def test_deploy_is_described(tmp_path: Path, content: bytes, deploy: str) -> None:
    head, data = parts(content)
    head["__metadata__"]["deploy"] = deploy
    (tmp_path / "odd.safetensors").write_bytes(whole(head, data))
    assert "deploy in its header" in refusal(tmp_path / "odd.safetensors")


def test_what_save_model_writes_is_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert load_model(path)[1].items() >= METADATA.items()
    for key in DEFAULTS:
        metadata, outline = read_header(changed(path, content, key, None))
        assert metadata[key] == DEFAULTS[key]
    assert len(outline) == len(build_model("seaformer_t", 3, "linear").state_dict())
    unusual = ["", " ", "Bäume/🌲", "a\nb"]
    for classes in (unusual[:3], ["same", "same", "same"]):
        changed(path, content, "classes", json.dumps(classes))
        assert load_model(path)[1]["classes"] == classes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    model = build_model("seaformer_t", 3, "linear")
    model.state_dict()["classifier.conv_seg.weight"].view(-1)[3] = value
    save_model(tmp_path / "odd.safetensors", model, {})
    message = refusal(tmp_path / "odd.safetensors")
    assert "classifier.conv_seg.weight has 1 of" in message
    assert "values that are NaN or infinite" in message


def test_types_of_tensors(tmp_path: Path, content: bytes) -> None:
    """Smaller floats are taken. Values that float32 cannot hold are not, and complex numbers, integers and float8 are
    told by key.
    """
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    tensors, header = load_file(path), parts(content)[0]["__metadata__"]
    key = "classifier.conv_seg.bias"
    save_file({**tensors, key: tensors[key].half()}, path, header)
    assert torch.equal(load_model(path)[0].state_dict()[key], tensors[key].half().float())
    for value, message in (
        (torch.full((3,), 1e300, dtype=torch.float64), "has 3 of 3 values that are NaN or infinite"),
        (torch.zeros(3, dtype=torch.complex64), "is of type C64, expected torch.float32"),
        (torch.zeros(3, dtype=torch.int64), "is of type I64, expected torch.float32"),
        (torch.zeros(3).to(torch.float8_e5m2), "is of type F8_E5M2"),
    ):
        save_file({**tensors, key: value}, path, header)
        assert f"{key} {message}" in refusal(path)


def test_tensors_are_compared_before_they_are_read(tmp_path: Path, content: bytes) -> None:
    """A sparse file of 64 GB is refused by its outline, without reading them; so are other names."""
    head, _ = parts(content)
    path = tmp_path / "sparse.safetensors"
    for key in ("classifier.conv_seg.bias", "extra\x1b"):
        shape = [2**34]
        odd = {"__metadata__": head["__metadata__"], key: {"dtype": "F32", "shape": shape, "data_offsets": [0, 2**36]}}
        path.write_bytes(whole(odd, b""))
        os.truncate(path, path.stat().st_size + 2**36)
        tracemalloc.start()
        message = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2**25
        tracemalloc.stop()
        assert "keys missing" in message
        assert "\x1b" not in message


def test_large_headers(tmp_path: Path, content: bytes) -> None:
    """Neither their length nor what is in them costs more than a small multiple of 8 MB."""
    path = tmp_path / "odd.safetensors"
    head, data = parts(content)
    head["__metadata__"]["scores"] = "[" + "[]," * 2**22 + "[]]"
    path.write_bytes(whole(head, data))
    assert "its header would have" in refusal(path)
    for length in (2**63, 2**40, 100_000_001):
        path.write_bytes(struct.pack("<Q", length) + content[8:])
        assert f"{length} bytes" in refusal(path)


@pytest.mark.parametrize(
    "head",
    [
        b"[" * 5000,
        b"{}",
        b'{"a": 5}',
        b'{"__metadata__": {"format": 5}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b"\xff\xfe",
        b"",
    ],
    ids=range(11),
)
def test_files_that_safetensors_refuses(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "odd.safetensors").write_bytes(whole(head, bytes(4)))
    refusal(tmp_path / "odd.safetensors")


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    for name in ("pipe.safetensors", "zero.safetensors"):
        with pytest.raises(OSError, match="not a regular file"):
            load_model(tmp_path / name)
    with pytest.raises(OSError, match="Is a directory"):
        load_model(tmp_path)
