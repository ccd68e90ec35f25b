"""COCO-format annotations for `ssaseg data init` and `check`: read as training does, and described for a recipe."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np

from ssaseg.cli.data.reading import read_through
from ssaseg.cli.data.recipe_text import OwnData
from ssaseg.datasets import DataError, Dataset
from ssaseg.datasets.base import IGNORED
from ssaseg.datasets.check import Findings
from ssaseg.datasets.classnames import Labels
from ssaseg.datasets.coco import UNCOVERED, CocoDataset
from ssaseg.datasets.conventions.base import Tree
from ssaseg.datasets.conventions.coco import FoundCoco, coco_files, find_coco
from ssaseg.datasets.survey import Found, find_folders, require_prepared

BACKGROUND = "background"


def look_at_coco(root: Path) -> OwnData | None:
    """Reads all images and annotations of a folder with COCO-format annotations, with progress on stderr.

    None where there are none, and where there are masks too: those are read. The class `background` is added, and
    `data.background` set to it, where 1 % of the pixels or more are in no region, or there is only one category. Raises
    DataError where the annotations cannot be used.
    """
    if not root.is_dir():
        return None
    require_prepared(root)
    tree = Tree(root)
    if not coco_files(tree):
        return None
    with contextlib.suppress(DataError):
        find_folders(root)
        return None
    coco = find_coco(tree)
    if coco is None:
        return None
    coco.background = coco.background or BACKGROUND
    added = [] if coco.background in coco.classes else [coco.background]
    classes = [*added, *coco.classes]
    pairs = _datasets(root, coco, classes)
    per_split = {split: read_through(each, f"read {split}") for split, each in pairs.items()}
    findings = reduce(Findings.joined, per_split.values())
    if not findings.pixels.any():
        raise DataError(findings.messages("error")[0])
    share = findings.pixels[classes.index(coco.background)] / findings.pixels.sum()
    if added and share < UNCOVERED and len(coco.classes) > 1:
        coco.notes.append(f"{share:.2%} of pixels are in no region: ignored; `data.background` makes them a class")
        classes, coco.background = coco.classes, None
        pairs = _datasets(root, coco, classes)
        per_split = {split: _first_ignored(each) for split, each in per_split.items()}
        findings = reduce(Findings.joined, per_split.values())
    elif added:
        coco.notes.append(
            f"{share:.0%} of pixels are in no region: class {BACKGROUND}, by data.background; without this key and "
            "this class they are ignored"
        )
    else:
        coco.notes.append(f"pixels in no region join the category {coco.background}, by data.background")
    found = Found({split: (place.images, "") for split, place in coco.splits.items()}, "", notes=coco.notes)
    labels = Labels(classes, list(range(len(classes))))
    return OwnData(root, found, pairs, findings, labels, per_split, coco=coco)


def _datasets(root: Path, coco: FoundCoco, classes: list[str]) -> dict[str, Dataset]:
    return {
        split: CocoDataset(
            root / place.images, [root / file for file in place.annotations], classes, background=coco.background
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
