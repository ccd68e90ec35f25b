"""Masks of class ids that are stored as pictures: the id in three equal channels, or beside a channel of alpha.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssaseg.datasets.base import IGNORED, DataError
from ssaseg.datasets.classnames import Labels, guess_labels, read_class_names
from ssaseg.datasets.conventions.base import Convention, Item, Options, Source, Tree
from ssaseg.datasets.conventions.binary import levels_of
from ssaseg.datasets.conventions.pictures import find_pairs, look_at_all, read_picture


@dataclass(frozen=True)
class Grey:
    """Reads ids by a table. It is sent to worker processes."""

    table: tuple[int, ...]  # level of grey -> train id, -1 where it was not in any mask

    def read(self, item: Item) -> np.ndarray:
        """Train ids uint8 (H, W). Raises DataError and OSError."""
        grey = read_picture(item.label).grey()
        ids = None if grey is None else np.array(self.table, np.int16)[grey]
        if ids is None or ids.min() < 0:
            raise DataError(f"{item.label}: a mask that differs from the others\nexpected class ids in equal channels")
        return ids.astype(np.uint8)


def recognise(tree: Tree) -> str | None:
    """Masks whose channels are equal, with few levels of grey."""
    try:
        pairs = find_pairs(tree.root)
    except DataError:
        return None
    values = _values(pairs.masks)
    return f"class ids in equal channels in {pairs.where}: {len(values)} values up to {max(values)}" if values else None


def open_source(tree: Tree, _options: Options) -> Source:
    """Raises DataError where masks are in colours, or where their values cannot be ids."""
    pairs = find_pairs(tree.root)
    values = _values(pairs.masks)
    if not values:
        raise DataError(
            f"{tree.root}: masks in colours, in JPEG files or with too many levels of grey\n"
            f"expected class ids in equal channels\n`ssaseg data init {tree.root}` says what the folder holds"
        )
    names, notes = read_class_names(tree.root)
    labels = guess_labels(values, names, None)
    read = Grey(_table(labels, values)).read
    return Source(pairs.items, labels.classes, read, labels.palette, [*labels.notes, *notes, *pairs.notes])


def _table(labels: Labels, values: Sequence[int]) -> tuple[int, ...]:
    """From levels of grey to train ids, see `label_table`."""
    table = [-1] * 256
    for value in values:
        table[value] = IGNORED
    for train_id, raw in enumerate(labels.raw_ids):
        table[raw] = train_id
    for raw, train_id in (labels.raw_to_train or {}).items():
        table[raw] = train_id
    return tuple(table)


def _values(files: Sequence[Path]) -> list[int]:
    """The levels that occur; [] where they cannot be ids."""
    counts = np.zeros(256, np.int64)
    for levels in look_at_all(files, levels_of):
        if isinstance(levels, OSError):
            continue
        if isinstance(levels, Exception) or levels.lossy or not levels.exact or levels.bits == 16:
            return []
        counts += levels.counts
    values = [int(value) for value in np.flatnonzero(counts)]
    return values if 1 < len(values) <= 100 else []


GREY = Convention(
    "grey",
    "class ids in three equal channels, or beside alpha",
    recognise,
    open_source,
    explains=True,
)
