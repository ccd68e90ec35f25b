"""Scores of suspicious labels, and the choice of images to label, on arrays."""

import numpy as np
import pytest

from ssaseg.cli.curation.choosing import Description, choose, describe, distances
from ssaseg.cli.curation.contradictions import Suspicion, contradictions, largest_region, share_found

K, SIDE = 4, 24


def sure_of(labels: np.ndarray, probability: float = 0.9) -> np.ndarray:
    """Probabilities (K,H,W): `probability` for the class of each pixel, the others share the rest."""
    rows = np.full((K, *labels.shape), (1 - probability) / (K - 1), np.float16)
    np.put_along_axis(rows, labels[None].astype(np.int64), np.float16(probability), axis=0)
    return rows


def scenes(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, K, (4, 4)).repeat(6, 0).repeat(6, 1).astype(np.uint8) for _ in range(count)]


def test_weights_are_differences_of_probabilities_over_labelled_pixels() -> None:
    truth = np.zeros((SIDE, SIDE), np.uint8)
    labels = truth.copy()
    labels[:6] = 1
    labels[-12:] = 255
    found = contradictions(sure_of(truth), labels)
    assert found.pairs.tolist() == [1 * K + 0]
    assert found.weights[0] == pytest.approx((0.9 - 0.1 / 3) * 6 / 12, rel=1e-3)
    assert found.pixels[1 * K] == 6 * SIDE
    assert found.pixels[0] == 6 * SIDE
    assert found.pixels.sum() == 12 * SIDE


def test_rare_contradictions_come_before_usual_ones() -> None:
    # In every image the network takes the upper rows, labelled 2, for 3: its own error. In one, labels are wrong.
    suspicion = Suspicion(K)
    for index, truth in enumerate(scenes(12)):
        labels = truth.copy()
        labels[:8] = 2
        seen = labels.copy()
        seen[:8] = 3
        if index == 7:
            labels[16:20, 4:12] = 1 - np.minimum(seen[16:20, 4:12], 1)  # fewer pixels than the usual error
        suspicion.add(contradictions(sure_of(seen), labels))
    ranking = suspicion.rank()
    assert ranking[0].image == 7
    assert ranking[0].label in (0, 1)
    assert share_found(ranking, [7], 12, 1 / 12) == 1
    assert share_found(ranking, [ranking[-1].image], 12, 0.5) == 0


def test_nothing_to_rank() -> None:
    suspicion = Suspicion(K)
    labels = scenes(1)[0]
    suspicion.add(contradictions(sure_of(labels), labels))
    suspicion.add(contradictions(sure_of(labels), np.full_like(labels, 255)))
    assert suspicion.rank() == []
    assert Suspicion(K).rank() == []


def test_the_largest_region_of_a_pair() -> None:
    labels, seen = np.zeros((2, SIDE, SIDE), np.uint8)
    seen[2:4, 3:5] = 1
    seen[10:14, 6:16] = 1
    assert largest_region(seen, labels, 0, 1) == ((6, 10, 10, 4), 40)
    assert largest_region(seen, labels, 1, 0) is None


def test_the_unsure_and_the_different_are_chosen() -> None:
    a, b = (np.full((SIDE, SIDE), label, np.uint8) for label in (0, 1))
    images = [sure_of(a, 0.5), sure_of(a, 0.49), sure_of(b, 0.6), sure_of(a, 0.99)]
    found = [describe(each) for each in images]
    assert choose(found, 2) == [1, 2]  # not 0, which is as unsure as 1 but the same
    assert choose(found, 2, [found[1]]) == [2, 3]  # of what is like 1 nothing more is needed
    assert sorted(choose(found, 9)) == [0, 1, 2, 3]
    assert choose([], 3) == []


def test_descriptions_are_distributions() -> None:
    found = describe(sure_of(scenes(1)[0]))
    assert (found.shares**2).sum() == pytest.approx(1, abs=1e-3)
    assert found.uncertainty == pytest.approx(1 - (0.9 - 0.1 / 3), abs=1e-3)
    other = Description(0.0, np.roll(found.shares, K))
    assert distances(found.shares[None], found.shares)[0] == pytest.approx(0, abs=0.03)
    assert 0 < distances(found.shares[None], other.shares)[0] <= 1
