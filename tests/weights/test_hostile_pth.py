"""A .pth from anywhere: nothing is called, no memory is read that is not the file's, nothing grows beyond the file."""

import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pickled as p
import pytest
import torch
from pickled import refusal
from torch import Tensor

from ssaseg.cli.weights import pickles
from ssaseg.cli.weights.foreign import read_weights

pytestmark = pytest.mark.filterwarnings("error")
KEY = "backbone.x"
HOOKS = p.call("collections.OrderedDict")


def among_weights(value: bytes) -> bytes:
    return p.mapping({"state_dict": p.mapping({KEY: value})})


# ---- NumPy -------------------------------------------------------------------------------------------------

SUB_ARRAY = p.several(
    p.number(3), p.text("|"), p.several(p.dtype("u1"), p.several(p.number(24576))), p.NONE, p.NONE,
    p.number(-1), p.number(-1), p.number(0),
)  # fmt: skip


def sized(size: int) -> bytes:
    """The state of a NumPy type of another item size."""
    return p.several(p.number(3), p.text("|"), p.NONE, p.NONE, p.NONE, p.number(size), p.number(1), p.number(0))


@pytest.mark.parametrize(
    "value",
    [
        p.array((24576,), p.dtype("u1", SUB_ARRAY), p.raw(b"A" * 8)),
        p.array((2,), p.dtype("f4", sized(-8)), p.raw(b"A" * 8)),
        p.array((2,), p.dtype("f4", sized(2**31 - 1)), p.raw(b"A" * 8)),
        p.array((3,), p.dtype("f4"), p.raw(b"A" * 8)),
        p.array((2**39,), p.dtype("f4"), p.raw(b"A" * 8)),
        p.array((-2,), p.dtype("f4"), p.raw(b"A" * 8)),
        p.array((2, -1), p.dtype("f4"), p.raw(b"A" * 8)),
        p.array((1,), p.dtype("O8"), p.raw(b"A" * 8)),
        p.array((1,), p.dtype("S8", sized(-8)), p.raw(b"A" * 8)),
        p.array((1,), p.dtype("V8"), p.raw(b"A" * 8)),
        p.array((2,), p.text("f4"), p.raw(b"A" * 8)),
        p.array((2,), p.dtype("f4"), p.number(1)),
        p.call("numpy.core.multiarray.scalar", p.dtype("S8", sized(-8)), p.raw(b"A" * 8)),
        p.call("numpy.core.multiarray._reconstruct", p.name("numpy.ndarray"), p.several(p.number(2**31)), p.raw(b"b")),
        p.call("numpy.ndarray", p.several(), p.dtype("u1"), p.raw(b"A" * 8)),
        p.build(p.name("numpy.ndarray"), p.several(p.NONE, p.mapping({"__call__": p.NONE}))),
        p.build(p.name("torch.Tensor"), p.several(p.NONE, p.mapping({"__call__": p.NONE}))),
        p.call("numpy._core.numeric._frombuffer", p.raw(b"A" * 8), p.dtype("f4"), p.several(p.number(9)), p.text("C")),
        p.call("numpy._core.numeric._frombuffer", p.storage(), p.dtype("f4"), p.several(p.number(2)), p.text("C")),
        p.call("numpy.dtype", p.number(8)),
        p.call("numpy.dtype", p.several(p.text("u1"), p.number(2**31))),
    ],
    ids=range(21),
)
def test_numpy_reads_no_memory_of_the_process(tmp_path: Path, value: bytes) -> None:
    refusal(p.archive(tmp_path / "leak.pth", among_weights(value)))


def test_a_numpy_array_cannot_become_a_tensor_of_a_device(tmp_path: Path) -> None:
    leak = p.array((24576,), p.dtype("u1"), p.raw(b"A" * 24576))
    body = p.call(
        "torch._utils._rebuild_device_tensor_from_numpy", leak, p.name("torch.float32"), p.text("cpu"), p.FALSE
    )
    message = refusal(p.archive(tmp_path / "leak.pth", among_weights(body)))
    assert f"{KEY}: a tensor of a device that is not known" in message


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False, None], ids=["zip", "legacy", "plain pickle"])
def test_numpy_arrays_are_read(tmp_path: Path, protocol: int, zipped: bool | None) -> None:
    """Bit for bit: every type, both orders of axes and of bytes, no axis, no element; by the names of NumPy 1 and 2."""
    draw = np.random.RandomState(0)
    arrays: dict[str, Any] = {
        f"backbone.{code}": draw.randint(0, 100, (3, 4)).astype(code)
        for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?", ">f4", ">i8")
    }
    arrays["backbone.nan"] = np.array([-0.0, 1e-45, 3], np.float32)
    arrays["backbone.fortran"] = np.asfortranarray(draw.rand(3, 4, 5).astype(np.float32))
    arrays["backbone.part"] = draw.rand(6, 8)[::2, ::3]
    arrays["backbone.none"], arrays["backbone.one"] = np.zeros((0, 3)), np.array(7)
    path = tmp_path / "numpy.pth"
    if zipped is None:
        path.write_bytes(pickle.dumps(arrays, protocol))
    else:
        torch.save(arrays, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    if not zipped and protocol < 4:  # later protocols have the length of each name
        path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        assert path.read_bytes() != content
    found = read_weights(path).tensors
    assert found.keys() == arrays.keys()
    for key, value in arrays.items():
        expected = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        assert found[key].dtype == expected.dtype, key
        assert torch.equal(found[key], expected), key


def test_arrays_of_python_2(tmp_path: Path) -> None:
    """Bytes are texts there, which need not be UTF-8."""
    for content in (b"\xff\x80\x00\x01" * 2, b"ABCD" * 2):
        short = b"U" + bytes([len(content)]) + content
        path = p.archive(tmp_path / "old.pth", among_weights(p.array((2,), p.dtype("f4"), short)))
        assert read_weights(path).tensors[KEY].numpy().tobytes() == content


# ---- tensors -----------------------------------------------------------------------------------------------

SHAPE, CPU = p.several(p.number(4)), p.text("cpu")
ODD: list[tuple[bytes, str]] = [
    (p.tensor((2**36,), (0,)), "expanded, with stride 0"),
    (p.tensor((100, 100), (0, 0)), "expanded, with stride 0"),
    (p.tensor((5,)), "ends at element 4 of its storage, which has 4"),
    (p.tensor((2, 2), (4, 1)), "ends at element 5"),
    (p.tensor((1,), (1,), 4), "ends at element 4"),
    (p.tensor((4,), (-1,), 3), "not sizes"),
    (p.tensor((4,), (1,), -1), "not sizes"),
    (p.tensor((4,), (2**70,)), "not sizes"),
    (p.tensor((2**40, 2**40), (0, 0)), "expanded"),
    (p.tensor((4,), ()), "strides do not fit"),
    (p.tensor((1,) * 33, (1,) * 33), "not sizes"),
    (p.tensor((2**40,), of=p.storage(2**40)), "is not there"),
    (p.tensor(of=p.storage(5)), "is not there"),
    (p.tensor(of=p.storage(key="../0")), "is not there"),
    (p.tensor(of=p.storage(2, "torch.ComplexFloatStorage"), shape=(2,)), "complex64"),
    (p.tensor(of=p.storage(16, "torch.QInt8Storage")), "qint8"),
    (p.tensor(of=p.NONE), "without a storage"),
    (p.tensor(of=p.several(p.NONE, b"]")), "without a storage"),
    (p.call("torch._utils._rebuild_tensor_v2", p.storage(), p.number(0), SHAPE, p.NONE, p.FALSE, HOOKS), "not sizes"),
    (p.call("torch._utils._rebuild_tensor_v2", p.storage(), p.NONE, SHAPE, SHAPE, p.FALSE, HOOKS), "not sizes"),
    (p.call("torch._utils._rebuild_tensor_v2", p.storage(), p.number(0), b"]", b"]", p.FALSE, HOOKS), "not sizes"),
    (p.call("torch._utils._rebuild_tensor_v2", p.storage(), p.number(0), p.several(p.TRUE), SHAPE), "not sizes"),
    (p.call("torch._utils._rebuild_tensor_v2", p.storage(), p.number(0), p.several(p.text("4")), SHAPE), "not sizes"),
    (p.call("torch._tensor._rebuild_from_type_v2", p.NONE, p.name("numpy.ndarray"), SHAPE), "of type numpy.ndarray"),
    (p.call("torch._utils._rebuild_qtensor", p.storage(), p.number(0), SHAPE, SHAPE), "a quantised tensor"),
    (p.call("torch._utils._rebuild_sparse_tensor", p.NONE, p.NONE), "a sparse tensor"),
    (p.call("torch._utils._rebuild_meta_tensor_no_storage", p.name("torch.float32"), SHAPE, SHAPE, p.FALSE), "a meta"),
    (p.call("torch._utils._rebuild_nested_tensor", p.NONE, p.NONE, p.NONE, p.NONE), "a nested tensor"),
    (p.call("torch._utils._rebuild_wrapper_subclass", p.NONE, p.NONE), "a tensor of a subclass"),
    (p.call("torch._utils._rebuild_device_tensor_from_cpu_tensor", p.tensor(), p.NONE, CPU, p.FALSE), "of a device"),
    (
        p.call(
            "torch._utils._rebuild_tensor_v3", p.storage(16, "torch.storage.UntypedStorage"), p.number(0), SHAPE,
            p.several(p.number(1)), p.FALSE, HOOKS, p.name("torch.uint16"),
        ),
        "uint16",
    ),
    (p.call("torch._utils._rebuild_parameter", p.call("torch._utils._rebuild_qtensor"), p.TRUE, HOOKS), "a quantised"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "reason"), ODD, ids=range(len(ODD)))
def test_tensors_that_are_not_dense_blocks(tmp_path: Path, value: bytes, reason: str) -> None:
    message = refusal(p.archive(tmp_path / "odd.pth", among_weights(value)))
    assert reason in message
    assert KEY in message


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(4, device="meta"),
        torch.zeros(4).to_sparse(),
        torch.zeros(4, dtype=torch.complex64),
        torch.zeros(1).expand(10_000_000),
        torch.zeros(4, dtype=torch.uint16),
    ],
    ids=["meta", "sparse", "complex", "expanded", "uint16"],
)
def test_odd_tensors_as_pytorch_saves_them(tmp_path: Path, value: Tensor) -> None:
    """Refused by name among the weights, and of no interest beside them."""
    torch.save({"state_dict": {KEY: value}}, tmp_path / "odd.pth")
    assert KEY in refusal(tmp_path / "odd.pth")
    torch.save({"state_dict": {KEY: torch.ones(3)}, "optimizer": {"a": value}}, tmp_path / "beside.pth")
    assert torch.equal(read_weights(tmp_path / "beside.pth").tensors[KEY], torch.ones(3))


@pytest.mark.parametrize("zipped", [True, False])
def test_dense_tensors_of_every_kind(tmp_path: Path, zipped: bool) -> None:
    """Views, shared storages, parameters, transposed and empty tensors, every type that is read: bit for bit."""
    base = torch.randn(6, 8)
    state: dict[str, Tensor] = {
        f"backbone.{dtype}": (torch.rand(5) * 3).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
                      torch.uint8, torch.bool)
    }  # fmt: skip
    state |= {
        "backbone.base": base, "backbone.row": base[2], "backbone.column": base[:, 3], "backbone.t": base.t(),
        "backbone.parameter": torch.nn.Parameter(torch.randn(3)), "backbone.empty": torch.zeros(0, 3),
        "backbone.one": torch.tensor(3), "backbone.tiny": torch.ones(1).expand(7),
    }  # fmt: skip
    content = OrderedDict(state)
    content._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    torch.save({"state_dict": content}, tmp_path / "dense.pth", _use_new_zipfile_serialization=zipped)
    found = read_weights(tmp_path / "dense.pth").tensors
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in state.items())


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_float8_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(-8.0, 8).to(dtype)
    torch.save({"state_dict": {KEY: value, "backbone.y": torch.ones(2)}}, tmp_path / "eighth.pth")
    weights = read_weights(tmp_path / "eighth.pth")
    assert torch.equal(weights.tensors[KEY], value.float())
    assert weights.notes == ("1 of float8 read as float32",)
    torch.save({"state_dict": {KEY: value, f"{KEY}_scale": torch.ones(1)}}, tmp_path / "scaled.pth")
    assert "float8 with a scale" in refusal(tmp_path / "scaled.pth")


# ---- size and time ---------------------------------------------------------------------------------------------------


def peak(function: Callable[[], object]) -> int:
    """Bytes that Python allocates at most."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("where", ["storage", "pickle"])
def test_compressed_records_are_not_expanded(tmp_path: Path, where: str) -> None:
    zeros = 2**26
    value = p.tensor((zeros // 4,), of=p.storage(zeros // 4))
    path = tmp_path / "bomb.pth"
    if where == "storage":
        p.archive(path, among_weights(value), {"0": bytes(zeros)}, zipfile.ZIP_DEFLATED)
    else:
        p.archive(path, p.mapping({"x": p.text("0" * zeros)}), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < zeros // 500
    assert peak(lambda: refusal(path)) < zeros // 8
    assert "is compressed" in refusal(path)


LONG = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"q\x00"
SHARED = p.mapping({}) + b"q\1(" + b"".join(p.text(str(k)) + b"h\0" for k in range(300)) + b"uh\1q\0"  # by 300 keys
BOMBS = {
    "a million lists": (b"(" + b"]" * 1000 + b"l", "more than 900 pickled values"),
    "bytes of one text": (LONG + (p.name("_codecs.encode") + b"h\0" + p.text("latin1") + b"\x86R0") * 50, "more bytes"),
    "bytearray by size": (p.call("builtins.bytearray", p.number(2**40)), "bytes that are made of something else"),
    "tensor by size": (p.call("torch.FloatTensor", p.number(2**30)), "refused"),
    "storage by size": (p.call("torch.FloatStorage", p.number(2**30)), "refused"),
    "text that is not there": (b"X\xff\xff\xff\xff", "truncated"),
    "eight bytes of length": (b"\x8e" + struct.pack("<Q", 2**62), "truncated"),
    "far memo": (b"}r\xff\xff\xff\xff", "no weights in it"),
    "of itself": (b"}q\0(" + p.text("a") + b"h\0u" + p.call("collections.Counter", b"h\0"), "no weights in it"),
    "hashes": (b"}(" + b"K\x01\x85" + b"q\x00" + b"h\x00\x86q\x00" * 60 + b"Nu", "neither texts nor numbers"),
    "long numbers": (b"}(" + p.number(2**61 - 1) + b"Nu", "neither texts nor numbers"),
    "the same mapping many times": (p.mapping({}) + b"q\0" + SHARED * 4, "no weights in it"),
    "itself": (p.mapping({"a": p.NONE}) + b"q\x00" + p.text("b") + b"h\x00s", "no weights in it"),
    "deep": (b"}" + p.text("a") + b"](" * 4000 + b"N" + b"e" * 4000 + b"s", "no weights in it"),
    "deep tuples": (b"}" + p.text("a") + b")" + b"\x85" * 10000 + b"s", "no weights in it"),
    "deep mappings": (b"}(" + (p.text("a") + b"}(") * 2000 + b"u" * 2001, "no weights in it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("zipped", [True, False])
def test_bombs(tmp_path: Path, name: str, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    body, message = BOMBS[name]
    path = tmp_path / "bomb.pth"
    if name == "a million lists":
        monkeypatch.setattr(pickles, "MOST_OPCODES", 900)
    if zipped:
        p.archive(path, body)
    else:
        path.write_bytes(p.pickled(body))
    assert peak(lambda: refusal(path)) < 5 * 2**20 + 4 * path.stat().st_size
    said = refusal(path)
    assert message in said


def test_a_large_pickle_is_refused_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "LARGEST_PICKLE", 1000)
    path = p.archive(tmp_path / "large.pth", p.mapping({"x": p.text("a" * 2000)}))
    assert "a pickle of more than 1000 bytes" in refusal(path)


def test_only_the_weights_are_read(tmp_path: Path) -> None:
    """An optimiser's state stays in the file; many views of one storage are no copies, and are counted."""
    content = {"model": {KEY: torch.ones(10)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2**22)}}}}
    torch.save(content, tmp_path / "both.pth")
    assert peak(lambda: read_weights(tmp_path / "both.pth")) < 2**22
    large = torch.ones(2**22)
    torch.save({f"backbone.{k}": large.view(2**22) for k in range(300)}, tmp_path / "views.pth")
    assert "more than 4294967296 bytes of weights" in refusal(tmp_path / "views.pth")
