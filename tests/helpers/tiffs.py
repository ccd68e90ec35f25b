"""Writes small TIFF files with any number of bands, which neither OpenCV nor Pillow can write."""

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

SHORT, LONG = 3, 4
FORMATS = {"u": 1, "i": 2, "f": 3}


def tiff(*pages: np.ndarray, planar: bool = False, deflate: bool = False, **tags: Any) -> bytes:
    """A little-endian TIFF of pages (H,W,C) or (H,W), each in one strip, or one strip a band with `planar`.

    tags: other values of a tag, such as `t262=2` (RGB) and `t338=[0]` (extra samples).
    """
    parts = [b"II*\0\0\0\0\0"]
    link = 4  # where the offset of the next directory is written
    for page in pages:
        page = page if page.ndim == 3 else page[..., None]
        strips = [page[..., band] for band in range(page.shape[2])] if planar else [page]
        packed = [np.ascontiguousarray(strip).tobytes() for strip in strips]
        packed = [zlib.compress(strip) for strip in packed] if deflate else packed
        offsets = []
        for strip in packed:
            offsets.append(sum(map(len, parts)))
            parts.append(strip + b"\0" * (len(strip) % 2))
        height, width, bands = page.shape
        entries: dict[int, tuple[int, Sequence[int]]] = {
            256: (LONG, [width]),
            257: (LONG, [height]),
            258: (SHORT, [8 * page.itemsize] * bands),
            259: (SHORT, [8 if deflate else 1]),
            262: (SHORT, [1]),
            273: (LONG, offsets),
            277: (SHORT, [bands]),
            278: (LONG, [height]),
            279: (LONG, [len(strip) for strip in packed]),
            284: (SHORT, [2 if planar else 1]),
            339: (SHORT, [FORMATS[page.dtype.kind]] * bands),
        }
        for name, values in tags.items():
            entries[int(name[1:])] = (SHORT, values if isinstance(values, list) else [values])
        link = _directory(parts, link, entries)
    return b"".join(parts)


def _directory(parts: list[bytes], link: int, entries: dict[int, tuple[int, Sequence[int]]]) -> int:
    """Appends a directory, whose offset is written at `link`; returns where the offset of the next one belongs."""
    table, start = [], sum(map(len, parts))
    after = start + 2 + 12 * len(entries) + 4
    longer = b""
    for tag, (kind, values) in sorted(entries.items()):
        content = struct.pack(f"<{len(values)}{'H' if kind == SHORT else 'I'}", *values)
        if len(content) > 4:
            content, longer = struct.pack("<I", after + len(longer)), longer + content
        table.append(struct.pack("<HHI", tag, kind, len(values)) + content.ljust(4, b"\0"))
    joined = bytearray(b"".join(parts))
    struct.pack_into("<I", joined, link, start)
    parts[:] = [bytes(joined), struct.pack("<H", len(entries)) + b"".join(table) + b"\0" * 4 + longer]
    return after - 4
