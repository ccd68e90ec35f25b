"""The header of a TIFF file: what its samples are, before a decoder decides what to make of them.

Decoders take what they do not know for something else, without an error: OpenCV multiplies colours by a fourth band
that is marked as alpha, and gives only the first of three bands that are not marked as colours. Source: TIFF 6.0,
sections 2 and 8; the layout of BigTIFF is that of libtiff.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# Numbers of tags.
SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
ORIENTATION, SAMPLES, PLANAR, TARGET, EXTRA, SAMPLE_FORMAT = 274, 277, 284, 337, 338, 339
DEFAULTS: Mapping[int, tuple[int, ...]] = {
    SUBFILE: (0,), WIDTH: (0,), HEIGHT: (0,), BITS: (1,), COMPRESSION: (1,), PHOTOMETRIC: (1,), SAMPLES: (1,),
    ORIENTATION: (1,), PLANAR: (1,), EXTRA: (), SAMPLE_FORMAT: (1,),
}  # fmt: skip
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK = 0, 1, 2, 5  # values of PHOTOMETRIC
COLOURED = {RGB: 3, CMYK: 4, 6: 3, 8: 3}  # PHOTOMETRIC -> number of its channels; 6: YCbCr, 8: Lab
UNASSOCIATED = 2  # value of EXTRA: alpha by which colours are still to be multiplied
INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}  # type of a value -> its code in `struct`
KINDS = {1: "uint", 2: "int", 3: "float", 4: "undefined", 5: "complex int", 6: "complex float"}
METHODS = {
    1: "no", 2: "CCITT", 3: "CCITT", 4: "CCITT", 5: "LZW", 6: "JPEG", 7: "JPEG", 8: "Deflate", 32773: "PackBits",
    32946: "Deflate", 34712: "JPEG 2000", 34887: "LERC", 34925: "LZMA", 50000: "ZSTD", 50001: "WebP", 50002: "JPEG XL",
}  # fmt: skip
LOSSY = {6, 7, 34712, 34887, 50001, 50002}  # compression that may change values
# Every build of OpenCV reads these, so that an error of theirs means damage.
COMMON = {1, 2, 3, 4, 5, 7, 8, 32773, 32946}
MOST_ENTRIES, MOST_VALUES, MOST_PAGES = 4096, 64, 100  # that are looked at


@dataclass(frozen=True)
class TiffHeader:
    """What the first page of a TIFF file holds."""

    width: int
    height: int
    bits: int  # of one sample
    kind: str  # "uint", "int", "float", …
    samples: int  # bands
    photometric: int
    extra: tuple[int, ...]  # meaning of the bands beyond the colours
    compression: int
    planar: bool  # each band is stored by itself
    orientation: int  # 1..8 as in EXIF
    paged: bool  # whether there are more pages than the first, beside smaller copies of it and its transparency
    entries: Mapping[int, int]  # tag -> offset of its entry in the file
    order: str  # of bytes, for `struct`
    big: bool  # BigTIFF

    @property
    def shown(self) -> int:
        """Number of channels as they are shown, with bands beyond the colours: CMYK becomes RGB."""
        return self.samples - (self.photometric == CMYK)

    @property
    def whole(self) -> bool:
        """Whether OpenCV gives all bits of its samples. Not of two bands, nor of bands that are stored apart."""
        return self.bits <= 8 or self.samples == 1 or (self.samples != 2 and not self.planar)

    @property
    def what(self) -> str:
        """For messages, such as `a TIFF of 4 bands of uint16, LZW compression`."""
        bands = f"{self.samples} band{'s' * (self.samples != 1)}"
        apart = " stored apart" if self.planar and self.samples > 1 else ""
        method = METHODS.get(self.compression, f"unknown ({self.compression})")
        return f"a TIFF of {bands} of {self.kind}{self.bits}{apart}, {method} compression"


def tiff_header(data: bytes | mmap.mmap) -> TiffHeader | None:
    """The header of a TIFF file; None for other files, and where it is damaged."""
    try:
        order, big, first = _start(data)
        tags, entries, following = _directory(data, order, big, first)
        values = {**DEFAULTS, **tags}
        bits, kinds = set(values[BITS]), set(values[SAMPLE_FORMAT])
        return TiffHeader(
            width=values[WIDTH][0],
            height=values[HEIGHT][0],
            bits=max(bits),
            kind=KINDS.get(values[SAMPLE_FORMAT][0], "unknown") if len(kinds) == 1 else "mixed",
            samples=values[SAMPLES][0],
            photometric=values[PHOTOMETRIC][0],
            extra=values[EXTRA],
            compression=values[COMPRESSION][0],
            planar=values[PLANAR][0] == 2,
            orientation=values[ORIENTATION][0] if 1 <= values[ORIENTATION][0] <= 8 else 1,
            paged=any(not each & 5 for each in _others(data, order, big, first, following)),
            entries=entries,
            order=order,
            big=big,
        )
    except (struct.error, IndexError, ValueError, OverflowError):
        return None


def as_rgb(data: bytes, header: TiffHeader) -> bytes:
    """The file with a header that makes a decoder give the first three bands, as they are stored.

    Alpha becomes a band without meaning, and three or four bands without meaning become red, green, blue and perhaps
    one more. Only entries of the header are changed: values and their places stay.
    """
    changed = bytearray(data)
    colours = COLOURED.get(header.photometric, 1)
    if header.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) and header.samples in (3, 4):
        _put(changed, header, PHOTOMETRIC, PHOTOMETRIC, (RGB,))
        # Without a band too many, the entry becomes that of a text which nobody reads; it keeps its place in the order.
        if header.samples == 4:
            _put(changed, header, EXTRA, EXTRA, (0,))
        else:
            _put(changed, header, EXTRA, TARGET, ())
        return bytes(changed)
    if header.samples > colours and UNASSOCIATED in header.extra and len(header.extra) <= 2:
        _put(changed, header, EXTRA, EXTRA, tuple(0 for _ in header.extra))
        return bytes(changed)
    return data


def _put(data: bytearray, header: TiffHeader, tag: int, name: int, values: tuple[int, ...]) -> None:
    """Overwrites the entry `tag`, if there is one: `values`, at most two, fit into it. None at all: an empty text."""
    at = header.entries.get(tag)
    if at is None:
        return
    kind, count = (3, len(values)) if values else (2, 1)
    room = 8 if header.big else 4
    content = struct.pack(f"{header.order}{len(values)}H", *values).ljust(room, b"\0")
    entry = struct.pack(f"{header.order}HH{'Q' if header.big else 'I'}", name, kind, count) + content
    data[at : at + len(entry)] = entry


def _start(data: bytes | mmap.mmap) -> tuple[str, bool, int]:
    """Order of bytes, whether it is a BigTIFF, and the offset of the first directory."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise ValueError("not a TIFF")
    (magic,) = struct.unpack_from(f"{order}H", data, 2)
    if magic == 42:
        return order, False, struct.unpack_from(f"{order}I", data, 4)[0]
    if magic == 43:
        return order, True, struct.unpack_from(f"{order}Q", data, 8)[0]
    raise ValueError("not a TIFF")


def _directory(
    data: bytes | mmap.mmap, order: str, big: bool, at: int
) -> tuple[dict[int, tuple[int, ...]], dict[int, int], int]:
    """Values of the tags in `DEFAULTS`, offsets of all entries, and the offset of the next directory (0: none)."""
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, at)
    if not 1 <= count <= MOST_ENTRIES:
        raise ValueError("number of entries")
    size, room, at = (20, 8, at + 8) if big else (12, 4, at + 2)
    tags: dict[int, tuple[int, ...]] = {}
    entries: dict[int, int] = {}
    for entry in range(at, at + size * count, size):
        tag, kind, number = struct.unpack_from(f"{order}HH{'Q' if big else 'I'}", data, entry)
        entries[tag] = entry
        if tag not in DEFAULTS or kind not in INTEGERS or not 1 <= number <= MOST_VALUES:
            continue
        code = f"{order}{number}{INTEGERS[kind]}"
        place = entry + size - room
        if struct.calcsize(code) > room:
            (place,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, place)
        tags[tag] = struct.unpack_from(code, data, place)
    (following,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, at + size * count)
    return tags, entries, following


def _others(data: bytes | mmap.mmap, order: str, big: bool, first: int, following: int) -> Iterator[int]:
    """The kind (`SUBFILE`) of each directory after the first. Ends at a damaged one, and at a circle."""
    seen = {first}
    while following and following not in seen and len(seen) < MOST_PAGES:
        seen.add(following)
        try:
            tags, _, following = _directory(data, order, big, following)
        except (struct.error, ValueError, OverflowError):
            return
        yield tags.get(SUBFILE, (0,))[0]
