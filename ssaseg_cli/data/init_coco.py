"""COCO-format annotations for `ssaseg data init` and `check`: read as training does, and described for a recipe."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np

from ssaseg.cli.data.reading import look_at, notes_on_images, read_values
from ssaseg.cli.data.recipe_text import OwnData
from ssaseg.datasets import DataError
from ssaseg.datasets.base import IGNORED, Levels
from ssaseg.datasets.check import Findings
from ssaseg.datasets.classnames import Labels
from ssaseg.datasets.coco import UNCOVERED, CocoDataset
from ssaseg.datasets.conventions.base import Tree
from ssaseg.datasets.conventions.coco import FoundCoco, coco_files, find_coco
from ssaseg.datasets.conventions.pictures import ANY
from ssaseg.datasets.pairs import first_names
from ssaseg.datasets.survey import Found, TieError, find_folders, require_prepared
from ssaseg.files.text import printable

BACKGROUND = "background"


def look_at_own(root: Path) -> OwnData:
    """Reads all images and labels of a user's folder, with progress on stderr: COCO-format annotations, or masks.

    Where there are both, masks are read if most of the annotated images have one; a note says what is not used. Raises
    what `look_at` raises, and DataError where the annotations cannot be used.
    """
    if not root.is_dir():
        return look_at(root)
    require_prepared(root)
    tree = Tree(root)
    files = coco_files(tree)
    if not files:
        return look_at(root, tree=tree)
    found = tie = None
    paired: set[str] = set()
    try:
        found = find_folders(root)
        opened = found.datasets(root, ANY).values()
        paired = {file.relative_to(root).as_posix() for each in opened for file in each.image_files}
    except TieError as error:
        tie = error
    except DataError:  # no masks, as usual beside such annotations
        found = None
    unused = f"COCO-format annotations, not used, as there are masks: {first_names([str(file) for file in files])}"
    try:
        coco = find_coco(tree)
    except DataError as error:
        if found is None:
            raise tie or error from None
        reason = printable(str(error).partition("\n")[0])
        return _of_masks(root, found, tree, f"{unused}; they cannot be read: {reason}")
    both = len(coco.images & paired) if coco else 0
    if coco is None or (found and 2 * both >= len(coco.images)):
        return _of_masks(root, found, tree, unused)
    if tie and 2 * tie.pairs >= len(coco.images):
        raise tie
    if paired or tie:
        count = len(paired) or (tie.pairs if tie else 0)
        coco.notes.append(f"masks, not used, as most of the annotated images have none: of {count} images")
    return _of_coco(root, coco)


def _of_masks(root: Path, found: Found | None, tree: Tree, note: str) -> OwnData:
    own = look_at(root, found=found, tree=tree)
    own.notes.append(note)
    return own


def _of_coco(root: Path, coco: FoundCoco) -> OwnData:
    """The class `background` is added, and `data.background` set to it, where 1 % of the pixels or more are in no
    region, or there is only one category. Raises DataError where the annotations cannot be used.
    """
    coco.background = coco.background or BACKGROUND
    added = [] if coco.background in coco.classes else [coco.background]
    classes = [*added, *coco.classes]
    pairs = _datasets(root, coco, classes)
    bands, per_split = read_values(pairs)
    findings = reduce(Findings.joined, per_split.values())
    if not findings.pixels.any():
        raise DataError(findings.messages("error")[0])
    share = findings.pixels[classes.index(coco.background)] / findings.pixels.sum()
    if added and share < UNCOVERED and len(coco.classes) > 1:
        coco.notes.append(f"{share:.2%} of pixels are in no region: ignored; `data.background` makes them a class")
        classes, coco.background = coco.classes, None
        pairs = _datasets(root, coco, classes, bands.channels, findings.headers.fitting)
        per_split = {split: _first_ignored(each) for split, each in per_split.items()}
        findings = reduce(Findings.joined, per_split.values())
    elif added:
        coco.notes.append(
            f"{share:.0%} of pixels are in no region: class {BACKGROUND}, by data.background; without this key and "
            "this class they are ignored"
        )
    else:
        coco.notes.append(f"pixels in no region join the category {coco.background}, by data.background")
    coco.notes += notes_on_images(findings)
    found = Found({split: (place.images, "") for split, place in coco.splits.items()}, "", notes=coco.notes)
    labels = Labels(classes, list(range(len(classes))))
    return OwnData(root, found, dict(pairs), findings, labels, per_split, coco=coco, bands=bands)


def _datasets(
    root: Path, coco: FoundCoco, classes: list[str], channels: int = 3, levels: Levels | None = None
) -> dict[str, CocoDataset]:
    return {
        split: CocoDataset(
            root / place.images,
            [root / file for file in place.annotations],
            classes,
            background=coco.background,
            channels=channels,
            levels=levels,
        )
        for split, place in coco.splits.items()
    }


def _first_ignored(findings: Findings) -> Findings:
    """The findings where class 0 is ignored instead, and the other classes have one id less."""

    def shifted(counts: np.ndarray) -> np.ndarray:
        moved = np.append(counts[1:IGNORED], [0, 0])
        moved[IGNORED] = counts[0] + counts[IGNORED]
        return moved

    pixels, masks, images = map(shifted, (findings.pixels, findings.masks, findings.images))
    return replace(findings, pixels=pixels, masks=masks, images=images)
