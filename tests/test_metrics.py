"""Scores against mmsegmentation's (stored, with the script that made them) and against cases done by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ssaseg.cli.metrics import Confusion

FIXTURE = np.load(Path(__file__).parent / "fixtures" / "mmseg_metrics.npz")


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
    for name in ("IoU", "Acc", "Dice", "Precision", "Recall", "aAcc"):
        np.testing.assert_allclose(scores[name], 100 * stored[name], rtol=0, atol=1e-9, err_msg=name)  # NaN equals NaN
    # mmsegmentation reports its means rounded to two decimals; half a unit of the second one is all that is known.
    for name in ("mIoU", "mAcc", "mDice", "mPrecision", "mRecall"):
        assert scores[name] == pytest.approx(float(stored[name]), abs=0.005 + 1e-9), name


def test_an_absent_class_counts_only_if_predicted() -> None:
    # Label: three of class 0, one ignored. Class 1 is predicted but absent; class 2 neither.
    scores = count(3, ([[0, 0], [0, 255]], [[0, 0], [1, 2]])).scores()
    np.testing.assert_allclose(scores["IoU"], [200 / 3, 0, np.nan])
    np.testing.assert_allclose(scores["Acc"], [200 / 3, np.nan, np.nan])
    assert scores["mIoU"] == pytest.approx(100 / 3)
    assert scores["mAcc"] == pytest.approx(200 / 3)
    assert scores["aAcc"] == pytest.approx(200 / 3)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
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
