"""Files that mean something else than they seem to: what is stored is read, or the error says what the file is."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from raw_files import png, tiff

from ssaseg.datasets import DataError
from ssaseg.datasets.decoding import image_facts, read_image, read_mask
from ssaseg.datasets.decoding.images import shown_size
from ssaseg.datasets.decoding.tiff import tiff_header
from ssaseg.datasets.published import LAYOUTS

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 4, (6, 9), dtype=np.uint8)


def bands(count: int, kind: str = "uint8", low: int = 0) -> np.ndarray:
    return RNG.integers(low, min(np.iinfo(kind).max, 5000) + 1, (6, 9, count)).astype(kind)


def put(folder: Path, content: bytes, name: str = "a.tif") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def saved(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def error_of(read: object, file: Path) -> str:
    with pytest.raises(DataError) as error:
        read(file)  # type: ignore[operator]
    text = str(error.value)
    assert text.startswith(f"{file}: ")
    assert len(text.splitlines()) <= 3
    return text


# ---- images ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("count", "photometric", "extra"),
    [
        (3, 2, ()),
        (4, 2, (0,)),
        (4, 2, (1,)),
        (4, 2, (2,)),
        (3, 1, (0, 0)),
        (3, 1, ()),
        (4, 1, (0, 0, 0)),
        (3, 1, (0, 2)),
    ],
)
def test_three_bands_are_read_as_they_are_stored(
    tmp_path: Path, count: int, photometric: int, extra: tuple[int, ...], order: str
) -> None:
    """A fourth band is dropped, whatever it is called, and bands need no mark to be colours."""
    for pixels in (bands(count), bands(count, "uint16")):
        file = put(tmp_path, tiff(pixels, photometric, extra, order=order))
        expected = pixels[..., 2::-1]
        np.testing.assert_array_equal(read_image(file, levels=(0, 65535)), scaled(expected, 65535))
        if pixels.dtype == np.uint8:
            np.testing.assert_array_equal(read_image(file), expected)


def test_bands_that_are_stored_apart(tmp_path: Path) -> None:
    """Of 16 bits, OpenCV mixes their values up, except where it makes 8 bits of them."""
    for count, photometric, extra in ((3, 2, ()), (4, 2, (2,)), (3, 1, (0, 0))):
        pixels = bands(count)
        file = put(tmp_path, tiff(pixels, photometric, extra, apart=True))
        np.testing.assert_array_equal(read_image(file), pixels[..., 2::-1])
        deep = bands(count, "uint16")
        file = put(tmp_path, tiff(deep, photometric, extra, apart=True))
        assert np.abs(read_image(file).astype(int) - (deep[..., 2::-1] >> 8)).max() <= 1
        text = error_of(lambda file: read_image(file, levels=(0, 4095)), file)
        assert f"{count} bands of uint16 stored apart" in text


def scaled(pixels: np.ndarray, high: int) -> np.ndarray:
    """`levels` (0, high) of 16 bits; 8 bits stay."""
    if pixels.dtype == np.uint8:
        return pixels
    return np.floor(pixels.astype(float).clip(0, high) * 255 / high + 0.5).astype(np.uint8)


def test_no_published_data_set_has_tiff_images() -> None:
    """mmsegmentation multiplies colours by a fourth band that is marked as alpha: its pixels would differ from ours."""
    assert {layout.image_suffix for layout in LAYOUTS.values()} <= {".jpg", ".png", "_leftImg8bit.png"}
    alpha = np.dstack([bands(3), RNG.integers(0, 256, (6, 9), dtype=np.uint8)])
    file = saved(alpha, "PNG")
    decoded = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(decoded, alpha[..., 2::-1])


@pytest.mark.parametrize(
    ("pixels", "part"),
    [
        (bands(5), "5 bands of uint8"),
        (bands(3).astype(np.float32), "3 bands of float32"),
        (bands(1).astype(np.float64), "1 band of float64"),
        (bands(1).astype(np.int64), "1 band of int64"),
        (bands(1).astype(np.int8), "1 band of int8"),
        (bands(3).astype(np.uint32), "3 bands of uint32"),
    ],
)
def test_other_samples_are_refused_by_what_they_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], pixels: np.ndarray, part: str
) -> None:
    text = error_of(read_image, put(tmp_path, tiff(pixels)))
    assert part in text
    assert "damaged" not in text
    assert capfd.readouterr().err == ""


def test_compression_that_is_not_read_is_named(tmp_path: Path) -> None:
    content = tiff(bands(3), 2)
    entry = content.index(b"\x03\x01\x03\x00")  # the tag 259
    unknown = content[: entry + 8] + (50_000).to_bytes(2, "little") + content[entry + 10 :]
    text = error_of(read_image, put(tmp_path, unknown))
    assert "ZSTD" in text
    assert "damaged" not in text
    assert "damaged" in error_of(read_image, put(tmp_path, content[:8] + b"\xff" * 40 + content[-100:]))


def test_levels_of_16_bits(tmp_path: Path) -> None:
    """A constant range: linear, clipped, and nothing else changes. Without it the upper 8 bits are taken."""
    pixels = bands(3, "uint16")
    pixels[0, :3] = [[0], [4095], [65535]]
    file = put(tmp_path, cv2.imencode(".png", pixels)[1].tobytes(), "a.png")
    np.testing.assert_array_equal(read_image(file), pixels >> 8)
    found = read_image(file, levels=(0, 4095))
    np.testing.assert_array_equal(found, scaled(pixels, 4095))
    assert found[0, :3, 0].tolist() == [0, 255, 255]
    assert (read_image(file, levels=(4095, 65535))[0, :2] == 0).all()
    for kind in ("PNG", "JPEG"):
        eight = put(tmp_path, saved(bands(3), kind), "b")
        np.testing.assert_array_equal(read_image(eight, levels=(0, 4095)), read_image(eight))


def test_signed_and_inverted_16_bits(tmp_path: Path) -> None:
    """-1, which often means "no data", is black and not white."""
    pixels = bands(3, "int16", low=-5)
    pixels[0, 0] = -1
    file = put(tmp_path, tiff(pixels, 2))
    np.testing.assert_array_equal(read_image(file), pixels.clip(0)[..., ::-1] >> 8)
    np.testing.assert_array_equal(read_image(file, levels=(0, 4000)), scaled(pixels[..., ::-1], 4000))
    white = put(tmp_path, tiff(bands(1, "uint16"), photometric=0))
    assert (read_image(white, levels=(0, 4095)).astype(int)).max() == 255 - scaled(read_raw(white), 4095).min()
    text = error_of(lambda file: read_image(file, levels=(0, 9)), put(tmp_path, tiff(bands(2, "uint16"), extra=(0,))))
    assert "2 bands of uint16" in text


def read_raw(file: Path) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize(
    ("content", "part", "fix"),
    [
        (png(IDS, 8).replace(b"\r\n", b"\n"), "line ends", "binary"),
        (png(IDS, 8).replace(b"\n", b"\r\n"), "line ends", ".gitattributes"),
        (png(IDS, 8).replace(b"\r\n\x1a\n", b"\r\n\x1a\r\n"), "line ends", "binary"),
        (png(IDS, 8).decode("utf-8", "replace").encode(), "letters were converted", "binary"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '|u1'}", "NumPy", "PNG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS", "git lfs pull"),
        (bytes(4) + b"ftypheic" + bytes(20), "HEIC", "JPEG"),
        (b"PK\x03\x04" + bytes(40), "archive", "unpack"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, part: str, fix: str) -> None:
    for read in (read_image, read_mask):
        text = error_of(read, put(tmp_path, content, "a.png"))
        assert part in text
        assert fix in text.splitlines()[-1]
        assert "damaged" not in text


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_orientation_is_found_and_followed(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = put(tmp_path, saved(bands(3), kind, exif=exif))
    facts = image_facts(file.read_bytes())
    assert facts is not None
    assert (facts.orientation, facts.bands, facts.bits, facts.paged) == (orientation, 3, 8, False)
    assert shown_size(file) == read_image(file).shape[:2] == ((9, 6) if orientation == 6 else (6, 9))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_pages_and_frames_are_noticed(tmp_path: Path, kind: str) -> None:
    frames = [Image.fromarray(bands(3)) for _ in range(3)]
    for more in (frames[1:], []):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=bool(more), append_images=more)
        facts = image_facts(buffer.getvalue())
        assert facts is not None
        assert facts.paged == bool(more)


def test_overviews_are_no_pages() -> None:
    content = bytearray(tiff(bands(3), 2, pages=3))
    header = tiff_header(bytes(content))
    assert header is not None
    assert header.paged
    # The tags 256 (width) of later pages become 254 with 1: a smaller copy of the first page.
    start = content.index(b"\x00\x01\x04\x00", header.entries[256] + 12)
    for _ in range(2):
        content[start : start + 12] = b"\xfe\x00\x04\x00\x01\x00\x00\x00\x01\x00\x00\x00"
        start = content.find(b"\x00\x01\x04\x00", start + 12)
    header = tiff_header(bytes(content))
    assert header is not None
    assert not header.paged


def test_a_circle_of_pages_ends() -> None:
    content = bytearray(tiff(bands(1)))
    (first,) = np.frombuffer(content[4:8], "<u4")
    count = int(np.frombuffer(content[first : first + 2], "<u2")[0])
    end = int(first) + 2 + 12 * count
    content[end : end + 4] = content[4:8]
    header = tiff_header(bytes(content))
    assert header is not None
    assert not header.paged
    for cut in range(len(content)):
        tiff_header(bytes(content[:cut]))  # raises nothing


# ---- masks -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_ids_are_the_numbers_in_the_file(tmp_path: Path, bits: int) -> None:
    """A viewer shows the largest number as white, and so do Pillow and OpenCV."""
    values = RNG.integers(0, 2**bits, (6, 9)).astype(np.uint8)
    mask = read_mask(put(tmp_path, png(values, bits), "a.png"))
    np.testing.assert_array_equal(mask.ids, values)
    assert (mask.white, mask.colours) == (2**bits - 1, None)
    coloured = read_mask(put(tmp_path, png(values, bits, bytes(3 * 2**bits)), "a.png"))
    np.testing.assert_array_equal(coloured.ids, values)
    assert coloured.colours is not None
    for photometric in (0, 1):  # 0: white is zero
        mask = read_mask(put(tmp_path, tiff(values, photometric, bits=0 if bits == 8 else bits)))
        expected = 1 - values if (bits, photometric) == (1, 0) else values
        np.testing.assert_array_equal(mask.ids, expected)
        assert mask.white == 2**bits - 1


@pytest.mark.parametrize("largest", [1, 3, 15, 100, 254, 255, 1023, 65535])
def test_pgm_of_any_largest_number(tmp_path: Path, largest: int) -> None:
    values = RNG.integers(0, min(largest, 255) + 1, (6, 9))
    binary = values.astype(np.uint8 if largest < 256 else ">u2").tobytes()
    plain = b" ".join(b"%d" % value for value in values.ravel())
    for head, body in ((b"P5\n# a comment 7\n9 6\n%d\n", binary), (b"P2 9 6 %d ", plain)):
        mask = read_mask(put(tmp_path, head % largest + body, "a.pgm"))
        np.testing.assert_array_equal(mask.ids, values)
        assert mask.white == largest


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (saved(IDS, "JPEG"), "JPEG compression"),
        (saved(IDS, "WEBP", quality=90), "lossy WebP"),
        (saved(IDS, "JPEG2000", irreversible=True), "lossy JPEG 2000"),
        (saved(IDS, "TIFF", compression="jpeg"), "JPEG compression"),
    ],
    ids=["jpeg", "webp", "jp2", "tiff"],
)
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_lossy_masks_are_refused_with_any_name(tmp_path: Path, content: bytes, part: str, name: str) -> None:
    assert part in error_of(read_mask, put(tmp_path, content, name)).splitlines()[0]


@pytest.mark.parametrize(
    ("pixels", "part"),
    [
        (IDS.astype(np.int64), "int64"),
        (IDS.astype(np.float64), "float64"),
        (IDS.astype(np.uint32), "uint32"),
        (IDS.astype(np.int8), "int8"),
        (IDS.astype(np.float32), "float32 values 0.0..3.0"),
        (IDS.astype(np.int16) - 1, "int16 values -1..2"),
        (IDS.astype(np.uint16) * 257, "divide by 257"),
        (IDS.astype(np.uint16) * 256, "divide by 256"),
        (np.stack([value == IDS for value in range(4)], 2).astype(np.uint8), "4 bands"),
    ],
)
def test_masks_of_other_samples_say_what_they_are(tmp_path: Path, pixels: np.ndarray, part: str) -> None:
    text = error_of(read_mask, put(tmp_path, tiff(pixels)))
    assert part in text
    assert "damaged" not in text


@pytest.mark.parametrize("kind", ["uint16", "int16", "int32"])
def test_small_ids_of_more_bits_are_read(tmp_path: Path, kind: str) -> None:
    np.testing.assert_array_equal(read_mask(put(tmp_path, tiff(IDS.astype(kind)))).ids, IDS)


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG2000", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_lossless_masks_are_read(tmp_path: Path, kind: str, options: dict[str, str]) -> None:
    np.testing.assert_array_equal(read_mask(put(tmp_path, saved(IDS, kind, **options))).ids, IDS)
