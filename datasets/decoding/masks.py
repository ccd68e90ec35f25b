"""Decodes mask files to the ids that are stored in them, and refuses files whose ids cannot be known.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import UnidentifiedImageError

from ssaseg.datasets.base import DataError
from ssaseg.datasets.decoding.formats import (
    MAX_PIXELS,
    decode,
    format_of,
    open_image,
    read_bytes,
    require_size,
    unreadable,
)
from ssaseg.datasets.decoding.tiff import LOSSY, METHODS, WHITE_IS_ZERO, TiffHeader, tiff_header


class Mask(NamedTuple):
    """A mask as it is stored."""

    ids: np.ndarray  # uint8 (H, W)
    colours: np.ndarray | None  # RGB uint8 (N, 3), the palette; None where ids are grey levels
    white: int  # the id that is shown as white, if ids are grey levels: 1 of 1-bit masks, 255 of most
    paged: bool = False  # whether there are more pages or frames than the first, which is read


def read_mask(path: Path) -> Mask:
    """Decode a mask file to raw ids, which are the stored numbers: not the grey levels that a viewer makes of them.

    Pillow reads palette files, because OpenCV turns their indices into colours. As in mmsegmentation, the EXIF
    orientation is not applied. Raises OSError where the file cannot be read or is not a regular file, DataError where
    it is damaged, in colours, was compressed with losses, holds ids over 255 or other numbers than whole ones, or has
    more than `MAX_PIXELS` pixels.
    """
    data = read_bytes(path, "mask")
    require_size(path, data, MAX_PIXELS)
    header, broken = tiff_header(data), False
    _require_exact(path, data, header)
    if data[:4] == b"\x89PNG" and data[24:26] == b"\x08\x00":  # 8 bits of grey, as most masks are
        # OpenCV is faster, and it checks the checksums, which Pillow does not.
        grey = decode(data, cv2.IMREAD_UNCHANGED)
        broken = grey is None
        if grey is not None and grey.ndim == 2:
            return Mask(grey, None, 255)
    try:
        with open_image(data) as file:
            mode = file.mode
            ids = np.array(file)
            colours = np.array(file.getpalette(), np.uint8).reshape(-1, 3) if mode == "P" else None
            paged = header.paged if header is not None else bool(getattr(file, "is_animated", False))
    except UnidentifiedImageError:  # its text names a Python object
        raise _not_read(path, header) from None
    except MemoryError:  # this does not mean that the file is damaged
        raise
    except Exception as error:  # Pillow's readers raise ten types for damaged files
        raise unreadable(path, "mask", str(error) or type(error).__name__) from None
    if broken:
        raise unreadable(path, "mask", "a checksum is wrong, or its end is missing")
    if ids.ndim != 2:
        raise _channels(path, ids, mode)
    ids, white = _stored(ids, colours is not None, data, header)
    kind = ids.dtype.name if header is None else f"{header.kind}{header.bits}"
    return Mask(_bytes(path, ids, kind), colours, white, paged)


def _stored(ids: np.ndarray, palette: bool, data: bytes, header: TiffHeader | None) -> tuple[np.ndarray, int]:
    """The numbers that are stored, of what Pillow makes of them, and which of them is shown as white.

    Pillow spreads grey levels of less than 8 bits over 0..255, and inverts those in which 0 is white.
    """
    if palette or ids.dtype == bool:  # of 1 bit, all programs mean black and white, also where 0 is white
        return ids, 1
    if data[:4] == b"\x89PNG" and data[24] < 8:
        white = 2 ** data[24] - 1
        return ids // (255 // white), white
    if header is not None and header.kind in ("uint", "undefined"):
        white = 2**header.bits - 1
        if header.bits < 8:
            ids = ids // (255 // white)
        if header.photometric == WHITE_IS_ZERO and header.bits <= 8:  # of more bits, Pillow does not invert
            ids = (white - ids).astype(np.uint8)
        return ids, white
    if format_of(data) == "PPM":
        white = _largest(data)
        full = 255 if white <= 255 else 65535
        # Equal numbers come back exactly: they were spread, so that rounding cannot have made two of them equal.
        return (ids if white == full else (ids.astype(np.uint32) * white + full // 2) // full), white
    return ids, 255


def _largest(data: bytes) -> int:
    """The number behind the size in the header of a PGM file: that of white. Comments end with their line."""
    head = b" ".join(line.partition(b"#")[0] for line in data[:4096].split(b"\n"))
    numbers = head[2:].split(maxsplit=3)
    return min(max(int(numbers[2]), 1), 65535)


def _bytes(path: Path, ids: np.ndarray, kind: str) -> np.ndarray:
    """Ids as uint8. Raises DataError where they are larger or smaller, or not whole numbers."""
    if ids.dtype == np.uint8:
        return ids
    low, high = ids.min(), ids.max()
    if ids.dtype.kind == "f" or not 0 <= int(low) <= int(high) <= 255:
        fix = "store ids in 8 bits, unscaled"
        for factor in (257, 256):
            if ids.dtype.kind != "f" and low >= 0 and high <= 255 * factor and not (ids % factor).any():
                fix = f"all values are multiples of {factor}, as of 8 bits that were spread over 16: divide by {factor}"
        raise DataError(f"{path}: {kind} values {low}..{high} in a mask\nexpected class ids 0..255\n{fix}")
    return ids.astype(np.uint8)


# ---- what is refused ---------------------------------------------------------------------------------------------
def _require_exact(path: Path, data: bytes, header: TiffHeader | None) -> None:
    """Raises DataError for lossy compression, and for samples that Pillow takes for others or does not read."""
    if method := lossy_method(data, header):
        raise DataError(
            f"{path}: a mask with {method} compression, which changes ids\nexpected PNG, or another lossless format\n"
            "export the masks again; of two values only, `ssaseg data prepare binary` makes class ids"
        )
    if header is None:
        return
    readable = header.bits in {"uint": (1, 2, 4, 8, 16), "undefined": (8,), "int": (16, 32)}.get(header.kind, ())
    if header.kind == "float" and header.bits == 32 and header.samples == 1:
        return  # refused with its values
    if not readable or (header.samples > 1 and header.photometric < 2 and not header.extra[:1] == (2,)):
        raise _not_read(path, header)


def _not_read(path: Path, header: TiffHeader | None) -> DataError:
    if header is None:
        return unreadable(path, "mask", "not an image of a known type")
    return DataError(
        f"{path}: {header.what}, as a mask\nexpected one band of 8 bits that holds class ids\n"
        "save the ids as 8-bit PNG, unscaled"
    )


def _channels(path: Path, ids: np.ndarray, mode: str) -> DataError:
    same = mode in ("RGB", "RGBA") and (ids[..., :1] == ids[..., :3]).all()
    fix = "its channels are equal: keep one" if same else "replace each colour by its class id (0, 1, 2, …)"
    if mode in ("LA", "PA"):
        fix = "the second channel is alpha, which does not hold classes: save the mask without alpha"
    found = f"a mask of {ids.shape[2]} channels (mode {mode})"
    return DataError(f"{path}: {found}\nexpected one channel that holds class ids\n{fix}")


def lossy_method(data: bytes, header: TiffHeader | None) -> str | None:
    """The name of the compression that may have changed ids; None where there is none."""
    name = format_of(data)
    if name == "TIFF":
        return METHODS[header.compression] if header is not None and header.compression in LOSSY else None
    if name == "WEBP":
        return "lossy WebP" if _webp_chunk(data) == b"VP8 " else None
    if name == "JPEG2000":
        return "lossy JPEG 2000" if _jpeg2000_wavelet(data) == 0 else None
    return name if name in ("JPEG", "AVIF") else None


def _webp_chunk(data: bytes) -> bytes:
    """The name of the first chunk that holds pixels: `VP8 ` with losses, `VP8L` without."""
    at = 12
    while at + 8 <= len(data) and data[at : at + 4] not in (b"VP8 ", b"VP8L"):
        (size,) = struct.unpack_from("<I", data, at + 4)
        at += 24 if data[at : at + 4] == b"ANMF" else 8 + size + size % 2  # a frame holds chunks of its own
    return data[at : at + 4]


def _jpeg2000_wavelet(data: bytes) -> int | None:
    """The wavelet in the header of a codestream: 0 with losses (9-7), 1 without (5-3). Source: ISO 15444-1, A.6."""
    at = data.find(b"\xff\x4f\xff\x51") + 2
    while 2 <= at <= len(data) - 14 and data[at : at + 2] not in (b"\xff\x90", b"\xff\x52"):
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[at + 13] if at >= 2 and data[at : at + 2] == b"\xff\x52" and at + 13 < len(data) else None
