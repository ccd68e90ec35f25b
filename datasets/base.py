"""What every data set offers, and the error that every data set raises."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ssaseg.files.text import cut, printable

if TYPE_CHECKING:
    import numpy as np


Palette = tuple[tuple[int, int, int], ...]
Levels = tuple[int, int]  # values of 16-bit images that become 0 and 255; those between are mapped linearly

_SHORT = reprlib.Repr()
_SHORT.maxstring = 60

Colour = tuple[int, int, int]  # RGB, 0..255
# What classes of pixels that are nothing else are called, in lower case.
NOTHING = ("background", "void", "unlabeled", "unlabelled", "ignore")
IGNORED = 255  # the label of pixels that no loss and no score counts


class DataError(ValueError):
    """Data that cannot be used. At most three lines: the file and what is wrong, what was expected, the likely fix."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data.

    severity: "error", "warning" or "note", which is only to be known. text: at most three lines. kind: what it is
    counted as, where several problems have one cause. name: of the pair; empty where it is about all of them.
    """

    severity: str
    text: str
    kind: str = ""
    name: str = ""

    @property
    def cause(self) -> tuple[str, ...]:
        """Equal for problems of one cause: what is wrong and the fix, without the file in front and without numbers."""
        if self.kind in ONE_CAUSE:
            return (self.kind,)
        first, *_, last = [*self.text.split("\n"), ""]
        return self.kind, *(re.sub(r"\d+", "#", part) for part in (first.partition(": ")[2], last))


ONE_CAUSE = ("ids out of range", "palette in another order")  # kinds of problems, whatever the ids are


def grouped(problems: Iterable[Problem]) -> list[tuple[Problem, str]]:
    """For each cause its first problem, and a text: of several pairs with their number and three names."""
    causes: dict[Any, list[Problem]] = {}
    for number, problem in enumerate(problems):
        causes.setdefault(problem.cause if problem.name else number, []).append(problem)
    texts = []
    for first, *others in causes.values():
        names = ", ".join(each.name for each in (first, *others[:2])) + (", …" if len(others) > 2 else "")
        several = f"{len(others) + 1} x {first.kind}: {names}; the first: " if others else ""
        texts.append((first, several + first.text))
    return texts


class ImageFacts(NamedTuple):
    """What the header of an image file says."""

    orientation: int  # 1..8 as in EXIF; 1: as stored
    bands: int  # channels in the file, alpha among them; 3 of CMYK, which becomes RGB
    bits: int  # of one sample
    paged: bool  # whether there are more pages or frames than the first, which is read


class PairFacts(NamedTuple):
    """What was found in one pair of image and label."""

    problems: list[Problem]
    pixels: np.ndarray | None  # int64 (256,), pixels of each raw id; None where the label cannot be read
    size: tuple[int, int] | None  # height and width of the image [pixels]; None where it cannot be read
    palette: bytes | None  # RGB triples of the mask file's own palette; None where it has none
    white: int = 255  # of a mask without palette: the id that is shown as white, see `Mask`
    image: ImageFacts | None = None  # what the header of the image says; None where it was not read
    top: tuple[int, int] | None = None  # of images of more than 8 bits: largest value, and that of 99.9 % of the values


class Dataset(Protocol):
    """Images with labels.

    An image is BGR uint8 (H, W, 3); one of other channels: see `bands.reading`. A label is uint8 (H, W) of train ids
    0..K-1, where 255 is ignored. Raw ids are the numbers in a file; `label_lut[raw]` is their train id. Where
    `valid_raw[raw]` is false, the raw id has no meaning and is an error.
    """

    classes: tuple[str, ...]
    palette: Palette  # RGB, 0..255, one colour for each class
    label_lut: np.ndarray  # uint8 (256,)
    valid_raw: np.ndarray  # bool (256,)

    @property
    def image_files(self) -> Sequence[Path]:
        """One file for each image; empty where images are drawn by a program."""

    @property
    def mask_files(self) -> Sequence[Path]:
        """One file for each label; empty where labels are not stored as mask files."""

    @property
    def incomplete(self) -> Sequence[DataError]:
        """The errors for pairs that were left out because one of their files is missing."""

    @property
    def unused_masks(self) -> Sequence[Path]:
        """Mask files that have no image."""

    @property
    def zero_ignored(self) -> bool | None:
        """What raw id 0 means where raw ids are numbered without gaps: True: ignored, and k is class k-1
        (`reduce_zero_label`); False: class 0, and k is class k. None where the raw ids follow no such rule.
        """

    @property
    def fix(self) -> str | None:
        """What a user can do about wrong ids; None where the recipe's keys about ids are the fix."""

    @property
    def channels(self) -> int:
        """Of every image, see `bands.reading`."""

    @property
    def levels(self) -> Levels | None:
        """Values of 16-bit images that become 0 and 255, see `read_image`."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The image's path below the image folder, without suffix."""

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and label of train ids, checked."""

    def load_raw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and label of raw ids, unchecked: the fast way, for a caller that looks ids up after cropping."""

    def load_image(self, index: int) -> np.ndarray:
        """The image alone."""

    def label_error(self, index: int) -> DataError:
        """The error to raise where `load_raw` gave an id that is not valid."""

    def inspect(self, index: int, decode: bool) -> PairFacts:
        """Look for everything that is wrong with one pair; raises nothing.

        decode: whether to decode the image; without it only its header and its end may be read.
        """

    def identity(self) -> list[str]:
        """What decides the pixels, as far as it is known without reading a file: the sizes of all files [bytes], or
        the numbers that scenes are drawn from. Raises OSError where a file is missing.
        """


def require_below(where: str, name: str) -> None:
    """Raises DataError, which begins with `where`, for a name of a file that does not stay below its folder, or that
    has characters which no list should have. Names are written with /, on every system.
    """
    parts = name.split("/")
    wrong = "an empty name" if not name else ""
    wrong = "a path from the root" if name.startswith("/") or re.match("[A-Za-z]:", name) else wrong
    wrong = "a path with `..`" if ".." in parts else wrong
    wrong = "a backslash" if "\\" in name else wrong
    wrong = "a control character" if re.search("[\x00-\x1f\x7f]", name) else wrong
    wrong = "a part of more than 255 characters" if max(map(len, parts)) > 255 else wrong
    if wrong:
        expected = "a path below the folder of images, with / between folders"
        fix = "write / in its place" if wrong == "a backslash" else "correct the name, also that of the file if needed"
        raise DataError(f"{printable(where)}: {wrong}: {brief(name)}\nexpected {expected}\n{fix}")


def brief(value: object) -> str:
    """A value from a file, for a message: one line of at most 60 characters, also for huge or deeply nested values."""
    return cut(printable(_SHORT.repr(value)))


def file_sizes(files: Iterable[Path | str]) -> list[str]:
    """Sizes of files [bytes], as text. Raises OSError where a file is missing."""
    return [str(os.stat(file).st_size) for file in files]


def default_palette(classes: Sequence[str]) -> Palette:
    """Distinct RGB colours, 0..255, of at most 255 classes that have none: PASCAL VOC's, without its black.

    Only a class of what is nothing else, such as `background`, is black: any other would look as if it had no label.
    """
    dark = next((index for index, name in enumerate(classes) if name.strip().casefold() in NOTHING), None)
    colours = iter(pascal_palette(len(classes) + 1)[1:])
    return tuple((0, 0, 0) if index == dark else next(colours) for index in range(len(classes)))


def pascal_palette(count: int) -> Palette:
    """`count` (at most 256) distinct RGB colours, 0..255: PASCAL VOC's colour map, whose first colour is black.

    The bits of the index go to red, green and blue in turn, and fill each of them from its highest bit down.
    """
    colours = []
    for index in range(count):
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        colours.append((channels[0], channels[1], channels[2]))
    return tuple(colours)


def hexed(colour: Colour) -> str:
    """A colour as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def evenly(count: int, sample: int) -> list[int]:
    """`sample` of the indices 0..count-1 (all if there are fewer), evenly spaced, the first among them."""
    sample = min(count, sample)
    return [at * count // sample for at in range(sample)]
