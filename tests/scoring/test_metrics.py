"""Scores against mmsegmentation's (stored, with the script that made them) and against cases done by hand."""

import numpy as np
import pytest
import torch
from places import FIXTURES

from ssaseg.cli.scoring import metrics
from ssaseg.cli.scoring.metrics import Confusion

FIXTURE = np.load(FIXTURES / "mmseg_metrics.npz")


def count(num_classes: int, *pairs: tuple) -> Confusion:
    """A table of (label, prediction) maps."""
    confusion = Confusion(num_classes)
    for label, prediction in pairs:
        confusion.update(np.asarray(prediction), np.asarray(label))
    return confusion


@pytest.mark.parametrize("case", range(int(FIXTURE["cases"])))
def test_scores_equal_those_of_mmsegmentation(case: int) -> None:
    stored = {key.split("_", 1)[1]: FIXTURE[key] for key in FIXTURE.files if key.startswith(f"case{case}_")}
    pairs = [(stored[f"label{j}"], stored[f"pred{j}"]) for j in range(int(stored["images"]))]
    confusion = count(int(stored["num_classes"]), *pairs)
    np.testing.assert_array_equal(confusion.matrix.diagonal(), stored["intersect"])
    np.testing.assert_array_equal(confusion.matrix.sum(axis=0), stored["pred_area"])
    np.testing.assert_array_equal(confusion.matrix.sum(axis=1), stored["label_area"])
    scores = confusion.scores()
    assert scores["aAcc"] == pytest.approx(100 * float(stored["aAcc"]), abs=1e-9)
    for name in ("IoU", "Acc", "Dice", "Fscore", "Precision", "Recall"):
        np.testing.assert_allclose(scores[name], 100 * stored[name], rtol=0, atol=1e-9, err_msg=name)  # NaN equals NaN
        mean = np.nanmean(100 * stored[name])
        assert scores[f"m{name}"] == pytest.approx(mean, abs=1e-9), name
        # As mmsegmentation reports it, rounded to two decimals.
        assert float(stored[f"m{name}"]) == pytest.approx(mean, abs=0.005 + 1e-9), name


def test_the_stored_cases_have_every_kind_of_class() -> None:
    kinds = set()
    for case in range(int(FIXTURE["cases"])):
        labelled, predicted = FIXTURE[f"case{case}_label_area"] > 0, FIXTURE[f"case{case}_pred_area"] > 0
        kinds |= set(zip(labelled.tolist(), predicted.tolist(), strict=True))
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}
    assert any((FIXTURE[key] == 255).any() for key in FIXTURE.files if "label" in key)


def test_an_absent_class_counts_only_if_predicted() -> None:
    # Label: three of class 0, one ignored. Class 1 is predicted but absent; class 2 neither.
    scores = count(3, ([[0, 0], [0, 255]], [[0, 0], [1, 2]])).scores()
    np.testing.assert_allclose(scores["IoU"], [200 / 3, 0, np.nan])
    np.testing.assert_allclose(scores["Acc"], [200 / 3, np.nan, np.nan])
    assert scores["mIoU"] == pytest.approx(100 / 3)
    assert scores["mAcc"] == pytest.approx(200 / 3)
    assert scores["aAcc"] == pytest.approx(200 / 3)


def test_frequency_weighted_iou_by_hand() -> None:
    # IoU 3/4, 1/2 and 0 with 3, 2 and 1 labelled pixels; class 3 is predicted but absent, class 4 neither.
    scores = count(5, ([[0, 0, 0, 1, 1, 2]], [[0, 0, 0, 1, 3, 0]])).scores()
    assert scores["fwIoU"] == pytest.approx(100 * (3 / 6 * 3 / 4 + 2 / 6 * 1 / 2))
    assert np.isnan(count(2, ([[255]], [[0]])).scores()["fwIoU"])


def test_f_score_is_dice_where_both_are() -> None:
    scores = count(4, ([[0, 0, 1, 1, 2]], [[0, 1, 1, 1, 3]])).scores()
    np.testing.assert_allclose(scores["Fscore"][:2], scores["Dice"][:2])
    assert np.isnan(scores["Fscore"][2:]).all()
    np.testing.assert_array_equal(scores["Dice"][2:], 0)


def random_images(count: int, classes: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels and predictions, better and worse ones; class 5 is in few images."""
    rng = np.random.default_rng(1)
    images = []
    for index in range(count):
        label = rng.integers(0, classes - (index % 7 != 0), (9, 11))
        prediction = np.where(rng.random(label.shape) < rng.uniform(0.3, 1), label, rng.integers(0, classes - 1))
        label[rng.random(label.shape) < 0.1] = 255
        images.append((label, prediction))
    return images


def test_the_interval_is_that_of_scoring_each_resample_anew() -> None:
    images = random_images(70)  # more than one block of counts
    confusion = count(6, *images)
    found = confusion.interval(level=90, resamples=25, seed=4)
    rng = np.random.default_rng(4)
    scores = [
        count(6, *(images[index] for index in drawn)).scores()["mIoU"] for drawn in rng.integers(70, size=(25, 70))
    ]
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(scores, [5, 95])), abs=1e-9)
    assert found[2:] == (90, 25, 4)
    usual = confusion.interval()
    assert usual is not None
    assert usual == confusion.interval()  # the seed is fixed
    assert usual.low < confusion.scores()["mIoU"] < usual.high
    assert usual[2:] == (95, 1000, 0)


def test_parts_of_the_resamples_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    confusion = count(6, *random_images(10))
    whole = confusion.interval(resamples=40)
    monkeypatch.setattr(metrics, "PRODUCT", 70)  # seven resamples at once
    assert confusion.interval(resamples=40) == whole


def test_an_interval_needs_two_images_and_a_label() -> None:
    (label, prediction), second = random_images(2)
    assert count(6, (label, prediction)).interval() is None
    assert count(6, (label, prediction), second).interval() is not None
    assert count(2, ([[255]], [[0]]), ([[255]], [[1]])).interval() is None
    # A resample of images without any label has no mIoU and is left out.
    found = count(2, ([[255]], [[0]]), ([[0]], [[0]])).interval()
    assert found is not None
    assert (found.low, found.high) == (100, 100)


def test_what_is_kept_of_an_image_is_eight_bytes_a_class() -> None:
    confusion = count(6, *random_images(metrics.BLOCK + 1))
    assert sum(block.numel() * block.element_size() for block in confusion._blocks) == 2 * metrics.BLOCK * 8 * 6


def test_counts_add_up_over_images_not_scores() -> None:
    small = ([[0]], [[1]])
    large = ([[0, 0, 0], [1, 1, 1]], [[0, 0, 0], [1, 1, 1]])
    np.testing.assert_allclose(count(2, small, large).scores()["IoU"], [75, 75])


def test_all_ignored_scores_nan() -> None:
    confusion = count(2, ([[255, 255]], [[0, 1]]))
    assert confusion.matrix.sum() == 0
    assert np.isnan([confusion.scores()["mIoU"], confusion.scores()["aAcc"], confusion.majority_miou()]).all()


@pytest.mark.parametrize(("label", "prediction"), [(3, 0), (254, 0), (0, 3), (-1, 0)])
def test_an_id_that_is_no_class_raises(label: int, prediction: int) -> None:
    confusion = Confusion(3)
    maps = np.array([[0, label, label]]), np.array([[0, prediction, prediction]])
    name, bad = ("label", label) if label else ("prediction", prediction)
    with pytest.raises(ValueError, match=f"{name} {bad} in 2 pixels\nexpected 0..2"):
        confusion.update(maps[1], maps[0])
    assert confusion.matrix.sum() == 0


def test_counts_stay_exact_where_float32_would_not() -> None:
    confusion = Confusion(2)
    confusion._counts[0] = 2**24
    confusion.update(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8))
    assert confusion.matrix[0, 0] == 2**24 + 1


def test_maps_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) for a label of \(3, 2\)"):
        Confusion(2).update(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))


def test_majority_by_hand() -> None:
    # Classes 0, 1, 2 with 5, 3, 2 labelled pixels; always answering 0 would give IoU 50, 0, 0.
    label = [[0, 0, 0, 0, 0, 1, 1, 1, 2, 2]]
    prediction = [[0, 0, 0, 0, 1, 1, 2, 0, 1, 0]]
    confusion = count(4, (label, prediction))
    assert confusion.majority_miou() == pytest.approx(50 / 3)


def test_takes_tensors_of_any_integer_type() -> None:
    label, prediction = torch.tensor([[0, 255]], dtype=torch.uint8), torch.tensor([[1, 0]], dtype=torch.int64)
    confusion = Confusion(2)
    confusion.update(prediction, label)
    np.testing.assert_array_equal(confusion.matrix, [[0, 1], [0, 0]])


@pytest.mark.gpu
def test_on_cuda_nothing_waits_and_a_bad_label_is_told_in_the_end() -> None:
    confusion = Confusion(2, "cuda")
    label, prediction = torch.tensor([[0, 1, 7]], device="cuda"), torch.tensor([[0, 1, 1]], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        confusion.update(prediction, label)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ValueError, match="1 pixels whose label or prediction"):
        confusion.scores()
