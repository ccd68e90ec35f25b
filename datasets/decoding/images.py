"""Decodes image files to BGR, 8 bits a channel; and what the header of an image file says.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

import mmap
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ssaseg.datasets.base import DataError, ImageFacts, Levels
from ssaseg.datasets.decoding.formats import (
    MAX_PIXELS,
    decode,
    format_of,
    open_image,
    read_bytes,
    require_end,
    require_size,
    unreadable,
)
from ssaseg.datasets.decoding.tiff import COMMON, WHITE_IS_ZERO, TiffHeader, as_rgb, tiff_header
from ssaseg.files.reading import open_file, read_file

ORIENTATION = 0x0112  # EXIF's and TIFF's tag
UPPER = (0, 2**16)  # as levels: the upper 8 bits, as OpenCV takes them
HEADER = 2**17  # bytes of a file that most often hold its header, with the EXIF data
# Formats whose further pictures are pages or frames. Cameras put previews behind the end of a JPEG.
PAGED = ("GIF", "PNG", "WEBP", "AVIF")


def read_image(
    path: Path, max_pixels: int = MAX_PIXELS, levels: Levels | None = None, data: bytes | None = None
) -> np.ndarray:
    """Decode an image file to BGR uint8 (H, W, 3), with its EXIF orientation applied.

    A fourth band, such as alpha or infrared, is dropped; grey is repeated in all channels. Of 16 bits, `levels` are
    mapped to 0..255 and values outside are clipped; without it, the upper 8 bits are taken (OpenCV rounds those of
    colour TIFFs), and values below 0 are 0. `levels` changes nothing for images of 8 bits. `data`: the file's content,
    if it is in memory already; `path` is then only its name in messages.

    Raises OSError where the file cannot be read or is not a regular file, DataError where it is not an image, is cut
    off, holds samples that are not of 1 to 16 bits or another number of bands than 1 to 4, or has more pixels than
    `max_pixels`; the latter before any pixel is decoded. MemoryError where the pixels do not fit into memory.
    """
    return decode_image(path, read_complete(path, max_pixels, data), levels)


def decode_image(path: Path, data: bytes, levels: Levels | None = None) -> np.ndarray:
    """`read_image` of the content of a file, as `read_complete` returns it. `path`: for messages."""
    image, header = _decoded(path, data, levels is not None)
    if image.dtype == np.uint8:
        if levels is not None and header is not None and header.bits > 8:
            raise _unknown(path, header)
        return image
    image = to_bytes(image, levels)
    white = header is not None and header.photometric == WHITE_IS_ZERO
    return 255 - image if white else image


def to_bytes(values: np.ndarray, levels: Levels | None) -> np.ndarray:
    """Values uint16 or int16, of any shape, as uint8 by `levels`, see `read_image`."""
    return _table(levels or UPPER, values.dtype == np.int16)[values.view(np.uint16)]


def stored_values(path: Path, data: bytes) -> np.ndarray:
    """The image (H, W, 3) with the values of the file: of 16 bits, uint16 or int16. Raises as `read_image` does."""
    return _decoded(path, data, True)[0]


def _decoded(path: Path, data: bytes, deep: bool) -> tuple[np.ndarray, TiffHeader | None]:
    """What OpenCV makes of an image, and its header if it is a TIFF. `deep`: 16 bits stay 16 bits."""
    # Not imread: it cannot open names with letters outside the system's code page, and it is not faster.
    header = tiff_header(data)
    if header is not None:
        _require_known(path, header)
        data = as_rgb(data, header)
        deep = (deep or header.kind == "int") and header.whole
    image = decode(data, cv2.IMREAD_COLOR | (cv2.IMREAD_ANYDEPTH if deep else 0))
    if image is not None and image.dtype in (np.uint8, np.uint16, np.int16):
        return image, header
    if header is not None and (header.compression not in COMMON or header.bits not in (1, 8, 16)):
        raise _unknown(path, header)
    if header is not None:
        what = f"{header.what}: damaged, or stored in a way that OpenCV does not read"
        raise DataError(f"{path}: {what}\nexpected a complete image\ncopy it again, or save it as PNG or without tiles")
    name = format_of(data)
    if name in ("GIF", "AVIF", "JPEG2000"):  # which some builds of OpenCV do not read
        what = f"{name}, damaged or not read by OpenCV {cv2.__version__}"
        raise DataError(f"{path}: {what}\nexpected a complete file of a known format\nconvert it to JPEG or PNG")
    raise unreadable(path, "image", "not an image of a known type")


def _require_known(path: Path, header: TiffHeader) -> None:
    """Raises DataError for samples that the decoder would take for others, or not at all."""
    known = header.kind in ("uint", "undefined") and header.bits <= 16
    signed = header.kind == "int" and header.bits == 16 and header.whole
    if not (known or signed) or not 1 <= header.samples <= 4:
        raise _unknown(path, header)


def _unknown(path: Path, header: TiffHeader) -> DataError:
    many = header.samples > 4 and header.kind == "uint" and header.bits in (8, 16)
    fix = "convert the image: scale its values to 0..255 in the same way for all images, and save PNG or TIFF"
    if many:
        fix = f"to read all bands, set data.channels: {header.samples}, with data.mean and data.std of that length"
    return DataError(
        f"{path}: {header.what}\n"
        "expected 1 to 4 bands of 8 or 16 bits, not stored apart, and no compression, LZW, Deflate or JPEG\n"
        f"{fix}"
    )


@lru_cache(maxsize=4)
def _table(levels: Levels, signed: bool) -> np.ndarray:
    """The grey level uint8 (65536,) of each 16-bit value, by its bits."""
    low, high = levels
    values = np.arange(2**16, dtype=np.uint16)
    values = values.view(np.int16).astype(np.int64) if signed else values.astype(np.int64)
    if levels == UPPER:
        return (values.clip(0) >> 8).astype(np.uint8)
    return ((values.clip(low, high) - low) * 255 / (high - low) + 0.5).astype(np.uint8)


def read_complete(path: Path, max_pixels: int = MAX_PIXELS, data: bytes | None = None) -> bytes:
    """The content of an image file, of a known format, complete and not too large. `data` and what is raised: as of
    `read_image`.
    """
    data = read_bytes(path, "image", data)
    require_end(path, data)
    require_size(path, data, max_pixels)
    return data


# ---- headers -----------------------------------------------------------------------------------------------------
def header_size(file: Path | bytes) -> tuple[int, int] | None:
    """Height and width [pixels] of an image according to its header. None where the header is not enough: the file is
    missing, its format is not known to Pillow, or its EXIF orientation may rotate the image.
    """
    try:
        data = read_file(file) if isinstance(file, Path) else file
        with open_image(data) as image:
            rotated = _orientation(image, data) != 1
            return None if rotated else (image.height, image.width)
    except MemoryError:
        raise
    except Exception:  # see `read_mask`
        return None


def shown_size(file: Path | bytes) -> tuple[int, int] | None:
    """Height and width [pixels] of an image as it is read, from the beginning of its file, at best the first `HEADER`
    bytes; None: not known.
    """
    try:
        if isinstance(file, bytes):
            data = file
            mapped = tiff_header(file) if format_of(data) == "TIFF" else None
        else:
            with open_file(file) as opened:
                data = opened.read(HEADER)
            mapped = mapped_header(file) if format_of(data) == "TIFF" else None  # it is often at the end
        if (header := mapped) is not None:
            size = header.height, header.width
            return None if 0 in size else size if header.orientation < 5 else size[::-1]
        with open_image(data) as image:
            turned = _orientation(image, data) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except MemoryError:
        raise
    except Exception:  # see `read_mask`
        return None


def mapped_header(path: Path) -> TiffHeader | None:
    """The header of a TIFF file, which is often at its end: only the parts that hold it are read. None as
    `tiff_header`. Raises OSError where the file cannot be read, ValueError where it is empty.
    """
    with open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return tiff_header(content)


def image_facts(data: bytes) -> ImageFacts | None:
    """What the header says about an image; None where it is damaged."""
    if (header := tiff_header(data)) is not None:
        return ImageFacts(header.orientation, header.shown, header.bits, header.paged)
    try:
        with open_image(data) as image:
            paged = image.format in PAGED and bool(getattr(image, "is_animated", False))
            bands = 3 if image.mode == "CMYK" else len(image.getbands())
            return ImageFacts(_orientation(image, data), bands, _bits(image, data), paged)
    except MemoryError:
        raise
    except Exception:  # see `read_mask`
        return None


def _bits(image: Image.Image, data: bytes) -> int:
    if image.format == "PNG":
        return data[24]
    return 16 if image.mode.startswith("I") else 8


def _orientation(image: Image.Image, data: bytes) -> int:
    """The EXIF orientation 1..8; 1 where there is none, or a value without meaning."""
    if image.format == "PNG":  # Pillow would decode its pixels to look for EXIF data behind them
        exif = Image.Exif()
        at = data.find(b"eXIf")
        if at >= 0:
            exif.load(data[at + 4 : at + 4 + int.from_bytes(data[at - 4 : at], "big")])
        elif b"Raw profile type exif" in data:
            exif = image.getexif()
    else:
        exif = image.getexif()
    value = exif.get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1
