"""Reads the pickles in checkpoints without unpickling them.

A pickle is a program for a stack machine. `Machine` is such a machine that knows plain values and containers, and what
`stand_ins` has for the names of types and functions. Every other name is refused. PyTorch's own restricted reader is
not used: it lets a file make tensors of memory that was never written, bytearrays of any size, and NumPy arrays larger
than their buffer. The opcodes are decoded by Python's `pickletools`.
"""

import pickletools
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, BinaryIO, cast

from ssaseg.cli.weights.stand_ins import (
    NESTED,
    STORAGES,
    Array,
    Dtype,
    Inert,
    Name,
    Refused,
    Storage,
    Typed,
    Unreadable,
    call,
    fill,
    key_of,
    name_of,
    product,
    set_order,
)

MOST_OPCODES = 1_000_000  # a checkpoint of 1,600 tensors and their optimiser's state has about 100,000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file of torch.save before PyTorch 1.6
LARGEST_PICKLE = 2**30  # bytes; tensors are not part of it, NumPy arrays are


class Window:
    """A part of a file, from its position now, in the form that `pickletools` reads from. It never reads beyond."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left, self.at = file, min(size, LARGEST_PICKLE), file.tell()
        self.limited = size > self.left

    def read(self, count: int) -> bytes:
        """`count` bytes, or fewer at the end."""
        if count > self.left and self.limited:
            raise Unreadable(f"a pickle of more than {LARGEST_PICKLE} bytes")
        content = self.file.read(min(count, self.left))
        self.left -= len(content)
        self.at += len(content)
        return content

    def readline(self) -> bytes:
        """The next line; protocol 0 writes a whole array as one."""
        content = self.file.readline(self.left)
        self.left -= len(content)
        self.at += len(content)
        return content

    def tell(self) -> int:
        """Position in the file."""
        return self.at


class Machine:
    """Reads the pickles of one file, one after the other. `storages`: those that were named, by key."""

    def __init__(self, left: int | None = None, inner: bool = False) -> None:
        """left: opcodes that may follow, if fewer than usual. inner: of bytes in a pickle, which hold no others."""
        self.storages: dict[str, Storage] = {}
        self.left, self.inner = MOST_OPCODES if left is None else left, inner
        self.copied = 0  # bytes that calls have made of texts

    def load(self, window: Window) -> Any:
        """The object of the next pickle. Raises Unreadable, or what other errors damaged content leads to."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.limit = 2 * window.left
        for opcode, argument, _ in pickletools.genops(cast(Any, window)):
            self.left -= 1
            if self.left < 0:
                raise Unreadable(f"more than {MOST_OPCODES:,} pickled values")
            if opcode.name in VALUES:
                self.stack.append(argument)
            elif opcode.name in STEPS:
                STEPS[opcode.name](self, argument)
            elif opcode.name == "INST":
                raise Refused(str(argument).replace(" ", ".")[:200])
            elif opcode.name not in ("PROTO", "FRAME", "STOP"):
                raise Unreadable(f"the pickle opcode {opcode.name}")
        return self.stack.pop()

    def items(self) -> list[Any]:
        """Takes all that was put on the stack since the last mark."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def old_text(self, argument: str) -> None:
        """A text of Python 2, which may also be bytes."""
        self.stack.append(argument if argument.isascii() else argument.encode("latin1"))

    def put(self, argument: Any) -> None:
        """Remembers the top of the stack, under the next number if none is given."""
        self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]

    def pop(self, _: Any) -> None:
        """Removes the top of the stack, which may be a mark."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def last(self, count: int) -> None:
        """The last `count` values become a tuple."""
        items = self.stack[-count:]
        del self.stack[-count:]
        self.stack.append(tuple(items))

    def extend(self, items: list[Any]) -> None:
        """Appends to the list on top of the stack."""
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)
        elif not isinstance(self.stack[-1], Inert):
            raise Unreadable("values that are appended to something else than a list")

    def update(self, items: list[Any]) -> None:
        """Sets keys and values of the mapping on top of the stack."""
        if type(self.stack[-1]) is dict:
            self.stack[-1].update((key_of(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
        elif not isinstance(self.stack[-1], Inert):
            raise Unreadable("keys that are set in something else than a mapping")

    def dict(self, _: Any) -> None:
        """Makes a mapping of keys and values."""
        items = self.items()
        self.stack.append({})
        self.update(items)

    def stack_name(self, _: Any) -> None:
        """A name whose two parts are on the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(name_of(str(module), str(name)))

    def reduce(self, _: Any) -> None:
        """Calls a function with a tuple of arguments; or makes an object of a type."""
        arguments, function = self.stack.pop(), self.stack.pop()
        nested = isinstance(function, Name) and function.text == NESTED and not self.inner
        made = self.storage_in(*arguments) if nested else call(function, arguments)
        # The same long argument may be given again and again.
        self.copied += len(made) if isinstance(made, bytes) else 0
        self.left -= len(made) if isinstance(made, dict | tuple) else 0
        if self.copied > self.limit:
            raise Unreadable("more bytes than the pickle has")
        self.stack.append(made)

    def storage_in(self, content: Any) -> Typed:
        """A storage as Python's `pickle` writes it: bytes, in which it is saved as before PyTorch 1.6."""
        if type(content) is not bytes:
            raise Unreadable("a storage that is not bytes")
        self.copied += len(content)
        if self.copied > self.limit:
            raise Unreadable("more bytes than the pickle has")
        window, machine = Window(BytesIO(content), len(content)), Machine(self.left, inner=True)
        magic, _protocol, _system, made, keys = (machine.load(window) for _ in range(5))
        self.left, at = machine.left, window.tell() + 8
        if magic != LEGACY_MAGIC or type(made) is not Typed or keys != [made.storage.key]:
            raise Unreadable("bytes that hold no storage")
        size = made.storage.length * made.storage.itemsize
        if len(content) != at + size or int.from_bytes(content[at - 8 : at], "little") != made.storage.length:
            raise Unreadable("a storage of another length")
        return Typed(Storage("", made.storage.itemsize, made.storage.length, content[at:]), made.dtype)

    def build(self, _: Any) -> None:
        """Gives an object its state; only NumPy's need it."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Dtype):
            set_order(target, state)
        elif isinstance(target, Array) and target.storage is None:
            fill(target, state)
        elif not isinstance(target, Inert | Array | dict):
            raise Unreadable(f"a state of a {type(target).__name__}")

    def storage(self, _: Any) -> None:
        """A storage, by ("storage", its type, key, device, length)."""
        mark, kind, key, _place, length, *view = self.stack.pop()
        if mark not in ("storage", b"storage") or any(part is not None for part in view):
            raise Unreadable("a storage that is a part of another")
        dtype, itemsize = STORAGES[kind.text]
        made = Storage(str(key), itemsize, product((length,)))
        if self.storages.setdefault(made.key, made) != made:
            raise Unreadable("one storage under two types or lengths")
        self.stack.append(Typed(self.storages[made.key], dtype))


VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
STEPS: Mapping[str, Callable[[Machine, Any], object]] = {
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), Machine.old_text),
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_SET": lambda m, _: m.stack.append(Inert("set")),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": Machine.pop,
    "POP_MARK": lambda m, _: m.items(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.items())),
    "TUPLE1": lambda m, _: m.last(1),
    "TUPLE2": lambda m, _: m.last(2),
    "TUPLE3": lambda m, _: m.last(3),
    "LIST": lambda m, _: m.stack.append(m.items()),
    "DICT": Machine.dict,
    "FROZENSET": lambda m, _: m.stack.append(Inert(f"set of {len(m.items())}")),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.items()),
    "SETITEM": lambda m, _: m.update([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.update(m.items()),
    "ADDITEMS": lambda m, _: m.items(),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, number: m.stack.append(m.memo[number])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine.put),
    "GLOBAL": lambda m, name: m.stack.append(name_of(*name.split(" ", 1))),
    "STACK_GLOBAL": Machine.stack_name,
    "REDUCE": Machine.reduce,
    "NEWOBJ": Machine.reduce,
    "BUILD": Machine.build,
    "BINPERSID": Machine.storage,
}
