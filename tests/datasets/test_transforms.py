"""Resizing, cropping and flipping: the same pixels as mmsegmentation 1.2.2, from the same random numbers."""

import cv2
import numpy as np
import pytest
from places import FIXTURES

from ssaseg.datasets import transforms
from ssaseg.datasets.transforms import TrainTransform, rescale_size, resize_label_window, resize_to_multiple

STORED = np.load(FIXTURES / "mmseg_pipeline.npz")
IDENTITY = np.arange(256, dtype=np.uint8)


def stored_transform() -> TrainTransform:
    width, height, *crop = STORED["train_config"].tolist()
    return TrainTransform((width, height), (0.5, 2.0), crop, cat_max_ratio=0.75, flip=0.5, distortion=True)


@pytest.mark.parametrize("seed", STORED["seeds"].tolist())
def test_train_pixels_equal_mmsegmentation(seed: int) -> None:
    image, raw = STORED[f"image{seed % 3}"], STORED[f"label{seed % 3}"]
    rng = np.random.RandomState(seed)
    sample = stored_transform()(image, raw, rng, IDENTITY)

    height, width = sample.size
    np.testing.assert_array_equal(sample.image[:height, :width], STORED[f"train{seed}_image"])
    np.testing.assert_array_equal(sample.label[:height, :width], STORED[f"train{seed}_label"])
    assert rng.random_sample() == STORED[f"train{seed}_next"], "another number of random numbers was drawn"

    padding = np.ones(sample.label.shape, bool)
    padding[:height, :width] = False
    assert (sample.label[padding] == 255).all()
    assert (sample.image[padding] == 0).all()


def test_stored_cases_cover_padding_flips_and_redraws() -> None:
    seeds = STORED["seeds"].tolist()
    shapes = {STORED[f"train{seed}_label"].shape for seed in seeds}
    crop = tuple(STORED["train_config"][2:])
    assert crop in shapes
    assert any(shape[0] < crop[0] for shape in shapes)
    assert any(shape[1] < crop[1] for shape in shapes)

    checks = []
    transform = stored_transform()
    is_mixed = transform._is_mixed
    transform._is_mixed = lambda label: checks.append(is_mixed(label)) or checks[-1]  # type: ignore[method-assign]
    for seed in seeds:
        transform(STORED[f"image{seed % 3}"], STORED[f"label{seed % 3}"], np.random.RandomState(seed), IDENTITY)
    assert checks.count(True) > 0
    assert checks.count(False) > 0


def test_draws_name_the_steps_that_mmsegmentation_took() -> None:
    names = ["brightness", "contrast", "saturation", "hue", "contrast"]
    for seed in range(8):
        rng = np.random.RandomState(seed)
        draws = stored_transform()(STORED[f"image{seed % 3}"], STORED[f"label{seed % 3}"], rng, IDENTITY).draws
        taken = [name for name, value in zip(names, draws, strict=True) if not np.isnan(value)]
        assert taken == STORED[f"train{seed}_steps"].tolist()


@pytest.mark.parametrize("case", range(len(STORED["tests"])))
def test_test_pixels_equal_mmsegmentation(case: int) -> None:
    source, width, height, multiple, *_ = STORED["tests"][case].tolist()
    result = transforms.test_image(STORED[f"image{source}"], (width, height), multiple or None)
    np.testing.assert_array_equal(result, STORED[f"test{case}_image"])


def test_test_image_without_steps_is_the_image() -> None:
    image = STORED["image0"]
    assert transforms.test_image(image, None, None) is image
    assert transforms.test_image(image, None, 32).shape == (64, 96, 3)


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((480, 360), (2048, 512), (683, 512)),
        ((360, 480), (2048, 512), (512, 683)),
        ((500, 375), (520, 520), (520, 390)),
        ((3000, 10), (100, 100), (100, 1)),  # 0.33 pixels: mmcv gives 0 and fails on resizing
        ((4096, 100), (2048, 512), (2048, 50)),
        ((3, 3), (5, 2), (2, 2)),
    ],
)
def test_rescale_size(size: tuple[int, int], scale: tuple[int, int], expected: tuple[int, int]) -> None:
    assert rescale_size(size, scale) == expected


def test_resize_to_multiple_resizes_and_never_pads() -> None:
    image = np.full((33, 64, 3), 200, np.uint8)
    result = resize_to_multiple(image, 32)
    assert result.shape == (64, 64, 3)
    assert (result == 200).all()


def test_label_window_equals_full_nearest_resize() -> None:
    """The indices are recomputed here, so OpenCV's own rounding is tried on many pairs of sizes."""
    rng = np.random.RandomState(0)
    lut = rng.permutation(256).astype(np.uint8)
    for _ in range(1500):
        old, new = rng.randint(1, 260, 2), rng.randint(1, 520, 2)
        raw = rng.randint(0, 256, old).astype(np.uint8)
        top, left = rng.randint(0, new[0]), rng.randint(0, new[1])
        rows, columns = slice(top, rng.randint(top, new[0]) + 1), slice(left, rng.randint(left, new[1]) + 1)
        full = cv2.resize(raw, (int(new[1]), int(new[0])), interpolation=cv2.INTER_NEAREST)
        window = resize_label_window(raw, (int(new[0]), int(new[1])), rows, columns, lut)
        np.testing.assert_array_equal(window, lut[full[rows, columns]], err_msg=f"{old} to {new}")


def test_nearest_index_for_every_enlargement_of_camvid() -> None:
    """Sides 360 and 480 to every side that scale (2048, 512) and ratios 0.5 to 2 can give."""
    for old in (360, 480):
        ramp = (np.arange(old) % 251).astype(np.uint8)[None]
        for new in range(200, 1400):
            expected = cv2.resize(ramp, (new, 1), interpolation=cv2.INTER_NEAREST)[0]
            np.testing.assert_array_equal(ramp[0, transforms.nearest_index(new, old, slice(0, new))], expected)


def test_labels_are_looked_up_and_class_share_is_of_train_ids() -> None:
    """Two raw ids that are one class make an unmixed crop: it is drawn anew, all ten times, and then used."""
    raw = np.tile(np.array([[7, 9]], np.uint8), (20, 10))
    image = np.zeros((20, 20, 3), np.uint8)
    merged, apart = np.full(256, 255, np.uint8), np.full(256, 255, np.uint8)
    merged[[7, 9]], apart[[7, 9]] = 3, (3, 4)
    transform = TrainTransform((20, 20), (1.0, 1.0), (8, 8), flip=0.0, distortion=False)

    counted = CountingRandom(0)
    assert set(np.unique(transform(image, raw, counted, merged).label)) == {3}
    assert counted.integers == 2 * 11
    counted = CountingRandom(0)
    assert set(np.unique(transform(image, raw, counted, apart).label)) == {3, 4}
    assert counted.integers == 2


class CountingRandom(np.random.RandomState):
    integers = 0

    def randint(self, *args: int) -> int:  # type: ignore[override]
        self.integers += 1
        return super().randint(*args)


def test_writes_into_given_arrays_and_leaves_its_input_alone() -> None:
    image, raw = STORED["image0"].copy(), STORED["label0"].copy()
    image.flags.writeable = raw.flags.writeable = False  # as a data set's cache gives them
    transform = stored_transform()
    images, labels = transform.empty((3,))
    images[:], labels[:] = 99, 99
    sample = transform(image, raw, np.random.RandomState(7), IDENTITY, out=(images[1], labels[1]))
    expected = transform(image, raw, np.random.RandomState(7), IDENTITY)
    np.testing.assert_array_equal(images[1], expected.image)
    np.testing.assert_array_equal(labels[1], expected.label)
    assert np.shares_memory(sample.image, images)
    assert (images[[0, 2]] == 99).all()
    assert (labels[[0, 2]] == 99).all()


def test_without_distortion_no_colour_numbers_are_drawn() -> None:
    transform = TrainTransform((140, 50), (0.5, 2.0), (40, 48), distortion=False)
    assert np.isnan(transform(STORED["image0"], STORED["label0"], np.random.RandomState(0), IDENTITY).draws).all()


def test_distortion_draws_keep_their_ranges() -> None:
    rng = np.random.RandomState(0)
    draws = np.stack([transforms.draw_distortion(rng) for _ in range(4000)])
    shares = (~np.isnan(draws)).mean(0)
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.5, 0.5, 0.25], atol=0.04)
    low, high = np.nanmin(draws, 0), np.nanmax(draws, 0)
    np.testing.assert_allclose(low, [-32, 0.5, 0.5, -18, 0.5], atol=0.1)
    np.testing.assert_allclose(high, [32, 1.5, 1.5, 17, 1.5], atol=0.1)
    assert not (~np.isnan(draws[:, [transforms.CONTRAST_FIRST, transforms.CONTRAST_LAST]])).all(1).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 777)])
def test_extreme_sizes_become_crops_and_inputs(size: tuple[int, int]) -> None:
    """mmsegmentation fails on masks with a side of one pixel, and on images that resizing leaves without one."""
    image, raw = np.full((*size, 3), 80, np.uint8), np.full(size, 3, np.uint8)
    for seed in range(4):
        sample = TrainTransform((2048, 512))(image, raw, np.random.RandomState(seed), IDENTITY)
        height, width = sample.size
        assert sample.image.shape == (512, 512, 3)
        assert (sample.label[:height, :width] == 3).all()
        assert (sample.image[:height, :width] == 80).all()
        assert np.count_nonzero(sample.label != 255) == height * width > 0
    assert all(side % 32 == 0 for side in transforms.test_image(image, (2048, 512), 32).shape[:2])
    assert max(transforms.test_image(image, (520, 520), None).shape[:2]) == 520
