"""Looking at one pair of image and label, for the methods `inspect` of the data sets."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ssaseg.datasets.bands.reading import stored_bands
from ssaseg.datasets.base import DataError, Dataset, ImageFacts, Levels, PairFacts, Problem
from ssaseg.datasets.decoding import header_size, image_facts, read_complete
from ssaseg.datasets.decoding.images import decode_image
from ssaseg.files.text import describe

MOST_COUNTED = 2**22  # values of an image that are counted; of larger images, those of some of their rows


def inspect_loaded(dataset: Dataset, index: int) -> PairFacts:
    """`Dataset.inspect` by way of `load_raw`, which raises only the first error of a pair."""
    look = None
    try:
        raw = dataset.load_raw(index)[1]
        if dataset.image_files:
            look = look_at_image(dataset.image_files[index], False, dataset.channels)
    except (DataError, OSError) as error:
        return PairFacts([Problem("error", describe(error), "pair that cannot be read")], None, None, None)
    counts, problems = count_ids(raw), []
    if counts[~dataset.valid_raw].any():
        problems = [Problem("error", str(dataset.label_error(index)), "ids out of range")]
    facts, top = (None, None) if look is None else (look.facts, look.top)
    return PairFacts(problems, counts, (raw.shape[0], raw.shape[1]), None, image=facts, top=top)


def count_ids(raw: np.ndarray) -> np.ndarray:
    """How many pixels each raw id of a mask uint8 (H, W) has, int64 (256,)."""
    # numpy's bincount would first make eight bytes of each pixel. OpenCV counts in float32, exact up to 2^24 pixels.
    rows = max(2**24 // raw.shape[1], 1)
    stripes = (raw[top : top + rows] for top in range(0, raw.shape[0], rows))
    counts = (cv2.calcHist([stripe], [0], None, [256], [0, 256]).ravel() for stripe in stripes)
    return sum((each.astype(np.int64) for each in counts), np.zeros(256, np.int64))


class ImageLook(NamedTuple):
    """What was found in an image file."""

    size: tuple[int, int]  # height and width [pixels], as shown
    facts: ImageFacts | None
    top: Levels | None  # of more than 8 bits: the largest value, and the one that 99.9 % of the values do not exceed


def look_at_image(file: Path, decode: bool, channels: int = 3) -> ImageLook:
    """Size and facts of an image that is checked to be complete. `decode`: every pixel is decoded; otherwise only the
    header and the end are read, except of 16-bit images and of other than 3 channels. Raises DataError or OSError.
    """
    data = read_complete(file)
    facts = image_facts(data)
    deep = facts is not None and facts.bits > 8
    if channels == 3 and not deep:
        return ImageLook(_size(file, data, decode), facts, None)
    values = stored_bands(file, channels)
    height, width = values.shape[:2]
    if facts is not None and channels != 3:  # all bands are used: none of them is a further one, nor is a page a band
        facts = facts._replace(bands=3, paged=facts.paged and channels == 1)
    # Where the decoder gives the upper 8 bits only, the values are known that well.
    values = values.astype(np.uint16) << 8 if deep and values.dtype == np.uint8 else values
    return ImageLook((height, width), facts, _top(values) if deep else None)


def image_size(file: Path, decode: bool) -> tuple[int, int]:
    """The size alone, of `look_at_image`, where 16-bit images are images like others."""
    return _size(file, read_complete(file), decode)


def _size(file: Path, data: bytes, decode: bool) -> tuple[int, int]:
    # None where the EXIF orientation turns the image, or Pillow does not know the format: then OpenCV decodes it.
    size = None if decode else header_size(data)
    if size is None:
        height, width = decode_image(file, data).shape[:2]
        size = height, width
    return size


def _top(values: np.ndarray) -> Levels:
    rows = values[:: values.size // MOST_COUNTED + 1].clip(0)
    below = np.cumsum(np.bincount(rows.ravel(), minlength=1))
    return max(int(values.max()), 0), int(np.searchsorted(below, 0.999 * below[-1]))
