"""The permutation test and the paired bootstrap, against counts that are swapped and scored anew."""

import itertools

import numpy as np
import pytest

from ssaseg.cli.scoring import paired
from ssaseg.cli.scoring.metrics import Confusion, difference_interval
from ssaseg.cli.scoring.paired import compare_rows, holm, neighbour_correlation, sum_blocks

K = 4
ALL = np.ones(K, bool)


def two(images: int, better: float = 0.0, seed: int = 0) -> tuple[Confusion, Confusion, list[np.ndarray]]:
    """Confusion matrices of two predictions of the same images, and of both the matrices of each image (N,K,K)."""
    rng = np.random.default_rng(seed)
    confusions, matrices = (Confusion(K), Confusion(K)), []
    for _ in range(images):
        label = rng.integers(0, K, (6, 7))
        each = []
        for confusion, right in zip(confusions, (0.6, 0.6 + better), strict=True):
            wrong = rng.integers(0, K, label.shape)
            prediction = np.where(rng.random(label.shape) < right, label, wrong)
            confusion.update(prediction, label)
            each.append(np.bincount((label * K + prediction).ravel(), minlength=K * K).reshape(K, K))
        matrices.append(np.stack(each))
    return *confusions, [np.stack(each) for each in zip(*matrices, strict=True)]


def score(matrix: np.ndarray) -> tuple[float, np.ndarray]:
    confusion = Confusion(K)
    confusion._counts[:-1] = confusion._counts.new_tensor(matrix.ravel())
    scores = confusion.scores()
    return scores["mIoU"], scores["IoU"]


def test_p_is_the_share_of_all_swaps() -> None:
    first, second, (ours, theirs) = two(6, better=0.1)
    found = compare_rows(first.rows, second.rows, ALL)
    assert (found.swaps, found.exact, found.blocks) == (2**6, True, 6)
    base, each = (b - a for a, b in zip(score(ours.sum(0)), score(theirs.sum(0)), strict=True))
    hits, class_hits = 0, np.zeros(K)
    for ways in itertools.product([False, True], repeat=6):
        swap = np.array(ways)[:, None, None]
        a, b = (np.where(swap, *pair).sum(axis=0) for pair in ((theirs, ours), (ours, theirs)))
        hits += abs(score(b)[0] - score(a)[0]) >= abs(base) - 1e-9
        class_hits += np.abs(score(b)[1] - score(a)[1]) >= np.abs(each) - 1e-9
    assert found.mean.value == pytest.approx(base)
    assert found.mean.p == pytest.approx(hits / 2**6)
    assert [row.p for row in found.classes if row] == pytest.approx(list(class_hits / 2**6))
    assert [row.value for row in found.classes if row] == pytest.approx(list(each))
    assert [row.holm for row in found.classes if row] == holm(class_hits / 2**6)


def test_random_swaps_are_near_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = two(11, better=0.03)
    exact = compare_rows(first.rows, second.rows, ALL)
    monkeypatch.setattr(paired, "SWAPS", 2000)
    found = compare_rows(first.rows, second.rows, ALL)
    assert (exact.exact, found.exact, found.swaps) == (True, False, 2000)
    assert found.mean.p == pytest.approx(exact.mean.p, abs=0.04)
    assert found.mean.p > 0


def test_the_null_is_called_a_difference_in_at_most_five_of_a_hundred_cases() -> None:
    """Of all ways to swap the images of two sides, each as likely as the others if they do not differ."""
    first, second, _ = two(7, better=0.2)
    p = []
    for ways in itertools.product([False, True], repeat=7):
        swap = np.array(ways)[:, None, None]
        a, b = np.where(swap, second.rows, first.rows), np.where(swap, first.rows, second.rows)
        p.append(paired._permute(a, b, 0)[1][0])
    for level in (0.01, 0.05, 0.2):
        assert np.mean(np.array(p) <= level) <= level
    assert min(p) <= 2 / 2**7


def test_the_interval_is_that_of_eval() -> None:
    first, second, _ = two(30, better=0.05)
    found = compare_rows(first.rows, second.rows, ALL).mean
    assert found.interval == difference_interval(first, second)
    assert found.smallest is not None
    assert found.interval is not None
    # 2.8 standard errors, of which the interval has 3.92.
    assert found.smallest == pytest.approx((found.interval.high - found.interval.low) * 2.8 / 3.92, rel=0.15)


def test_a_large_difference_is_shown_and_none_is_not() -> None:
    first, second, _ = two(30, better=0.3)
    found = compare_rows(first.rows, second.rows, ALL)
    assert found.mean.shown
    assert all(row is not None and row.shown for row in found.classes)
    same = compare_rows(first.rows, first.rows, ALL)
    assert (same.mean.value, same.mean.p, same.mean.shown, same.mean.smallest) == (0, 1, False, None)


def test_classes_without_label_are_not_tested() -> None:
    first, second, _ = two(30, better=0.02)
    some = compare_rows(first.rows, second.rows, np.array([True, False, True, False]))
    assert [row is None for row in some.classes] == [False, True, False, True]
    p = [row.p for row in some.classes if row]
    assert [row.holm for row in some.classes if row] == holm(p), "corrected for two classes, not four"


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1, 1]
    assert holm([]) == []


def test_blocks_are_sums_and_fewer_images() -> None:
    first, second, _ = two(12, better=0.1)
    block = np.array([0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 0, 3])
    rows = sum_blocks(first.rows, block)
    assert rows.shape == (4, 2, K)
    np.testing.assert_array_equal(rows[0], first.rows[[0, 1, 10]].sum(axis=0))
    found = compare_rows(rows, sum_blocks(second.rows, block), ALL)
    assert (found.blocks, found.swaps) == (4, 16)
    assert found.mean.p >= 2 / 16, "no way to swap four blocks is rarer"
    assert found.mean.value == pytest.approx(compare_rows(first.rows, second.rows, ALL).mean.value)
    with pytest.raises(ValueError, match="two or more"):
        compare_rows(rows[:1], rows[:1], ALL)


def test_neighbours_that_are_alike() -> None:
    first, second, _ = two(40, better=0.2)
    half = np.arange(40) < 20
    ours = np.where(half[:, None, None], second.rows, first.rows)
    theirs = np.where(half[:, None, None], first.rows, second.rows)
    alike, apart = neighbour_correlation(ours, theirs), neighbour_correlation(first.rows, second.rows)
    assert alike is not None
    assert apart is not None
    assert alike > 0.4 > abs(apart)
    assert neighbour_correlation(first.rows, first.rows) is None
