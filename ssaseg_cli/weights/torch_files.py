"""The files that torch.save writes: a zip archive of one pickle and its storages, or, before PyTorch 1.6, pickles and
storages one after the other. Also plain pickles.

Nothing is expanded: torch.save never compresses, so a compressed record is refused, and nothing that is read is larger
than the file. Storages are read when they are needed: an optimiser's state stays in the file.

Sources: PyTorch's `torch/serialization.py`; the zip format's APPNOTE 6.3.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from stat import S_ISREG
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import torch
from torch import Tensor

from ssaseg.cli.weights.pickles import LEGACY_MAGIC, Machine, Window
from ssaseg.cli.weights.stand_ins import Array, Storage, Unreadable, product

LARGEST_FILE = 2**34  # bytes, of which an optimiser's state may be most; the largest network's has 4.4 GB
LARGEST_WEIGHTS = 2**32  # bytes of the storages that are read; the largest network here has 1.5 GB
LARGEST_DIRECTORY = 2**23  # bytes; of 1,600 tensors it has about 110,000
TINY = 1024  # elements that a tensor may have more than its storage

LEGACY_PROTOCOL = 1001
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
END, END_64, LOCATOR_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")

# Types of the tensors that are read. float8 becomes float32: neither a network here nor a check computes in float8.
READ = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
FLOAT8 = {name: getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")}


class Changed(Unreadable):
    """A record whose checksum is wrong. The text is its name."""


@dataclass
class Archive:
    """An open checkpoint: `content`, in which each tensor is an `Array`, and where its storages are."""

    file: BinaryIO
    content: Any
    places: Mapping[str, tuple[int, int]]  # key of a storage → position in the file, bytes
    most: int  # bytes of the storages that may be read
    read: dict[str, bytearray] = field(default_factory=dict)  # the storages that were read
    taken: int = 0  # bytes that were read
    checked: bool = False  # by checksums

    def tensor(self, array: Array) -> Tensor:
        """The tensor that `array` describes; float8 as float32. Raises Unreadable with the reason if it is not a dense
        tensor of a type in `READ` or `FLOAT8`, or does not lie in its storage.
        """
        storage, dtype = array.storage, {**READ, **FLOAT8}.get(array.dtype)
        if storage is None or dtype is None:
            raise Unreadable(f"a tensor of {array.dtype or 'an unknown type'}")
        size = product(array.shape)
        product(array.strides)  # they must be sizes too
        product((array.offset,))
        if len(array.shape) != len(array.strides):
            raise Unreadable("a tensor whose strides do not fit its shape")
        if size == 0:
            return torch.empty(array.shape, dtype=torch.float32 if array.dtype in FLOAT8 else dtype)
        length = storage.length * storage.itemsize // dtype.itemsize
        last = array.offset + sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True))
        if last >= length:
            raise Unreadable(f"a tensor that ends at element {last} of its storage, which has {length}")
        if size > max(length, TINY):
            raise Unreadable(f"a tensor of {size} elements in a storage of {length} (expanded, with stride 0)")
        content, raw = self._bytes(storage, array), torch.uint8 if dtype == torch.bool else dtype
        flat = torch.frombuffer(content, dtype=raw, count=length)
        values = flat.as_strided(array.shape, array.strides, array.offset)
        if dtype == torch.bool:
            return values != 0
        return values.float() if array.dtype in FLOAT8 else values

    def _bytes(self, storage: Storage, array: Array) -> bytearray:
        """The content of a storage, in the byte order of this machine."""
        if storage.key in self.read and storage.data is None:
            return self.read[storage.key]
        start, size = self.places.get(storage.key, (0, -1))
        size = storage.length * storage.itemsize if storage.data is not None else size
        if size != storage.length * storage.itemsize:
            raise Unreadable(f"a tensor in a storage of {storage.length * storage.itemsize} bytes, which is not there")
        self.taken += size
        if self.taken > self.most:
            raise Unreadable(f"with the tensors before it, more than {self.most} bytes of weights")
        if storage.data is not None:
            data = storage.data.encode() if isinstance(storage.data, str) else storage.data
            if array.big_endian and storage.itemsize > 1:
                data = np.frombuffer(data, f"u{storage.itemsize}").byteswap().tobytes()
            return bytearray(data)
        self.file.seek(start)
        content = self.read[storage.key] = bytearray(self.file.read(size))
        if len(content) != size:
            raise Unreadable("a tensor in a storage that is cut short")
        return content


def open_archive(file: BinaryIO, size: int, most: int = LARGEST_WEIGHTS) -> Archive:
    """Reads a checkpoint of `size` bytes, except its tensors, of which at most `most` bytes may be read later.

    Raises Unreadable, or other errors if it is damaged.
    """
    start = file.read(512)
    file.seek(0)
    if start.startswith(b"PK\x03\x04"):
        return _zip(file, size, most)
    if start[257:262] == b"ustar":
        raise Unreadable("a tar archive, as PyTorch wrote before version 0.2")
    return _legacy(file, size, most)


# ---- zip -------------------------------------------------------------------------------------------------------------


def _zip(file: BinaryIO, size: int, most: int) -> Archive:
    _require_small_directory(file, size)
    with ZipFile(file) as archive:
        infos = archive.infolist()
        starts = _require_plain(file, archive)
        _require_end(file, size, archive)
        found = [info for info in infos if info.filename.count("/") == 1 and info.filename.endswith("/data.pkl")]
        if len(found) != 1:
            raise Unreadable("an archive without data.pkl, as torch.save writes it")
        folder = found[0].filename.removesuffix("data.pkl")
        if f"{folder}constants.pkl" in starts:
            raise Unreadable("a TorchScript archive, which is a program")
        # torch.serialization.set_crc32_options(False) writes 0 for each record.
        checked = any(info.CRC for info in infos)
        changed = archive.testzip() if checked else None
        if changed is not None:
            raise Changed(changed)
        if f"{folder}byteorder" in starts:
            file.seek(starts[f"{folder}byteorder"])
            if file.read(archive.getinfo(f"{folder}byteorder").file_size).strip() != b"little":
                raise Unreadable("written on a machine of another byte order")
    file.seek(starts[found[0].filename])
    content = Machine().load(Window(file, found[0].file_size))
    data = f"{folder}data/"
    places = {
        info.filename.removeprefix(data): (starts[info.filename], info.file_size)
        for info in infos
        if info.filename.startswith(data)
    }
    return Archive(file, content, places, most, checked=checked)


def _require_small_directory(file: BinaryIO, size: int) -> None:
    """Raises Unreadable for an archive whose directory would fill the memory, and for one with a comment."""
    file.seek(max(size - END.size - LOCATOR_64.size - END_64.size, 0))
    tail = file.read()
    mark, *_, directory, _start, comment = END.unpack(tail[-END.size :])
    if mark != b"PK\x05\x06" or comment:
        raise Unreadable("an archive without its end: it may be truncated")
    if tail[-END.size - LOCATOR_64.size :].startswith(b"PK\x06\x07"):
        directory = max(directory % 0xFFFFFFFF, END_64.unpack(tail[: END_64.size])[8])
    if directory > LARGEST_DIRECTORY:
        raise Unreadable(f"an archive whose directory has {directory} bytes, more than {LARGEST_DIRECTORY}")


def _require_plain(file: BinaryIO, archive: ZipFile) -> dict[str, int]:
    """The position of each record's content, by name. Raises Unreadable unless the records follow each other without
    gaps, are stored as they are, each name once, and both headers of each record say the same.
    """
    starts: dict[str, int] = {}
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = info.filename
        if info.compress_type != ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise Unreadable(f"{name} in it is compressed or encrypted, which torch.save never does")
        if name in starts or info.header_offset != end:
            raise Unreadable(f"{name} in it overlaps another record, or is there twice")
        starts[name] = _content_start(file, info)
        end = starts[name] + info.file_size
        if info.flag_bits & 8:  # the sizes are repeated after the content
            file.seek(end)
            after = _repeated(info, file.read(24))
            if after == 0:
                raise Changed(name)
            end += after
    if end != archive.start_dir:
        raise Unreadable("an archive with something between its records and its directory")
    makers = {
        (info.create_version, info.create_system, info.external_attr)
        for info in archive.infolist()
        if not info.is_dir()
    }
    # Files that were packed again may differ in their permissions.
    unix = all(system == 3 and S_ISREG(attributes >> 16) for _, system, attributes in makers)
    if (len(makers) > 1 and not unix) or any(info.volume or info.internal_attr > 1 for info in archive.infolist()):
        raise Changed("its directory")
    return starts


def _repeated(info: ZipInfo, found: bytes) -> int:
    """Bytes of a record's checksum and sizes after its content, in 32 or 64 bits; 0 if they are not there."""
    sizes = [info.file_size] * 2
    wide = struct.pack("<4sLQQ", b"PK\x07\x08", info.CRC, *sizes)
    narrow = struct.pack("<4sLLL", b"PK\x07\x08", info.CRC, *(size & 0xFFFFFFFF for size in sizes))
    return next((len(each) for each in (wide, narrow) if found.startswith(each)), 0)


def _require_end(file: BinaryIO, size: int, archive: ZipFile) -> None:
    """Raises Changed unless the directory has the length that its entries have, and the file's end says the same."""
    at, count = archive.start_dir, len(archive.infolist())
    for _ in range(count):
        file.seek(at + 28)
        at += 46 + sum(struct.unpack("<3H", file.read(6)))
    file.seek(at)
    tail, directory = file.read(), at - archive.start_dir
    if tail.startswith(b"PK\x06\x06"):
        *_, first, last, own, all_, length, start = END_64.unpack(tail[: END_64.size])
        locator = LOCATOR_64.pack(b"PK\x06\x07", 0, at, 1)
        found = (first, last, own, all_, length, start, tail[END_64.size : -END.size])
        if found != (0, 0, count, count, directory, archive.start_dir, locator) or tail[4:12] != b"," + bytes(7):
            raise Changed("its end")
    elif len(tail) != END.size:
        raise Changed("its end")
    _, first, last, own, all_, length, start, _ = END.unpack(tail[-END.size :])
    expected = (
        (own, count, 0xFFFF),
        (all_, count, 0xFFFF),
        (length, directory, 2**32 - 1),
        (start, archive.start_dir, 2**32 - 1),
    )
    if first or last or any(value not in allowed for value, *allowed in expected):
        raise Changed("its end")


def _content_start(file: BinaryIO, info: ZipInfo) -> int:
    """Where the content of a record starts. Raises Changed if its own header differs from the directory's."""
    file.seek(info.header_offset)
    mark, version, flags, method, time, date, crc, packed, full, name, extra = LOCAL_HEADER.unpack(file.read(30))
    own = file.read(name)
    padding = file.read(extra)
    stamp = ((date >> 9) + 1980, date >> 5 & 15, date & 31, time >> 11, time >> 5 & 63, (time & 31) * 2)
    later = flags & 8 and not crc and {packed, full} <= {0, 0xFFFFFFFF}  # they follow the content
    sizes_fit = later or (crc == info.CRC and all(each in (info.file_size, 0xFFFFFFFF) for each in (packed, full)))
    same = (version, flags, method, stamp) == (
        info.extract_version + 256 * info.reserved, info.flag_bits, info.compress_type, info.date_time,
    )  # fmt: skip
    names_fit = mark == b"PK\x03\x04" and own.decode("utf-8", "replace") == info.orig_filename
    if not (same and sizes_fit and names_fit and _is_padding(padding)):
        raise Changed(info.filename)
    return file.tell()


def _is_padding(extra: bytes) -> bool:
    """Whether the extra fields of a record are known ones. PyTorch fills a field FB with one letter, so that storages
    start at multiples of 64; others are 64-bit sizes, and the times and owners of Info-ZIP and NTFS.
    """
    known = (b"FB", b"\x01\x00", b"\x0a\x00", b"UT", b"UX", b"Ux", b"ux")
    while extra:
        kind, length = extra[:2], int.from_bytes(extra[2:4], "little")
        content, extra = extra[4 : 4 + length], extra[4 + length :]
        filled = kind != b"FB" or len(set(content)) < 2
        if kind not in known or len(content) != length or not filled:
            return False
    return True


# ---- before PyTorch 1.6, and plain pickles ---------------------------------------------------------------------------


def _legacy(file: BinaryIO, size: int, most: int) -> Archive:
    window, machine = Window(file, size), Machine()
    content = machine.load(window)
    if content != LEGACY_MAGIC:
        if not isinstance(content, dict):
            raise Unreadable("not a checkpoint: it holds no mapping")
        return Archive(file, content, {}, most)
    protocol, system = machine.load(window), machine.load(window)
    if protocol != LEGACY_PROTOCOL or system.get("little_endian") is not True:
        raise Unreadable("written by another version of torch.save, or on a machine of another byte order")
    content = machine.load(window)
    places: dict[str, tuple[int, int]] = {}
    keys, at = machine.load(window), window.tell()
    for key in keys:
        storage = machine.storages[str(key)]
        file.seek(at)
        (length,) = struct.unpack("<q", file.read(8))
        start, at = at + 8, at + 8 + storage.length * storage.itemsize
        if length != storage.length or at > size:
            raise Unreadable(f"the storage {key} in it has another length, or is cut short")
        places[storage.key] = (start, at - start)
    if at != size:
        raise Unreadable("it has something after its last storage")
    return Archive(file, content, places, most)
