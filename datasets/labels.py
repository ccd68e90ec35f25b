"""Class names, colours and test sizes of published data sets: a foreign checkpoint does not hold them.

`labels.json` holds the values, from mmsegmentation 0.30's `ade.py`, `coco_stuff.py`, `pascal_context.py`,
`cityscapes.py` and `voc.py` (Apache-2.0), and SegNet's 11 classes of CamVid; colours are written as hexadecimal RGB.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ssaseg.datasets.base import DataError


class LabelSpace(NamedTuple):
    """The classes of train ids, and the size of test images; in the form of a checkpoint's metadata."""

    classes: list[str]
    palette: list[list[int]]  # RGB, 0..255
    protocol: dict[str, Any]  # "scale": [w, h] in pixels, or null; "multiple" of pixels, or null


@cache
def _table() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "labels.json").read_text(encoding="utf-8"))


def list_label_spaces() -> list[str]:
    """Names that `label_space` knows."""
    return list(_table())


def label_space(name: str) -> LabelSpace:
    """The labels of a published data set. Raises DataError for an unknown name."""
    if name not in _table():
        raise DataError(f"data set {name!r} is not known\nexpected one of: {', '.join(list_label_spaces())}")
    row = _table()[name]
    return LabelSpace(
        list(row["classes"]), [list(bytes.fromhex(rgb)) for rgb in row["classes"].values()], dict(row["protocol"])
    )
