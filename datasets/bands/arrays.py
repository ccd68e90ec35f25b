"""Images in memory, as `bands.reading` gives those of files: NumPy arrays and Pillow images from users of `Predictor`.

Letters: H, W height and width [pixels]; C channels that a network takes.
"""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from ssaseg.datasets.base import DataError, Levels
from ssaseg.datasets.decoding.images import to_bytes

DEEP = ("I", "F")  # how the names of Pillow's modes of more than 8 bits begin


def array_bands(image: np.ndarray, channels: int = 3, levels: Levels | None = None, name: str = "image") -> np.ndarray:
    """An array with red, green and blue first as uint8 (H, W, channels) with BGR first; a copy.

    `image`: uint8 (H, W, bands) or (H, W); uint16 and int16 only with `levels`, see `read_bands`. For three channels,
    one band is repeated and a fourth one, such as alpha, is dropped. For one channel, three bands must be equal. For
    others, there must be as many bands. `name`: for messages. Raises DataError for any other array.
    """
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise _misshapen(image, name)
    pixels = _bytes(pixels, levels, name)
    bands = pixels.shape[2]
    if channels == 3 and bands in (1, 3, 4):
        code = cv2.COLOR_GRAY2BGR if bands == 1 else cv2.COLOR_RGB2BGR
        return cv2.cvtColor(np.ascontiguousarray(pixels[..., :3]), code)
    if channels == 1 and bands == 3 and (pixels[..., :1] == pixels).all():
        pixels = pixels[..., :1]
    elif bands != channels:
        raise _other_number(image, channels, name)
    found = np.array(pixels, order="C")
    if channels > 3:
        found[..., 0], found[..., 2] = pixels[..., 2], pixels[..., 0]
    return found


def picture_bands(
    picture: Image.Image, channels: int = 3, levels: Levels | None = None, name: str = "image"
) -> np.ndarray:
    """A Pillow image as `array_bands` gives an array. Colours in other forms, such as palettes, become RGB.

    The EXIF orientation is not applied: pixels stay where `picture.size` and NumPy have them. Raises DataError.
    """
    bands = picture.getbands()
    if picture.mode.startswith(DEEP):
        values = np.asarray(picture)
        # Pillow may hold 16 bits as 32.
        if values.dtype == np.int32 and values.size and 0 <= values.min() <= values.max() < 2**16:
            values = values.astype(np.uint16)
        return array_bands(values, channels, levels, name)
    if picture.mode in ("L", "RGB") or (picture.mode in ("LA", "RGBA") and len(bands) == channels):
        return array_bands(np.asarray(picture), channels, levels, name)
    return array_bands(np.asarray(picture.convert("RGB")), channels, levels, name)


def _bytes(pixels: np.ndarray, levels: Levels | None, name: str) -> np.ndarray:
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    if kind == "u" and size == 1:
        return pixels
    if kind in "ui" and size == 2 and levels is not None:
        return to_bytes(np.ascontiguousarray(pixels, np.uint16 if kind == "u" else np.int16), levels)
    fix = "convert it with .astype(np.uint8)"
    if kind in "ui" and size == 2:
        fix = "scale the values of all images in the same way; a checkpoint trained with data.range takes 16 bits"
    elif kind == "f":
        fix = "if its values are 0 to 1: (255 * image).round().astype(np.uint8)"
    raise DataError(f"{name}: an array of {pixels.dtype}\nexpected uint8, 0 to 255\n{fix}")


def _misshapen(image: np.ndarray, name: str) -> DataError:
    fix = "give one image; several as a list" if image.ndim == 4 else "give an image with pixels"
    what = f"{name}: an array of shape {image.shape}"
    return DataError(f"{what}\nexpected (height, width, bands) or (height, width)\n{fix}")


def _other_number(image: np.ndarray, channels: int, name: str) -> DataError:
    taken = {1: "one band, or three that are equal", 3: "1, 3 or 4 bands"}.get(channels, f"{channels} bands")
    fix = "this is the number that the network was trained with"
    if image.ndim == 3 and image.shape[0] in (1, 3, 4, channels):
        fix = "if its bands are the first axis: image.transpose(1, 2, 0)"
    return DataError(f"{name}: an array of shape {image.shape}\nexpected (height, width, bands) with {taken}\n{fix}")
