"""Pickles written by hand, opcode by opcode, archives around them like those of torch.save, and errors about them."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from ssaseg.cli.errors import CommandError
from ssaseg.cli.weights.foreign import read_weights

NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"


def text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def raw(content: bytes) -> bytes:
    """Bytes as protocol 2 writes them."""
    return call("_codecs.encode", text(content.decode("latin1")), text("latin1"))


def name(full: str) -> bytes:
    module, _, leaf = full.rpartition(".")
    return b"c" + module.encode() + b"\n" + leaf.encode() + b"\n"


def several(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def call(function: str, *arguments: bytes) -> bytes:
    return name(function) + several(*arguments) + b"R"


def build(target: bytes, state: bytes) -> bytes:
    return target + state + b"b"


def mapping(values: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def storage(length: int = 4, kind: str = "torch.FloatStorage", key: str = "0") -> bytes:
    return several(text("storage"), name(kind), text(key), text("cpu"), number(length)) + b"Q"


def tensor(
    shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,), offset: int = 0, of: bytes | None = None
) -> bytes:
    sizes, steps = several(*map(number, shape)), several(*map(number, strides))
    hooks = call("collections.OrderedDict")
    made = of if of is not None else storage()
    return call("torch._utils._rebuild_tensor_v2", made, number(offset), sizes, steps, FALSE, hooks)


def dtype(code: str, state: bytes | None = None) -> bytes:
    """A NumPy type, with the usual state if none is given."""
    made = call("numpy.dtype", text(code), FALSE, TRUE)
    usual = several(number(3), text("<"), NONE, NONE, NONE, number(-1), number(-1), number(0))
    return build(made, state or usual)


def array(shape: tuple[int, ...], kind: bytes, content: bytes) -> bytes:
    empty = call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), several(number(0)), raw(b"b"))
    return build(empty, several(number(1), several(*map(number, shape)), kind, FALSE, content))


def archive(
    path: Path, body: bytes, storages: Mapping[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    """A zip file like those of torch.save; `body`: of the pickle; storages by key, by default 16 zero bytes as "0"."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled(body))
        file.writestr("archive/byteorder", "little")
        for key, content in ({"0": bytes(16)} if storages is None else storages).items():
            file.writestr(f"archive/data/{key}", content)
        file.writestr("archive/version", "3\n")
    return path


def refusal(path: Path) -> str:
    """The error about a file: the file first, at most three lines."""
    with pytest.raises(CommandError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) <= 3
    assert message.isprintable() or "\n" in message
    return message
