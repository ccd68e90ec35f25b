"""Which images to label next: those of which the network is unsure, and which differ from each other.

A greedy choice: the next image has the largest product of its uncertainty and its distance to the nearest image that is
chosen, or labelled, already. Uncertainty: the mean over pixels of 1 - (largest probability - second largest), "margin
sampling" (Scheffer et al. 2001). Distance: the Hellinger distance between the mean probabilities of the classes in the
cells of a grid over the image. With k-centre greedy (Sener and Savarese, ICLR 2018) it shares that only distances to
the nearest chosen image count.

Axes: K classes, H×W pixels, I images, D = CELLS·CELLS·K numbers of a description.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CELLS = 2  # of the grid, along each axis


class Description(NamedTuple):
    """What is kept of one image."""

    uncertainty: float  # 0 to 1
    shares: np.ndarray  # float32 (D,) square roots of the mean probabilities of the cells; their squares sum to 1


def describe(probabilities: np.ndarray) -> Description:
    """Of one image: probabilities (K,H,W)."""
    rows = probabilities.astype(np.float32)
    two = np.partition(rows, -2, axis=0)[-2:] if len(rows) > 1 else np.concatenate([np.zeros_like(rows), rows])
    cells = [
        cell.mean(axis=(1, 2))
        for band in np.array_split(rows, CELLS, axis=1)
        for cell in np.array_split(band, CELLS, 2)
    ]
    return Description(float(1 - (two[1] - two[0]).mean()), np.sqrt(np.concatenate(cells) / len(cells)))


def choose(found: Sequence[Description], count: int, labelled: Sequence[Description] = ()) -> list[int]:
    """Indices of `count` images of `found`, in the order of their choice; fewer if there are not so many.

    labelled: images that have labels already; what resembles them is not needed. Time grows with count·I·D.
    """
    uncertainty = np.array([each.uncertainty for each in found])
    shares = np.stack([each.shares for each in found]) if found else np.zeros((0, 0), np.float32)
    nearest = np.ones(len(found))  # the largest Hellinger distance that there is
    for each in labelled:
        nearest = np.minimum(nearest, distances(shares, each.shares))
    left, chosen = np.ones(len(found), bool), []
    for _ in range(min(count, len(found))):
        index = int(np.where(left, uncertainty * nearest, -1.0).argmax())
        chosen.append(index)
        left[index] = False
        nearest = np.minimum(nearest, distances(shares, shares[index]))
    return chosen


def distances(shares: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Hellinger distances (I,) in [0, 1] of descriptions (I,D) to one (D,)."""
    return np.sqrt(np.clip(1 - shares @ one, 0, 1))
