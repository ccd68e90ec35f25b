"""Scores of one confusion matrix under the named protocols of several tools, side by side.

All of them leave out pixels whose label is ignored. They differ in what a class without labelled pixels counts, and in
whether counts are first summed over images. Sources: mmsegmentation 1.2.2, `mmseg/evaluation/metrics/iou_metric.py`;
cityscapesScripts, `evaluation/evalPixelLevelSemanticLabeling.py`; torchmetrics 1.9, `classification/jaccard.py` and
`segmentation/mean_iou.py`.

Axes: K classes, N images.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ssaseg.cli.scoring.metrics import nan_mean, percent


@dataclass(frozen=True)
class Scored:
    """What all protocols are computed from.

    matrix: int (K,K+1), labels by predictions; the last column: predicted as no class. rows: intersections and unions
    of each image, int (N,2,K).
    """

    matrix: np.ndarray
    rows: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """Pixels labelled and predicted as each class (K)."""
        return self.matrix.diagonal()

    @property
    def labelled(self) -> np.ndarray:
        """Pixels labelled as each class (K)."""
        return self.matrix.sum(axis=1)

    @property
    def predicted(self) -> np.ndarray:
        """Pixels predicted as each class (K)."""
        return self.matrix[:, :-1].sum(axis=0)

    @property
    def iou(self) -> np.ndarray:
        """IoU [%] of each class (K); NaN for a class that is neither labelled nor predicted."""
        return percent(self.hits, self.labelled + self.predicted - self.hits)

    @property
    def accuracies(self) -> np.ndarray:
        """Share [%] of each class's labelled pixels that are right (K); NaN for a class that is not labelled."""
        return percent(self.hits, self.labelled)

    @property
    def pixel_accuracy(self) -> float:
        """Share [%] of all labelled pixels that are right."""
        return float(percent(self.hits.sum(), self.labelled.sum()))


def protocol_scores(scored: Scored) -> list[dict[str, Any]]:
    """One entry for each protocol: name, mIoU, mAcc, aAcc [%] (None: it has none), counted, what.

    counted: the number of values that the mIoU is the mean of.
    """
    iou, acc = scored.iou, scored.accuracies
    absent = "classes that are not labelled are left out, unless they are predicted"

    def entry(
        name: str, what: str, ious: np.ndarray, accs: np.ndarray | None = None, digits: int = 15
    ) -> dict[str, Any]:
        means = {"mIoU": nan_mean(ious)}
        means |= {"mAcc": nan_mean(accs), "aAcc": scored.pixel_accuracy} if accs is not None else {}
        rounded = {key: None if np.isnan(value) else float(np.round(value, digits)) for key, value in means.items()}
        counted = int((~np.isnan(ious)).sum())
        return {"name": name, "mAcc": None, "aAcc": None, **rounded, "counted": counted, "what": what}

    zeros = np.nan_to_num(iou), np.nan_to_num(acc)
    pairs = percent(scored.rows[:, 0], scored.rows[:, 1]).ravel()
    return [
        entry("ssaseg", absent, iou, acc),
        entry("mmsegmentation", f"IoUMetric: {absent}; rounded to 0.01", iou, acc, 2),
        entry("mmsegmentation nan_to_num=0", "IoUMetric: absent classes count as 0; rounded to 0.01", *zeros, 2),
        entry("Cityscapes", f"averageScoreClasses: {absent}", iou),
        entry("torchmetrics JaccardIndex", f"macro average: {absent}", iou),
        entry("torchmetrics MeanIoU", "mean over all pairs of an image and a class that it has", pairs),
        entry("labelled classes", "classes that are not labelled are left out, also if they are predicted",
              np.where(scored.labelled > 0, iou, np.nan), acc),
    ]  # fmt: skip
