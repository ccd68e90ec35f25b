"""Images of other than three channels: grey, RGB + infrared, depth, multispectral (`data.channels` of a recipe).

Bands are what a file has, channels what a network takes; both numbers must be the same. In memory the first three of
three or more channels are in the order BGR, as everywhere, and the others in the order of the file.

Letters: H, W height and width [pixels]; C channels.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ssaseg.datasets.base import DataError
from ssaseg.datasets.decoding import FORMATS, MAX_PIXELS, Levels, open_image, read_complete, read_image
from ssaseg.datasets.decoding.images import stored_values, to_bytes
from ssaseg.files.reading import read_file
from ssaseg.files.text import cut, printable

TIFF = tuple(start for _, start in FORMATS["TIFF"])
# Modes of Pillow that stand for colours in another form: they are read as red, green and blue.
COLOURS = ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV")
WIDTH, SAMPLES = 256, 277  # tags of a TIFF; a file without SAMPLES has one band
for library in ("PIL", "tifffile"):  # they log what they raise, too
    logging.getLogger(library).setLevel(logging.CRITICAL + 1)
MEASURED = 24  # images, at most, that mean and spread are measured on


def read_bands(
    path: Path,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    levels: Levels | None = None,
    data: bytes | None = None,
) -> np.ndarray:
    """Decode an image file to uint8 (H, W, channels). Of 16 bits, the values `levels` become 0 and 255, those between
    are mapped linearly, and those outside are clipped; None: the upper 8 bits are taken, and values below 0 are 0.

    3: `read_image`. 1: grey files, also such that store the same grey in red, green and blue; alpha is dropped. Others:
    PNG and WebP files whose alpha is the last band, and TIFF files with as many bands, in one page or one page a band,
    whose values are not changed by alpha; of these, at most as many values as an RGB image of MAX_PIXELS has. `data`:
    as of `read_image`. Raises what `read_image` raises, and DataError for another number of bands, for values that are
    not whole numbers of 8 or 16 bits, and where TIFF files need a package that is not installed.
    """
    if channels == 3:
        return read_image(path, max_pixels, levels, data)
    if channels == 1:
        return _one_band(path, read_image(path, max_pixels, levels, data))
    pixels = stored_bands(path, channels, max_pixels, data)
    pixels = pixels if pixels.dtype == np.uint8 else to_bytes(pixels, levels)
    image = np.array(pixels, order="C")
    if channels > 3:  # to BGR; faster than one index for all channels
        image[..., 0], image[..., 2] = pixels[..., 2], pixels[..., 0]
    return image


def stored_bands(path: Path, channels: int, max_pixels: int = MAX_PIXELS, data: bytes | None = None) -> np.ndarray:
    """The values of a file that `read_bands` reads, uint8, uint16 or int16 (H, W, channels): of three channels BGR, of
    others in the order of the file. Raises what `read_bands` raises.
    """
    data = read_complete(path, max_pixels, data)
    if channels in (1, 3):
        values = stored_values(path, data)
        return values if channels == 3 else _one_band(path, values)
    most = min(max_pixels, 3 * MAX_PIXELS // channels)
    try:
        pixels = _from_tiff(data, channels, most) if data.startswith(TIFF) else _from_alpha(data)
    except MemoryError:
        raise
    except ImportError:
        raise DataError(
            f"{path}: a TIFF file, which for {channels} channels is read by tifffile\n"
            "expected this package, which is not installed\npip install tifffile imagecodecs"
        ) from None
    except Exception as error:  # Pillow and tifffile raise many types for damaged files
        raise _unreadable(path, error) from None
    if pixels is None:
        what = f"an image of more than {most:,} pixels of {channels} bands"
        raise DataError(f"{path}: {what}\nuse a smaller image, or cut it into tiles")
    if pixels.ndim != 3 or pixels.shape[2] != channels:
        count = count_bands(data) or 0
        raise _other_number(path, len(pixels) if count == 1 and pixels.ndim == 3 else count, channels)
    if pixels.dtype not in (np.uint8, np.uint16, np.int16):
        raise DataError(
            f"{path}: its bands hold {pixels.dtype} values\nexpected whole numbers of 8 or 16 bits\n"
            "scale the values of all images in the same way to 0..255 or 0..65535, and save them again"
        )
    return pixels


def count_bands(file: Path | bytes) -> int | None:
    """How many bands an image file has according to its header, alpha included; None where it cannot be read.

    Of a TIFF with several pages, those of the first page.
    """
    try:
        data = read_file(file) if isinstance(file, Path) else file
        if data.startswith(TIFF):
            tags = ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8])
            stream = io.BytesIO(data)
            stream.seek(tags.next)
            tags.load(stream)
            return int(tags.get(SAMPLES, 1)) if WIDTH in tags else None
        with open_image(data) as image:
            return 3 if image.mode in COLOURS else len(image.getbands())
    except MemoryError:
        raise
    except Exception:  # see `read_bands`
        return None


def shown(image: np.ndarray) -> np.ndarray:
    """An image uint8 (H, W, C) as a picture BGR uint8 (H, W, 3): its first three channels, or the first one as grey."""
    if image.shape[2] == 3:
        return image
    return np.ascontiguousarray(image[..., :3]) if image.shape[2] > 3 else image[..., :1].repeat(3, axis=2)


def measure(files: Sequence[Path], channels: int, levels: Levels | None = None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, red, green and blue first, over some of the files, on 0..255, where
    16 bits become these by `levels`, see `read_bands`.

    Files that cannot be read are left out; raises the last error if none can be read.
    """
    count, sums, squares = 0, np.zeros(channels), np.zeros(channels)
    error: Exception | None = None
    for file in files[:: max(len(files) // MEASURED, 1)][:MEASURED]:
        try:
            pixels = read_bands(file, channels, levels=levels).reshape(-1, channels)[::7].astype(np.float64)
        except (DataError, OSError) as failed:
            error = failed
            continue
        count += len(pixels)
        sums += pixels.sum(axis=0)
        squares += (pixels**2).sum(axis=0)
    if not count:
        raise error or DataError("no image to measure")
    mean = sums / count
    spread = np.sqrt(np.maximum(squares / count - mean**2, 1.0))  # a band of one value has none
    order = [2, 1, 0, *range(3, channels)] if channels > 2 else [*range(channels)]
    return [round(float(mean[k]), 3) for k in order], [round(float(spread[k]), 3) for k in order]


def _one_band(path: Path, values: np.ndarray) -> np.ndarray:
    """The first of three equal channels (H, W, 3), as (H, W, 1). Raises DataError where they are not equal."""
    if (values[..., :1] != values[..., 1:]).any():
        raise _other_number(path, 3, 1)
    return np.ascontiguousarray(values[..., :1])


def _from_alpha(data: bytes) -> np.ndarray:
    """Pixels (H, W, bands) of a file with alpha as its last band; the bands alone of one without."""
    with open_image(data) as image:
        if image.mode not in ("LA", "RGBA"):
            return np.empty((0, 0))
        return np.array(image)


def _from_tiff(data: bytes, channels: int, max_pixels: int) -> np.ndarray | None:
    """Values (H, W, bands) of a TIFF as they are stored; None where there are more than `max_pixels` pixels.

    OpenCV 5 and Pillow 12 multiply colours with alpha, read one of four bands without saying so, or no file of five.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first: Any = file.series[0]  # the first page, and those of the same kind after it
        if math.prod(first.shape) > max_pixels * channels:
            return None
        pixels = np.asarray(first.asarray())
    # Bands are the first axis if they lie one after the other in the file, or have a page each.
    if pixels.ndim == 3 and not first.axes.endswith("S") and (first.axes.startswith("S") or len(pixels) == channels):
        return np.moveaxis(pixels, 0, 2)
    return pixels


def _other_number(path: Path, got: int, channels: int) -> DataError:
    what = "a grey image, of one band" if got == 1 else f"an image of {got} bands"
    fix = f"leave such files out, or set data.channels: {got} and as many numbers in data.mean and data.std"
    return DataError(f"{path}: {what}\nexpected {channels}, as data.channels of the recipe\n{fix}")


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = cut(printable(str(error) or type(error).__name__), 100)
    fix = "pip install imagecodecs" if "imagecodecs" in reason else "copy it again, or remove the pair"
    return DataError(f"{path}: cannot be read: {reason}\nexpected a complete file of a known format\n{fix}")
