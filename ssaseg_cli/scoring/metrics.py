"""Segmentation scores from a K×K confusion matrix: IoU, accuracies, Dice, F-score, precision and recall.

They are mmsegmentation's scores, from `mmseg/core/evaluation/metrics.py` of mmsegmentation 0.30. In addition: the
frequency-weighted IoU (Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, section 5),
and an interval that says how much the mIoU varies with the choice of images. All scores are in percent.

Axes: K classes, H×W pixels, N images, R resamples. In the matrix rows are labels, columns are predictions.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

from ssaseg.datasets import IGNORED

if TYPE_CHECKING:
    import torch


BLOCK = 64  # number of images whose counts are allocated together

PRODUCT = 2**21  # entries of a resampling matrix that are computed together


class Scores(TypedDict):
    """Scores in percent, with mmsegmentation's names. Per class: float64 (K,), NaN if the ratio is 0/0.

    The means ignore NaN. A class without labelled pixels has IoU 0 if some pixel was predicted as this class; the 0
    counts in the mean. If no pixel was, its IoU is NaN. fwIoU weights the IoU of each class by its labelled pixels.
    Fscore equals Dice, except for classes that are never predicted, or never correctly: Dice is 0, Fscore NaN.
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
    """Range [%] of the middle `level` percent of `resamples` mIoUs, each over N images drawn with replacement.

    It says how the score depends on the choice of images; it says nothing about the training's seed. Frames of one
    video, or crops of one scan, are not independent images: for them the interval is too narrow.
    """

    low: float
    high: float
    level: float
    resamples: int
    seed: int


class Confusion:
    """A confusion matrix: counts of (label, prediction) pairs, summed over images: K×K int64, on `device`.

    For `interval` it also keeps 2·K int32 numbers of each image (1.2 KB for 150 classes). Counting reads nothing back
    from a GPU.
    """

    def __init__(self, num_classes: int, device: "torch.device | str" = "cpu") -> None:
        import torch

        self.num_classes = num_classes
        # The last cell counts pixels with an invalid class: an error, raised as early as the device allows.
        self._counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=device)
        self._images = 0
        self._blocks: list[torch.Tensor] = []  # of int32 (BLOCK,2,K): each image's intersections and unions

    def update(self, prediction: "np.ndarray | torch.Tensor", label: "np.ndarray | torch.Tensor") -> None:
        """Add one image: `count`, then `add`."""
        self.add(self.count(prediction, label))

    def count(self, prediction: "np.ndarray | torch.Tensor", label: "np.ndarray | torch.Tensor") -> "torch.Tensor":
        """What `add` takes of one image, int64 (K·K+1): prediction and label (H,W), integers in [0, K); pixels with
        label 255 are ignored. Several threads may call it at the same time.

        Raises ValueError if the two maps differ in size, and for a class out of range: immediately if this matrix is on
        the CPU, otherwise when `matrix` is read. mmsegmentation drops such labels from one count and keeps them in
        another.
        """
        import torch

        prediction, label = torch.as_tensor(prediction), torch.as_tensor(label)
        if prediction.shape != label.shape:
            raise ValueError(f"a prediction of {tuple(prediction.shape)} for a label of {tuple(label.shape)} (H, W)")
        device, classes = self._counts.device, self.num_classes
        if device.type == "cpu":
            return torch.from_numpy(self._count_pairs(prediction.cpu().numpy(), label.cpu().numpy()))
        prediction, label = (t.to(device, non_blocking=True).flatten().long() for t in (prediction, label))
        known = (label >= 0) & (label < classes) & (prediction >= 0) & (prediction < classes)
        cell = torch.where(known, label * classes + prediction, classes**2)
        return torch.zeros_like(self._counts).scatter_add_(0, cell, (label != IGNORED).long())

    def _count_pairs(self, prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
        """One image's counts, int64 (K·K+1), by OpenCV, in a tenth of the time of an index for each pixel."""
        classes = self.num_classes
        small = [each.astype(np.uint8, copy=False) for each in (label, prediction)]
        pairs = count_pairs(*small)
        inside = pairs[:classes, :classes]
        exact = all(each.dtype == np.uint8 for each in (label, prediction)) or (
            (small[0] == label).all() and (small[1] == prediction)[label != IGNORED].all()
        )
        if not exact or inside.sum() + pairs[IGNORED].sum() != label.size:
            valid = label != IGNORED
            raise _out_of_range(label[valid], prediction[valid], classes)
        return np.append(inside.ravel(), 0)

    def add(self, counts: "torch.Tensor") -> None:
        """Add what `count` returned of one image. The order of the images decides the interval."""
        self._counts += counts
        self._keep(counts[:-1].view(self.num_classes, self.num_classes))

    def _keep(self, matrix: "torch.Tensor") -> None:
        """Stores the intersections and unions of one image, given its matrix (K,K)."""
        import torch

        if self._images == BLOCK * len(self._blocks):
            self._blocks.append(matrix.new_zeros((BLOCK, 2, self.num_classes), dtype=torch.int32))
        row = self._blocks[-1][self._images % BLOCK]
        row[0] = matrix.diagonal()
        row[1] = matrix.sum(dim=0) + matrix.sum(dim=1) - row[0]
        self._images += 1

    @property
    def last_row(self) -> np.ndarray:
        """Intersections and unions of the image that was added last, int32 (2,K); waits for the device."""
        return self._blocks[-1][(self._images - 1) % BLOCK].cpu().numpy()

    @property
    def rows(self) -> np.ndarray:
        """Each image's intersections and unions, int32 (N,2,K); reading them waits for the device."""
        blocks = [block.cpu().numpy() for block in self._blocks]
        none = np.empty((0, 2, self.num_classes), np.int32)
        return np.concatenate([none, *blocks])[: self._images]

    def snapshot(self) -> "tuple[torch.Tensor, np.ndarray]":
        """What `merge` needs: the counts and the rows, on the CPU."""
        return self._counts.cpu(), self.rows

    def merge(
        self, snapshots: "Sequence[tuple[torch.Tensor, np.ndarray]]", places: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Replaces the counts by the sum of R snapshots. places: numbers of the images that each has counted; without
        them, snapshot r has counted images r, r+R, …

        The images are then in the same order as in a single count, since the interval depends on their order. No image
        may be added afterwards.
        """
        import torch

        total = sum(len(rows) for _, rows in snapshots)
        places = places or [range(first, total, len(snapshots)) for first in range(len(snapshots))]
        self._counts = torch.stack([counts for counts, _ in snapshots]).sum(dim=0)
        rows = np.empty((total, 2, self.num_classes), np.int32)
        for place, (_, each) in zip(places, snapshots, strict=True):
            rows[np.asarray(place, np.intp)] = each
        self._images, self._blocks = len(rows), [torch.from_numpy(rows)]

    @property
    def matrix(self) -> np.ndarray:
        """Pixels by label (row) and prediction (column), int64 (K,K). Raises ValueError as `update`."""
        counts = self._counts.cpu().numpy()
        if counts[-1]:
            expected = f"expected 0..{self.num_classes - 1}, or the label {IGNORED} (ignored)"
            raise ValueError(f"{counts[-1]} pixels whose label or prediction is not a class\n{expected}")
        return counts[:-1].reshape(self.num_classes, self.num_classes)

    def scores(self) -> Scores:
        """All scores [%] of the images counted so far."""
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
        """Percentile bootstrap of the mIoU over images (Efron, 1979); None with fewer than two images.

        The mean of a resample ignores classes that none of its images contains or predicts, as every mIoU does.
        """
        if self._images < 2:
            return None
        return middle(resampled_miou(self.rows, resamples, np.random.default_rng(seed)), level, resamples, seed)

    def majority_miou(self) -> float:
        """The mIoU [%] of predicting the most common class everywhere. A model that has learnt something exceeds it."""
        labelled = self.matrix.sum(axis=1)
        if not labelled.sum():
            return float("nan")
        return float(percent(labelled.max(), labelled.sum())) / int((labelled > 0).sum())


def image_scores(rows: np.ndarray) -> dict[str, np.ndarray]:
    """mIoU and aAcc [%] of each image, float64 (N) each, given their intersections and unions, int (N,2,K).

    The mean of an image is over the classes that it has or that are predicted in it. NaN without a labelled pixel.
    """
    hits, union = rows.astype(np.int64).swapaxes(0, 1)
    iou = percent(hits, union)
    present = (union > 0).sum(axis=1)
    # Each class's union is labelled + predicted - hits, and each pixel is labelled once and predicted once.
    pixels = (union.sum(axis=1) + hits.sum(axis=1)) / 2
    return {"mIoU": percent(np.nansum(iou, axis=1) / 100, present), "aAcc": percent(hits.sum(axis=1), pixels)}


def class_intervals(rows: np.ndarray, level: float = 95.0, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """As `Confusion.interval` of each class's IoU: lower and upper bounds [%], float64 (K,2); NaN where no image has
    the class, or with fewer than two images. Resamples without the class are left out.
    """
    bounds = np.full((rows.shape[2], 2), np.nan)
    if len(rows) < 2:
        return bounds
    found = list(resampled_iou(rows, resamples, np.random.default_rng(seed)))
    iou, present = (np.concatenate(each) for each in zip(*found, strict=True))
    for index in np.flatnonzero(present.any(axis=0)):
        bounds[index] = np.percentile(iou[present[:, index], index], [50 - level / 2, 50 + level / 2])
    return bounds


def difference_interval(
    first: Confusion, second: Confusion, level: float = 95.0, resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """The same as `Confusion.interval` for the difference `second` - `first` of two mIoUs [points] on the same images.

    It is paired: each resample has the same images for both, so that what makes an image hard for both does not widen
    the interval. Both must have counted the images in the same order; raises ValueError if their numbers differ.
    """
    rows = first.rows, second.rows
    if len(rows[0]) != len(rows[1]):
        raise ValueError(f"{len(rows[0])} and {len(rows[1])} images; expected the same images in both")
    if len(rows[0]) < 2:
        return None
    before, after = (resampled_miou(each, resamples, np.random.default_rng(seed)) for each in rows)
    return middle(after - before, level, resamples, seed)


def middle(means: np.ndarray, level: float, resamples: int, seed: int) -> Interval | None:
    """The interval of the resampled values `means` (R) that are not NaN; None without any."""
    known = means[~np.isnan(means)]
    if not len(known):
        return None
    low, high = np.percentile(known, [50 - level / 2, 50 + level / 2])
    return Interval(float(low), float(high), level, resamples, seed)


def count_pairs(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """How many pixels have each pair of numbers; two maps uint8 (H,W) → int64 (256,256)."""
    import cv2

    total = np.zeros((256, 256), np.int64)
    rows = max(2**24 // label.shape[1], 1)  # OpenCV counts in float32, which is exact up to 2^24
    for top in range(0, label.shape[0], rows):
        stripe = [np.ascontiguousarray(each[top : top + rows]) for each in (label, prediction)]
        total += cv2.calcHist(stripe, [0, 1], None, [256, 256], [0, 256, 0, 256]).astype(np.int64)
    return total


def _out_of_range(label: np.ndarray, prediction: np.ndarray, classes: int) -> ValueError:
    for kind, ids in (("label", label), ("prediction", prediction)):
        wrong = ids[(ids < 0) | (ids >= classes)]
        if len(wrong):
            found = f"{kind} {int(wrong[0])} in {int((wrong == wrong[0]).sum())} pixels"
            break
    return ValueError(f"{found}\nexpected 0..{classes - 1}, or the label {IGNORED} (ignored)")


def resampled_iou(
    rows: np.ndarray, resamples: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """IoU [%] of resamples with replacement of N images, given their intersections and unions, int (N,2,K).

    Yields pairs: float64 (r,K), 0 for a class that a resample does not have, and bool (r,K): whether it has the class.
    The sums over a resample are a matrix product: how often it has each image, times the counts of the images. This is
    exact in float64.
    """
    images = len(rows)
    counts = rows.reshape(images, -1).astype(np.float64)
    chunk = max(PRODUCT // images, 1)
    for first in range(0, resamples, chunk):
        drawn = rng.integers(images, size=(min(chunk, resamples - first), images))
        cells = drawn + images * np.arange(len(drawn))[:, None]
        times = np.bincount(cells.ravel(), minlength=drawn.size).reshape(drawn.shape)
        yield iou_of((times.astype(np.float64) @ counts).reshape(len(drawn), 2, -1))


def iou_of(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU [%] (r,K), 0 for a class whose union is 0, and whether it is not; sums: intersections, unions (r,2,K)."""
    hits, union = sums.swapaxes(0, 1)
    return percent(hits, np.maximum(union, 1)), union > 0


def mean_iou(iou: np.ndarray, present: np.ndarray) -> np.ndarray:
    """mIoU [%] (r) of what `iou_of` returned: the mean over the classes that are present; NaN without any."""
    count = present.sum(axis=1)
    return iou.sum(axis=1) / np.where(count, count, np.nan)


def resampled_miou(rows: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """mIoU [%] (R) of what `resampled_iou` yields."""
    return np.concatenate([mean_iou(*each) for each in resampled_iou(rows, resamples, rng)])


def percent(count: np.ndarray, total: np.ndarray) -> np.ndarray:
    """100 · count / total in float64; NaN where both are 0."""
    with np.errstate(invalid="ignore"):
        return np.asarray(count, dtype=np.float64) / np.asarray(total, dtype=np.float64) * 100


def nan_mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; if all are NaN: NaN, without NumPy's warning."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
