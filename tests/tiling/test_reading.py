"""Images that are read by rows have the pixels of those that are decoded at once; and what cannot be read by rows."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from predicting import picture
from rasterio.transform import from_origin
from tiffs import tiff

from ssaseg.cli.tiling import reading
from ssaseg.cli.tiling.library import windows_library
from ssaseg.cli.tiling.reading import Band, LargeImage, open_large
from ssaseg.datasets import DataError
from ssaseg.datasets.bands.reading import read_bands
from ssaseg.datasets.base import Levels

HEIGHT, WIDTH = 150, 201
GEO: dict[str, Any] = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 0.5, 0.5)}


def image(bands: int = 3, deep: bool = False) -> np.ndarray:
    """Smooth values (H,W,bands)."""
    planes = [picture(HEIGHT, WIDTH, seed) for seed in range(-(-bands // 3))]
    values = np.concatenate(planes, axis=2)[..., :bands]
    return values.astype(np.uint16) * 200 + 31 if deep else values


def geotiff(path: Path, values: np.ndarray, **options: Any) -> Path:
    """Values (H,W,bands) in a file that GDAL writes."""
    options = {"driver": "GTiff", "height": len(values), "width": values.shape[1], "count": values.shape[2]} | options
    with windows_library(), rasterio.open(path, "w", dtype=values.dtype, **options) as file:
        file.write(np.moveaxis(values, 2, 0))
    return path


def by_rows(path: Path, channels: int = 3, levels: Levels | None = None) -> np.ndarray:
    """The image as a band of 64 rows sees it that moves down by 40."""
    with windows_library(), open_large(path, channels, levels, whole=0) as opened:
        assert opened.pixels is None
        band = Band(opened)
        parts = []
        for top in range(0, opened.height, 40):
            rows = band.take(max(top - 12, 0), min(top + 52, opened.height))
            assert len(band.rows) <= 64 + opened.block
            parts.append(rows[top - max(top - 12, 0) :][:40])
        return np.concatenate(parts)


def saved(path: Path, mode: str, **options: Any) -> Path:
    Image.fromarray(image()).convert(mode).save(path, **options)
    return path


def test_pixels_are_those_of_the_decoder(tmp_path: Path) -> None:
    tiled = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    whole = Image.fromarray(image())
    files = {
        "png": saved(tmp_path / "rgb.png", "RGB"),
        "palette": saved(tmp_path / "palette.png", "P"),
        "grey": saved(tmp_path / "grey.png", "L"),
        "alpha": saved(tmp_path / "alpha.png", "RGBA"),
        "palette tiff": saved(tmp_path / "palette.tif", "P"),
        "cmyk": saved(tmp_path / "cmyk.tif", "CMYK"),
        "tiles": geotiff(tmp_path / "tiles.tif", image(), **tiled, compress="deflate"),
        "strips": geotiff(tmp_path / "strips.tif", image(), blockysize=7, compress="lzw"),
        "one strip": geotiff(tmp_path / "strip.tif", image(), blockysize=HEIGHT),
        "big": geotiff(tmp_path / "big.tif", image(), bigtiff="yes"),
        "infrared": geotiff(tmp_path / "infrared.tif", image(4), **tiled, photometric="rgb"),
    }
    white = tmp_path / "white.tif"
    white.write_bytes(tiff(image(1), t262=0))
    for name, file in (files | {"white is zero": white}).items():
        np.testing.assert_array_equal(by_rows(file), read_bands(file), err_msg=name)
    assert (by_rows(files["png"]) == np.array(whole)[..., ::-1]).all()


def test_bands_and_bits(tmp_path: Path) -> None:
    deep = geotiff(tmp_path / "deep.tif", image(3, deep=True), photometric="rgb")
    levels = (1000, 30_000)
    np.testing.assert_array_equal(by_rows(deep, 3, levels), read_bands(deep, 3, levels=levels))
    np.testing.assert_array_equal(by_rows(deep), image(3, deep=True)[..., ::-1] >> 8)
    np.testing.assert_allclose(by_rows(deep), read_bands(deep), atol=1)  # libtiff, which OpenCV uses, divides by 257
    four = geotiff(tmp_path / "four.tif", image(4))
    np.testing.assert_array_equal(by_rows(four, 4), image(4)[..., [2, 1, 0, 3]])
    five = geotiff(tmp_path / "five.tif", image(5, deep=True), interleave="band")
    np.testing.assert_array_equal(by_rows(five, 5), (image(5, deep=True) >> 8)[..., [2, 1, 0, 3, 4]])
    grey = geotiff(tmp_path / "grey.tif", image(1))
    np.testing.assert_array_equal(by_rows(grey, 1), image(1))
    (tmp_path / "white.tif").write_bytes(tiff(image(1), t262=0))
    np.testing.assert_array_equal(by_rows(tmp_path / "white.tif", 1), 255 - image(1))


@pytest.mark.parametrize("name", ["a.jpg", "tiled.tif", "cmyk.jpg"])
def test_pixels_of_jpeg_differ_by_rounding_alone(name: str, tmp_path: Path) -> None:
    """GDAL's decoder is another than OpenCV's."""
    options = {"compress": "jpeg", "photometric": "ycbcr", "tiled": True, "blockxsize": 64, "blockysize": 64}
    if name == "tiled.tif":
        file = geotiff(tmp_path / name, image(), **options)
    else:
        file = saved(tmp_path / name, "CMYK" if name == "cmyk.jpg" else "RGB", quality=95)
    apart = np.abs(by_rows(file).astype(int) - read_bands(file))
    assert apart.mean() < 1.1
    assert apart.max() < 16


def place(path: Path, whole: int | None) -> tuple[Any, np.ndarray | None]:
    with windows_library(), open_large(path, 3, whole=whole) as opened:
        assert isinstance(opened, LargeImage)
        return opened.place, opened.missing(0, HEIGHT)


@pytest.mark.parametrize("whole", [None, 0])
def test_where_an_image_lies_and_where_it_has_no_data(whole: int | None, tmp_path: Path) -> None:
    values = image()
    values[:20, :30] = 0
    values[50, 60] = (0, 7, 0)  # not in all bands
    found, missing = place(geotiff(tmp_path / "a.tif", values, **GEO, nodata=0), whole)
    assert (found.crs.to_epsg(), found.transform, found.nodata) == (32633, GEO["transform"], 0)
    expected = (values == 0).all(axis=2)
    assert expected.sum() >= 600
    np.testing.assert_array_equal(missing, expected)
    found, missing = place(geotiff(tmp_path / "b.tif", values), whole)
    assert (found.crs, found.transform, found.nodata, missing) == (None, None, None, None)


def damaged(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = b"\x55" * 200
    path.write_bytes(data)
    return path


def half(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def turned(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(path, "RGB", exif=exif.tobytes())


def text(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def webp() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image()).save(stream, "WEBP")
    return stream.getvalue()


BAD = {
    "damaged strip": (lambda p: damaged(geotiff(p / "a.tif", image(), blockysize=8, compress="deflate")), "rows"),
    "half a TIFF": (lambda p: half(geotiff(p / "a.tif", image(), blockysize=8)), "damaged image"),
    "half a JPEG": (lambda p: half(saved(p / "a.jpg", "RGB")), "its end is missing"),
    "half a PNG": (lambda p: half(saved(p / "a.png", "RGB")), "its end is missing"),
    "orientation": (lambda p: turned(p / "a.jpg"), "its orientation, 6, says that it is to be turned"),
    "orientation of a TIFF": (lambda p: text(p / "a.tif", tiff(image(), t274=3, t262=2)), "its orientation, 3"),
    "floats": (lambda p: geotiff(p / "a.tif", image().astype(np.float32)), "float32 values"),
    "4 bits": (lambda p: geotiff(p / "a.tif", image(1) & 15, nbits=4), "samples of 4 bits"),
    "five bands": (lambda p: geotiff(p / "a.tif", image(5)), "an image with 5 bands"),
    "WebP": (lambda p: text(p / "a.webp", webp()), "its format has no rows to read"),
    "a text": (lambda p: text(p / "a.tif", b"<html>"), "an HTML page"),
    "nothing": (lambda p: text(p / "a.tif", b""), "empty file"),
    "VRT in the place of an image": (lambda p: text(p / "a.tif", b"<VRTDataset>"), "not an image of a known type"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_by_rows(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    file = make(tmp_path)
    with pytest.raises(DataError, match=message) as raised:
        by_rows(file)
    lines = str(raised.value).splitlines()
    assert len(lines) <= 3
    assert lines[0].startswith(str(file))


def test_a_large_progressive_jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, plain = saved(tmp_path / "a.jpg", "RGB", progressive=True), saved(tmp_path / "b.jpg", "RGB")
    assert by_rows(file).shape == (HEIGHT, WIDTH, 3)
    monkeypatch.setattr(reading, "PROGRESSIVE", 0)
    with pytest.raises(DataError, match="progressive, which its decoder keeps in memory"):
        by_rows(file)
    assert by_rows(plain).shape == (HEIGHT, WIDTH, 3)


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    with windows_library(), pytest.raises(FileNotFoundError), open_large(tmp_path / "no.tif", 3):
        pass


def test_compression_that_the_decoder_lacks_is_read_by_rows(tmp_path: Path) -> None:
    file = geotiff(tmp_path / "zstd.tif", image(), compress="zstd")
    with windows_library(), open_large(file, 3) as opened:
        assert opened.height * opened.width < reading.WHOLE
        np.testing.assert_array_equal(opened.rows(0, HEIGHT), image()[..., ::-1])


def test_headers_of_large_files_are_not_read_whole(tmp_path: Path) -> None:
    """A sparse file of 2 GiB, more than `read_file` takes, whose header is at its end."""
    from ssaseg.datasets.decoding.images import shown_size

    options = {"driver": "GTiff", "height": 60_000, "width": 50_000, "count": 1, "dtype": "uint8"}
    with windows_library(), rasterio.open(tmp_path / "a.tif", "w", **options, sparse_ok=True) as file:
        assert file.width == 50_000
    data = (tmp_path / "a.tif").read_bytes()
    with (tmp_path / "a.tif").open("r+b") as stream:
        stream.truncate(len(data) + 2**31)
    assert shown_size(tmp_path / "a.tif") == (60_000, 50_000)
