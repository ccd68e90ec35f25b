"""What the names in a checkpoint's pickle stand for: objects that only describe, and functions that make them.

Nothing that a file names is imported, called or constructed. `CALLS` has our own function for each name that a
checkpoint needs; they check what they are given. An `Array` says where the numbers of a tensor are; `torch_files` reads
them. Formats: PyTorch's `torch/_utils.py` (`_rebuild_…`), NumPy's `ndarray.__reduce__` and `numeric._frombuffer`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

LARGEST_SIZE = 2**40  # of one dimension, one stride and one storage
MOST_DIMENSIONS = 32


class Unreadable(ValueError):
    """A pickle or an archive that is damaged, too large or of an unknown format. The text is the reason."""


class Refused(Unreadable):
    """A pickle that names a type which is not known. The text is that name."""


# ---- what a pickle may hold, besides plain values and containers -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Name:
    """A type, function or constant, by its full name; never the thing itself."""

    text: str


@dataclass(slots=True)
class Inert:
    """Stands for an object whose content nobody needs, or for a tensor that is not read: `kind` says of which kind."""

    kind: str
    is_tensor: bool = False


@dataclass(slots=True)
class Storage:
    """A block of numbers: a record of the file called `key`, or `data`. `length` is in elements of `itemsize` bytes."""

    key: str
    itemsize: int
    length: int
    data: bytes | bytearray | str | None = None  # ASCII text if Python 2 has written it


@dataclass(slots=True)
class Typed:
    """A storage and PyTorch's name of the type of its elements; "" if it is bytes."""

    storage: Storage
    dtype: str


@dataclass(slots=True)
class Array:
    """A tensor or a NumPy array; `offset`, `shape` and `strides` are in elements. Nothing in it has been checked.

    A NumPy array has no storage until its state has been read.
    """

    dtype: str = ""  # PyTorch's name, such as float32, or the name of a kind that is not read
    storage: Storage | None = None
    offset: Any = 0
    shape: Any = ()
    strides: Any = ()
    big_endian: bool = False


@dataclass(slots=True)
class Dtype:
    """A NumPy type, such as f4; `order` is its byte order: <, >, = or |."""

    code: str
    order: str = "="


DTYPES = {f"torch.{name}": name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# The first part of a storage's type → the type and the size of its elements.
ELEMENTS = {
    "Double": ("float64", 8), "Float": ("float32", 4), "Half": ("float16", 2), "BFloat16": ("bfloat16", 2),
    "Long": ("int64", 8), "Int": ("int32", 4), "Short": ("int16", 2), "Char": ("int8", 1), "Byte": ("uint8", 1),
    "Bool": ("bool", 1), "ComplexDouble": ("complex128", 16), "ComplexFloat": ("complex64", 8), "QUInt8": ("quint8", 1),
    "QInt8": ("qint8", 1), "QInt32": ("qint32", 4), "QUInt4x2": ("quint4x2", 1), "QUInt2x4": ("quint2x4", 1),
}  # fmt: skip
STORAGES = {
    **{f"torch.{place}{name}Storage": value for name, value in ELEMENTS.items() for place in ("", "cuda.")},
    **dict.fromkeys(("torch.storage.UntypedStorage", "torch.UntypedStorage"), ("", 1)),
}
NUMPY = {
    **{f"f{size}": f"float{8 * size}" for size in (2, 4, 8)},
    **{f"i{size}": f"int{8 * size}" for size in (1, 2, 4, 8)},
    "u1": "uint8",
    "b1": "bool",
}
# Tensors that are no dense blocks of numbers: the function that makes them, and what they are called in an error.
ODD_TENSORS = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a device that is not known",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a device that is not known",
}
# The type of mmengine's curves. Their pickles look up methods with `getattr`, which here gives None for everything.
CURVES = "mmengine.logging.history_buffer.HistoryBuffer"
NESTED = "torch.storage._load_from_bytes"  # a storage in Python's own pickles; `pickles` reads it
# What may be called or made, and gives an object without content: what training scripts save beside the weights.
INERT = {
    "argparse.Namespace", "types.SimpleNamespace", CURVES, "builtins.complex", "builtins.set", "builtins.frozenset",
    "builtins.slice", "builtins.range", "builtins.xrange", "collections.deque", "torch.device",
    "torch.torch_version.TorchVersion", "torch.serialization._get_layout", "numpy._core.multiarray.scalar",
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"pathlib{module}.{pure}{system}Path" for module in ("", "._local") for pure in ("", "Pure")
      for system in ("Posix", "Windows")),
    *(f"omegaconf.{name}" for name in (
        "listconfig.ListConfig", "dictconfig.DictConfig", "base.ContainerMetadata", "base.Metadata",
        *(f"nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Path", "Enum", "Bytes")))),
}  # fmt: skip
# Mappings of other libraries, which are read as plain ones: they may hold the weights.
MAPPINGS = {
    "collections.OrderedDict", "collections.Counter", "collections.defaultdict", "addict.addict.Dict", "builtins.dict",
    "easydict.EasyDict", "mmcv.utils.config.ConfigDict", "mmengine.config.config.ConfigDict", "yacs.config.CfgNode",
    *(f"{package}.AttributeDict" for package in (
        "pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing", "lightning_fabric.utilities.data",
        "lightning.fabric.utilities.data")),
}  # fmt: skip
# What is only an argument of other calls, or a value beside the weights.
ARGUMENTS = {
    "numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "typing.Any",
    *(f"builtins.{name}" for name in ("int", "float", "bool", "list", "tuple", "str", "Ellipsis")),
    *(f"numpy.{name}" for name in (
        "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "bool", "bool_", "str_", "bytes_", "object_")),
    "torch.per_tensor_affine", "torch.per_tensor_symmetric", "torch.per_channel_affine",
    "torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams",
    *(f"torch.optim.lr_scheduler.OneCycleLR{name}" for name in ("", "._annealing_cos", "._annealing_linear")),
    *(f"torch.optim.swa_utils.SWALR{name}" for name in ("", "._cosine_anneal", "._linear_anneal")),
    *(f"{package}.callbacks.{name}" for package in ("pytorch_lightning", "lightning.pytorch") for name in (
        "model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "lr_monitor.LearningRateMonitor")),
}  # fmt: skip


# ---- functions that a pickle may call; each takes the arguments in the file ------------------------------------------


def tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Array | Inert:
    """`torch._utils._rebuild_tensor` and `_rebuild_tensor_v2`."""
    if not isinstance(storage, Typed):
        return Inert("a tensor without a storage", is_tensor=True)
    return Array(storage.dtype, storage.storage, offset, shape, strides)


def typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Array | Inert:
    """`torch._utils._rebuild_tensor_v3`: a storage of bytes, and a type of elements."""
    made = tensor(storage, offset, shape, strides)
    if isinstance(made, Array):
        made.dtype = DTYPES[dtype.text]
    return made


def of_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes, or of a subclass."""
    if kind.text not in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"):
        return Inert(f"a tensor of type {kind.text}", is_tensor=True)
    return call(function, arguments)


def mapping(*arguments: Any) -> dict[Any, Any]:
    """Those in `MAPPINGS`; `defaultdict` without its factory; Python 2 gave a list of pairs."""
    made: dict[Any, Any] = {}
    for argument in arguments:
        if not isinstance(argument, Name) and argument is not None:
            pairs = argument.items() if isinstance(argument, dict) else argument
            made.update((key_of(key), value) for key, value in pairs)
    return made


def encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """`_codecs.encode`: how bytes are written with protocol 2."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Unreadable(f"_codecs.encode of {type(text).__name__} with other arguments than of bytes")
    return text.encode("latin1")


def bytes_of(content: Any = b"", encoding: Any = "latin1") -> bytes:
    """`bytes` and `bytearray`; not of a number, which would be its size."""
    if isinstance(content, str):
        return encoded(content, encoding)
    if not isinstance(content, bytes | bytearray):
        raise Unreadable("bytes that are made of something else than bytes")
    return bytes(content)


def sizes_of(sizes: Any = ()) -> tuple[Any, ...]:
    """`torch.Size`."""
    if not isinstance(sizes, list | tuple):
        raise Unreadable("a torch.Size that is not made of a list")
    return tuple(sizes)


def numpy_type(code: Any, *_: Any) -> Dtype:
    """`numpy.dtype`."""
    if not isinstance(code, str | bytes) or len(code) > 100:
        raise Unreadable("a numpy.dtype that is not a name of a type")
    return Dtype(code if isinstance(code, str) else code.decode("latin1"))


def from_buffer(content: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> Array:
    """`numpy._core.numeric._frombuffer`: how protocol 5 writes arrays."""
    return fill(Array(), (1, shape, dtype, order == "F", content))


def fill(array: Array, state: Any) -> Array:
    """The state of a NumPy array: version, shape, type, whether the first axis varies fastest, content."""
    _, shape, dtype, fortran, content = state
    name = NUMPY.get(dtype.code)
    if name is None:
        array.dtype = f"NumPy's {dtype.code[:8]}"
        return array
    size, itemsize = product(shape), int(dtype.code[1:])
    is_content = isinstance(content, bytes | bytearray) or (isinstance(content, str) and content.isascii())
    if not is_content or len(content) != size * itemsize:
        raise Unreadable(f"a NumPy array of {size} elements of {itemsize} bytes, whose content has another length")
    array.dtype, array.shape, array.big_endian = name, shape, dtype.order == ">"
    array.strides = contiguous(shape[::-1])[::-1] if fortran else contiguous(shape)
    array.storage = Storage("", itemsize, size, content)
    return array


def set_order(dtype: Dtype, state: Any) -> None:
    """The state of a NumPy type. Of the known types, the byte order is all that it may say."""
    if dtype.code in NUMPY and (state[1] not in ("<", ">", "=", "|") or state[2:] != (None, None, None, -1, -1, 0)):
        raise Unreadable(f"a numpy.dtype {dtype.code} with fields, a sub-array or another item size")
    dtype.order = state[1]


def product(shape: Any) -> int:
    """Number of elements of a shape. Raises Unreadable unless it is a tuple of a few whole numbers of limited size."""
    fits = isinstance(shape, tuple) and len(shape) <= MOST_DIMENSIONS
    if not fits or not all(type(side) is int and 0 <= side <= LARGEST_SIZE for side in shape):
        raise Unreadable("a tensor whose shape or strides are not sizes")
    return math.prod(shape)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense array in which the last axis varies fastest."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor_v3": typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": of_type,
    "torch.Size": sizes_of,
    **dict.fromkeys(MAPPINGS, mapping),
    **dict.fromkeys(("builtins.bytes", "builtins.bytearray"), bytes_of),
    "_codecs.encode": encoded,
    "builtins.getattr": lambda *_: None,
    "numpy.dtype": numpy_type,
    "numpy._core.multiarray._reconstruct": lambda *_: Array(),
    "numpy._core.numeric._frombuffer": from_buffer,
}
KNOWN = {NESTED, *CALLS, *INERT, *ARGUMENTS, *ODD_TENSORS, *DTYPES, *STORAGES}


def name_of(module: str, name: str) -> Name:
    """A known name. Raises Refused for any other."""
    module = {"__builtin__": "builtins"}.get(module, module)  # Python 2 and protocol 2
    if module.startswith("numpy.core."):  # NumPy 1
        module = module.replace("core", "_core", 1)
    text = f"{module}.{name}"
    if text not in KNOWN:
        raise Refused(text[:200])
    return Name(text)


def call(function: Any, arguments: Any) -> Any:
    """What a function gives for its arguments in the file. Raises Refused for one that may not be called."""
    name = function.text if isinstance(function, Name) else type(function).__name__
    if name in CALLS:
        return CALLS[name](*arguments)
    if name in ODD_TENSORS:
        return Inert(ODD_TENSORS[name], is_tensor=True)
    if name in INERT:
        return Inert(name)
    raise Refused(f"call of {name}")


def key_of(key: Any) -> Any:
    """A key of a mapping. Raises Unreadable for keys whose hashes could be made to take for ever."""
    parts = key if type(key) is tuple else (key,)
    if not all(type(part) in (str, bytes, float, bool, type(None), Name) or is_small(part) for part in parts):
        raise Unreadable("a mapping with keys that are neither texts nor numbers")
    return key


def is_small(number: Any) -> bool:
    """Whether it is a whole number whose hash is itself."""
    return type(number) is int and abs(number) < 2**60
