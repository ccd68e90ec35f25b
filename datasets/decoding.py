"""Decode image and mask files to pixels, with an error where a file is damaged or cut off.

Letters: H, W height and width [pixels].
"""

import io
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from ssaseg.datasets.base import DataError
from ssaseg.files.reading import read_file

# The formats that are read, by content, with any file name: Pillow's name -> how such files start. Pillow would try 44
# formats, among them EPS, for which it runs the program Ghostscript on the file.
FORMATS: dict[str, tuple[tuple[int, bytes], ...]] = {
    "PNG": ((0, b"\x89PNG\r\n\x1a\n"),),
    "JPEG": ((0, b"\xff\xd8"),),
    "TIFF": ((0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")),
    "BMP": ((0, b"BM"),),
    "WEBP": ((8, b"WEBP"),),
    "GIF": ((0, b"GIF8"),),
    "PPM": ((0, b"P1"), (0, b"P2"), (0, b"P3"), (0, b"P4"), (0, b"P5"), (0, b"P6")),
    "JPEG2000": ((0, b"\xff\x4f\xff\x51"), (4, b"jP  \r\n\x87\n")),
    "AVIF": ((4, b"ftypavif"), (4, b"ftypavis"), (4, b"ftypmif1")),
}

MAX_PIXELS = 2**28  # of an image in a data set: 268 million, 0.8 GB as colours
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow warns above it and refuses twice as many; ours comes first
warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow's warnings about damaged files do not name the file
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # as little as OpenCV's, of up to seven lines


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to BGR uint8 (H, W, 3), with its EXIF orientation applied.

    Alpha is dropped, grey is repeated in all channels, 16 bits are reduced to 8. Raises OSError where the file cannot
    be read or is not a regular file, DataError where it is not an image, is cut off, or has more pixels than
    `max_pixels`; the latter before any pixel is decoded. MemoryError where the pixels do not fit into memory.
    """
    data = read_complete(path, max_pixels)
    # Not imread: it cannot open names with letters outside the system's code page, and it is not faster.
    image = _decode(data, cv2.IMREAD_COLOR)
    if image is None:
        raise _unreadable(path, "image", "not an image of a known type")
    return image


def read_complete(path: Path, max_pixels: int = MAX_PIXELS) -> bytes:
    """The content of an image file, of a known format, complete and not too large. Raises as `read_image` does."""
    data = _read_bytes(path, "image")
    _require_end(path, data)
    _require_size(path, data, max_pixels)
    return data


def read_mask(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode a mask file to raw ids uint8 (H, W) and, for palette files, the palette as RGB uint8 (N, 3).

    Pillow reads palette files, because OpenCV turns their indices into colours. As in mmsegmentation, the EXIF
    orientation is not applied. Raises OSError where the file cannot be read or is not a regular file, DataError where
    it is damaged, in colours, holds ids over 255, or has more than `MAX_PIXELS` pixels.
    """
    data, broken = _read_bytes(path, "mask"), False
    _require_size(path, data, MAX_PIXELS)
    if data[:4] == b"\x89PNG" and data[24:26] == b"\x08\x00":  # 8 bits of grey, as most masks are
        # OpenCV is faster, and it checks the checksums, which Pillow does not.
        grey = _decode(data, cv2.IMREAD_UNCHANGED)
        broken = grey is None
        if grey is not None and grey.ndim == 2:
            return grey, None
    try:
        with open_image(data) as file:
            mode = file.mode
            ids = np.array(file)
            colours = np.array(file.getpalette(), np.uint8).reshape(-1, 3) if mode == "P" else None
    except UnidentifiedImageError:  # its text names a Python object
        raise _unreadable(path, "mask", "not an image of a known type") from None
    except MemoryError:  # this does not mean that the file is damaged
        raise
    except Exception as error:  # Pillow's readers raise ten types for damaged files
        raise _unreadable(path, "mask", str(error) or type(error).__name__) from None
    if broken:
        raise _unreadable(path, "mask", "a checksum is wrong, or its end is missing")
    if ids.ndim != 2:
        same = mode in ("RGB", "RGBA") and (ids[..., :1] == ids[..., :3]).all()
        fix = "its channels are equal: keep one" if same else "replace each colour by its class id (0, 1, 2, …)"
        if mode in ("LA", "PA"):
            fix = "the second channel is alpha, which does not hold classes: save the mask without alpha"
        found = f"a mask of {ids.shape[2]} channels (mode {mode})"
        raise DataError(f"{path}: {found}\nexpected one channel that holds class ids\n{fix}")
    if ids.dtype != np.uint8:
        if ids.dtype.kind == "f" or not 0 <= int(ids.min()) <= int(ids.max()) <= 255:
            found = f"{ids.dtype} values {ids.min()}..{ids.max()}"
            raise DataError(f"{path}: {found} in a mask\nexpected class ids 0..255\nstore ids in 8 bits, unscaled")
        ids = ids.astype(np.uint8)
    return ids, colours


def header_size(file: Path | bytes) -> tuple[int, int] | None:
    """Height and width [pixels] of an image according to its header. None where the header is not enough: the file is
    missing, its format is not known to Pillow, or its EXIF orientation may rotate the image.
    """
    try:
        data = read_file(file) if isinstance(file, Path) else file
        with open_image(data) as image:
            if image.format == "PNG":  # Pillow would decode its pixels to look for EXIF data behind them
                rotated = b"eXIf" in data or b"Raw profile type exif" in data
            else:
                rotated = image.getexif().get(0x0112, 1) != 1
            return None if rotated else (image.height, image.width)
    except MemoryError:
        raise
    except Exception:  # see `read_mask`
        return None


def open_image(data: bytes) -> Image.Image:
    """A Pillow image of one of `FORMATS`, not yet decoded. Of an open file, a size in the header would be read at once.

    Raises what Pillow raises for damaged files, most often OSError.
    """
    return Image.open(io.BytesIO(data), formats=tuple(FORMATS))


def _read_bytes(path: Path, kind: str) -> bytes:
    """The content of a file that starts as one of `FORMATS` does."""
    data = read_file(path)
    known = any(data[at : at + len(start)] == start for starts in FORMATS.values() for at, start in starts)
    if not known:
        raise _unreadable(path, kind, "not an image of a known type" if data else "empty file")
    return data


def _require_size(path: Path, data: bytes, max_pixels: int) -> None:
    """Raise DataError where the header claims more pixels: a few kilobytes can hold gigabytes of one colour."""
    try:
        with open_image(data) as image:
            pixels, size = image.width * image.height, f"{image.width}×{image.height} pixels"
    except Image.DecompressionBombError:
        pixels, size = 2 * MAX_PIXELS, f"more than {2 * MAX_PIXELS:,} pixels"
    except MemoryError:
        raise
    except Exception:  # Pillow cannot read it; OpenCV may, and has a limit of its own
        return
    if pixels > max_pixels:
        raise DataError(
            f"{path}: an image of {size}, in a file of {len(data) / 2**20:.2g} MiB\n"
            f"expected at most {max_pixels:,} pixels\nuse a smaller image, or cut it into tiles"
        )


def _decode(data: bytes, flags: int) -> np.ndarray | None:
    """The image that OpenCV decodes from the bytes of a file; None where it cannot. Raises MemoryError."""
    if data[:4] == b"\x89PNG":
        data = _without_profile(data)
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError("not enough memory to decode an image") from None
        return None


def _without_profile(data: bytes) -> bytes:
    """A PNG file without its colour profile, which OpenCV does not use. If it is damaged, libpng prints its name, with
    the control characters in it, on stderr.
    """
    at = len(b"\x89PNG\r\n\x1a\n")
    kept, start = [], 0
    while data.find(b"iCCP", at) >= 0 and data[at + 4 : at + 8] not in (b"", b"IDAT"):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, name, content, checksum
        if data[at + 4 : at + 8] == b"iCCP":
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]]) if kept else data


def _require_end(path: Path, data: bytes) -> None:
    """Raise DataError for a JPEG or PNG file that is cut off: OpenCV 4 only warns and fills the missing part grey."""
    if data[:2] == b"\xff\xd8":
        complete = data.endswith(b"\xff\xd9") or data.find(b"\xff\xd9", _jpeg_scan(data)) >= 0
    elif data[:4] == b"\x89PNG":
        complete = data.rfind(b"IEND") >= 0
    else:
        return
    if not complete:
        raise _unreadable(path, "image", f"its end is missing after {len(data)} bytes")


def _jpeg_scan(data: bytes) -> int:
    """Offset of the first scan: an end marker before it belongs to the thumbnail in the EXIF segment."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def _unreadable(path: Path, kind: str, reason: str) -> DataError:
    fix = "copy it again, or remove the pair"
    return DataError(f"{path}: damaged {kind}: {reason}\nexpected a complete file of a known format\n{fix}")
