"""Looking at one pair of image and label, for the methods `inspect` of the data sets."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from ssaseg.datasets.bands.reading import read_bands
from ssaseg.datasets.base import DataError, Dataset, PairFacts, Problem
from ssaseg.datasets.decoding import header_size, read_complete
from ssaseg.files.text import describe


def inspect_loaded(dataset: Dataset, index: int) -> PairFacts:
    """`Dataset.inspect` by way of `load_raw`, which raises only the first error of a pair."""
    try:
        raw = dataset.load_raw(index)[1]
    except (DataError, OSError) as error:
        return PairFacts([Problem("error", describe(error), "pair that cannot be read")], None, None, None)
    counts, problems = count_ids(raw), []
    if counts[~dataset.valid_raw].any():
        problems = [Problem("error", str(dataset.label_error(index)), "ids out of range")]
    return PairFacts(problems, counts, (raw.shape[0], raw.shape[1]), None)


def count_ids(raw: np.ndarray) -> np.ndarray:
    """How many pixels each raw id of a mask uint8 (H, W) has, int64 (256,)."""
    # numpy's bincount would first make eight bytes of each pixel. OpenCV counts in float32, exact up to 2^24 pixels.
    rows = max(2**24 // raw.shape[1], 1)
    stripes = (raw[top : top + rows] for top in range(0, raw.shape[0], rows))
    counts = (cv2.calcHist([stripe], [0], None, [256], [0, 256]).ravel() for stripe in stripes)
    return sum((each.astype(np.int64) for each in counts), np.zeros(256, np.int64))


def image_size(file: Path, decode: bool, channels: int = 3) -> tuple[int, int]:
    """Height and width [pixels] of an image that is checked to be complete. `decode`: every pixel is decoded; otherwise
    only the header and the end are read; images of other than 3 channels are always decoded. Raises DataError, OSError.
    """
    if not decode and channels == 3:
        data = read_complete(file)
        # None where the EXIF orientation turns the image, or Pillow does not know the format: then OpenCV decodes it.
        if size := header_size(data):
            return size
    height, width = read_bands(file, channels).shape[:2]
    return height, width
