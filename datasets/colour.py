"""Colour distortion and normalisation of a whole batch on the device, from the uint8 pixels that the workers make.

Source: mmsegmentation 1.2 `datasets/transforms/transforms.py` (PhotoMetricDistortion), `models/data_preprocessor.py`;
OpenCV's 8-bit HSV conversion. Its integer arithmetic is done below in float32, where every intermediate value is exact.

On a GPU only: on a CPU the workers apply the distortion, see `transforms.distort_image`, and leave no draws.

Letters: N images of H x W pixels; n of these, which a step changes, and P pixels of each. Between the functions,
pixels are float32 planes (N,3,H,W) in the order RGB with whole values 0..255. Nothing here waits for the device: values
that differ between images are read from CPU tensors. Images of other channels have C planes: of three or more, the
first three are RGB.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ssaseg.datasets.loader import Batch
from ssaseg.datasets.transforms import DRAWS, HUE, SATURATION


def prepare_batch(
    batch: Batch, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """A batch of the loader on `device`: distorted and normalised images float32 (N,3,H,W) RGB, labels int64 (N,H,W).

    mean, std: RGB, on the scale 0..255. Padding becomes exactly 0, which is the mean colour; its labels are 255.
    """
    planes = to_planes(batch.images.to(device, non_blocking=True))
    distort(planes, batch.draws)
    labels = batch.labels.to(device, non_blocking=True).long()
    return normalize_planes(planes, mean, std, batch.sizes), labels


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], sizes: Tensor | None = None) -> Tensor:
    """uint8 (N,H,W,3) BGR to float32 (N,3,H,W) RGB: (value - mean) / std, with mean and std on the scale 0..255.

    sizes: int (N,2) on the CPU, (h, w) of the image without padding; pixels to the right of it and below are set to 0.
    None: there is no padding.
    """
    return normalize_planes(to_planes(images), mean, std, sizes)


def to_planes(images: Tensor) -> Tensor:
    """uint8 (N,H,W,C), BGR first, to float32 (N,C,H,W), RGB first, values unchanged."""
    count, height, width, channels = images.shape
    planes = torch.empty((count, channels, height, width), dtype=torch.float32, device=images.device)
    for channel in range(channels):
        planes[:, channel] = images[..., 2 - channel if channel < 3 <= channels else channel]
    return planes


def from_planes(planes: Tensor) -> np.ndarray:
    """The inverse of `to_planes` for one image uint8 (C,H,W) on the CPU."""
    channels = len(planes)
    order = [2, 1, 0, *range(3, channels)] if channels >= 3 else [*range(channels)]
    return planes[order].permute(1, 2, 0).numpy()


def distort(planes: Tensor, draws: Tensor) -> None:
    """Apply mmsegmentation's PhotoMetricDistortion in place to float32 planes (N,3,H,W) RGB, whole values 0..255.

    draws: float32 (N,5) on the CPU as `transforms.draw_distortion` makes them; NaN: the step is not applied to this
    image. Each step clips to 0..255 and truncates to whole levels. Of more than three planes, only the first three
    change. Of one or two, which have no colour, all change in brightness and contrast.

    The pixels are equal to OpenCV's with two exceptions, both by one level: 1 to 3 of 10000 saturation and hue values;
    and the last columns where the width is not a multiple of OpenCV's vector length (up to 64 pixels), as OpenCV rounds
    in these columns and truncates in all others.
    """
    if planes.shape[1] < 3:
        draws = draws.clone()
        draws[:, [SATURATION, HUE]] = torch.nan
    if draws.isnan().all():
        return
    pixels = planes[:, :3].view(len(planes), -1, planes[0, 0].numel())  # N,3,H*W; a view: a copy would stay unseen
    scratch = pixels.new_empty((5, len(pixels), pixels.shape[2]))
    for step in range(DRAWS):
        amounts = draws[:, step]
        taken = (~amounts.isnan()).nonzero()[:, 0]
        if len(taken) == 0:
            continue
        amount = amounts[taken].view(-1, 1, 1).to(pixels.device, non_blocking=True)
        workspace = scratch[:, : len(taken)]
        if len(taken) == len(draws):
            STEPS[step](pixels, amount, workspace)
            continue
        index = taken.to(pixels.device, non_blocking=True)
        group = pixels.index_select(0, index)
        STEPS[step](group, amount, workspace)
        pixels.index_copy_(0, index, group)


def _brightness(pixels: Tensor, delta: Tensor, _scratch: Tensor) -> None:
    """Add delta (n,1,1) levels in place to pixels (n,3,P)."""
    pixels.add_(delta).clamp_(0, 255).floor_()


def _contrast(pixels: Tensor, factor: Tensor, _scratch: Tensor) -> None:
    """Multiply pixels (n,3,P) in place by factor (n,1,1)."""
    pixels.mul_(factor).clamp_(0, 255).floor_()


def _saturation(pixels: Tensor, factor: Tensor, scratch: Tensor) -> None:
    """Multiply the saturation of pixels (n,3,P) in place by factor (n,1,1), in 8-bit HSV."""
    _to_hsv(pixels, scratch)
    scratch[1].mul_(factor[:, 0]).clamp_(0, 255).floor_()
    _from_hsv(pixels, scratch)


def _hue(pixels: Tensor, delta: Tensor, scratch: Tensor) -> None:
    """Turn the hue of pixels (n,3,P) in place by delta (n,1,1), in units of 2 degrees, in 8-bit HSV."""
    _to_hsv(pixels, scratch)
    _wrap(scratch[0].add_(delta[:, 0]), scratch[3])
    _from_hsv(pixels, scratch)


# In the order of the columns of `draws`. Contrast is applied early or late, never twice.
STEPS: tuple[Callable[[Tensor, Tensor, Tensor], None], ...] = (_brightness, _contrast, _saturation, _hue, _contrast)


def _to_hsv(pixels: Tensor, scratch: Tensor) -> None:
    """RGB pixels (n,3,P) to hue 0..179, saturation and value 0..255 in the first three planes of scratch (5,n,P).

    Exactly OpenCV's 8-bit conversion. In place of a division it multiplies with tables of round(255 * 4096 / value) and
    round(180 * 4096 / 6 / chroma), adds half of 4096 and shifts right by 12 bits. All products stay below 2^24, so that
    float32 holds them exactly.
    """
    red, green, blue = pixels.unbind(1)
    hue, saturation, value, chroma, other = scratch.unbind(0)
    torch.maximum(torch.maximum(red, green, out=value), blue, out=value)
    torch.minimum(torch.minimum(red, green, out=chroma), blue, out=chroma)
    torch.sub(value, chroma, out=chroma)

    # The numerator of the hue. `saturation` is not in use yet: until then it holds the values of one of three cases.
    torch.sub(red, green, out=hue).add_(chroma, alpha=4)
    torch.sub(blue, red, out=saturation).add_(chroma, alpha=2)
    _choose(saturation, hue, torch.sub(value, green, out=other))
    torch.sub(green, blue, out=saturation)
    _choose(saturation, hue, torch.sub(value, red, out=other))

    # Where value or chroma is 0, the other factor is 0 too.
    torch.clamp(value, min=1, out=saturation).reciprocal_().mul_(255 * 4096).round_()
    saturation.mul_(chroma).add_(2048).mul_(1 / 4096).floor_()
    chroma.clamp_(min=1).reciprocal_().mul_(180 * 4096 / 6).round_()
    hue.mul_(chroma).add_(2048).mul_(1 / 4096).floor_()
    _wrap(hue, other)


def _choose(first: Tensor, second: Tensor, which: Tensor) -> None:
    """Overwrite `second` with `first` where the whole number `which` is 0; keep it where `which` is positive.

    Clamped to 0..1, `which` is a mask. On a CPU this is several times faster than a comparison and `torch.where`.
    """
    second.sub_(first).mul_(which.clamp_(max=1)).add_(first)


def _wrap(hue: Tensor, turns: Tensor) -> None:
    """Whole numbers -180..359 to 0..179, in place; `turns` is overwritten. On a CPU faster than `remainder`."""
    # 0.5 is added so that the rounding error of 1/180 cannot cross a whole number.
    torch.add(hue, 0.5, out=turns).mul_(1 / 180).floor_()
    hue.sub_(turns, alpha=180)


def _from_hsv(pixels: Tensor, scratch: Tensor) -> None:
    """The inverse of `_to_hsv`: from the first three planes of scratch (5,n,P) to pixels (n,3,P). Overwrites scratch.

    Each channel is value * (1 - saturation * w), where w is a trapezium over the circle of hues: 0 where the channel is
    the largest, 1 where it is the smallest. These are OpenCV's float32 operations in the same order, except that OpenCV
    fuses one multiplication with the subtraction.
    """
    sector, saturation, value = (plane[:, None] for plane in scratch[:3])  # n,1,P
    sector.mul_(6 / 180)  # 0..6
    saturation.mul_(-1 / 255)
    value.mul_(1 / 255)
    # Red: w = 2 - |sector - 3|, clamped; green and blue: |sector - 2| - 1 and |sector - 4| - 1.
    for channel, middle in enumerate((3, 2, 4)):
        torch.sub(sector[:, 0], middle, out=pixels[:, channel])
    pixels.abs_()
    pixels[:, 0].neg_().add_(2)
    pixels[:, 1:].sub_(1)
    pixels.clamp_(0, 1).mul_(saturation).add_(1).mul_(value).mul_(255).floor_()


def normalize_planes(planes: Tensor, mean: Sequence[float], std: Sequence[float], sizes: Tensor | None) -> Tensor:
    """Normalise float32 planes (N,3,H,W) in place and set their padding to 0; returns them."""
    # Tensors, not Python numbers: PyTorch may compute a division by a number as a multiplication.
    centre, spread = (
        torch.tensor(values, dtype=torch.float32).view(-1, 1, 1).to(planes.device, non_blocking=True)
        for values in (mean, std)
    )
    planes.sub_(centre).div_(spread)
    for image, (height, width) in zip(planes, sizes.tolist() if sizes is not None else (), strict=False):
        image[:, height:] = 0
        image[:, :height, width:] = 0
    return planes
