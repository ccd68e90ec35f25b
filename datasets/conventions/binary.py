"""Masks of one object in black and white: 0 and 255, in one or three channels, with 1, 8 or 16 bits, with soft edges.

A whole set is looked at before it is called binary: one mask alone proves little.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ssaseg.datasets.base import DataError
from ssaseg.datasets.checking.storage import THRESHOLD, is_soft
from ssaseg.datasets.classnames import read_class_names
from ssaseg.datasets.conventions.base import REST, TABLE, Convention, Item, Options, Source, Tree
from ssaseg.datasets.conventions.pictures import Pairs, Picture, find_pairs, look_at_all, read_picture
from ssaseg.datasets.conventions.tables import read_names
from ssaseg.datasets.inspection import count_ids
from ssaseg.datasets.survey.places import MASKS

TOLERANCE = 24  # by which compression makes channels of black and white differ
BACKGROUND, OBJECT = "background", "object"


class Levels(NamedTuple):
    """What one mask holds."""

    counts: np.ndarray  # int64 (256,): pixels of each level of grey
    bits: int
    channels: int
    lossy: bool
    alpha: bool  # whether the object is in the alpha channel
    zero: int | None  # of a palette: the level that the index 0 stands for
    exact: bool  # whether the channels are equal


@dataclass(frozen=True)
class Binary:
    """How the masks of a set are read. It is sent to worker processes."""

    ones: bool  # whether masks without a pixel above 1 hold ids, where 1 is the object
    alpha: bool  # whether the object is in the alpha channel

    def read(self, item: Item) -> np.ndarray:
        """Train ids uint8 (H, W): 1 is the object. Raises DataError and OSError."""
        return self.of(item.label, read_picture(item.label))

    def of(self, file: Path, picture: Picture) -> np.ndarray:
        """The object, uint8 (H, W) of 0 and 1."""
        grey = picture.alpha if self.alpha and picture.alpha is not None else picture.grey(TOLERANCE)
        if grey is None:
            raise _in_colour(file, picture)
        if self.ones and picture.bits == 8 and int(grey.max(initial=0)) <= 1:
            return grey
        return cv2.threshold(grey, THRESHOLD - 1, 1, cv2.THRESH_BINARY)[1]


class Seen(NamedTuple):
    """A set of masks that are all black and white."""

    how: Binary
    text: str  # what was seen, for messages
    plain: bool  # whether training can read all as they are, as they are stored alike in one channel


def recognise(tree: Tree) -> str | None:
    """A set of masks that are all black and white."""
    try:
        pairs = _pairs(tree)
    except DataError:
        return None
    seen = survey(pairs.masks)
    return None if seen is None else f"binary masks in {pairs.where}: {seen.text}"


def recognise_mixed(tree: Tree) -> str | None:
    """As `recognise`, where some masks can be read as ids. None where all that can be decoded are read as they are."""
    try:
        pairs = _pairs(tree)
    except DataError:
        return None
    seen = survey(pairs.masks)
    return None if seen is None or seen.plain else f"binary masks in {pairs.where}: {seen.text}"


def open_source(tree: Tree, options: Options) -> Source:
    """Raises DataError where the masks are not all black and white."""
    pairs = _pairs(tree)
    seen = survey(pairs.masks)
    if seen is None:
        raise _not_binary(tree.root, pairs.masks)
    classes = _names(tree.root, options)
    notes = [f"{seen.text}: from {THRESHOLD} on a pixel is {classes[1]!r}, below it is {classes[0]!r}", *pairs.notes]
    return Source(pairs.items, classes, seen.how.read, None, notes)


def _pairs(tree: Tree) -> Pairs:
    """Pairs, also where the masks are JPEG files; those must lie in a folder of masks, or their names must say so."""
    try:
        return find_pairs(tree.root)
    except DataError as error:
        try:
            pairs = find_pairs(tree.root, jpeg=True)
        except DataError:
            raise error from None
        words = " ".join([*pairs.found.mask_folders, pairs.found.mask_suffix])
        if not any(map(MASKS.fullmatch, re.findall(r"[^\W\d_]+", words.lower()))):
            raise error from None
        return pairs


def _names(root: Path, options: Options) -> list[str]:
    """Names of the two classes: of `--table`, `--background`, a file of names, or usual ones."""
    if options.table:
        names = read_names(options.table)
    else:
        found, _ = read_class_names(root)
        names = list(found.names.values()) if found and len(found.names) <= 2 else []
    if len(names) == 1:
        names = [options.background or BACKGROUND, *names]
    if options.table and len(names) != 2:
        raise DataError(f"{options.table}: {len(names)} names\nexpected 2: of the pixels around the object and of it")
    names = names or [BACKGROUND, OBJECT]
    return [options.background or names[0], names[1]]


def survey(files: Sequence[Path]) -> Seen | None:
    """How to read a set of masks as black and white; None where they are something else.

    Files that cannot be read are passed over: reading reports them.
    """
    counts = np.zeros(256, np.int64)
    kinds: dict[tuple[int, int], int] = {}
    ones = both = read = alphas = 0
    zeros: set[int | None] = set()
    lossy = False
    for levels in look_at_all(files, levels_of):
        if isinstance(levels, DataError) and "in colours" in str(levels):
            return None
        if isinstance(levels, Exception):
            continue
        read += 1
        high = int(np.flatnonzero(levels.counts).max(initial=0))
        kinds[levels.bits, levels.channels] = kinds.get((levels.bits, levels.channels), 0) + 1
        if levels.bits == 8:
            ones += high == 1
            both += bool(levels.counts[1] and levels.counts[255])
        alphas += levels.alpha
        zeros.add(levels.zero)
        lossy |= levels.lossy
        counts += levels.counts
    if not read or (alphas and alphas < read):
        return None
    only = set(np.flatnonzero(counts).tolist())
    if only <= {0, 1, 255}:
        # Where one file has both, 1 is a class and 255 is "ignored". Ids 0 and 1 in one channel are read as they are.
        if both or 255 not in only:
            return None
        seen = _storage(kinds) + (f", {ones} of them with 0 and 1 in place of 0 and 255" if ones else "")
        seen += ", palettes in different orders" if len(zeros) > 1 else ""
        plain = not ones and len(zeros) == 1 and kinds.keys() in ({(8, 1)}, {(1, 1)})
        return Seen(Binary(bool(ones), bool(alphas)), seen, plain)
    if not is_soft(counts):
        return None
    between = counts[1:255].sum() / counts.sum()
    edges = "soft edges or compression" if not lossy else "lossy compression"
    seen = f"{_storage(kinds)}, with {edges}: {between:.1%} of the pixels are not 0 or 255"
    return Seen(Binary(False, bool(alphas)), seen, False)


def levels_of(file: Path) -> Levels:
    """Raises DataError where a mask is in colours or cannot be read, and OSError."""
    picture = read_picture(file)
    grey, alpha = picture.grey(TOLERANCE), False
    if picture.alpha is not None and grey is not None and grey.min() == grey.max() and _varies(picture.alpha):
        grey, alpha = picture.alpha, True  # the object is what is not transparent
    if grey is None:
        raise _in_colour(file, picture)
    return Levels(
        count_ids(np.ascontiguousarray(grey)),
        picture.bits,
        1 if picture.mode in ("1", "L", "P") else 3,
        picture.lossy,
        alpha,
        picture.zero,
        picture.grey() is not None,
    )


def _varies(alpha: np.ndarray) -> bool:
    return int(alpha.min(initial=255)) < THRESHOLD <= int(alpha.max(initial=0))


def _storage(kinds: dict[tuple[int, int], int]) -> str:
    """Such as "5 with 1 bit, 9 with 8 bits in 3 channels"."""
    parts = []
    for (bits, channels), count in sorted(kinds.items()):
        same = " in equal channels" if channels > 1 else ""
        parts.append(f"{count} with {bits} bit{'s' if bits > 1 else ''}{same}")
    return f"black and white ({', '.join(parts)})"


def _in_colour(file: Path, picture: Picture) -> DataError:
    at = int((picture.pixels != picture.pixels[..., :1]).any(-1).argmax())
    colour = tuple(map(int, picture.pixels.reshape(-1, 3)[at]))
    return DataError(
        f"{file}: a mask in colours: a pixel is {colour}\nexpected black and white only\n"
        "for masks in colours: `ssaseg data prepare colours`"
    )


def _not_binary(root: Path, files: Sequence[Path]) -> DataError:
    """The error for masks that are not black and white: with the first one in colours, or with the levels of grey."""
    counts = np.zeros(256, np.int64)
    for levels in look_at_all(files, levels_of):
        if isinstance(levels, Exception):
            return levels if isinstance(levels, DataError) else DataError(str(levels))
        counts += levels.counts
    values = [(int(value), int(counts[value])) for value in np.argsort(-counts)[:6] if counts[value]]
    shown = ", ".join(f"{value} ({pixels / counts.sum():.1%})" for value, pixels in values)
    return DataError(
        f"{root}: masks that are not black and white; commonest values: {shown}\n"
        "expected 0 and 255, or levels near them at edges\n"
        f"if these are class ids, `ssaseg data init` reads them directly"
    )


BINARY = Convention(
    "binary",
    "black and white masks: 0 and 255 in one or three channels, JPEG or GIF files, soft edges, 1 bit",
    recognise,
    open_source,
    TABLE | REST,
    explains=True,
)
