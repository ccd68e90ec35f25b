"""Image and mask files that are not what their names say, or are made to do harm: one error that names the file."""

import io
import os
import shutil
import stat
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ssaseg.datasets import DataError
from ssaseg.datasets.decoding import FORMATS, MAX_PIXELS, header_size, read_image, read_mask
from ssaseg.datasets.decoding.formats import format_of

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n{ } loop\n%%EOF\n"
# The same PostScript behind the binary header of DOS.
DOS_EPS = b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + bytes(18) + EPS


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def one_bit_png(width: int, height: int) -> bytes:
    """A PNG of zeros, one bit a pixel, made without holding its pixels."""
    squeeze, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    body = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content", [EPS, DOS_EPS, b"\n" + EPS], ids=["plain", "DOS", "after a line"])
@pytest.mark.parametrize("name", ["x.png", "x.eps", "x.tif"])
def test_no_other_program_runs_on_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, name: str
) -> None:
    """Pillow hands PostScript to the program `gs`, whatever the file is called."""
    ghost, file = tmp_path / "bin/gs", tmp_path / name
    ghost.parent.mkdir()
    ghost.write_text(f'#!/bin/sh\ntouch {tmp_path}/started\n[ "$1" = --version ] && echo 10.0\nexit 1\n')
    ghost.chmod(ghost.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{ghost.parent}{os.pathsep}{os.environ['PATH']}")
    assert shutil.which("gs") == str(ghost)
    file.write_bytes(content)
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=f"{name}: (damaged|a PostScript document)"):
            read(file)
    assert header_size(file) is None
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("suffix", ["PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000"])
def test_listed_formats_are_read_by_content(tmp_path: Path, suffix: str) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    buffer, file = io.BytesIO(), tmp_path / "photo.jpg"
    picture = Image.fromarray(grey)
    if suffix == "WEBP":
        picture.convert("RGB").save(buffer, suffix, lossless=True)
    else:
        picture.save(buffer, suffix)
    file.write_bytes(buffer.getvalue())
    assert suffix in FORMATS
    assert (read_image(file) == grey[..., None]).all()
    if suffix != "WEBP":
        assert (read_mask(file)[0] == grey).all()


@pytest.mark.parametrize("suffix", ["TGA", "PCX", "ICO", "SGI", "DDS", "IM", "MSP", "ICNS", "SPIDER"])
def test_other_formats_are_not_opened(tmp_path: Path, suffix: str) -> None:
    buffer, file = io.BytesIO(), tmp_path / "x.png"
    mode = {"MSP": "1", "SPIDER": "F"}.get(suffix, "RGB")
    Image.new(mode, (16, 16)).save(buffer, suffix)
    file.write_bytes(buffer.getvalue())
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match="not an image of a known type"):
            read(file)


def box(*brands: bytes) -> bytes:
    """The start of a file of ISO's format for media: its main brand, a version, and the others."""
    content = brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", 8 + len(content)) + b"ftyp" + content + bytes(64)


@pytest.mark.parametrize(
    ("data", "what", "fix"),
    [
        (box(b"isom", b"mp42"), "a video (MP4", "ffmpeg -i VIDEO"),
        (box(b"qt  "), "a video (MP4", "ffmpeg"),
        (b"RIFF\x10\0\0\0AVI LIST", "a video (AVI)", "ffmpeg"),
        (b"\x1aE\xdf\xa3" + bytes(20), "a video (Matroska", "ffmpeg"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", "a video (QuickTime)", "ffmpeg"),
        ((b"G" + bytes(187)) * 4, "a video (MPEG transport stream)", "ffmpeg"),
        (b"\0\0\1\xba" + bytes(20), "a video (MPEG)", "ffmpeg"),
        (box(b"heic", b"mif1"), "a HEIC image", "JPEG"),
        (box(b"mif1", b"heic", b"miaf"), "a HEIC image", "JPEG"),
        (box(b"crx "), "a camera's raw image", "develop"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF document", "pdftoppm"),
        (b"PK\3\4" + bytes(20), "an archive (zip, .npz)", "unpack"),
        (b"7z\xbc\xaf'\x1c" + bytes(20), "an archive (7z)", "unpack"),
        (b"name".ljust(257, b"\0") + b"ustar" + bytes(300), "an archive (tar)", "unpack"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><p>404", "an HTML page", "download the image again"),
        (b"<svg xmlns='x'></svg>", "an SVG drawing", "PNG"),
        ("{“a”: 1}".encode() * 99, "a text file (XML or JSON)", "give images"),
    ],
)
def test_what_is_no_image_is_named_with_the_fix(tmp_path: Path, data: bytes, what: str, fix: str) -> None:
    file = tmp_path / "x.jpg"
    file.write_bytes(data)
    for read in (read_image, read_mask):
        with pytest.raises(DataError) as caught:
            read(file)
        first, second, third = str(caught.value).split("\n")
        assert what in first
        assert "damaged" not in first
        assert second.startswith("expected a")
        assert fix in third


def test_text_is_named_as_text(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    for content, text in (("größer als é ".encode() * 99, True), (b"\xe9t\xe9", False), (b"a\0b", False)):
        file.write_bytes(content)
        with pytest.raises(DataError, match="not an image of a known type") as caught:
            read_image(file)
        assert ("known type, but text\n" in str(caught.value)) == text


def test_a_long_video_is_named_as_one(tmp_path: Path) -> None:
    """A file that is larger than any image may be: only its start is read."""
    file = tmp_path / "film.mp4"
    file.write_bytes(box(b"isom"))
    os.truncate(file, 2**30 + 1)
    with pytest.raises(DataError, match="a video"):
        read_image(file)
    (tmp_path / "zeros.png").touch()
    os.truncate(tmp_path / "zeros.png", 2**30 + 1)
    with pytest.raises(OSError, match="larger than 1,024 MiB"):
        read_image(tmp_path / "zeros.png")


def test_an_avif_image_by_any_of_its_brands() -> None:
    brands = ((b"mif1", b"avif"), (b"avis",), (b"mif1",))
    assert [format_of(box(*each)) for each in brands] == ["AVIF", "AVIF", None]


def test_a_small_file_of_very_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(one_bit_png(20000, 20000))
    assert file.stat().st_size < 2**17
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("pixels were decoded"))
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=f"20000×20000 pixels.*\nexpected at most {MAX_PIXELS:,} pixels"):
            read(file)
    file.write_bytes(one_bit_png(100, 100))
    with pytest.raises(DataError, match="expected at most 9,999 pixels"):
        read_image(file, max_pixels=9_999)


def test_more_pixels_than_pillow_counts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    head = struct.pack(">IIBBBBB", 2**20, 2**20, 8, 0, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match="more than 536,870,912 pixels"):
            read(file)


@pytest.mark.parametrize("suffix", ["TIFF", "AVIF", "GIF", "WEBP", "PPM", "BMP", "JPEG2000"])
def test_damaged_files_end_in_an_error_that_names_them(tmp_path: Path, suffix: str) -> None:
    rng, buffer, file = np.random.default_rng(0), io.BytesIO(), tmp_path / "x.png"
    picture = Image.fromarray(rng.integers(0, 9, (24, 24), dtype=np.uint8))
    picture.convert("RGB" if suffix in ("WEBP", "AVIF") else "L").save(buffer, suffix)
    whole, refused = buffer.getvalue(), list[str]()
    for _ in range(60):
        damaged = bytearray(whole)
        for at in rng.integers(0, min(len(whole), 200), rng.integers(1, 6)):
            damaged[at] = rng.integers(0, 256)
        file.write_bytes(damaged[: rng.integers(20, len(damaged) + 1)])
        for read in (read_image, read_mask):
            try:
                read(file)
            except DataError as error:
                refused.append(str(error))
    assert refused
    assert all(text.startswith(f"{file}: ") and len(text.splitlines()) <= 3 for text in refused)


def test_any_error_of_a_decoder_is_a_damaged_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's readers raise ten types for damaged files; only a lack of memory says nothing about the file."""
    file = tmp_path / "x.gif"
    Image.new("P", (4, 4)).save(file)
    for error in (TypeError("a"), RuntimeError("b"), NotImplementedError(), ZeroDivisionError(), RecursionError()):
        monkeypatch.setattr(Image.Image, "load", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(DataError, match="damaged mask"):
            read_mask(file)
    monkeypatch.setattr(Image.Image, "load", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        read_mask(file)


def test_opencv_without_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        error = cv2.error("Failed to allocate")
        error.code = cv2.Error.StsNoMem
        raise error

    file = tmp_path / "x.png"
    cv2.imwrite(str(file), np.zeros((4, 4), np.uint8))
    monkeypatch.setattr(cv2, "imdecode", out_of_memory)
    for read in (read_image, read_mask):
        with pytest.raises(MemoryError):
            read(file)


def test_what_is_not_a_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("fifo.png", "zero.png"):
        for read in (read_image, read_mask):
            with pytest.raises(OSError, match="not a regular file"):
                read(tmp_path / name)
        assert header_size(tmp_path / name) is None


# ---- what decoders print -----------------------------------------------------------------------------------------
def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_decoders_print_nothing_of_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """libpng prints the name of a damaged colour profile, OpenCV up to seven lines about a file."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    plain = cv2.imencode(".png", pixels)[1].tobytes()
    profile = zlib.compress(struct.pack(">I", 3000) + rng.bytes(2996))
    named = _chunk(b"iCCP", b"x\x1b]0;title\x07\0\0" + profile)
    file = tmp_path / "a.png"
    for content in (plain[:33] + named + plain[33:], plain[:33] + named * 2 + plain[33:] + b"iCCP"):
        file.write_bytes(content)
        assert (read_image(file) == pixels).all()
    for cut in (b"", b"\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x05iCCP"):  # of the list of chunks
        file.write_bytes(plain[:33] + cut + b"iCCP" + b"IEND")
        with pytest.raises(DataError, match="damaged image"):
            read_image(file)
    file.write_bytes(b"P6 9000 20 255\n")
    with pytest.raises(DataError, match="damaged image"):
        read_image(file)
    printed = capfd.readouterr().err
    assert "\x1b" not in printed
    assert "OpenCV" not in printed
