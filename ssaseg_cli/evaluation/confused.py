"""Which classes a model confuses: the most confused pairs of a confusion matrix, as data and as a line of text.

Axes: K classes; in the matrix (K,K) rows are labels, columns are predictions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssaseg.cli.scoring.metrics import percent

PAIRS = 20  # in the picture and in the file


def confused_pairs(matrix: np.ndarray, classes: Sequence[str], most: int = PAIRS) -> list[dict[str, Any]]:
    """The pairs (true class, predicted class) with the largest share [%] of the true class's pixels.

    Sorted by share, since each class has the same weight in the mIoU, large or small; pairs with equal shares are
    sorted by number of pixels. Keys: true, predicted (names), share [%], pixels. matrix: int (K,K).
    """
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    shares = np.nan_to_num(percent(wrong, matrix.sum(axis=1, keepdims=True)))
    order = np.lexsort((-wrong.ravel(), -shares.ravel()))[:most]
    pairs = [divmod(int(cell), len(classes)) for cell in order if wrong.ravel()[cell]]
    return [
        {"true": classes[t], "predicted": classes[p], "share": float(shares[t, p]), "pixels": int(wrong[t, p])}
        for t, p in pairs
    ]


def most_confused(pairs: Sequence[Mapping[str, Any]], most: int = 3) -> str:
    """The first `most` pairs as one line of text."""
    texts = [f"{p['true']} → {p['predicted']} {p['share']:.1f} % ({p['pixels']:,} pixels)" for p in pairs[:most]]
    return "most confused: " + ("; ".join(texts) if texts else "none, no pixel is wrong")
