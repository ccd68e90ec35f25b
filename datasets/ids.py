"""What the numbers in mask files mean: tables from raw ids to train ids, and what to do about ids out of range.

"Raw ids" are the numbers in a mask file, "train ids" are 0..K-1 for K classes, and 255 where a pixel is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ssaseg.datasets.base import IGNORED, DataError, Palette, pascal_palette


def label_table(
    classes: int,
    ignore_index: int = IGNORED,
    reduce_zero_label: bool = False,
    raw_to_train: Mapping[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Two tables over the 256 raw ids: the train id (uint8, 255 = ignored) and whether the raw id is valid (bool).

    `reduce_zero_label` as in mmsegmentation: 0 is ignored and k becomes k-1. With `raw_to_train` only its keys are
    valid, and a value of 255 or `ignore_index` means ignored. `ignore_index` and 255 are always ignored, unless they
    are keys of `raw_to_train`.
    """
    table = np.full(256, IGNORED, np.uint8)
    valid = np.zeros(256, bool)
    valid[[ignore_index, IGNORED]] = True
    if raw_to_train is not None:
        for raw, train_id in raw_to_train.items():
            table[raw], valid[raw] = (IGNORED if train_id == ignore_index else train_id), True
        return table, valid
    first = int(reduce_zero_label)
    last = min(first + classes, IGNORED)
    table[first:last] = np.arange(last - first)
    valid[:last] = True  # with reduce_zero_label 0 too: it is ignored
    table[ignore_index] = IGNORED
    return table, valid


def expected_ids(
    classes: int, ignore_index: int, reduce_zero_label: bool, raw_to_train: Mapping[int, int] | None
) -> str:
    """The valid raw ids in words, for a message."""
    ignored = " or ".join(str(value) for value in sorted({ignore_index, IGNORED}))
    if raw_to_train is not None:
        return f"the {len(raw_to_train)} ids of data.raw_to_train, or {ignored} (ignored)"
    if reduce_zero_label:
        return f"ids 1..{classes} ({classes} classes, data.reduce_zero_label=true), 0 or {ignored} (ignored)"
    return f"ids 0..{classes - 1} ({classes} classes) or {ignored} (ignored)"


def likely_fix(
    bad: Sequence[int],
    counts: np.ndarray,
    classes: int,
    reduce_zero_label: bool,
    raw_to_train: Mapping[int, int] | None,
) -> str:
    """What to do about the likeliest cause: most masks with wrong ids follow another convention.

    bad: the ids of a mask that are not valid, sorted. counts: int64 (256,), pixels of each raw id.
    """
    if raw_to_train is not None:
        return f"add {bad[0]} to data.raw_to_train; map it to {IGNORED} to ignore it"
    if bad == [classes] and not reduce_zero_label:
        void = f"if {bad[0]} is void: set data.ignore_index={bad[0]}"
        return f"if ids are 1 to {bad[0]} and 0 is unlabelled: set data.reduce_zero_label=true; {void}"
    if len(bad) == 1:
        add = "otherwise add it to data.classes or data.raw_to_train"
        return f"if {bad[0]} is void: set data.ignore_index={bad[0]}; {add}"
    if len(bad) >= np.count_nonzero(counts) / 2:
        return "grey levels of a colour mask? Then write class ids. Ids of a larger set? Then set data.raw_to_train"
    return "add their classes to data.classes, or map each id to a class in data.raw_to_train"


def palette_error(
    file: Path,
    raw: np.ndarray,
    colours: np.ndarray | None,
    palette: Palette,
    classes: Sequence[str],
    label_lut: np.ndarray | None = None,
) -> DataError | None:
    """The error for a palette file that has the colours of the classes in another order, or None.

    `colours`: RGB (N, 3), the palette of the file. Most of them must be colours of the classes: the palette of an
    annotation tool, often PASCAL VOC's, may have one or two colours in common with them by chance. `label_lut`: the
    train id of each raw id; without it they are the same.
    """
    if colours is None:
        return None
    if label_lut is None:
        label_lut = label_table(len(classes))[0]
    owner = {colour: train_id for train_id, colour in enumerate(palette)}
    counts = np.bincount(raw.ravel(), minlength=256)
    # Ignored ids, often 255, have no class: they prove nothing, nor do the unused entries before them.
    last = int(np.flatnonzero((counts > 0) & (label_lut != IGNORED)).max(initial=-1))
    own = [(int(red), int(green), int(blue)) for red, green, blue in colours[: last + 1]]
    known, wrong = [], []
    for value, colour in enumerate(own):
        train_id = int(label_lut[value])
        if train_id == IGNORED:
            continue
        found = owner.get(colour)
        known.append(found is not None)
        if found is not None and counts[value] and found != train_id:
            wrong.append((value, classes[train_id], classes[found]))
    if not wrong or 2 * sum(known) <= len(known) or tuple(own) == pascal_palette(len(own)):
        return None
    value, read_as, shown_as = wrong[0]
    return DataError(
        f"{file}: id {value} ({read_as}) has the colour of {shown_as} in the file's own palette\n"
        f"expected indices that are class ids; this palette has the colours of data.palette in another order\n"
        f"write class ids as indices, map each index to its class in data.raw_to_train, or remove data.palette"
    )
