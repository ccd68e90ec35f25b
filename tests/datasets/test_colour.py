"""Colour distortion and normalisation against mmsegmentation 1.2.2's stored pixels and OpenCV's conversions."""

import cv2
import numpy as np
import pytest
import torch
from places import FIXTURES
from torch.utils._python_dispatch import TorchDispatchMode

from ssaseg.datasets import colour
from ssaseg.datasets.loader import Batch
from ssaseg.datasets.transforms import (
    BRIGHTNESS,
    CONTRAST_FIRST,
    CONTRAST_LAST,
    DRAWS,
    HUE,
    SATURATION,
    TrainTransform,
    distort_image,
)

STORED = np.load(FIXTURES / "mmseg_pipeline.npz")
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def distorted(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """BGR uint8 in and out, by way of the planes."""
    planes = colour.to_planes(torch.from_numpy(images))
    colour.distort(planes, torch.from_numpy(draws))
    assert torch.equal(planes, planes.floor())
    return planes.flip(1).permute(0, 2, 3, 1).to(torch.uint8).numpy()


def only(step: int, value: float) -> np.ndarray:
    row = np.full((1, DRAWS), np.nan, np.float32)
    row[0, step] = value
    return row


@pytest.mark.parametrize("seed", range(8))
def test_each_step_equals_mmsegmentation(seed: int) -> None:
    width, height, *crop = STORED["train_config"].tolist()
    transform = TrainTransform((width, height), (0.5, 2.0), crop)
    identity = np.arange(256, dtype=np.uint8)
    source = STORED[f"image{seed % 3}"], STORED[f"label{seed % 3}"]
    sample = transform(*source, np.random.RandomState(seed), identity)
    taken = (~np.isnan(sample.draws)).nonzero()[0]
    before = STORED[f"train{seed}_image"]
    for k, step in enumerate(taken):
        expected = STORED[f"train{seed}_step{k}"]
        result = distorted(before[None], only(step, sample.draws[step]))[0]
        difference = np.abs(result.astype(int) - expected)
        if step not in (SATURATION, HUE):
            assert difference.max() == 0
        else:
            assert difference.max() <= 1
            # In the remainder of a row after its last whole vector OpenCV rounds instead of truncating.
            if before.shape[1] % 64 == 0:
                assert (difference == 0).mean() >= 0.999
        before = expected

    # All of them in one go: each pixel may inherit one level from either HSV step, which contrast can stretch.
    result = distorted(STORED[f"train{seed}_image"][None], sample.draws[None])[0]
    assert np.abs(result.astype(int) - before).mean() < 0.5


def test_bgr_to_hsv_equals_opencv_for_every_colour() -> None:
    axis = torch.arange(256, dtype=torch.uint8)
    for blue in range(0, 256, 15):
        rgb = torch.cartesian_prod(axis, axis).flip(1)
        pixels = torch.cat([rgb, torch.full((len(rgb), 1), blue, dtype=torch.uint8)], 1)  # P,3
        scratch = torch.empty(5, 1, len(rgb))
        colour._to_hsv(pixels.T[None].float(), scratch)
        expected = cv2.cvtColor(pixels[None].numpy(), cv2.COLOR_RGB2HSV)[0]
        np.testing.assert_array_equal(scratch[:3, 0].T.numpy(), expected)


def test_hsv_to_bgr_differs_from_opencv_by_one_level_in_few_values() -> None:
    hue, saturation, value = np.meshgrid(np.arange(180), np.arange(0, 256, 3), np.arange(256), indexing="ij")
    hsv = np.stack([hue, saturation, value], -1).astype(np.uint8).reshape(180, -1, 3)
    planes = torch.from_numpy(hsv).reshape(-1, 3).T.float()[:, None]
    scratch = torch.cat([planes, torch.empty(2, *planes.shape[1:])])
    pixels = torch.empty(1, 3, planes.shape[2])
    colour._from_hsv(pixels, scratch)
    difference = np.abs(pixels[0].T.numpy() - cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).reshape(-1, 3))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.9995


@pytest.mark.parametrize("delta", [-18, -1, 0, 17])
def test_hue_turns_the_circle(delta: int) -> None:
    rng = np.random.RandomState(0)
    image = rng.randint(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    hsv = cv2.cvtColor(image[0], cv2.COLOR_BGR2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + delta) % 180
    expected = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    difference = np.abs(distorted(image, only(HUE, delta))[0].astype(int) - expected)
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.999


def test_images_of_a_batch_take_their_own_steps() -> None:
    """All subsets at once equal one image after the other."""
    rng = np.random.RandomState(1)
    images = rng.randint(0, 256, (5, 24, 40, 3)).astype(np.uint8)
    draws = np.full((5, DRAWS), np.nan, np.float32)
    draws[1] = [20.5, 1.3, 0.7, -5, np.nan]
    draws[2, HUE] = 11
    draws[3] = [-9, np.nan, 1.4, 3, 0.6]
    draws[4, CONTRAST_FIRST] = 0.8
    one_by_one = np.stack([distorted(images[i : i + 1], draws[i : i + 1])[0] for i in range(5)])
    np.testing.assert_array_equal(one_by_one[0], images[0])
    assert all((one_by_one[i] != images[i]).any() for i in range(1, 5))

    np.testing.assert_array_equal(distorted(images, draws), one_by_one)


def test_normalisation_and_padding_equal_mmsegmentation() -> None:
    images, labels = torch.from_numpy(STORED["norm_images"]), torch.from_numpy(STORED["norm_labels"])
    sizes = torch.from_numpy(STORED["norm_sizes"])
    before = images.clone()
    result = colour.normalize(images, MEAN, STD, sizes)
    assert torch.equal(result, torch.from_numpy(STORED["norm_result"]))
    assert torch.equal(images, before)

    batch = Batch(images, labels, torch.full((2, DRAWS), torch.nan), sizes, ["a", "b"], [0, 1])
    prepared, target = colour.prepare_batch(batch, MEAN, STD, torch.device("cpu"))
    assert torch.equal(prepared, result)
    assert torch.equal(target, torch.from_numpy(STORED["norm_label_result"]))
    assert target.dtype == torch.int64


def test_memory_does_not_grow_by_copies_of_the_batch() -> None:
    """On a CPU: beside the result, no tensor of the size of the batch."""
    images = torch.randint(0, 256, (6, 256, 256, 3), dtype=torch.uint8)
    draws = torch.full((6, DRAWS), torch.nan)  # as workers leave them, which have applied the distortion
    sizes = torch.tensor([[256, 256]]).repeat(6, 1)
    batch = Batch(images, torch.zeros(6, 256, 256, dtype=torch.uint8), draws, sizes, [""] * 6, [0] * 6)
    with Allocations() as seen:
        colour.prepare_batch(batch, MEAN, STD, torch.device("cpu"))
    large = [storage for storage in seen.bytes.values() if storage >= images.numel()]
    assert large == [4 * images.numel(), 8 * batch.labels.numel()]
    assert sum(seen.bytes.values()) - sum(large) < 2 * images.numel()


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation returns, each counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.kept: list[torch.Tensor] = []  # so that addresses are not used again

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.kept.append(result)
            self.bytes.setdefault(result.untyped_storage().data_ptr(), result.untyped_storage().nbytes())
        return result


# ---- in the workers, without a GPU -------------------------------------------------------------------------------
def in_worker(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    result = image.copy()
    distort_image(result, draws)
    return result


@pytest.mark.parametrize("seed", range(8))
def test_a_worker_equals_mmsegmentation(seed: int) -> None:
    """One step after the other from mmsegmentation's pixels; and all in one go, in fewer passes."""
    width, height, *crop = STORED["train_config"].tolist()
    source = STORED[f"image{seed % 3}"], STORED[f"label{seed % 3}"]
    made = [
        TrainTransform((width, height), (0.5, 2.0), crop, distort_here=here)(
            *source, np.random.RandomState(seed), np.arange(256, dtype=np.uint8)
        )
        for here in (False, True)
    ]
    draws, rows, columns = made[0].draws, *made[0].size
    first = before = STORED[f"train{seed}_image"]
    chained = first.copy()
    for k, step in enumerate((~np.isnan(draws)).nonzero()[0]):
        expected, row = STORED[f"train{seed}_step{k}"], only(step, draws[step])[0]
        difference = np.abs(in_worker(before, row).astype(int) - expected)
        assert difference.max() <= (1 if step in (SATURATION, HUE) else 0)  # another OpenCV may round another way
        assert (difference == 0).mean() >= 0.999
        before, chained = expected, in_worker(chained, row)
    np.testing.assert_array_equal(in_worker(first, draws), chained)
    np.testing.assert_array_equal(made[1].image[:rows, :columns], chained)
    assert not made[1].image[rows:].any()
    assert not made[1].image[:, columns:].any()
    assert np.isnan(made[1].draws).all()  # nothing is left for the device to do


@pytest.mark.parametrize("amounts", [{SATURATION: 1.4}, {HUE: -18}, {BRIGHTNESS: 20.5, HUE: 17, CONTRAST_LAST: 0.6}])
def test_a_worker_has_the_arithmetic_of_mmsegmentation(amounts: dict[int, float]) -> None:
    """With this OpenCV, bit for bit: float32 on levels, and a conversion to HSV and back for each step."""
    image = np.random.RandomState(0).randint(0, 256, (40, 50, 3)).astype(np.uint8)
    draws = np.full(DRAWS, np.nan, np.float32)
    expected = image
    for step, amount in amounts.items():
        draws[step] = amount
        if step not in (SATURATION, HUE):
            levels = expected.astype(np.float32)
            levels = levels + np.float32(amount) if step == BRIGHTNESS else levels * np.float32(amount)
            expected = np.clip(levels, 0, 255).astype(np.uint8)
            continue
        hsv = cv2.cvtColor(expected, cv2.COLOR_BGR2HSV)
        if step == SATURATION:
            hsv[..., 1] = np.clip(hsv[..., 1].astype(np.float32) * np.float32(amount), 0, 255).astype(np.uint8)
        else:
            hsv[..., 0] = (hsv[..., 0].astype(int) + int(amount)) % 180
        expected = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    np.testing.assert_array_equal(in_worker(image, draws), expected)
    rows = np.zeros((40, 60, 3), np.uint8)  # as where an image is narrower than the crop: rows are not contiguous
    rows[:, :50] = image
    distort_image(rows[:, :50], draws)
    np.testing.assert_array_equal(rows[:, :50], expected)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_worker_distorts_other_channels_as_a_gpu_does(channels: int) -> None:
    image = np.random.RandomState(0).randint(0, 256, (24, 64, channels)).astype(np.uint8)
    draws = np.array([12.5, 1.25, 0.8, 7, np.nan], np.float32)
    planes = colour.to_planes(torch.from_numpy(image[None]))
    colour.distort(planes, torch.from_numpy(draws[None]))
    result = in_worker(image, draws)
    assert np.abs(result - colour.from_planes(planes[0].byte()).astype(int)).max() <= (2 if channels > 2 else 0)
    assert (result != image).any(axis=(0, 1)).tolist() == [True] * min(channels, 3) + [False] * max(channels - 3, 0)


@pytest.mark.gpu
def test_cuda_equals_cpu_without_waiting() -> None:
    rng = np.random.RandomState(0)
    images = torch.from_numpy(rng.randint(0, 256, (4, 64, 96, 3)).astype(np.uint8))
    draws = torch.full((4, DRAWS), torch.nan)
    draws[0] = torch.tensor([12.5, 1.25, 0.8, 7, torch.nan])
    draws[2] = torch.tensor([torch.nan, torch.nan, 1.4, -18, 0.7])
    sizes = torch.tensor([[64, 96], [50, 96], [64, 31], [64, 96]])
    batch = Batch(images, torch.zeros(4, 64, 96, dtype=torch.uint8), draws, sizes, [""] * 4, [0] * 4)
    expected, _ = colour.prepare_batch(batch, MEAN, STD, torch.device("cpu"))
    colour.prepare_batch(batch, MEAN, STD, torch.device("cuda"))  # starts the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        result, _ = colour.prepare_batch(batch, MEAN, STD, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    levels = (result.cpu() - expected).abs() * torch.tensor(STD).view(3, 1, 1)
    assert levels.max() <= 1.01
    assert (levels < 0.01).float().mean() > 0.999
