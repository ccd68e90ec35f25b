"""Segmentation scores from one K×K table of counts: IoU, accuracies, Dice, F-score, precision and recall, as
mmsegmentation's, and how far the mIoU would move with other images of the same kind.

Source of the definitions: `mmseg/core/evaluation/metrics.py` of mmsegmentation 0.30; of the frequency-weighted IoU:
Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, section 5. Scores are in percent.

Axes: K classes, H×W pixels, N images, R resamples. In the table rows are labels, columns are predictions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

from ssaseg.datasets import IGNORED

if TYPE_CHECKING:
    import torch


BLOCK = 64  # images whose counts are allocated at once

PRODUCT = 2**21  # numbers of a resampling matrix worked on at once


class Scores(TypedDict):
    """Scores in percent, by mmsegmentation's names. Per class: float64 (K,), NaN where the ratio is 0/0; the means
    leave NaN out.

    A class without a labelled pixel has IoU 0, which counts, where some pixel was predicted as it, and NaN where none
    was. fwIoU weighs each class's IoU by its labelled pixels. Fscore is Dice but for classes that are never predicted,
    or never rightly: Dice calls them 0, it NaN.
    """

    IoU: np.ndarray
    Acc: np.ndarray
    Dice: np.ndarray
    Fscore: np.ndarray
    Precision: np.ndarray
    Recall: np.ndarray
    mIoU: float
    fwIoU: float
    aAcc: float
    mAcc: float
    mDice: float
    mFscore: float
    mPrecision: float
    mRecall: float


class Interval(NamedTuple):
    """What of `resamples` mIoUs [%], each of as many images drawn with replacement, lies in the middle `level` percent.

    It says how the score depends on which images were taken, not on the training's seed. Frames of one video, or crops
    of one scan, are no independent images: for them it is too narrow.
    """

    low: float
    high: float
    level: float
    resamples: int
    seed: int


class Confusion:
    """Counts of (label, prediction) pairs, summed over images: K×K int64, on `device`.

    Of each image 2·K int32 numbers are kept beside (1.2 KB for 150 classes), for `interval`. Nothing is read back from
    a GPU while it counts.
    """

    def __init__(self, num_classes: int, device: "torch.device | str" = "cpu") -> None:
        import torch

        self.num_classes = num_classes
        # The last cell counts pixels that no class can be found for: an error, told as early as the device allows.
        self._counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=device)
        self._images = 0
        self._blocks: list[torch.Tensor] = []  # of int32 (BLOCK,2,K): each image's intersections and unions

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
        counts = torch.zeros_like(self._counts).scatter_add_(0, cell, valid.long())
        self._counts += counts
        self._keep(counts[:-1].view(classes, classes))

    def _keep(self, matrix: "torch.Tensor") -> None:
        """Remembers one image's intersections and unions."""
        import torch

        if self._images == BLOCK * len(self._blocks):
            self._blocks.append(matrix.new_zeros((BLOCK, 2, self.num_classes), dtype=torch.int32))
        row = self._blocks[-1][self._images % BLOCK]
        row[0] = matrix.diagonal()
        row[1] = matrix.sum(dim=0) + matrix.sum(dim=1) - row[0]
        self._images += 1

    @property
    def rows(self) -> np.ndarray:
        """Each image's intersections and unions, int32 (N,2,K); reading them waits for the device."""
        blocks = [block.cpu().numpy() for block in self._blocks]
        none = np.empty((0, 2, self.num_classes), np.int32)
        return np.concatenate([none, *blocks])[: self._images]

    def part(self) -> "tuple[torch.Tensor, np.ndarray]":
        """What `merge` needs of each of several counts: this one's table and rows, on the CPU."""
        return self._counts.cpu(), self.rows

    def merge(self, parts: "Sequence[tuple[torch.Tensor, np.ndarray]]") -> None:
        """Becomes the R `parts` together: part r has counted images r, r+R, …, and no image is added afterwards.

        The images' order, which the interval depends on, is that of one count over all.
        """
        import torch

        self._counts = torch.stack([counts for counts, _ in parts]).sum(dim=0)
        rows = np.empty((sum(len(part) for _, part in parts), 2, self.num_classes), np.int32)
        for first, (_, part) in enumerate(parts):
            rows[first :: len(parts)] = part
        self._images, self._blocks = len(rows), [torch.from_numpy(rows)]

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
        fscore = percent(precision * acc, 50 * (precision + acc))  # 2PR / (P + R), all in percent
        present = labelled > 0
        return {
            "IoU": iou,
            "Acc": acc,
            "Dice": dice,
            "Fscore": fscore,
            "Precision": precision,
            "Recall": acc,
            "mIoU": nan_mean(iou),
            "fwIoU": float(percent(labelled[present] @ iou[present] / 100, labelled.sum())),
            "aAcc": float(percent(hits.sum(), matrix.sum())),
            "mAcc": nan_mean(acc),
            "mDice": nan_mean(dice),
            "mFscore": nan_mean(fscore),
            "mPrecision": nan_mean(precision),
            "mRecall": nan_mean(acc),
        }

    def interval(self, level: float = 95.0, resamples: int = 1000, seed: int = 0) -> Interval | None:
        """Percentile bootstrap of the mIoU over images (Efron, 1979); None of fewer than two images.

        A class that no image of a resample has or predicts is left out of that resample's mean, as always.
        """
        if self._images < 2:
            return None
        means = resampled_miou(self.rows, resamples, np.random.default_rng(seed))
        known = means[~np.isnan(means)]
        if not len(known):
            return None
        low, high = np.percentile(known, [50 - level / 2, 50 + level / 2])
        return Interval(float(low), float(high), level, resamples, seed)

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


def resampled_miou(rows: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """mIoU [%] (R) of resamples with replacement of N images, given their intersections and unions, int (N,2,K).

    Sums over a resample are a product of how often it has each image with the images' counts: exact in float64.
    """
    images = len(rows)
    counts = rows.reshape(images, -1).astype(np.float64)
    means = []
    part = max(PRODUCT // images, 1)
    for first in range(0, resamples, part):
        drawn = rng.integers(images, size=(min(part, resamples - first), images))
        cells = drawn + images * np.arange(len(drawn))[:, None]
        times = np.bincount(cells.ravel(), minlength=drawn.size).reshape(drawn.shape)
        hits, union = (times.astype(np.float64) @ counts).reshape(len(drawn), 2, -1).swapaxes(0, 1)
        present = (union > 0).sum(axis=1)
        iou = percent(hits, np.maximum(union, 1))  # 0 where there is none
        means.append(iou.sum(axis=1) / np.where(present, present, np.nan))
    return np.concatenate(means)


def percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """100 · part / whole in float64; NaN where both are 0."""
    with np.errstate(invalid="ignore"):
        return np.asarray(part, dtype=np.float64) / np.asarray(whole, dtype=np.float64) * 100


def nan_mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN, without NumPy's warning, where all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
