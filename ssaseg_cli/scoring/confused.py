"""Which classes a model takes for which: the most confused pairs of a table of counts, as figures, lines and bars.

Axes: K classes; in the table (K,K) rows are labels, columns are predictions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssaseg.cli.scoring.metrics import percent

PAIRS = 20  # in picture and file


def confused_pairs(matrix: np.ndarray, classes: Sequence[str], most: int = PAIRS) -> list[dict[str, Any]]:
    """The pairs with the largest share [%] of a true class's pixels that were predicted as another class.

    By share, as every class weighs the same in the mIoU, however small it is; pairs with one share by their pixels.
    Keys: true, predicted (names), share [%], pixels. matrix: int (K,K).
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
    """The first pairs in one line for people."""
    words = [f"{p['true']} → {p['predicted']} {p['share']:.1f} % ({p['pixels']:,} pixels)" for p in pairs[:most]]
    return "most confused: " + ("; ".join(words) if words else "none, no pixel is wrong")
