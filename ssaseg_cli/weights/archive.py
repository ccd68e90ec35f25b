"""Reads what `torch.save` wrote as a zip file, if it holds only plain values and tensors: such as a training state.

Not with `torch.load(weights_only=True)`: its list of allowed functions can make tensors that are larger than the file,
that overlap, that are sparse or quantised, and it reads compressed records. Here nothing in the file is called, a
tensor is exactly what its record holds, and memory stays within twice the file's size.
"""

import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssaseg.files.reading import open_file

LARGEST = 2**32  # bytes of a file: the largest network with its optimiser and averages needs an eighth of it

MOST_VALUES, DEEPEST = 1_000_000, 50  # of a file: values, also those that are shared, and nested containers

DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in (
        ("Float", torch.float32), ("Double", torch.float64), ("Half", torch.float16), ("BFloat16", torch.bfloat16),
        ("Long", torch.int64), ("Int", torch.int32), ("Short", torch.int16), ("Char", torch.int8),
        ("Byte", torch.uint8), ("Bool", torch.bool),
    )
}  # fmt: skip

# All that a pickle of plain values and tensors consists of, in protocol 2, the one that `torch.save` uses.
OPCODES = (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1,
    pickle.BINFLOAT, pickle.BINUNICODE, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS,
    pickle.GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID,
)  # fmt: skip


class Storage(NamedTuple):
    """The memory of tensors: a record of the zip file."""

    record: str
    dtype: torch.dtype
    length: int


class Stored(NamedTuple):
    """A tensor that was not read yet: `offset`, `size` and `stride` count elements of `storage`."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_archive(path: Path) -> Any:
    """The content: None, bool, int, float, text, list, tuple, dict with such keys, and dense tensors on the CPU.

    Each tensor has memory of its own. Raises OSError if the file cannot be read, and ValueError, BadZipFile, or what a
    damaged pickle raises, for everything else.
    """
    with open_file(path, LARGEST) as file, zipfile.ZipFile(file) as archive:
        size = os.fstat(file.fileno()).st_size
        names = require_stored(archive, size)
        folders = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise ValueError("it has no data.pkl, so PyTorch did not write it")
        order = f"{folders[0]}byteorder"
        if order in names and archive.read(order) != sys.byteorder.encode():
            raise ValueError("it was written on a machine with another order of bytes")
        content = _Unpickler(archive, folders[0]).load()
        return _Builder(archive, 2 * size).build(content)


def require_stored(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The records by name. Raises ValueError if one is compressed, two have the same name, or they are together larger
    than the file, of `size` bytes: a small file would then fill the memory.
    """
    records = archive.infolist()
    names = {record.filename: record for record in records}
    if len(names) < len(records):
        raise ValueError("two of its records have the same name")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise ValueError("a record is compressed, which PyTorch never does")
    if sum(record.file_size for record in records) > size:
        raise ValueError("its records are larger than the file")
    return names


class _Mapping(dict[Any, Any]):
    """An OrderedDict of the file; a state dict's `_metadata` is left out."""


class _Unpickler(pickle._Unpickler):
    """Reads a pickle without calling anything that it names. The version in Python: the one in C reserves memory for
    any number that a file claims.
    """

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in OPCODES}  # noqa: RUF012 (as in the base)

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self.archive, self.folder = archive, folder
        super().__init__(BytesIO(archive.read(f"{folder}data.pkl")), encoding="utf-8")

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in the file."""
        if (module, name) == ("collections", "OrderedDict"):
            return _Mapping
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _stored
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise ValueError(f"it holds a {module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        """The memory that a tensor refers to."""
        kind, dtype, key, _, length = pid
        record = self.archive.getinfo(f"{self.folder}data/{key}")
        if kind != "storage" or type(length) is not int or length * dtype.itemsize != record.file_size:
            raise ValueError(f"the record {record.filename} does not have the size that it should have")
        return Storage(record.filename, dtype, length)

    def _reduce(self) -> None:
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        arguments, function = stack.pop(), stack[-1]
        if function is not _stored and (function is not _Mapping or arguments):
            raise ValueError("it calls what is not a tensor")
        stack[-1] = function(*arguments)

    def _build(self) -> None:
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        stack.pop()
        if not isinstance(stack[-1], _Mapping):
            raise ValueError("it sets attributes of what is not a state dict")

    dispatch[pickle.REDUCE[0]] = _reduce  # type: ignore[assignment]
    dispatch[pickle.BUILD[0]] = _build  # type: ignore[assignment]


def _stored(storage: Storage, offset: int, size: Any, stride: Any, *_: Any) -> Stored:
    """Replaces `_rebuild_tensor_v2`. Raises ValueError for a tensor that overlaps itself or leaves its storage."""
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor is not described as PyTorch describes it")
    numbers = (offset, *size, *stride)
    if any(type(number) is not int or number < 0 for number in numbers) or len(size) != len(stride):
        raise ValueError("a tensor is not described as PyTorch describes it")
    reach = 1
    for step, length in sorted((step, length) for length, step in zip(size, stride, strict=True) if length > 1):
        if step < reach:
            raise ValueError("a tensor uses the same memory for several of its values")
        reach = step * (length - 1) + reach
    if prod(size) and offset + reach > storage.length:
        raise ValueError("a tensor is larger than its memory")
    return Stored(storage, offset, size, stride)


class _Builder:
    """Makes plain values and tensors from what the pickle described."""

    def __init__(self, archive: zipfile.ZipFile, most: int) -> None:
        """most: bytes of all tensors together."""
        self.archive, self.bytes, self.values = archive, most, MOST_VALUES
        self.tensors: dict[int, Tensor] = {}  # by the identity of their description: a shared tensor is read once

    def build(self, value: Any, depth: int = 0) -> Any:
        """Raises ValueError for values that are too many, nested too deeply, or not plain."""
        self.values -= 1
        if self.values < 0 or depth > DEEPEST:
            raise ValueError("its values are too many, or nested too deeply")
        if isinstance(value, Stored):
            if id(value) not in self.tensors:
                self.tensors[id(value)] = self._tensor(value)
            return self.tensors[id(value)]
        if isinstance(value, dict):
            if any(type(key) not in (str, int) for key in value):
                raise ValueError("a key is neither text nor a whole number")
            return {key: self.build(inner, depth + 1) for key, inner in value.items()}
        if type(value) in (list, tuple):
            made: Callable[[Any], Any] = type(value)
            return made([self.build(inner, depth + 1) for inner in value])
        if value is None or type(value) in (bool, float, str) or (type(value) is int and abs(value) < 2**63):
            return value
        raise ValueError("it holds a value that is neither plain nor a tensor")

    def _tensor(self, stored: Stored) -> Tensor:
        dtype = stored.storage.dtype
        tensor = torch.empty(0, dtype=dtype)
        if not prod(stored.size):
            return tensor.new_empty(0).view(0).reshape(stored.size)
        self.bytes -= prod(stored.size) * dtype.itemsize
        if self.bytes < 0:
            raise ValueError("its tensors are larger than the file")
        record = bytearray(self.archive.read(stored.storage.record))  # checks the record's checksum
        if dtype == torch.bool and max(record) > 1:
            raise ValueError("a truth value is neither 0 nor 1")
        whole = torch.frombuffer(record, dtype=dtype)
        # A copy: PyTorch aligns its own memory.
        return tensor.new_empty(stored.size).copy_(whole.as_strided(stored.size, stored.stride, stored.offset))
