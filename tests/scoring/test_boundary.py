"""Boundary IoU against OpenCV's erosion, class by class, and against cases done by hand."""

import cv2
import numpy as np
import pytest
import torch

from ssaseg.cli.scoring.boundary import Boundaries, bands, reach

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_band(labels: np.ndarray, category: int, ignored: np.ndarray, d: int) -> np.ndarray:
    """As the authors do it for one mask: zeros around it, d erosions by 3x3. Ignored pixels erode nothing."""
    mask = (labels == category) & ~ignored
    around = cv2.copyMakeBorder((mask | ignored).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(around, np.ones((3, 3), np.uint8), iterations=d)[1:-1, 1:-1]
    return mask & (eroded == 0)


def slow_scores(pairs: list[tuple[np.ndarray, np.ndarray]], num_classes: int) -> np.ndarray:
    both, either = np.zeros((2, num_classes))
    for label, prediction in pairs:
        d = max(round(0.02 * np.sqrt(label.shape[0] ** 2 + label.shape[1] ** 2)), 1)
        for category in range(num_classes):
            ours, theirs = (slow_band(each, category, label == 255, d) for each in (label, prediction))
            both[category] += (ours & theirs).sum()
            either[category] += (ours | theirs).sum()
    with np.errstate(invalid="ignore"):
        return 100 * both / either


def scene(rng: np.random.Generator, size: tuple[int, int], classes: list[int], ignored: float) -> np.ndarray:
    """Blobs of some pixels."""
    coarse = rng.choice(classes, (size[0] // 9 + 1, size[1] // 9 + 1)).astype(np.uint8)
    labels = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)
    labels[rng.random(size) < 0.02] = rng.choice(classes)
    labels[cv2.blur(rng.random(size), (5, 5)) < ignored] = 255
    return labels


# Sizes with bands of 1 to 9 pixels; class 3 absent, 4 predicted but absent, 5 labelled but never predicted.
@pytest.mark.parametrize("ignored", [0.0, 0.42])
def test_scores_equal_erosion_class_by_class(ignored: float) -> None:
    rng = np.random.default_rng(3)
    pairs = []
    for size in ((20, 31), (64, 90), (301, 347), (100, 7), (1, 1), (5, 60)):
        label = scene(rng, size, [0, 1, 2, 5], ignored)
        prediction = np.where(rng.random(size) < 0.5, label, scene(rng, size, [0, 1, 2, 4], 0))
        prediction[prediction == 255] = 1
        prediction[prediction == 5] = 0
        pairs.append((label, prediction))
    boundaries = Boundaries(6)
    for label, prediction in pairs:
        boundaries.update(prediction, torch.from_numpy(label))
    expected = slow_scores(pairs, 6)
    np.testing.assert_allclose(boundaries.scores(), expected, rtol=0, atol=1e-9)
    assert np.isnan(expected[3])
    assert (expected[4:6] == 0).all()
    assert (expected[:3] > 5).all()


@pytest.mark.parametrize("d", [1, 2, 5, 16, 17])
def test_bands_of_any_width(d: int) -> None:
    rng = np.random.default_rng(d)
    labels = np.stack([scene(rng, (70, 53), [0, 3, 254], 0.4), np.full((70, 53), 7, np.uint8)])
    found = bands(torch.from_numpy(labels), d).numpy()
    for one, band in zip(labels, found, strict=True):
        expected = np.zeros(one.shape, bool)
        for category in (0, 3, 7, 254):
            expected |= slow_band(one, category, one == 255, d)
        np.testing.assert_array_equal(band, expected)
    assert found[1].sum() == 70 * 53 - (70 - 2 * d) * (53 - 2 * d)  # one class alone: the frame


def test_reach_is_two_percent_of_the_diagonal() -> None:
    assert [reach(size) for size in ((300, 400), (512, 683), (1024, 2048), (1, 1), (30, 40))] == [10, 17, 46, 1, 1]


def test_by_hand() -> None:
    # 9x9, d = 1: a 3x3 square of class 1; predicted 3x4. Bands of class 1: 8 pixels, and 10.
    label, prediction = np.zeros((2, 9, 9), np.uint8)
    label[3:6, 3:6] = 1
    prediction[3:6, 3:7] = 1
    boundaries = Boundaries(2)
    boundaries.update(prediction, label)
    # They share the two rows of 3 and the left column's middle: 7. Class 0: frame 32, rings 16 and 18, which share 13.
    assert boundaries.scores() == pytest.approx([100 * (32 + 13) / (32 + 16 + 18 - 13), 100 * 7 / (8 + 10 - 7)])


def test_ignored_pixels_bound_nothing_and_count_nowhere() -> None:
    label = np.zeros((40, 40), np.uint8)
    prediction = label.copy()
    label[:, 20:24] = 255
    prediction[:, 20:24] = 1  # what is said of ignored pixels is no boundary either
    boundaries = Boundaries(2)
    boundaries.update(prediction, label)
    scores = boundaries.scores()
    assert scores[0] == 100
    assert np.isnan(scores[1])
    assert int(boundaries.counts[0, 0]) == 40 * 40 - 38 * 38 - 2 * 4  # the frame without its ignored pixels


@pytest.mark.gpu
def test_on_cuda_nothing_waits() -> None:
    rng = np.random.default_rng(0)
    pair = [torch.from_numpy(scene(rng, (64, 90), [0, 1, 2], 0)) for _ in range(2)]
    on_gpu, on_cpu = Boundaries(3, "cuda"), Boundaries(3)
    on_cpu.update(*pair)
    moved = [each.cuda() for each in pair]
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu.update(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(on_gpu.scores(), on_cpu.scores())
