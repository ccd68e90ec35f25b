"""Where a network contradicts labels with confidence: what is kept of one image, and which images are most suspicious.

A pixel contradicts its label if another class is more probable; its weight is by how much. The weights are summed for
each pair (class of the label, predicted class). A pair counts more the less often the network confuses its classes in
the whole set, because errors of the network come in the same pairs again and again, and errors of labels do not. The
idea that the network's own confusions tell errors of labels from its errors is that of "Confident Learning" (Northcutt
et al., JAIR 2021); the score is ours.

Axes: K classes, H×W pixels, P = K·K pairs, in the order label · K + predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

from ssaseg.datasets import IGNORED

FEW = 1e-3  # share of an image that is added to the mean weight of a pair, so that rare pairs do not count too much
RAREST = 1e-6  # least rate of a confusion that is told from another


class Region(NamedTuple):
    """The largest part of an image with one pair of classes."""

    box: tuple[int, int, int, int]  # x, y, width, height [pixels]
    pixels: int


class Contradictions(NamedTuple):
    """What is kept of one image: a few numbers for each pair that occurs."""

    pairs: np.ndarray  # int32 (p,) the pairs that occur, ascending
    weights: np.ndarray  # float32 (p,) sums of the pixels' weights, as shares of the labelled pixels
    pixels: np.ndarray  # int64 (P,) only for sums: labelled pixels of each pair, right ones too


class Suspect(NamedTuple):
    """An image with its score, and the pair of classes that the score is of."""

    image: int  # its index
    score: float
    label: int
    predicted: int
    share: float  # of the labelled pixels, weighted


@dataclass
class Suspicion:
    """Of all images seen so far. Memory: about 8 bytes for each image and pair that occurs in it."""

    classes: int
    images: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # pairs and weights
    pixels: np.ndarray = field(init=False)  # (P,) of all images
    total: np.ndarray = field(init=False)  # (P,) weights of all images

    def __post_init__(self) -> None:
        self.pixels = np.zeros(self.classes**2, np.int64)
        self.total = np.zeros(self.classes**2)

    def add(self, found: Contradictions) -> None:
        """Adds an image."""
        self.images.append((found.pairs, found.weights))
        self.pixels += found.pixels
        self.total[found.pairs] += found.weights

    def rank(self) -> list[Suspect]:
        """All images with a contradiction, the most suspicious first; equal scores in the order of the images."""
        matrix = self.pixels.reshape(self.classes, self.classes)
        rates = (matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)).ravel()
        surprise = -np.log(np.maximum(rates, RAREST))
        usual = np.sqrt(self.total / max(len(self.images), 1) + FEW)
        found = []
        for index, (pairs, weights) in enumerate(self.images):
            if not len(pairs):
                continue
            scores = weights * surprise[pairs] / usual[pairs]
            at = int(scores.argmax())
            label, predicted = divmod(int(pairs[at]), self.classes)
            found.append(Suspect(index, float(scores[at]), label, predicted, float(weights[at])))
        return sorted(found, key=lambda suspect: -suspect.score)


def contradictions(probabilities: np.ndarray, labels: np.ndarray) -> Contradictions:
    """Of one image: probabilities (K,H,W), labels uint8 (H,W) in [0, K) or 255 = ignored."""
    classes = len(probabilities)
    known = labels != IGNORED
    truth = labels[known].astype(np.int64)
    rows = probabilities[:, known]  # (K,n)
    predicted = rows.argmax(axis=0)
    columns = np.arange(len(truth))
    weights = rows[predicted, columns].astype(np.float32) - rows[truth, columns]
    codes = truth * classes + predicted
    sums = np.bincount(codes, weights=weights, minlength=classes**2) / max(len(truth), 1)
    pairs = np.flatnonzero(sums > 0).astype(np.int32)
    return Contradictions(pairs, sums[pairs].astype(np.float32), np.bincount(codes, minlength=classes**2))


def largest_region(prediction: np.ndarray, labels: np.ndarray, label: int, predicted: int) -> Region | None:
    """The largest connected region of a pair of classes; None if it does not occur. Both maps uint8 (H,W)."""
    pixels = ((labels == label) & (prediction == predicted)).astype(np.uint8)
    _, _, statistics, _ = cv2.connectedComponentsWithStats(pixels, connectivity=8)
    if len(statistics) < 2:
        return None
    x, y, width, height, count = statistics[1 + statistics[1:, cv2.CC_STAT_AREA].argmax()].tolist()
    return Region((x, y, width, height), count)


def share_found(ranking: Sequence[Suspect], wrong: Sequence[int], images: int, part: float) -> float:
    """The share of the images `wrong` that are in the first `part` of a ranking of so many images."""
    first = {suspect.image for suspect in ranking[: round(part * images)]}
    return len(first & {*wrong}) / max(len(wrong), 1)
