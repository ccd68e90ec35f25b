"""Look through a data set before time is spent on it: all that is wrong at once, not only the first thing."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ssaseg.datasets import DataError, Dataset
from ssaseg.datasets.pairs import PairDataset, read_image, read_mask, require_complete, some

# A set of this size is read in about a second, so that a sample would save nothing.
SMALL = 512
# Images that are decoded; of the others the header and the end are read.
DECODED = 64
# Problems told in full. A convention that is misunderstood shows in every file.
TOLD = 10


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data: severity "error" or "warning", and a text of at most three lines."""

    severity: str
    text: str


def check_dataset(dataset: Dataset, sample: int | None = None) -> list[Problem]:
    """Everything wrong with `sample` evenly spaced pairs, or with all of them (None, and sets of up to 512 pairs).

    Errors: images and masks that are damaged or differ in size, masks in colours, palettes in another order, ids out of
    range; and where none of these, not one labelled pixel. Warnings, where all pairs are read: classes without a pixel
    (if there is no error, which would explain them), masks without an image. At most ten errors are told in full, one
    more says how many there are besides. Scenes drawn by a program are sound by construction: [].
    """
    if not isinstance(dataset, PairDataset):
        return []
    indices = _evenly(len(dataset), len(dataset) if sample is None or len(dataset) <= SMALL else sample)
    decoded = {indices[at] for at in _evenly(len(indices), DECODED)}
    pixels = np.zeros(256, np.int64)  # per raw id
    errors = []
    for index in indices:
        errors += [str(error) for error in _errors(dataset, index, index in decoded, pixels)]
    per_class = np.bincount(dataset.label_lut, pixels, 256)[: len(dataset.classes)]
    if not errors and not per_class.any():
        errors = [
            f"no labelled pixel in the {len(indices)} masks that were read; ids in them: {_ids(pixels)}\n"
            f"expected pixels of {len(dataset.classes)} classes; these ids are all ignored\n"
            f"check data.ignore_index, data.reduce_zero_label and data.raw_to_train"
        ]
    problems = [Problem("error", text) for text in errors[:TOLD]]
    if len(errors) > TOLD:
        problems.append(
            Problem("error", f"{len(errors) - TOLD} more errors in the {len(indices)} pairs that were read")
        )
    if len(indices) == len(dataset):
        problems += [Problem("warning", text) for text in _warnings(dataset, pixels, [] if errors else per_class)]
    return problems


def _errors(dataset: PairDataset, index: int, decode: bool, pixels: np.ndarray) -> Iterator[Exception]:
    """What is wrong with one pair. Adds the mask's ids to `pixels`, int64 (256,)."""
    size = None
    try:
        size = _image_size(dataset, index, decode)
    except (DataError, OSError) as error:
        yield error
    try:
        raw, colours = read_mask(dataset.mask_files[index])
    except (DataError, OSError) as error:
        yield error
        return
    if size is not None and size != raw.shape:
        yield dataset.size_error(index, size, raw.shape)
    counts = np.bincount(raw.ravel(), minlength=256)
    pixels += counts
    if counts[~dataset.valid_raw].any():
        yield dataset.label_error(index, raw)
    elif shuffled := dataset.palette_error(index, raw, colours):
        yield shuffled


def _image_size(dataset: PairDataset, index: int, decode: bool) -> tuple[int, int]:
    """Height and width [pixels] of an image that is whole as far as can be seen; `decode` looks at every pixel."""
    file = dataset.image_files[index]
    if not decode:
        data = file.read_bytes()
        require_complete(file, data)
        try:
            with Image.open(io.BytesIO(data)) as image:
                # Orientations 5 to 8 lie on their side; OpenCV is asked what it makes of any that is not upright.
                if image.getexif().get(0x0112, 1) == 1:
                    return image.height, image.width
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            pass  # what Pillow cannot open, OpenCV may
    height, width = read_image(file).shape[:2]
    return height, width


def _warnings(dataset: PairDataset, pixels: np.ndarray, per_class: Iterable[float]) -> Iterator[str]:
    """What a whole set's ids suggest, and its unpaired files.

    `pixels`: int64 (256,), per raw id; `per_class`: pixels per train id, or nothing where they would mislead.
    """
    absent = [name for name, count in zip(dataset.classes, per_class, strict=False) if count == 0]
    if absent:
        yield (
            f"{len(absent)} of {len(dataset.classes)} classes have no pixel in {len(dataset)} masks: "
            f"{some(absent, 8)}; ids there: {_ids(pixels)}; check data.classes, reduce_zero_label, raw_to_train"
        )
    if dataset.unused_masks:
        count, files = len(dataset.unused_masks), [str(file) for file in dataset.unused_masks]
        yield f"{count} mask{'s have' if count > 1 else ' has'} no image: {some(files, 3)}"


def _ids(pixels: np.ndarray) -> str:
    """The raw ids that occur, the first 20 of them."""
    return some([str(value) for value in np.flatnonzero(pixels)], 20)


def _evenly(count: int, sample: int) -> list[int]:
    """`sample` of the indices 0..count-1 (all if there are fewer), evenly spaced, the first among them."""
    sample = min(count, sample)
    return [at * count // sample for at in range(sample)]
