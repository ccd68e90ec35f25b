"""Masks in colours, with a table that says which class has which colour: CVAT, VOC, CamVid, Mapillary, datumaro.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from ssaseg.datasets.base import IGNORED, DataError, hexed
from ssaseg.datasets.classnames.names import NO_CLASS
from ssaseg.datasets.conventions.base import TABLE, Colour, Convention, Item, Options, Source, Tree, prepare_command
from ssaseg.datasets.conventions.pictures import Picture, find_pairs, look_at_all, read_picture, some_of
from ssaseg.datasets.conventions.tables import Table, find_tables, read_table, why_unused
from ssaseg.datasets.decoding import read_mask
from ssaseg.datasets.inspection import count_ids

SAMPLE = 20  # masks that are looked at to recognise colours
MOST_COLOURS = 255  # of a table that is proposed: more are no classes


class NoTable(DataError):
    """Masks in colours without a table that names them. `table`: what such a file may hold, to be filled in."""

    def __init__(self, text: str, table: str) -> None:
        super().__init__(text)
        self.table = table


def recognise(tree: Tree) -> str | None:
    """Masks in colours with a table that has most of their colours."""
    try:
        pairs = find_pairs(tree.root)
    except DataError:
        return None
    counts = count_colours(some_of(pairs.masks, SAMPLE))
    table = choose_table(find_tables(tree), counts)
    if table is None:
        return None
    name = table.file.relative_to(tree.root).as_posix()
    missing = [colour for colour, _ in counts.most_common() if colour not in table.ids]
    shown = ", ".join(f"{hexed(colour)} {counts[colour] / sum(counts.values()):.1%}" for colour in missing[:3])
    lacks = f"; not in it: {shown}{', …' if len(missing) > 3 else ''}" if missing else ""
    return f"masks in colours in {pairs.where}, and a table of {len(table.classes)} classes: {name}{lacks}"


def open_source(tree: Tree, options: Options) -> Source:
    """Raises NoTable where there is no table, DataError where `options` or the table do not fit."""
    pairs = find_pairs(tree.root)
    counts = count_colours(some_of(pairs.masks, SAMPLE))
    table = read_table(options.table) if options.table else choose_table(find_tables(tree), counts)
    if table is None:
        raise no_table(tree.root, pairs.masks, counts)
    notes = [f"classes and colours: {table.file}", *table.notes, *pairs.notes]
    colours = Colours(str(table.file), tuple(table.ids.items()))
    return Source(pairs.items, table.classes, colours.read, table.palette, notes)


def table_of_palettes(tree: Tree, masks: Sequence[Path]) -> tuple[Table, bool] | None:
    """The table that has all colours of palette masks, and whether every index is its class; None without a table.

    Where indices are in another order than the table, in any of the files, they are not the classes that it names.
    """
    tables = find_tables(tree)
    if not tables:
        return None
    counts: Counter[Colour] = Counter()
    seen: set[tuple[int, Colour]] = set()
    for result in look_at_all(masks, _indices_of):
        for (index, colour), count in {} if isinstance(result, Exception) else result.items():
            if index != IGNORED:
                seen.add((index, colour))
                counts[colour] += count
    table = choose_table(tables, counts)
    if table is None or not counts.keys() <= table.ids.keys():
        return None
    return table, all(table.ids[colour] == index for index, colour in seen)


def _indices_of(file: Path) -> dict[tuple[int, Colour], int]:
    """Pixels of each index with its colour, of a palette mask; of another mask {}."""
    ids, palette = read_mask(file)[:2]
    if palette is None:
        return {}
    counts = count_ids(ids)
    return {
        (int(index), (int(palette[index][0]), int(palette[index][1]), int(palette[index][2]))): int(counts[index])
        for index in np.flatnonzero(counts)
        if index < len(palette)
    }


def choose_table(tables: Sequence[Table], counts: Counter[Colour]) -> Table | None:
    """The table that has the colours of most pixels: of all where all are grey, otherwise of at least half of them, or
    half of the colours.

    Two of its colours must occur, or one that is not grey: black alone, the background of many masks, proves nothing.
    Raises DataError where two tables that have as many pixels differ.
    """
    total = sum(counts.values())
    grey = not any(len(set(colour)) > 1 for colour in counts)
    known = [sum(count for colour, count in counts.items() if colour in table.ids) for table in tables]
    best = max(known, default=0)
    if not best or (grey and best < total):
        return None
    fitting = []
    for table, pixels in zip(tables, known, strict=True):
        shared = [colour for colour in counts if colour in table.ids]
        most = 2 * pixels >= total or 2 * len(shared) >= len(counts)
        if pixels == best and most and (len(shared) > 1 or any(len(set(colour)) > 1 for colour in shared)):
            fitting.append(table)
    if differing := next((table for table in fitting[1:] if not table.same(fitting[0])), None):
        raise DataError(
            f"{fitting[0].file} and {differing.file}: two tables of colours, which differ\n"
            "expected one table\n"
            "name the right one: ssaseg data prepare colours --source DIR --root OUT --table FILE"
        )
    return fitting[0] if fitting else None


def no_table(root: Path, masks: Sequence[Path], counts: Counter[Colour]) -> DataError:
    """The error for masks in colours that no table explains, with a table to be filled in."""
    total = max(sum(counts.values()), 1)
    seen = f"{len(counts)} colours in {min(len(masks), SAMPLE)} masks"
    if len(counts) > MOST_COLOURS:
        return DataError(
            f"{masks[0]}: a mask in colours; {seen}: more than classes\n"
            "expected one colour for each class\n"
            "smoothed or compressed masks cannot be read: export them again as PNG, without smoothing"
        )
    command = prepare_command("colours", root, "--table", "classes.csv")
    why = why_unused(Tree(root))
    why = f"; not this one: {why}" if why else ", such as labelmap.txt or class_dict.csv"
    common = counts.most_common()
    shown = ", ".join(f"{hexed(colour)} {count / total:.1%}" for colour, count in common[:12])
    more = f", and {len(common) - 12} more" if len(common) > 12 else ""
    rows = [f"class_{number},{','.join(map(str, colour))}" for number, (colour, _) in enumerate(common)]
    first = f"# Replace class_0, class_1, ... by names, in the order of the ids; {NO_CLASS}: pixels to ignore"
    table = "\n".join([first, "name,r,g,b", *rows])
    return NoTable(
        f"{masks[0]}: a mask in colours; {seen}: {shown}{more}\n"
        f"expected a table that says which class has which colour{why}\n"
        f"write names into the table on stdout, save it, and run `{command}`",
        table,
    )


def count_colours(masks: Sequence[Path]) -> Counter[Colour]:
    """Pixels of each colour in these masks, without those that cannot be read."""
    counts: Counter[Colour] = Counter()
    for result in look_at_all(masks, _colours_of):
        if not isinstance(result, Exception):
            counts.update(result)
    return counts


def _colours_of(file: Path) -> dict[Colour, int]:
    values, counts = np.unique(_packed(read_picture(file)), return_counts=True)
    # Of a photograph, the commonest are enough.
    order = np.argsort(-counts)[:4096]
    return {unpack(int(values[at])): int(counts[at]) for at in order}


@dataclass(frozen=True)
class Colours:
    """Reads masks by a table. It is sent to worker processes."""

    table: str  # its file, for messages
    ids: tuple[tuple[Colour, int], ...]

    def read(self, item: Item) -> np.ndarray:
        """Train ids uint8 (H, W). Raises DataError for a colour that is not in the table, and OSError."""
        packed = _packed(read_picture(item.label))
        ids = _lookup(self.ids).take(packed)
        if (ids == IGNORED).any():
            values, counts = np.unique(packed[ids == IGNORED], return_counts=True)
            ignored = {pack(colour) for colour, train_id in self.ids if train_id == IGNORED}
            bad = [
                (count, unpack(value))
                for value, count in zip(values.tolist(), counts.tolist(), strict=True)
                if value not in ignored
            ]
            if bad:
                raise self._unknown(item.label, sorted(bad, reverse=True))
        return ids

    def _unknown(self, file: Path, bad: Sequence[tuple[int, Colour]]) -> DataError:
        seen = "; ".join(f"colour {hexed(colour)} {colour} in {count:,} pixels" for count, colour in bad[:3])
        more = f"; {len(bad) - 3} more colours" if len(bad) > 3 else ""
        line = ",".join(map(str, bad[0][1]))
        fix = f"add a line such as {NO_CLASS},{line} (ignored) to a copy of it, and give that with --table"
        if len(bad) > 20:
            fix = "so many colours are made by smoothing or JPEG: export the masks again as PNG, without smoothing"
        return DataError(f"{file}: {seen}{more}\nexpected only colours of {self.table}\n{fix}")


@lru_cache(maxsize=1)
def _lookup(ids: tuple[tuple[Colour, int], ...]) -> np.ndarray:
    """uint8 (2^24,): the train id of each packed colour; `IGNORED` for those that are not in the table, too."""
    table = np.full(2**24, IGNORED, np.uint8)
    for colour, train_id in ids:
        table[pack(colour)] = train_id
    return table


def pack(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def unpack(value: int) -> Colour:
    return value >> 16, value >> 8 & 255, value & 255


def _packed(picture: Picture) -> np.ndarray:
    """Colours as one number each, uint32 (H, W). Alpha is dropped: the colour below it is the label."""
    grey = picture.pixels.ndim == 2
    # Four bytes a pixel in one pass: shifting each channel would take ten times as long.
    four = cv2.cvtColor(picture.pixels, cv2.COLOR_GRAY2BGRA if grey else cv2.COLOR_RGB2BGRA)
    return four.view("<u4")[..., 0] & np.uint32(0xFFFFFF)


COLOURS = Convention(
    "colours",
    "masks in colours (RGB, palette), and a table of names and colours: labelmap.txt, class_dict.csv, labels.json, ...",
    recognise,
    open_source,
    TABLE,
    explains=True,
)
