"""What every data set offers, and the error that every one of them raises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


Palette = tuple[tuple[int, int, int], ...]

IGNORED = 255  # the label of pixels that count nowhere


class DataError(ValueError):
    """Data that cannot be used. At most three lines: the file and what is wrong, what was expected, the likely mend."""


class Dataset(Protocol):
    """Images with labels.

    An image is BGR uint8 (H, W, 3); a label is uint8 (H, W) of train ids 0..K-1, where 255 is ignored. Raw ids, as a
    file holds them, become train ids by `label_lut[raw]`; where `valid_raw[raw]` is false the id means nothing: an
    error.
    """

    classes: tuple[str, ...]
    palette: Palette  # RGB, 0..255, one colour a class
    label_lut: np.ndarray  # uint8 (256,)
    valid_raw: np.ndarray  # bool (256,)

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Path below the image folder, without suffix."""

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and label of train ids, checked."""

    def load_raw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and label of raw ids, unchecked: the fast way, for a caller that looks ids up after cropping."""

    def load_image(self, index: int) -> np.ndarray:
        """The image alone."""

    def label_error(self, index: int) -> DataError:
        """What to raise where an id of `load_raw` is not valid."""


def default_palette(count: int) -> Palette:
    """`count` (at most 256) distinct RGB colours, 0..255: PASCAL VOC's colour map.

    The index's bits go to red, green, blue in turn, and fill each from its top bit down.
    """
    colours = []
    for index in range(count):
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        colours.append((channels[0], channels[1], channels[2]))
    return tuple(colours)
