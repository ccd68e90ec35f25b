"""Decode image and mask files to pixels, with an error where a file is damaged or cut off.

Letters: H, W height and width [pixels].
"""

import io
import struct
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from ssaseg.datasets.base import DataError

# What Pillow raises for damaged files: its PNG reader alone raises three types besides OSError.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(path: Path) -> np.ndarray:
    """Decode an image file to BGR uint8 (H, W, 3), with its EXIF orientation applied.

    Alpha is dropped, grey is repeated in all channels, 16 bits are reduced to 8. Raises OSError where the file cannot
    be read, DataError where it is not an image or is cut off.
    """
    data = path.read_bytes()
    require_complete(path, data)
    # Not imread: it cannot open names with letters outside the system's code page, and it is not faster.
    image = _decode(data, cv2.IMREAD_COLOR)
    if image is None:
        raise _unreadable(path, "image", "not an image of a known type" if data else "empty file")
    return image


def read_mask(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode a mask file to raw ids uint8 (H, W) and, for palette files, the palette as RGB uint8 (N, 3).

    Pillow reads palette files, because OpenCV turns their indices into colours. As in mmsegmentation, the EXIF
    orientation is not applied. Raises OSError where the file cannot be read, DataError where it is damaged, in colours,
    or holds ids over 255.
    """
    data, broken = path.read_bytes(), False
    if data[:4] == b"\x89PNG" and data[24:26] == b"\x08\x00":  # 8 bits of grey, as most masks are
        # OpenCV is faster, and it checks the checksums, which Pillow does not.
        grey = _decode(data, cv2.IMREAD_UNCHANGED)
        broken = grey is None
        if grey is not None and grey.ndim == 2:
            return grey, None
    try:
        with _open(io.BytesIO(data)) as file:
            mode = file.mode
            ids = np.array(file)
            colours = np.array(file.getpalette(), np.uint8).reshape(-1, 3) if mode == "P" else None
    except UnidentifiedImageError:  # its text names a Python object
        raise _unreadable(path, "mask", "not an image of a known type" if data else "empty file") from None
    except _DAMAGE as error:
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


def header_size(file: Path | io.BytesIO) -> tuple[int, int] | None:
    """Height and width [pixels] of an image according to its header. None where the header is not enough: the file is
    missing, its format is not known to Pillow, or its EXIF orientation rotates the image.
    """
    try:
        with _open(file) as image:
            return (image.height, image.width) if image.getexif().get(0x0112, 1) == 1 else None
    except _DAMAGE:
        return None


def _open(file: Path | io.BytesIO) -> Image.Image:
    """The image, not yet decoded. Pillow's warning about large images is switched off: it would not name the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file)


def _decode(data: bytes, flags: int) -> np.ndarray | None:
    """The image that OpenCV decodes from the bytes of a file; None where it cannot."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:
        return None


def require_complete(path: Path, data: bytes) -> None:
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
