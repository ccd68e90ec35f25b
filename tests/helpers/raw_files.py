"""Image files written byte by byte, as other programs write them: Pillow and OpenCV have no option for these."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

KINDS = {"u": 1, "i": 2, "f": 3}  # of numpy -> TIFF's SampleFormat


def tiff(
    pixels: np.ndarray,
    photometric: int = 1,
    extra: Sequence[int] = (),
    bits: int = 0,
    order: str = "<",
    pages: int = 1,
    apart: bool = False,
) -> bytes:
    """A TIFF without compression of (H, W) or (H, W, bands). `bits`: of a sample, if less than a byte. `extra`: what
    the bands behind the colours mean. `pages`: of the same pixels. `apart`: each
    band by itself, one after the other.
    """
    bands = pixels.reshape(*pixels.shape[:2], -1)
    height, width, count = bands.shape
    values = (np.moveaxis(bands, 2, 0) if apart else bands).astype(bands.dtype.newbyteorder(order))
    content = packed(bands[..., 0], bits) if bits else values.tobytes()
    strips = count if apart else 1
    sizes = [len(content) // strips] * strips
    content += bytes(len(content) % 2)
    per_sample = (bits or 8 * bands.dtype.itemsize,) * count
    tags: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", per_sample), 259: ("H", [1]), 262: ("H", [photometric]),
        273: ("I", [8 + at * sizes[0] for at in range(strips)]), 277: ("H", [count]), 278: ("I", [height]),
        279: ("I", sizes), 284: ("H", [1 + apart]),
        338: ("H", extra), 339: ("H", (KINDS[bands.dtype.kind],) * count),
    }  # fmt: skip
    tags = {tag: value for tag, value in tags.items() if value[1]}
    file = bytearray(struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(content)) + content)
    for page in range(pages):
        long = bytearray()
        start = len(file) + 2 + 12 * len(tags) + 4  # of the values that do not fit into their entries
        entries = bytearray(struct.pack(f"{order}H", len(tags)))
        for tag, (code, values) in tags.items():
            raw = struct.pack(f"{order}{len(values)}{code}", *values)
            if len(raw) > 4:
                at = start + len(long)
                long += raw + bytes(len(raw) % 2)
                raw = struct.pack(f"{order}I", at)
            entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[code], len(values)) + raw.ljust(4, b"\0")
        following = start + len(long) if page + 1 < pages else 0
        file += entries + struct.pack(f"{order}I", following) + long
    return bytes(file)


def png(ids: np.ndarray, bits: int, palette: bytes = b"") -> bytes:
    """A PNG of grey levels or, with `palette`, of indices, of 1, 2, 4 or 8 bits."""
    height, width = ids.shape
    stride = len(packed(ids[:1], bits))
    rows = packed(ids, bits)
    lines = b"".join(b"\0" + rows[at : at + stride] for at in range(0, len(rows), stride))
    head = struct.pack(">IIBBBBB", width, height, bits, 3 if palette else 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"PLTE", palette), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, part) for name, part in parts if part or name == b"IEND")


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def packed(ids: np.ndarray, bits: int) -> bytes:
    """Rows of numbers of 1, 2, 4 or 8 bits, each row from a whole byte on."""
    high_first = (ids[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(high_first.reshape(len(ids), -1).astype(np.uint8), axis=1).tobytes()
