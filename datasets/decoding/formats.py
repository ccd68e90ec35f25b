"""What images and masks have in common: which formats are read, and what is refused before pixels are decoded."""

import codecs
import errno
import io
import mmap
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ssaseg.datasets.base import DataError
from ssaseg.datasets.decoding.tiff import tiff_header
from ssaseg.files.reading import open_file, read_file

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
    "AVIF": ((4, b"ftypavif"), (4, b"ftypavis")),  # and other files that name one of these brands, see `_brands`
}

# What is not read, but is found under an image's name: how such files start, what they are, and the fix.
_SAVE = "save it as PNG, masks with one byte a pixel"
_FRAMES = "extract its frames as images first: ffmpeg -i VIDEO frames/%06d.png"
_PAGES = "save its pages as images, for example with pdftoppm -png"
_RAW = "develop it to JPEG or PNG first"
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
    (128, b"DICM", "a DICOM image", _SAVE),
    (8, b"AVI ", "a video (AVI)", _FRAMES),
    (0, b"\x1aE\xdf\xa3", "a video (Matroska, WebM)", _FRAMES),
    (4, b"moov", "a video (QuickTime)", _FRAMES),
    (4, b"mdat", "a video (QuickTime)", _FRAMES),
    (4, b"wide", "a video (QuickTime)", _FRAMES),
    (0, b"\0\0\1\xba", "a video (MPEG)", _FRAMES),
    (0, b"\0\0\1\xb3", "a video (MPEG)", _FRAMES),
    (0, b"FLV\1", "a video (Flash)", _FRAMES),
    (0, b"OggS", "a video or sound (Ogg)", _FRAMES),
    (0, b"0&\xb2u\x8ef\xcf\x11", "a video (Windows Media)", _FRAMES),
    (0, b"%PDF", "a PDF document", _PAGES),
    (0, b"%!PS", "a PostScript document", _PAGES),
    (0, b"Rar!\x1a\7", "an archive (rar)", "unpack it"),
    (0, b"7z\xbc\xaf'\x1c", "an archive (7z)", "unpack it"),
    (0, b"\xfd7zXZ\0", "an archive (xz)", "unpack it"),
    (0, b"BZh", "an archive (bzip2)", "unpack it"),
    (0, b"(\xb5/\xfd", "an archive (zstd)", "unpack it"),
    (257, b"ustar", "an archive (tar)", "unpack it"),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw image", _RAW),
    (348, b"n+1\0", "a NIfTI volume", _SAVE),
)
# What a file of ISO's format for media is, by its brands; any other is a video.
_BRANDS = (
    ({"heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1"}, "a HEIC image", "convert it to JPEG or PNG"),
    ({"crx "}, "a camera's raw image", _RAW),
    ({"M4A ", "M4B "}, "a sound file", "give images"),
)
# How texts start, in lower case, after the mark of UTF-8 and blanks.
_TEXTS = (
    ((b"<!doctype html", b"<html"), "an HTML page, as servers send it in place of a file", "download the image again"),
    ((b"<svg",), "an SVG drawing", "draw it as PNG, for example with rsvg-convert"),
    ((b"<?xml", b"{", b"["), "a text file (XML or JSON)", "give images"),
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


def read_bytes(path: Path, kind: str, data: bytes | None = None) -> bytes:
    """The content of a file that starts as one of `FORMATS` does. `data`: the content, if it is in memory already."""
    try:
        data = read_file(path) if data is None else data
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        with open_file(path) as file:
            if (other := _other(file.read(512))) is None:
                raise
        raise _not_read(path, kind, *other) from None
    if format_of(data) is None:
        if other := _other(data):
            raise _not_read(path, kind, *other)
        what = f"not an image of a known type{', but text' * _is_text(data[:512])}"
        raise unreadable(path, kind, what if data else "empty file")
    return data


def _not_read(path: Path, kind: str, what: str, fix: str) -> DataError:
    return DataError(f"{path}: {what}\nexpected {KNOWN[kind]}\n{fix}")


def _other(data: bytes) -> tuple[str, str] | None:
    """What a file of none of `FORMATS` is, and the fix; None where this is not known."""
    if b"PNG" in data[:8] and b"\x1a" in data[:16]:  # its first bytes are there to show this
        what = "a PNG file whose line ends or letters were converted, as git and FTP do with text"
        return what, "copy it again in binary mode; for git: `*.png binary` in .gitattributes"
    if brands := _brands(data):
        known = (each[1:] for each in _BRANDS if each[0] & brands)
        return next(known, ("a video (MP4, QuickTime)", _FRAMES))
    if data[0:377:188] == b"GGG":
        return "a video (MPEG transport stream)", _FRAMES
    found = (each[2:] for each in OTHERS if data[each[0] : each[0] + len(each[1])] == each[1])
    start = data[:512].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    texts = (each[1:] for each in _TEXTS if start.startswith(each[0]))
    return next(found, None) or (next(texts, None) if _is_text(data[:512]) else None)


def _brands(data: bytes) -> set[str]:
    """The brands in the first box of a file of ISO's format for media (ISO/IEC 14496-12); empty for another file."""
    if data[4:8] != b"ftyp":
        return set()
    box = data[8 : max(min(int.from_bytes(data[:4], "big"), 256), 12)]
    return {box[at : at + 4].decode("latin-1") for at in range(0, len(box), 4) if at != 4}  # at 4 is a version


def _is_text(data: bytes) -> bool:
    """Whether the start of a file is text in UTF-8."""
    if any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in data):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)  # the end may be half a letter
    except UnicodeDecodeError:
        return False
    return True


def format_of(data: bytes) -> str | None:
    """The name in `FORMATS`, by how the content of a file starts."""
    for name, starts in FORMATS.items():
        if any(data[at : at + len(start)] == start for at, start in starts):
            return name
    return "AVIF" if _brands(data) & {"avif", "avis"} else None


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


def require_end(path: Path, data: bytes | mmap.mmap) -> None:
    """Raise DataError for a JPEG or PNG file that is cut off: OpenCV 4 only warns and fills the missing part grey."""
    if data[:2] == b"\xff\xd8":
        complete = data[-2:] == b"\xff\xd9" or data.find(b"\xff\xd9", _jpeg_scan(data)) >= 0
    elif data[:4] == b"\x89PNG":
        complete = data.rfind(b"IEND") >= 0
    else:
        return
    if not complete:
        raise unreadable(path, "image", f"its end is missing after {len(data)} bytes")


def _jpeg_scan(data: bytes | mmap.mmap) -> int:
    """Offset of the first scan: an end marker before it belongs to the thumbnail in the EXIF segment."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def unreadable(path: Path, kind: str, reason: str) -> DataError:
    """The error for a damaged file. `kind`: "image" or "mask"."""
    fix = "copy it again, or leave it out"
    return DataError(f"{path}: damaged {kind}: {reason}\nexpected a complete file of a known format\n{fix}")
