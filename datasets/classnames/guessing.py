"""Guess what the ids in a user's masks mean: from class names if there are any, otherwise from the ids.

Nothing here is certain: every guess comes with a note that says what was found, for the person who reads the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ssaseg.datasets.base import IGNORED, DataError
from ssaseg.datasets.classnames.names import Names
from ssaseg.datasets.pairs import first_names

# More different ids than this are probably the grey levels of a picture, not classes.
MOST_IDS = 200
# Names that id 0 often has. In a list that starts with one of them, the first name belongs to 0.
BACKGROUND = re.compile(r"_*(background|bg|void|unlabell?ed|other)_*", re.IGNORECASE)


@dataclass
class Labels:
    """What raw ids are assumed to mean, as keys of a recipe's data section; and notes that say why."""

    classes: list[str]
    raw_ids: list[int]  # one for each class
    reduce_zero_label: bool = False
    raw_to_train: dict[int, int] | None = None
    palette: list[tuple[int, int, int]] | None = None
    notes: list[str] = field(default_factory=list)


def guess_labels(ids: Sequence[int], names: Names | None, palette: bytes | None) -> Labels:
    """What the raw ids that occur (sorted) are assumed to mean.

    `palette`: RGB triples that all mask files have, or None. Raises DataError where the ids cannot be classes.
    """
    present = [value for value in ids if value != IGNORED]
    if len(ids) > MOST_IDS:
        raise DataError(
            f"the masks hold {len(ids)} different values: they look like grey levels, not like class ids\n"
            f"expected one small number for each class\nwrite class ids 0, 1, 2, … without smoothing"
        )
    even = list(ids) == [0, IGNORED] or _is_even(ids)
    if even and names is not None and len(names.names) == len(ids):
        shown = first_names([str(value) for value in ids], 10)
        note = f"{shown} are the only ids: they are the {'two ' if len(ids) == 2 else ''}classes"
        given = list(names.colours.values()) if len(names.colours) == len(ids) else None
        classes, numbers = list(names.names.values()), {raw: number for number, raw in enumerate(ids)}
        return Labels(classes, list(ids), False, numbers, given, [f"class names: {names.file.name}", note])
    labels = None if names is None else _named(present, names)
    if labels is None:
        labels = _unnamed(list(ids), present)
        if names is not None:
            ids_found = first_names([str(value) for value in present], 10)
            reason = f"it has {len(names.names)} names, and the ids are {ids_found}"
            labels.notes.append(f"{names.file.name} is not used: {reason}")
            names = None
    if len(labels.classes) < 2:
        raise DataError(
            f"the masks hold one class, id {first_names(list(map(str, ids)))}: there is nothing to distinguish\n"
            "expected 2 classes or more\ngive the background its own class id"
        )
    if IGNORED in ids and IGNORED not in labels.raw_ids:
        labels.notes.append("255 is in the masks: read as 'ignored', its usual meaning")
    first = int(labels.reduce_zero_label and names is not None and not names.numbered)  # the id of the first line
    if names is not None and names.colours.keys() >= {value - first for value in labels.raw_ids}:
        labels.palette = [names.colours[value - first] for value in labels.raw_ids]
    elif palette is not None and 3 * max(labels.raw_ids) < len(palette):
        colours = [tuple(palette[3 * value : 3 * value + 3]) for value in labels.raw_ids]
        # Where colours are equal, the palette was never filled in.
        if len(set(colours)) == len(colours):
            labels.palette = [(r, g, b) for r, g, b in colours]
            labels.notes.append("colours: the palette of the mask files")
    return labels


def _is_even(ids: Sequence[int]) -> bool:
    """Whether ids are spread over 0..255 to be seen, as 0, 128, 255 or 0, 85, 170, 255: then 255 is a class, too."""
    last = len(ids) - 1
    return last >= 2 and all(abs(value - IGNORED * at / last) <= 1 for at, value in enumerate(ids)) and ids[1] > 2


def _named(present: Sequence[int], names: Names) -> Labels | None:
    """Labels according to a file of names, or None where it does not fit the ids."""
    given, file = names.names, names.file.name
    notes = [f"class names: {file}"]
    if names.numbered:
        ids = sorted({*given, *present} - names.ignored)
        if unnamed := [str(value) for value in ids if value not in given]:
            notes.append(f"ids that {file} does not name: {first_names(unnamed, 10)}")
        if unseen := [name for value, name in given.items() if value not in present]:
            notes.append(f"{len(unseen)} of {len(given)} names have no pixel: {first_names(unseen, 6)}")
        classes = [given.get(value, f"class_{value}") for value in ids]
        return _with_map(Labels(classes, ids, notes=notes), names.ignored & set(present))
    count, last = len(given), max(present, default=0)
    if last > count or (last == count and (count < 2 or BACKGROUND.fullmatch(given[0]))):
        return None
    if last == count:
        notes.append(f"0 is read as 'ignored': {file} has {count} names, and ids go up to {count}")
        return Labels(list(given.values()), list(range(1, count + 1)), True, notes=notes)
    if last < count - 1:
        notes.append(f"{count} names, but ids only go up to {last}: the last names have no pixel")
    if present and 0 not in present:
        notes.append(f"no mask holds 0, the id of {given[0]}; if ids start at 1: reduce_zero_label: true")
    return Labels(list(given.values()), list(range(count)), notes=notes)


def _unnamed(ids: Sequence[int], present: Sequence[int]) -> Labels:
    if ids == [0, IGNORED]:
        note = "0 and 255 are the only ids: read as two classes, not as a class and 'ignored'"
        return Labels(["class_0", "class_255"], [0, IGNORED], raw_to_train={0: 0, IGNORED: 1}, notes=[note])
    even = _is_even(ids)
    raw_ids = list(ids if even else present)
    labels = Labels([f"class_{value}" for value in raw_ids], raw_ids)
    if even:
        labels.notes.append("the ids are spread evenly over 0..255: 255 is read as a class, not as 'ignored'")
    labels.notes.append("class names are made from the ids: write the real ones")
    if present and present == list(range(1, len(present) + 1)):
        labels.reduce_zero_label = True
        labels.notes.append("ids start at 1, and no mask holds 0: 0 is read as 'ignored' (reduce_zero_label)")
        return labels
    if 0 in present:
        labels.notes.append("0 is read as a class; if it means 'unlabelled', map it to 255 in raw_to_train")
    return _with_map(labels)


def _with_map(labels: Labels, ignored: frozenset[int] = frozenset()) -> Labels:
    """The labels with `raw_to_train`, where the ids are not 0, 1, 2, … or some of them are to be ignored."""
    gaps = labels.raw_ids != list(range(len(labels.raw_ids)))
    if ignored or gaps:
        labels.raw_to_train = {raw: train_id for train_id, raw in enumerate(labels.raw_ids)}
        last = len(labels.raw_ids) - 1
        if gaps:
            labels.notes.append(f"the ids have gaps or do not start at 0: raw_to_train numbers them 0..{last}")
        labels.raw_to_train |= dict.fromkeys(sorted(ignored), IGNORED)
    return labels
