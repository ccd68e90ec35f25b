"""The best and the worst images of an evaluation, kept small while the images pass.

Axes: H×W pixels of an image, h×w pixels of a scene, K classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch import Tensor

from ssaseg.cli.scoring.metrics import image_scores
from ssaseg.datasets.bands.reading import shown

KEPT = 6  # best images, and as many worst ones
SIDE = 400  # longest side of a scene [pixels]


class Scene(NamedTuple):
    """An image, its label and its prediction, so small that a page can hold several."""

    image: np.ndarray  # BGR uint8 (h,w,3)
    label: np.ndarray  # uint8 (h,w), 255 where ignored
    labels: np.ndarray  # uint8 (h,w), predicted

    @classmethod
    def of(cls, image: Tensor, label: Tensor, labels: Tensor) -> "Scene":
        """From a network's input uint8 (·,·,C), and maps uint8 (H,W), on any device."""
        height, width = label.shape
        scale = min(SIDE / max(height, width), 1.0)
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        pixels = cv2.resize(shown(image.cpu().numpy()), size, interpolation=cv2.INTER_AREA)
        maps = (cv2.resize(each.cpu().numpy(), size, interpolation=cv2.INTER_NEAREST) for each in (label, labels))
        return cls(pixels, *maps)


class Entry(NamedTuple):
    """A scene, the number of its image, and the image's mIoU [%]."""

    number: int
    miou: float
    scene: Scene


class Gallery:
    """Keeps the scenes of the best and the worst images; of equal ones the first."""

    def __init__(self) -> None:
        self.best: list[Entry] = []
        self.worst: list[Entry] = []

    def add(self, number: int, row: np.ndarray, scene: Scene) -> None:
        """An image; row: its intersections and unions, int (2,K). An image without a labelled pixel is left out."""
        miou = float(image_scores(row[None])["mIoU"][0])
        if not np.isnan(miou):
            self._keep([Entry(number, miou, scene)])

    def _keep(self, entries: Sequence[Entry]) -> None:
        self.best = sorted([*self.best, *entries], key=lambda each: (-each.miou, each.number))[:KEPT]
        self.worst = sorted([*self.worst, *entries], key=lambda each: (each.miou, each.number))[:KEPT]

    def snapshot(self) -> list[Any]:
        """What `merge` needs, of the types that ranks can send."""
        every = {each.number: each for each in (*self.best, *self.worst)}
        return [(each.number, each.miou, tuple(each.scene)) for each in every.values()]

    def merge(self, snapshots: Sequence[list[Any]]) -> None:
        """Replaces the scenes by the best and worst of all ranks."""
        self.best, self.worst = [], []
        for number, miou, maps in (entry for snapshot in snapshots for entry in snapshot):
            self._keep([Entry(number, miou, Scene(*map(np.asarray, maps)))])
