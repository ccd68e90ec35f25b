"""Conventions of annotation tools, in the order in which they are tried."""

from __future__ import annotations

from ssaseg.datasets.conventions.base import Convention, Tree
from ssaseg.datasets.conventions.binary import BINARY
from ssaseg.datasets.conventions.colours import COLOURS
from ssaseg.datasets.conventions.cvat import CVAT
from ssaseg.datasets.conventions.grey import GREY
from ssaseg.datasets.conventions.kitti import KITTI
from ssaseg.datasets.conventions.labelme import LABELME
from ssaseg.datasets.conventions.layers import LAYERS
from ssaseg.datasets.conventions.panoptic import PANOPTIC
from ssaseg.datasets.conventions.supervisely import SUPERVISELY
from ssaseg.datasets.conventions.via import VIA
from ssaseg.datasets.conventions.yolo import YOLO

# A convention whose files prove more comes before one that would accept the same folder.
CONVENTIONS: tuple[Convention, ...] = (
    PANOPTIC,
    SUPERVISELY,
    LABELME,
    VIA,
    CVAT,
    KITTI,
    YOLO,
    LAYERS,
    COLOURS,
    BINARY,
    GREY,
)


def recognise(tree: Tree) -> tuple[Convention, str] | None:
    """The first convention that a folder has, and what shows it; None where it has none."""
    for convention in CONVENTIONS:
        if seen := convention.recognise(tree):
            return convention, seen
    return None
