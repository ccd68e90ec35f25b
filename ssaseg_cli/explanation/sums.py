"""Sums over images, whose size does not depend on the number of images or pixels.

Axes: K classes, C channels, S classifiers (stages), B bins of distance, H×W pixels. In matrices (K,K) rows are labels.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from ssaseg.cli.explanation.probing import Prototypes, Stage
from ssaseg.cli.scoring.boundary import reach
from ssaseg.datasets import IGNORED

# Bins of the distance to the edge of a mask [pixels]: bin i is from EDGES[i] to below EDGES[i+1]. The last has no end.
EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

# Means over pixels of a mask: the probability of the mask's class; its standardised logit, see `Stage.strength`; and
# the share of pixels that get the mask's label.
QUANTITIES = ("confidence", "strength", "agreement")


class Sums:
    """Sums for classifiers `stages` (names), of which `comparisons` (first, second) are compared.

    A mask is the set of an image's pixels with one label. Its rim are the pixels whose `edge_distance` is at most
    `reach`, the width of boundary IoU's band; the rest is its middle. `known`: the labels are true; otherwise they are
    predictions, and nothing is right or wrong.
    """

    def __init__(
        self, num_classes: int, stages: Sequence[str], comparisons: Sequence[tuple[str, str]], known: bool
    ) -> None:
        K, B = num_classes, len(EDGES)
        self.num_classes, self.stages, self.comparisons, self.known = K, list(stages), list(comparisons), known
        self.images = 0
        # By class, rim or middle (0, 1), and distance: pixels of masks, and sums over them for each classifier.
        self.pixels = np.zeros((K, 2, B), np.int64)
        self.totals = {key: {name: np.zeros((K, 2, B)) for name in stages} for key in QUANTITIES}
        self.confusion = {name: np.zeros((K, K), np.int64) for name in stages}
        # Of each comparison, pixels with another label. (label, what the wrong one of the two classifiers says):
        # fixed: the second is right; broken: the first is.
        self.changed = {pair: np.zeros((), np.int64) for pair in comparisons}
        self.fixed = {pair: np.zeros((K, K), np.int64) for pair in comparisons}
        self.broken = {pair: np.zeros((K, K), np.int64) for pair in comparisons}
        self.prototypes = PrototypeSums(K)

    def add(
        self, stages: Mapping[str, Stage], labels: np.ndarray, distance: np.ndarray, prototypes: Prototypes | None
    ) -> None:
        """Adds an image, or after an error nothing of it; labels uint8 (H,W), 0..K-1, 255: not counted; `distance`:
        `edge_distance` of the labels.
        """
        one = Sums(self.num_classes, self.stages, self.comparisons, self.known)
        one._count(stages, labels, distance, prototypes)
        if one.prototypes.directions is not None and self.prototypes.directions is None:
            self.prototypes.directions = np.zeros_like(one.prototypes.directions)
        for total, more in zip(self._arrays(), one._arrays(), strict=True):
            total += more
        self.images += 1

    def _arrays(self) -> list[np.ndarray]:
        """All that is summed up."""
        found: list[np.ndarray] = [self.pixels, *(each for totals in self.totals.values() for each in totals.values())]
        for name in ("confusion", "changed", "fixed", "broken"):
            found.extend(getattr(self, name).values())
        return found + [each for each in vars(self.prototypes).values() if each is not None]

    def _count(
        self, stages: Mapping[str, Stage], labels: np.ndarray, distance: np.ndarray, prototypes: Prototypes | None
    ) -> None:
        """Counts the pixels of an image."""
        middle = distance > reach(labels.shape)
        cells = middle * len(EDGES) + np.searchsorted(EDGES, distance, side="right") - 1
        for index in present(labels):
            mask = labels == index
            within = cells[mask]
            self.pixels[index] += self._by_cell(within).astype(np.int64)
            for name, stage in stages.items():
                values = (*stage.probability_and_strength(index), stage.labels == index)
                for key, each in zip(QUANTITIES, values, strict=True):
                    self.totals[key][name][index] += self._by_cell(within, each[mask])
            if prototypes is not None:
                self.prototypes.add(prototypes, index, mask)
        valid = labels != IGNORED
        truth = labels[valid].astype(np.int64)
        said = {name: stage.labels[valid] for name, stage in stages.items()}
        for name in stages if self.known else ():
            self.confusion[name] += self._matrix(truth, said[name])
        for pair in self.comparisons:
            first, second = (said[name] for name in pair)
            differs = first != second
            self.changed[pair] += differs.sum()
            if self.known:
                fixed, broken = differs & (second == truth), differs & (first == truth)
                self.fixed[pair] += self._matrix(truth[fixed], first[fixed])
                self.broken[pair] += self._matrix(truth[broken], second[broken])

    @staticmethod
    def _by_cell(cells: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(cells, weights, minlength=2 * len(EDGES)).reshape(2, len(EDGES))

    def _matrix(self, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
        K = self.num_classes
        return np.bincount(labels * K + predictions, minlength=K * K).reshape(K, K)


class PrototypeSums:
    """Sums over the images that a class occurs in."""

    def __init__(self, num_classes: int) -> None:
        self.images = np.zeros(num_classes, np.int64)
        self.cosine = np.zeros(num_classes)  # of the fixed and the adapted semantic prototype
        self.directions: np.ndarray | None = None  # (K,C): of the adapted semantic prototypes, each with length 1
        # Of the mean cosine of the spatial prototype and the spatial feature: inside the class's mask, and outside.
        self.inside, self.outside = np.zeros(num_classes), np.zeros(num_classes)
        self.with_inside = np.zeros(num_classes, np.int64)  # images that have the mean
        self.with_outside = np.zeros(num_classes, np.int64)

    def add(self, prototypes: Prototypes, index: int, mask: np.ndarray) -> None:
        """Adds a class that occurs in an image, with its mask, bool (H,W)."""
        fixed, adapted = (each[index].double().cpu().numpy() for each in (prototypes.fixed, prototypes.semantic))
        direction = adapted / max(np.linalg.norm(adapted), 1e-12)
        if self.directions is None:
            self.directions = np.zeros(tuple(prototypes.fixed.shape))
        self.images[index] += 1
        self.directions[index] += direction
        self.cosine[index] += float(direction @ fixed) / max(float(np.linalg.norm(fixed)), 1e-12)
        gaze = prototypes.gaze(index)
        if gaze is None:
            return
        self.with_inside[index] += 1
        self.inside[index] += gaze[mask].mean(dtype=np.float64)
        if not mask.all():
            self.outside[index] += gaze[~mask].mean(dtype=np.float64)
            self.with_outside[index] += 1


def present(labels: np.ndarray) -> list[int]:
    """The classes that occur in a label map uint8 (H,W), ascending."""
    return [int(index) for index in np.flatnonzero(np.bincount(labels.ravel(), minlength=256)[:IGNORED])]


def edge_distance(labels: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest pixel with another label [pixels], float32 (H,W), at least 1.

    Ignored pixels (255) are another label; their own distance is 1. The image's border is no edge: there the mask is
    cut off. Where the whole image has one label, the distance is larger than any image.
    """
    distance = np.ones(labels.shape, np.float32)
    for index in present(labels):
        mask = labels == index
        inner = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        distance[mask] = inner[mask]
    return distance
