"""Cross entropy and dice at the labels' size, although the upsampled logits of an image are never held at once.

Bilinear upsampling is a product with a matrix along each axis. Logits are widened along the columns for a whole image,
which has only few rows then, and along the rows for one band of output rows after the other. The gradient takes the
same way back. Nothing here holds state, and no loop depends on values.

Axes: N images, K classes, H×W label pixels, h×w logit pixels, R rows of a band. Labels are integers in [0, K), or
`IGNORE`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssaseg.models.classifiers.losses import IGNORE

LOG2_E = math.log2(math.e)

# Limits of a band on a CPU: its full-resolution logits should stay in the cache (4 MiB of float32), and it should read
# few rows of the small logits, since its matrix products cost rows times rows. Measured with 11, 30 and 150 classes.
BAND_ELEMENTS = 1 << 20

BAND_ROWS = 64

# Below this, in powers of 2, relative to the largest logit of its pixel, a small logit is too low for `_Powers`: an
# upsampled pixel keeps a quarter or more of one neighbour, so its largest logit could reach 2^-120, where float32 ends.
LOWEST = -160.0


class ImageTerms(NamedTuple):
    """Per-image sums, each (N,) float32; `cross_entropy` and `dice` are differentiable."""

    cross_entropy: Tensor  # summed over the pixels that are not ignored
    dice: Tensor  # summed over the classes present in the image
    valid: Tensor  # pixels that are not ignored, each times the weight of its class
    pairs: Tensor  # number of classes present


class Weighing(NamedTuple):
    """Weights of the pixels in a cross entropy. With the defaults each pixel counts once.

    The loss of a pixel of class y is w_y·(1−ε)·nll_y + ε/K·Σ_k w_k·nll_k, as in `F.cross_entropy(weight=,
    label_smoothing=)`. With a threshold only hard examples count: pixels where the probability of their own class is
    below the threshold. If an image has `min_kept` of them or fewer, the threshold is raised: to the probability at
    index `min_kept` of the image's probabilities in ascending order. This is mmsegmentation's OHEMPixelSampler for a
    batch of one image.
    """

    classes: Tensor | None = None  # (K,) w, float32, not all 0
    smoothing: float = 0.0  # ε in [0, 1]
    threshold: float | None = None  # probability in (0, 1]; None: all pixels count
    min_kept: int = 0  # pixels


class Branch(NamedTuple):
    """The logits of one branch of a classifier, and which terms they get."""

    logits: Tensor  # (N,K,h,w)
    align_corners: bool  # of the upsampling
    dice: bool = False
    weighing: Weighing = Weighing()


def full_resolution_terms(branches: Sequence[Branch], labels: Tensor) -> list[ImageTerms]:
    """Cross entropy and dice of each branch, upsampled bilinearly to the labels' size, summed per image.

    Logits (N,K,h,w) float, labels (N,H,W) integer. Only one band of one image is upsampled at a time, and backward
    stores only gradients of the size of the logits: their memory does not depend on H×W or N·H×W·K.
    Dice of a present class: 1 − (2Σpt + 1) / (Σp + Σt + 1), p = sigmoid, t = its mask, Σ over all pixels of the image.
    Without `dice` that term is 0. A branch's `weighing` applies to its cross entropy only; hard examples cost a second
    pass over the bands, and one float32 per pixel of one image.
    """
    pixels = class_pixels(labels, branches[0].logits.shape[1])
    settings = [branch[1:] for branch in branches]
    sums = _FullResolutionTerms.apply(labels, pixels, settings, *(branch.logits.float() for branch in branches))
    present = (pixels > 0).sum(dim=1).float()
    return [
        ImageTerms(
            cross_entropy,
            dice,
            pixels.sum(dim=1) if branch.weighing.classes is None else pixels @ branch.weighing.classes,
            present,
        )
        for branch, cross_entropy, dice in zip(branches, sums[::2], sums[1::2], strict=True)
    ]


def class_pixels(labels: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class in each image. (N,H,W) integer → (N,K) float32; ignored pixels are not counted."""
    counts = []
    for label in labels:  # one image at a time, so that index maps are small
        index = torch.where(label == IGNORE, num_classes, label).long().flatten()
        ones = torch.ones_like(index, dtype=torch.float32)
        counts.append(ones.new_zeros(num_classes + 1).scatter_add_(0, index, ones)[:num_classes])
    return torch.stack(counts)


class _FullResolutionTerms(torch.autograd.Function):
    """Forward also computes the gradients with respect to the small logits; backward is their weighted sum."""

    @staticmethod
    def forward(
        ctx: Any, labels: Tensor, pixels: Tensor, settings: list[tuple[bool, bool, Weighing]], *logits: Tensor
    ) -> tuple[Tensor, ...]:
        found: list[list[tuple[Tensor, ...]]] = [[] for _ in logits]
        for label, counts, *images in zip(labels, pixels, *logits, strict=True):
            target = _Target.of(label, counts)
            for image, (corners, dice, weighing), gradient, terms in zip(
                images, settings, ctx.needs_input_grad[3:], found, strict=True
            ):
                entropy = _cross_entropy(image, target, corners, weighing, gradient)
                terms.append((*entropy, *(_dice(image, target, corners, gradient) if dice else ())))
        stacked = [[torch.stack(each) for each in zip(*terms, strict=True)] for terms in found]
        ctx.save_for_backward(*(each for terms in stacked for each in terms[1::2]))
        ctx.dice = [dice for _, dice, _ in settings]
        sums = [(terms[0], terms[2] if len(terms) > 2 else torch.zeros_like(terms[0])) for terms in stacked]
        return tuple(each for pair in sums for each in pair)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        gradients = []
        for dice, entropy, dices in zip(ctx.dice, slopes[::2], slopes[1::2], strict=True):
            gradient = entropy[:, None, None, None] * next(saved)
            if dice:
                gradient.addcmul_(dices[:, None, None, None], next(saved))
            gradients.append(gradient)
        return None, None, None, *gradients


def _can_look(tensor: Tensor) -> bool:
    """Whether a shape or branch may depend on values: a value of a GPU has to be waited for, a compiler has none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


# ---- one image ---------------------------------------------------------------------------------------------------
class _Target(NamedTuple):
    """The label of one image, for all of its branches."""

    label: Tensor  # (H,1,W) int64; 0 for ignored pixels
    valid: Tensor  # (H,1,W) float32 1; 0 for ignored pixels
    pixels: Tensor  # (K,) float32 pixels of each class
    chosen: Tensor  # (P,) int64 the classes that dice looks at
    places: Tensor  # (H,1,W) int64 the label's place in `chosen`; 0 for ignored pixels

    @classmethod
    def of(cls, label: Tensor, pixels: Tensor) -> "_Target":
        """label (H,W) integer, pixels (K,)."""
        valid = (label != IGNORE).unsqueeze(1)
        index = torch.where(valid, label.unsqueeze(1), 0).long()
        every = torch.arange(len(pixels), device=label.device)
        chosen = every[pixels > 0] if _can_look(label) else every  # absent classes add nothing to dice
        places = torch.zeros_like(every).index_copy_(0, chosen, every[: len(chosen)])[index]
        return cls(index, valid.float(), pixels, chosen, places)


class _Band(NamedTuple):
    """Rows of an image that are upsampled together."""

    output: slice  # rows of the label
    source: slice  # rows of the small logits that it reads
    rows: Tensor  # (R,r) its rows of the interpolation matrix


class _Widened:
    """The logits of one image, widened along the columns, and its bands.

    Rows are the first axis, so that the vertical step of a band, and its transpose, is one matrix product over classes
    and columns together.
    """

    def __init__(self, logits: Tensor, height: int, width: int, align_corners: bool) -> None:
        """(K,h,w)."""
        self.columns = interpolation_matrix(width, logits.shape[2], align_corners, logits.device)  # (W,w)
        self.wide = logits.transpose(0, 1) @ self.columns.T  # (h,K,W)
        self.bands = _bands(self.wide, height, align_corners)

    def room(self) -> Tensor:
        """Memory for a band (R,K,W). On a CPU, new memory for each band would cost more than the arithmetic."""
        return self.wide.new_empty(self.bands[0].rows.shape[0], *self.wide.shape[1:])

    def upsample(self, band: _Band, room: Tensor) -> Tensor:
        """The upsampled logits of a band (R,K,W), written into the first rows of `room`."""
        logits = room[: band.rows.shape[0]]
        torch.mm(band.rows, self.wide[band.source].flatten(1), out=logits.flatten(1))
        return logits

    def add(self, sums: Tensor, band: _Band, values: Tensor) -> None:
        """Adds a band's values (R,K,W), taken back to the small rows, to `sums` (h,K,W)."""
        sums[band.source].flatten(1).addmm_(band.rows.T, values.flatten(1))

    def narrow(self, sums: Tensor) -> Tensor:
        """(h,K,W) → (K,h,w): the transpose of the horizontal step."""
        return (sums @ self.columns).transpose(0, 1)


def _bands(wide: Tensor, height: int, align_corners: bool) -> list[_Band]:
    """Bands of output rows: on a GPU a single one, as launches cost more than memory; on a CPU each fits the cache."""
    inputs, row_elements = wide.shape[0], wide[0].numel()
    matrix = interpolation_matrix(height, inputs, align_corners, wide.device)  # (H,h)
    step = max(min(BAND_ELEMENTS // row_elements, BAND_ROWS), 1) if wide.device.type == "cpu" else height
    # A band of output rows reads few input rows. They follow from the sizes alone.
    scale = (inputs - 1) / max(height - 1, 1) if align_corners else inputs / height
    shift = 0.0 if align_corners else scale / 2 - 0.5
    bands = []
    for start in range(0, height, step):
        stop = min(start + step, height)
        # The matrix is computed in single precision, whose error is below 1e-3 of a row.
        first = max(int(start * scale + shift - 1e-3), 0)
        last = min(int((stop - 1) * scale + shift + 1e-3) + 2, inputs)
        bands.append(_Band(slice(start, stop), slice(first, last), matrix[start:stop, first:last]))
    return bands


def interpolation_matrix(outputs: int, inputs: int, align_corners: bool, device: torch.device) -> Tensor:
    """Bilinear interpolation along one axis as a matrix (outputs, inputs), equal to `F.interpolate`'s weights.

    Products with it (and with its transpose, for gradients) are deterministic on every device, unlike
    `upsample_bilinear2d`'s backward on CUDA.
    """
    position = torch.arange(outputs, device=device, dtype=torch.float32)
    if align_corners:
        position = position * ((inputs - 1) / max(outputs - 1, 1))
    else:
        position = ((position + 0.5) * (inputs / outputs) - 0.5).clamp(min=0.0)
    distance = (position[:, None] - torch.arange(inputs, device=device)).abs()
    # Beyond the last input its weight stays 1: the border is repeated.
    return (1 - distance.clamp(max=1.0)) + (position > inputs - 1)[:, None] * (distance < 1) * distance


# ---- cross entropy -----------------------------------------------------------------------------------------------
def _cross_entropy(
    logits: Tensor, target: _Target, align_corners: bool, weighing: Weighing, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Cross entropy of one image, and its gradient. (K,h,w) → scalar, (K,h,w)."""
    powers = _Powers(logits, target, align_corners)
    kept = None if weighing.threshold is None else _hard_pixels(powers, target, weighing)
    total, sums = logits.new_zeros(()), torch.zeros_like(powers.wide)
    for band in powers.bands:
        index = target.label[band.output]
        own, spread = _weigh(target, weighing, band.output, kept)
        exponents = powers.upsample(band, powers.memory)
        chosen = exponents.gather(1, index)
        mean = chosen if spread is None else (spread[1] @ exponents).unsqueeze(1)  # before they are overwritten
        # exp2, as MKL's exp takes four times as long on AMD's processors.
        softmax = exponents.exp2_()
        mass = softmax.sum(dim=1, keepdim=True)
        normaliser = mass.log2()
        total.add_(((normaliser - chosen) * own).sum(), alpha=1 / LOG2_E)
        share = own
        if spread is not None:
            total.add_(((normaliser - mean) * spread[0]).sum(), alpha=1 / LOG2_E)
            share = own + spread[0]
        if gradient:
            softmax.mul_(share / mass).scatter_add_(1, index, -own)
            if spread is not None:
                softmax.addcmul_(spread[0], spread[1].unsqueeze(1), value=-1.0)
            powers.add(sums, band, softmax)
    return total, powers.narrow(sums)


class _Powers(_Widened):
    """log2(e) · (logit − the largest logit of its pixel), widened: what exp2 takes, with no value above 0.

    The largest is subtracted from the small logits. Upsampled logits are convex sums of small ones, so that none can be
    above the sum of the largest; and softmax does not change. Where a small logit is extremely low, all upsampled
    logits of a pixel could become too low: then their own largest is subtracted, which costs a pass over all of them.
    """

    def __init__(self, logits: Tensor, target: _Target, align_corners: bool) -> None:
        small = (logits - logits.amax(dim=0)).mul_(LOG2_E)
        super().__init__(small, target.label.shape[0], target.label.shape[2], align_corners)
        self.extreme = not _can_look(logits) or bool(small.amin() < LOWEST)
        self.memory = self.room()

    def upsample(self, band: _Band, room: Tensor) -> Tensor:
        exponents = super().upsample(band, room)
        return exponents.sub_(exponents.amax(dim=1, keepdim=True)) if self.extreme else exponents


def _weigh(
    target: _Target, weighing: Weighing, rows: slice, kept: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Factors (R,1,W) of the negative log probability of the label's class; and with smoothing: factors (R,1,W) of the
    weighted mean of all classes' negative log probabilities, and its weights (K,).

    kept (H,1,W): 1 for hard examples, else 0; None: all pixels count.
    """
    counted = target.valid[rows] if kept is None else target.valid[rows] * kept[rows]
    classes, smoothing = weighing.classes, weighing.smoothing
    own = counted if classes is None else counted * classes[target.label[rows]]
    if not smoothing:
        return own, None
    if classes is None:
        classes = torch.ones_like(target.pixels)
    return own * (1 - smoothing), (counted * (smoothing * classes.mean()), classes / classes.sum())


def _hard_pixels(powers: _Powers, target: _Target, weighing: Weighing) -> Tensor:
    """1 for the hard examples of an image (see `Weighing`), else 0. (H,1,W) float32."""
    probability = torch.empty_like(target.valid)
    for band in powers.bands:
        exponents = powers.upsample(band, powers.memory)
        own = exponents.gather(1, target.label[band.output])
        probability[band.output] = own.exp2_() / exponents.exp2_().sum(dim=1, keepdim=True)
    valid = target.valid > 0
    # 2 is larger than all probabilities: ignored pixels come after all others.
    probability = torch.where(valid, probability, 2.0)
    index = (valid.sum() - 1).clamp(min=0, max=weighing.min_kept)
    least = probability.flatten().sort().values.gather(0, index.view(1))
    return (probability < least.clamp(min=weighing.threshold)).float()


# ---- dice --------------------------------------------------------------------------------------------------------
def _dice(logits: Tensor, target: _Target, align_corners: bool, gradient: bool) -> tuple[Tensor, Tensor]:
    """Dice of one image, summed over the classes that it has, and its gradient. (K,h,w) → scalar, (K,h,w)."""
    chosen, pixels = target.chosen, target.pixels[target.chosen]
    if not len(chosen):
        return logits.new_zeros(()), torch.zeros_like(logits)
    widened = _Widened(logits[chosen], target.label.shape[0], target.label.shape[2], align_corners)
    rooms = widened.room(), widened.room()
    # Sums of sigmoids over all pixels and over the class's own, (P,), and of their slopes, (h,P,W).
    area, overlap = torch.zeros_like(pixels), torch.zeros_like(pixels)
    slopes, own_slopes = torch.zeros_like(widened.wide), torch.zeros_like(widened.wide)
    for band in widened.bands:
        index = target.places[band.output]
        sigmoid = widened.upsample(band, rooms[0]).sigmoid_()
        own = sigmoid.gather(1, index) * target.valid[band.output]  # (R,1,W) the label's class
        area.add_(sigmoid.sum(dim=(0, 2)))
        overlap.scatter_add_(0, index.flatten(), own.flatten())
        if gradient:
            slope = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1.0, out=rooms[1][: len(sigmoid)])
            widened.add(slopes, band, slope)
            widened.add(own_slopes, band, slope.zero_().scatter_(1, index, own * (1 - own)))
    present = (pixels > 0).float()
    numerator, denominator = 2 * overlap + 1, area + pixels + 1
    dice = (present * (1 - numerator / denominator)).sum()
    # d dice / d sigmoid = numerator/denominator² everywhere, plus −2/denominator where the label is the class.
    slopes.mul_((present * numerator / denominator**2).unsqueeze(1))
    slopes.addcmul_(own_slopes, (present * 2 / denominator).unsqueeze(1), value=-1.0)
    return dice, torch.zeros_like(logits).index_copy_(0, chosen, widened.narrow(slopes))
