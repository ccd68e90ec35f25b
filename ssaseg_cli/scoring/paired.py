"""Whether two predictions of the same images differ: a permutation test and a paired bootstrap over whole images.

- The statistic is the difference of two mIoUs, or of the IoUs of one class, second minus first [points]. It is computed
  again from the summed counts of each permutation and each resample; it is not a mean over images.
- Permutation test (Fisher, 1935; Pitman, 1937): if the two did not differ, each image's counts could as well be
  swapped. p is the share of the ways to swap that give a difference at least as large, in either direction. All 2^N
  ways are tried where there are at most `SWAPS` of them; else random ways, with (1 + hits) / (1 + ways), which is never
  too small (Phipson and Smyth, 2010).
- Interval: percentile bootstrap (Efron, 1979); each resample has the same images for both.
- Classes: Holm's correction (1979) of the p of all classes that are labelled. The mIoU is not one of them: it is the
  one question that is asked first.
- A difference is "shown" if p is at most 5 % and the 95 % interval does not contain 0. Both must hold, so that there
  are no more false alarms than 5 %.
- The smallest difference that such images can show: the true difference that is found in 80 % of such samples, (1.96 +
  0.84) times the standard error, which is the standard deviation of the bootstrap.

Images that are not independent, such as frames of a video, are grouped to blocks by the caller: a block's counts are
the sums over its images, and it is swapped and drawn as a whole.

Axes: N images or blocks, K classes, R permutations or resamples.
"""

from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from ssaseg.cli.scoring import metrics
from ssaseg.cli.scoring.metrics import Interval, iou_of, mean_iou, middle, resampled_iou

SWAPS = 10_000  # permutations
RESAMPLES = 1_000  # as of the intervals of `ssaseg eval`
LEVEL = 95.0  # percent
POWER = 0.8  # how often the smallest difference is found
TIE = 1e-9  # points: differences that are equal except for rounding


class Difference(NamedTuple):
    """A difference of two scores [points] on the same images."""

    value: float  # second minus first
    interval: Interval | None  # None: no resample has it
    p: float  # of the permutation test
    holm: float | None  # p, corrected for the number of classes; None for the mIoU
    smallest: float | None  # that such images can show; None where it is not known

    @property
    def shown(self) -> bool:
        """Whether the difference is more than chance."""
        found = self.p if self.holm is None else self.holm
        outside = self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)
        return found <= 1 - LEVEL / 100 and outside


class Paired(NamedTuple):
    """What `compare_rows` finds."""

    mean: Difference  # of the mIoU
    classes: list[Difference | None]  # of the IoU of each class; None: has no labelled pixel
    blocks: int  # N
    swaps: int  # permutations tried
    exact: bool  # whether these are all


def compare_rows(first: np.ndarray, second: np.ndarray, labelled: np.ndarray, seed: int = 0) -> Paired:
    """Compares the intersections and unions of N ≥ 2 images or blocks, int (N,2,K), in the same order.

    labelled: bool (K): the classes that have labelled pixels; only these are tested. Raises ValueError if the shapes
    differ or N is less than 2.
    """
    if first.shape != second.shape or len(first) < 2:
        raise ValueError(f"counts {first.shape} and {second.shape}; expected those of the same images, two or more")
    observed, (p, class_p), swaps, exact = _permute(first, second, seed)
    means, classes = _resample(first, second, seed)
    tested = np.flatnonzero(labelled)
    corrected = dict(zip(tested.tolist(), holm(class_p[tested]), strict=True))
    return Paired(
        _difference(observed[0], means, p, None, seed),
        [
            _difference(observed[1][k], classes[:, k], class_p[k], corrected[k], seed) if k in corrected else None
            for k in range(len(labelled))
        ],
        len(first),
        swaps,
        exact,
    )


def _difference(value: float, resampled: np.ndarray, p: float, corrected: float | None, seed: int) -> Difference:
    known = resampled[~np.isnan(resampled)]
    spread = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    normal = NormalDist()
    factor = normal.inv_cdf(0.5 + LEVEL / 200) + normal.inv_cdf(POWER)
    smallest = factor * spread if spread else None
    return Difference(float(value), middle(resampled, LEVEL, RESAMPLES, seed), float(p), corrected, smallest)


def holm(p: Sequence[float] | np.ndarray) -> list[float]:
    """Holm's corrected p of M tests, in the order given: at most 1, and in the order of the p."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.minimum(np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values)))), 1)
    corrected = np.empty_like(values)
    corrected[order] = steps
    return [float(each) for each in corrected]


# ---- permutations ------------------------------------------------------------------------------------------------
def _permute(
    first: np.ndarray, second: np.ndarray, seed: int
) -> tuple[tuple[float, np.ndarray], tuple[float, np.ndarray], int, bool]:
    """The differences of the mIoU and of the IoUs (K), the p of each, the number of permutations, whether all."""
    size, (_, ways, classes) = len(first), first.shape
    before = first.reshape(size, -1).astype(np.float64)
    step = second.reshape(size, -1) - before
    step = step[step.any(axis=1)]  # to swap equal counts changes nothing
    start, total = before.sum(axis=0), 2 * before.sum(axis=0) + step.sum(axis=0)

    def differences(swapped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the mIoU (r) and of the IoUs (r,K); swapped: bool (r,n)."""
        moved = start + swapped.astype(np.float64) @ step
        ours, theirs = (iou_of(sums.reshape(-1, ways, classes)) for sums in (moved, total - moved))
        return mean_iou(*theirs) - mean_iou(*ours), theirs[0] - ours[0]

    means, ious = differences(np.zeros((1, len(step)), bool))
    exact = 2 ** len(step) <= SWAPS
    hits, class_hits, tried = 0, np.zeros(classes, np.int64), 0
    for swapped in _all_ways(len(step)) if exact else _random_ways(len(step), seed):
        mean, each = differences(swapped)
        hits += int((np.abs(mean) >= abs(means[0]) - TIE).sum())
        class_hits += (np.abs(each) >= np.abs(ious[0]) - TIE).sum(axis=0)
        tried += len(swapped)
    one = 0 if exact else 1  # what is observed is one of all ways, and must be added to random ones
    p, class_p = (one + hits) / (one + tried), (one + class_hits) / (one + tried)
    return (float(means[0]), ious[0]), (p, class_p), tried, exact


def _all_ways(size: int) -> Iterator[np.ndarray]:
    numbers = np.arange(2**size)
    yield (numbers[:, None] >> np.arange(size) & 1).astype(bool)


def _random_ways(size: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([seed, 1])  # other numbers than those of the resamples
    chunk = max(metrics.PRODUCT // size, 1)
    for begin in range(0, SWAPS, chunk):
        yield rng.integers(2, size=(min(chunk, SWAPS - begin), size), dtype=np.uint8).astype(bool)


# ---- resamples ---------------------------------------------------------------------------------------------------
def _resample(first: np.ndarray, second: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences of the mIoU (R) and of the IoUs (R,K); NaN for a class that a resample does not have."""
    sides = [resampled_iou(rows, RESAMPLES, np.random.default_rng(seed)) for rows in (first, second)]
    means, classes = [], []
    for ours, theirs in zip(*sides, strict=True):
        means.append(mean_iou(*theirs) - mean_iou(*ours))
        classes.append(np.where(ours[1] & theirs[1], theirs[0] - ours[0], np.nan))
    return np.concatenate(means), np.concatenate(classes)


# ---- neighbours --------------------------------------------------------------------------------------------------
def sum_blocks(rows: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Sums int64 (B,2,K) of the rows (N,2,K) of each block; block: int (N), each in [0, B)."""
    sums = np.zeros((int(block.max()) + 1, *rows.shape[1:]), np.int64)
    np.add.at(sums, block, rows)
    return sums


def neighbour_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """How alike the differences of neighbouring images are, -1..1: near 0 where they are independent, as the test
    assumes. None where it is not defined. first, second: int (N,2,K), in the order of the images.

    It is the correlation of each image's share of the difference of the mIoUs, to first order, with the next image's.
    """
    shares = [_shares(rows.astype(np.float64)) for rows in (first, second)]
    share = shares[1] - shares[0]
    if len(share) < 3 or not share[:-1].std() or not share[1:].std():
        return None
    return float(np.corrcoef(share[:-1], share[1:])[0, 1])


def _shares(rows: np.ndarray) -> np.ndarray:
    """(N): by how much each image moves the mIoU, to first order."""
    hits, union = rows.sum(axis=0)
    present = union > 0
    iou = hits[present] / union[present]
    return ((rows[:, 0, present] - iou * rows[:, 1, present]) / union[present]).mean(axis=1)
