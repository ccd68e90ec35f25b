"""Segmentation scores from one K×K table of counts: IoU, accuracies, Dice, precision and recall, as mmsegmentation's.

Source of every definition: `mmseg/core/evaluation/metrics.py` of mmsegmentation 0.30. Scores are in percent.

Axes: K classes, H×W pixels. In the table rows are labels, columns are predictions.
"""

from typing import TYPE_CHECKING, TypedDict

import numpy as np

from ssaseg.datasets import IGNORED

if TYPE_CHECKING:
    import torch


class Scores(TypedDict):
    """Scores in percent, by mmsegmentation's names. Per class: float64 (K,), NaN where the ratio is 0/0; the means
    leave NaN out.

    A class without a labelled pixel has IoU 0, which counts, where some pixel was predicted as it, and NaN where none
    was.
    """

    IoU: np.ndarray
    Acc: np.ndarray
    Dice: np.ndarray
    Precision: np.ndarray
    Recall: np.ndarray
    mIoU: float
    aAcc: float
    mAcc: float
    mDice: float
    mPrecision: float
    mRecall: float


class Confusion:
    """Counts of (label, prediction) pairs, summed over images: K×K int64, on `device`.

    Nothing is read back from a GPU while it counts.
    """

    def __init__(self, num_classes: int, device: "torch.device | str" = "cpu") -> None:
        import torch

        self.num_classes = num_classes
        # The last cell counts pixels that no class can be found for: an error, told as early as the device allows.
        self._counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=device)

    def update(self, prediction: "np.ndarray | torch.Tensor", label: "np.ndarray | torch.Tensor") -> None:
        """Add one image: prediction and label (H,W), integers in [0, K); label 255 leaves the pixel out.

        Raises ValueError for maps of two sizes, and for a class out of range: at once where both maps and the table are
        on the CPU, otherwise when `matrix` is read. mmsegmentation drops such labels from one count and keeps them in
        another.
        """
        import torch

        prediction, label = torch.as_tensor(prediction), torch.as_tensor(label)
        if prediction.shape != label.shape:
            raise ValueError(f"a prediction of {tuple(prediction.shape)} for a label of {tuple(label.shape)} (H, W)")
        device, classes = self._counts.device, self.num_classes
        prediction, label = (t.to(device, non_blocking=True).flatten().long() for t in (prediction, label))
        valid = label != IGNORED
        known = (label >= 0) & (label < classes) & (prediction >= 0) & (prediction < classes)
        if device.type == "cpu" and (valid & ~known).any():
            raise _out_of_range(label[valid], prediction[valid], classes)
        cell = torch.where(known, label * classes + prediction, classes**2)
        self._counts.scatter_add_(0, cell, valid.long())

    @property
    def matrix(self) -> np.ndarray:
        """Pixels by label (row) and prediction (column), int64 (K,K). Raises ValueError as `update`."""
        counts = self._counts.cpu().numpy()
        if counts[-1]:
            expected = f"expected 0..{self.num_classes - 1}, or the label {IGNORED} (ignored)"
            raise ValueError(f"{counts[-1]} pixels whose label or prediction is no class\n{expected}")
        return counts[:-1].reshape(self.num_classes, self.num_classes)

    def scores(self) -> Scores:
        """All scores of what was counted so far [%]."""
        matrix = self.matrix
        hits, labelled, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
        iou = percent(hits, labelled + predicted - hits)
        acc, precision = percent(hits, labelled), percent(hits, predicted)
        dice = percent(2 * hits, labelled + predicted)
        return {
            "IoU": iou,
            "Acc": acc,
            "Dice": dice,
            "Precision": precision,
            "Recall": acc,
            "mIoU": nan_mean(iou),
            "aAcc": float(percent(hits.sum(), matrix.sum())),
            "mAcc": nan_mean(acc),
            "mDice": nan_mean(dice),
            "mPrecision": nan_mean(precision),
            "mRecall": nan_mean(acc),
        }

    def majority_miou(self) -> float:
        """The mIoU [%] of predicting the commonest class everywhere: what a model must beat to have learnt anything."""
        labelled = self.matrix.sum(axis=1)
        if not labelled.sum():
            return float("nan")
        return float(percent(labelled.max(), labelled.sum())) / int((labelled > 0).sum())


def _out_of_range(label: "torch.Tensor", prediction: "torch.Tensor", classes: int) -> ValueError:
    for kind, ids in (("label", label), ("prediction", prediction)):
        wrong = ids[(ids < 0) | (ids >= classes)]
        if len(wrong):
            found = f"{kind} {int(wrong[0])} in {int((wrong == wrong[0]).sum())} pixels"
            break
    return ValueError(f"{found}\nexpected 0..{classes - 1}, or the label {IGNORED} (ignored)")


def percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """100 · part / whole in float64; NaN where both are 0."""
    with np.errstate(invalid="ignore"):
        return np.asarray(part, dtype=np.float64) / np.asarray(whole, dtype=np.float64) * 100


def nan_mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN, without NumPy's warning, where all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
