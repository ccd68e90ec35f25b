"""Colour distortion and normalisation against mmsegmentation 1.2.2's stored pixels and OpenCV's conversions."""

import cv2
import numpy as np
import pytest
import torch
from places import FIXTURES
from torch.utils._python_dispatch import TorchDispatchMode

from ssaseg.datasets import colour
from ssaseg.datasets.loader import Batch
from ssaseg.datasets.transforms import CONTRAST_FIRST, DRAWS, HUE, SATURATION, TrainTransform

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
    """All subsets at once, as on a GPU, equal one image after the other, as on a CPU; and pieces do not show."""
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

    planes = colour.to_planes(torch.from_numpy(images))
    scratch = torch.empty(5, 5, 24 * 40)
    colour._distort_piece(planes.flatten(2), torch.from_numpy(draws), scratch)
    expected = colour.to_planes(torch.from_numpy(one_by_one))
    assert torch.equal(planes, expected)

    large = rng.randint(0, 256, (1, 200, 300, 3)).astype(np.uint8)  # more pixels than one piece
    parts = [distorted(np.ascontiguousarray(large[:, i : i + 50]), draws[3:4]) for i in range(0, 200, 50)]
    np.testing.assert_array_equal(distorted(large, draws[3:4]), np.concatenate(parts, 1))


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
    """Beside the result, no tensor of the whole batch in float32; the scratch planes are a fraction of one image."""
    images = torch.randint(0, 256, (6, 256, 256, 3), dtype=torch.uint8)
    draws = torch.tensor([[5.0, torch.nan, 1.2, 4.0, 0.9]]).repeat(6, 1)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
