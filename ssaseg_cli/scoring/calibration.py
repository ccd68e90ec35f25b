"""Calibration: whether a network is right as often as its probabilities say.

A pixel's confidence is the probability of its label: the largest softmax, or with several views their largest mean
probability. Pixels are put in bins by their confidence; in a calibrated network, the share of right pixels in a bin is
the mean confidence in it. The expected calibration error (ECE) is the mean over bins of the difference of the two,
weighted by their pixels. Pixels whose label is ignored (255) are left out.

Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2: M = 15 bins of equal width; bin m
is ((m-1)/M, m/M].

Axes: K classes, M bins, H×W pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssaseg.cli.scoring.metrics import percent
from ssaseg.datasets import IGNORED

BINS = 15
# Confidences are summed as whole numbers of 2^-24, the step of float32 below 1: the sum does not depend on the order.
UNIT = 2**24

STATEMENT = (
    f"calibration: expected calibration error over {BINS} bins of equal width of the confidence, the probability of "
    "the predicted class; ignored pixels are left out"
)


class Calibration:
    """Numbers of pixels in each bin, summed over images. Counting reads nothing back from a GPU."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        # Of each predicted class and bin: pixels, right pixels, and the sum of confidences in units of 1/UNIT.
        self.counts = torch.zeros(3, num_classes, BINS, dtype=torch.int64, device=device)
        self.edges = torch.arange(1, BINS, device=device) / BINS

    def count(self, labels: Tensor, confidence: Tensor, label: Tensor) -> Tensor:
        """One image's numbers, int64 (3,K,M): predicted labels in [0, K), their probabilities float32 in [0, 1], and
        the image's label, all (H,W). Several threads may call it at the same time.
        """
        known = (label != IGNORED).flatten().long()
        cells = labels.flatten().long() * BINS + torch.bucketize(confidence.flatten(), self.edges)
        right = known * (labels == label).flatten()
        sums = known * (confidence.flatten() * UNIT).round().long()
        found = torch.zeros_like(self.counts).flatten(1)
        for total, values in zip(found, (known, right, sums), strict=True):
            total.scatter_add_(0, cells, values)
        return found.view_as(self.counts)

    def figures(self, classes: Sequence[str]) -> dict[str, Any]:
        """What a report has of it, in percent; None where there is no pixel.

        ECE; confidence: mean; accuracy: share of right pixels; bins: the same of each bin; classes: the same of the
        pixels that are predicted as a class, with the ECE of these alone.
        """
        counts = self.counts.cpu().numpy()
        whole = counts.sum(axis=1)
        edges = np.linspace(0, 100, BINS + 1)
        return {
            "ECE": expected_error(whole),
            **_shares(whole.sum(axis=1)),
            "bins": [
                {"from": float(low), "to": float(high), **_shares(each)}
                for low, high, each in zip(edges, edges[1:], whole.T, strict=False)
            ],
            "classes": [
                {"name": name, "ECE": expected_error(each), **_shares(each.sum(axis=1))}
                for name, each in zip(classes, counts.swapaxes(0, 1), strict=True)
            ],
        }


def expected_error(counts: np.ndarray) -> float | None:
    """The ECE [%] of pixels, right pixels and sums of confidences, int (3,M); None without a pixel."""
    pixels, right, sums = counts
    return float(percent(np.abs(right - sums / UNIT).sum(), pixels.sum())) if pixels.any() else None


def _shares(counts: np.ndarray) -> dict[str, Any]:
    """Pixels, mean confidence [%] and share of right pixels [%], from int (3,)."""
    pixels, right, sums = (int(each) for each in counts)
    shares = {"confidence": sums / UNIT, "accuracy": right}
    return {"pixels": pixels, **{key: 100 * each / pixels if pixels else None for key, each in shares.items()}}
