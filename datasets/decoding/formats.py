"""What images and masks have in common: which formats are read, and what is refused before pixels are decoded."""

import io
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ssaseg.datasets.base import DataError
from ssaseg.datasets.decoding.tiff import tiff_header
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

# What is not read, but is found under an image's name: how such files start, what they are, and the fix.
_SAVE = "save it as PNG, masks with one byte a pixel"
OTHERS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a pointer of Git LFS in place of the file", "fetch the files: git lfs pull"),
    (0, b"\x93NUMPY", "a NumPy array (.npy)", _SAVE),
    (0, b"PK\x03\x04", "an archive (zip, .npz)", "unpack it"),
    (0, b"\x1f\x8b", "an archive (gzip)", "unpack it"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _SAVE),
    (0, b"MATLAB 5.0", "a MATLAB file", _SAVE),
    (0, b"8BPS", "a Photoshop file", _SAVE),
    (0, b"v/1\x01", "an OpenEXR image", _SAVE),
    (0, b"\xff\x0a", "a JPEG XL image", _SAVE),
    (4, b"JXL \r\n", "a JPEG XL image", _SAVE),
    (4, b"ftyphei", "a HEIC image", "convert it to JPEG or PNG"),
    (4, b"ftyphev", "a HEIC image", "convert it to JPEG or PNG"),
    (128, b"DICM", "a DICOM image", _SAVE),
)
KNOWN = {
    "image": "an image: PNG, JPEG, TIFF, BMP, WebP, GIF, PNM, JPEG 2000 or AVIF",
    "mask": "a mask: PNG, or TIFF, BMP, GIF or PGM",
}

MAX_PIXELS = 2**28  # of an image in a data set: 268 million, 0.8 GB as colours
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow warns above it and refuses twice as many; ours comes first
warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow's warnings about damaged files do not name the file
# As little do OpenCV's log lines, up to seven for a file. The function has another place in version 4 than in 5.
(getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel)(0)  # silent


def open_image(data: bytes) -> Image.Image:
    """A Pillow image of one of `FORMATS`, not yet decoded. Of an open file, a size in the header would be read at once.

    Raises what Pillow raises for damaged files, most often OSError.
    """
    return Image.open(io.BytesIO(data), formats=tuple(FORMATS))


def read_bytes(path: Path, kind: str) -> bytes:
    """The content of a file that starts as one of `FORMATS` does."""
    data = read_file(path)
    if format_of(data) is None:
        if other := _other(data):
            what, fix = other
            raise DataError(f"{path}: {what}\nexpected {KNOWN[kind]}\n{fix}")
        raise unreadable(path, kind, "not an image of a known type" if data else "empty file")
    return data


def _other(data: bytes) -> tuple[str, str] | None:
    """What a file of none of `FORMATS` is, and the fix; None where this is not known."""
    if b"PNG" in data[:8] and b"\x1a" in data[:16]:  # its first bytes are there to show this
        what = "a PNG file whose line ends or letters were converted, as git and FTP do with text"
        return what, "copy it again in binary mode; for git: `*.png binary` in .gitattributes"
    found = (each[2:] for each in OTHERS if data[each[0] : each[0] + len(each[1])] == each[1])
    return next(found, None)


def format_of(data: bytes) -> str | None:
    """The name in `FORMATS`, by how the content of a file starts."""
    for name, starts in FORMATS.items():
        if any(data[at : at + len(start)] == start for at, start in starts):
            return name
    return None


def require_size(path: Path, data: bytes, max_pixels: int) -> None:
    """Raise DataError where the header claims more pixels: a few kilobytes can hold gigabytes of one colour."""
    try:
        with open_image(data) as image:
            pixels, size = image.width * image.height, f"{image.width}×{image.height} pixels"
    except Image.DecompressionBombError:
        pixels, size = 2 * MAX_PIXELS, f"more than {2 * MAX_PIXELS:,} pixels"
    except MemoryError:
        raise
    except Exception:  # Pillow cannot read it; OpenCV may
        header = tiff_header(data)
        if header is None:  # then OpenCV's own limit is what is left
            return
        pixels, size = header.width * header.height, f"{header.width}×{header.height} pixels"
    if pixels > max_pixels:
        raise DataError(
            f"{path}: an image of {size}, in a file of {len(data) / 2**20:.2g} MiB\n"
            f"expected at most {max_pixels:,} pixels\nuse a smaller image, or cut it into tiles"
        )


def decode(data: bytes, flags: int) -> np.ndarray | None:
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


def require_end(path: Path, data: bytes) -> None:
    """Raise DataError for a JPEG or PNG file that is cut off: OpenCV 4 only warns and fills the missing part grey."""
    if data[:2] == b"\xff\xd8":
        complete = data.endswith(b"\xff\xd9") or data.find(b"\xff\xd9", _jpeg_scan(data)) >= 0
    elif data[:4] == b"\x89PNG":
        complete = data.rfind(b"IEND") >= 0
    else:
        return
    if not complete:
        raise unreadable(path, "image", f"its end is missing after {len(data)} bytes")


def _jpeg_scan(data: bytes) -> int:
    """Offset of the first scan: an end marker before it belongs to the thumbnail in the EXIF segment."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def unreadable(path: Path, kind: str, reason: str) -> DataError:
    """The error for a damaged file. `kind`: "image" or "mask"."""
    fix = "copy it again, or remove the pair"
    return DataError(f"{path}: damaged {kind}: {reason}\nexpected a complete file of a known format\n{fix}")
