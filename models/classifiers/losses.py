"""Losses as pure functions of tensors. None holds state, waits for the device, or has a loop that depends on values.

Axes: N images, K classes, C channels, H×W label pixels, h×w logit pixels, P = h·w, G groups of images, R band rows.
Labels are integers in [0, K), or `IGNORE`. Source of the definitions: "SSA-Seg" (NeurIPS 2024, arXiv 2405.06525)
and its official implementation; where the two differ, the implementation is followed.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssaseg.models.classifiers.edges import boundary_map

IGNORE = 255

EPS = 1e-12

LOG2_E = math.log2(math.e)

# Limits of a band on a CPU: its full-resolution logits should stay in the cache (4 MiB of float32), and it should read
# few rows of the small logits, since its matrix products cost rows times rows. Measured with 11, 30 and 150 classes.
BAND_ELEMENTS = 1 << 20

BAND_ROWS = 64


# ---- images of one group -----------------------------------------------------------------------------------------
def group_matrix(images: int, group: int, device: torch.device) -> Tensor:
    """Membership (G,N), 0 or 1, of N images cut in order into groups of `group`; the last group may be smaller."""
    groups = torch.arange(images, device=device) // group
    count = (images + group - 1) // group
    return (groups == torch.arange(count, device=device)[:, None]).float()


def group_ratio(numerator: Tensor, denominator: Tensor, members: Tensor) -> Tensor:
    """Mean over groups of (sum of numerator) / (sum of denominator, or 1 if 0). (N,), (N,), (G,N) → scalar."""
    total = members @ denominator
    return ((members @ numerator) / torch.where(total > 0, total, 1.0)).mean()


# ---- full-resolution cross entropy and dice ----------------------------------------------------------------------
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


def full_resolution_terms(
    logits: Tensor,
    labels: Tensor,
    align_corners: bool,
    dice: bool,
    pixels: Tensor | None = None,
    weighing: Weighing = Weighing(),  # noqa: B008 (immutable)
) -> ImageTerms:
    """Cross entropy and dice of logits upsampled bilinearly to the labels' size, summed per image.

    logits (N,K,h,w) float, labels (N,H,W) integer. Only one band of one image is upsampled at a time, and backward
    stores only gradients of the size of `logits`: their memory does not depend on H×W or N·H×W·K.
    Dice of a present class: 1 − (2Σpt + 1) / (Σp + Σt + 1), p = sigmoid, t = its mask, Σ over all pixels of the image.
    Without `dice` that term is 0. `pixels`: `class_pixels` of the labels, if already computed. `weighing` applies to
    the cross entropy only; hard examples cost a second pass over the bands, and one float32 per pixel of one image.
    """
    if pixels is None:
        pixels = class_pixels(labels, logits.shape[1])
    cross_entropy, dices = _FullResolutionTerms.apply(logits.float(), labels, pixels, align_corners, dice, *weighing)
    valid = pixels.sum(dim=1) if weighing.classes is None else pixels @ weighing.classes
    return ImageTerms(cross_entropy, dices, valid, (pixels > 0).sum(dim=1).float())


def class_pixels(labels: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class in each image. (N,H,W) integer → (N,K) float32; ignored pixels are not counted."""
    counts = []
    for label in labels:  # one image at a time, so that index maps are small
        index = torch.where(label == IGNORE, num_classes, label).long().flatten()
        ones = torch.ones_like(index, dtype=torch.float32)
        counts.append(ones.new_zeros(num_classes + 1).scatter_add_(0, index, ones)[:num_classes])
    return torch.stack(counts)


class _FullResolutionTerms(torch.autograd.Function):
    """Forward also computes both gradients with respect to the small logits; backward is their weighted sum."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, pixels: Tensor, align_corners: bool, dice: bool, *weighing: Any
    ) -> tuple[Tensor, Tensor]:
        images = [
            _image_terms(*image, align_corners, dice, Weighing(*weighing), gradient=ctx.needs_input_grad[0])
            for image in zip(logits, labels, pixels, strict=True)
        ]
        entropy, dices, entropy_grad, dice_grad = (torch.stack(each) for each in zip(*images, strict=True))
        ctx.save_for_backward(entropy_grad, dice_grad)
        ctx.dice = dice
        return entropy, dices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        entropy_grad, dice_grad = ctx.saved_tensors
        gradient = grads[0][:, None, None, None] * entropy_grad
        if ctx.dice:
            gradient = gradient + grads[1][:, None, None, None] * dice_grad
        return gradient, *[None] * (4 + len(Weighing._fields))


def _image_terms(
    logits: Tensor,
    label: Tensor,
    pixels: Tensor,
    align_corners: bool,
    dice: bool,
    weighing: Weighing,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One image of `full_resolution_terms`. (K,h,w), (H,W), (K,) → two scalars and their gradients (K,h,w)."""
    classes = logits.shape[0]
    columns = interpolation_matrix(label.shape[1], logits.shape[2], align_corners, logits.device)  # (W,w)
    # First the horizontal step, for the whole image: it has only h rows. Rows are the first axis, so that the vertical
    # step of a band, and its transpose, is one matrix product over classes and columns together.
    wide = logits.transpose(0, 1) @ columns.T  # (h,K,W)
    bands = _bands(wide, label.shape[0], align_corners)
    # Allocated once for all bands: on a CPU, new memory for each band would cost more than the arithmetic.
    room = tuple(wide.new_empty(bands[0].rows.shape[0], *wide.shape[1:]) for _ in range(2))
    kept = None if weighing.threshold is None else _hard_pixels(wide, label, bands, weighing, room[0])
    sums = _BandSums.zeros(wide)
    for band in bands:
        weights = _weigh_pixels(label[band.output], classes, weighing, kept if kept is None else kept[band.output])
        _add_band(sums, wide, band, weights, room, dice, gradient)
    entropy_grad = (sums.entropy_grad @ columns).transpose(0, 1)  # (K,h,w)
    if not dice:
        return sums.entropy, torch.zeros_like(sums.entropy), entropy_grad, torch.zeros_like(logits)
    numerator, denominator = 2 * sums.overlap + 1, sums.area + pixels + 1
    present = (pixels > 0).float()
    dices = (present * (1 - numerator / denominator)).sum()
    # d dice / d sigmoid = numerator/denominator² everywhere, plus −2/denominator where the label is the class.
    slope = sums.slope_all.mul_((present * numerator / denominator**2).unsqueeze(1))
    slope.addcmul_(sums.slope_label, (present * 2 / denominator).unsqueeze(1), value=-1.0)
    return sums.entropy, dices, entropy_grad, (slope @ columns).transpose(0, 1)


class _BandSums(NamedTuple):
    """Sums over the bands of one image, updated in place."""

    entropy: Tensor  # scalar
    area: Tensor  # (K,) sum of sigmoids
    overlap: Tensor  # (K,) sum of sigmoids where the label is the class
    entropy_grad: Tensor  # (h,K,W) softmax minus one-hot, summed to h rows
    slope_all: Tensor  # (h,K,W) slope of the sigmoid, s(1−s), summed to h rows
    slope_label: Tensor  # (h,K,W) the same, only where the label is the class

    @classmethod
    def zeros(cls, wide: Tensor) -> "_BandSums":
        per_class = wide.new_zeros(wide.shape[1])
        return cls(wide.new_zeros(()), per_class, per_class.clone(), *(torch.zeros_like(wide) for _ in range(3)))


class _Band(NamedTuple):
    """Rows of an image that are upsampled together."""

    output: slice  # rows of the label
    source: slice  # rows of the small logits that it reads
    rows: Tensor  # (R,r) its rows of the interpolation matrix


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


def _band_logits(wide: Tensor, band: _Band, room: Tensor) -> Tensor:
    """The upsampled logits of a band, written into the first rows of `room`. wide (h,K,W) → (R,K,W)."""
    logits = room[: band.rows.shape[0]]
    torch.mm(band.rows, wide[band.source].flatten(1), out=logits.flatten(1))
    return logits


class _PixelWeights(NamedTuple):
    """Weights of the pixels of a band in the cross entropy, each (R,1,W)."""

    target: Tensor  # the label; 0 for ignored pixels
    valid: Tensor  # 1; 0 for ignored pixels
    own: Tensor  # factor of the negative log probability of the label's class
    # With smoothing: factor of the weighted mean of all classes' negative log probabilities, and its weights (K,).
    spread: tuple[Tensor, Tensor] | None


def _weigh_pixels(label: Tensor, num_classes: int, weighing: Weighing, kept: Tensor | None) -> _PixelWeights:
    """For a band's labels (R,W). kept (R,W): 1 for hard examples, else 0; None: all pixels count."""
    valid = label != IGNORE
    index = torch.where(valid, label, 0).long().unsqueeze(1)
    weight = valid.float().unsqueeze(1)
    classes, smoothing = weighing.classes, weighing.smoothing
    counted = weight if kept is None else weight * kept.unsqueeze(1)
    own = counted if classes is None else counted * classes[index]
    if not smoothing:
        return _PixelWeights(index, weight, own, None)
    if classes is None:
        classes = weight.new_ones(num_classes)
    spread = counted * (smoothing * classes.mean()), classes / classes.sum()
    return _PixelWeights(index, weight, own * (1 - smoothing), spread)


def _hard_pixels(wide: Tensor, label: Tensor, bands: list[_Band], weighing: Weighing, room: Tensor) -> Tensor:
    """1 for the hard examples of an image (see `Weighing`), else 0. wide (h,K,W), label (H,W) → (H,W) float32."""
    valid = label != IGNORE
    probability = torch.empty_like(label, dtype=torch.float32)
    for band in bands:
        logits = _band_logits(wide, band, room)
        index = torch.where(valid[band.output], label[band.output], 0).long().unsqueeze(1)
        own = logits.gather(1, index).squeeze(1) - logits.logsumexp(dim=1)
        probability[band.output].copy_(own.exp_())
    # 2 is larger than all probabilities: ignored pixels come after all others.
    probability = torch.where(valid, probability, 2.0)
    index = (valid.sum() - 1).clamp(min=0, max=weighing.min_kept)
    least = probability.flatten().sort().values.gather(0, index.view(1))
    return (probability < least.clamp(min=weighing.threshold)).float()


def _add_band(
    sums: _BandSums,
    wide: Tensor,
    band: _Band,
    weights: _PixelWeights,
    room: tuple[Tensor, ...],
    dice: bool,
    gradient: bool,
) -> None:
    """Adds one band of an image to `sums`. wide (h,K,W); `room` is overwritten."""
    index, valid, weight, spread = weights
    logits = _band_logits(wide, band, room[0])
    top = logits.amax(dim=1, keepdim=True)
    # exp2, as MKL's exp takes four times as long on AMD's processors. The factor log2(e) costs no extra pass here.
    softmax = torch.add(-LOG2_E * top, logits, alpha=LOG2_E, out=room[1][: len(logits)]).exp2_()
    total = softmax.sum(dim=1, keepdim=True)
    normaliser = total.log() + top
    sums.entropy.add_(((normaliser - logits.gather(1, index)) * weight).sum())
    mass = weight
    if spread is not None:
        factor, mean_weights = spread
        sums.entropy.add_(((normaliser - (mean_weights @ logits).unsqueeze(1)) * factor).sum())
        mass = weight + factor
    if gradient:
        softmax.mul_(mass / total).scatter_add_(1, index, -weight)
        if spread is not None:
            softmax.addcmul_(factor, mean_weights.unsqueeze(1), value=-1.0)
        sums.entropy_grad[band.source].flatten(1).addmm_(band.rows.T, softmax.flatten(1))
    if not dice:
        return
    sigmoid = logits.sigmoid_()
    own = sigmoid.gather(1, index) * valid  # (R,1,W) the label's own class
    sums.area.add_(sigmoid.sum(dim=(0, 2)))
    sums.overlap.scatter_add_(0, index.flatten(), own.flatten())
    if gradient:
        slope = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1.0, out=softmax)
        sums.slope_all[band.source].flatten(1).addmm_(band.rows.T, slope.flatten(1))
        only_label = slope.zero_().scatter_(1, index, own * (1 - own))
        sums.slope_label[band.source].flatten(1).addmm_(band.rows.T, only_label.flatten(1))


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


# ---- low-resolution terms ----------------------------------------------------------------------------------------
def one_hot_pixels(labels: Tensor, num_classes: int) -> Tensor:
    """(N,h,w) integer → (N,K,P) float32, all zero at ignored pixels."""
    return (labels.flatten(1).unsqueeze(1) == torch.arange(num_classes, device=labels.device)[:, None]).float()


def response_loss(logits: Tensor, teacher: Tensor, labels: Tensor, members: Tensor, edges: bool = True) -> Tensor:
    """Response distillation at the logits' own resolution: SSA-Seg's, with `edges`; CAC's, without.

    logits and teacher (N,K,h,w), labels (N,h,w), members (G,N) → scalar. The target is half the teacher's softmax, half
    the label. A pixel's weight is the teacher's entropy. For each class, the loss is a mean over its pixels; with
    `edges`, the average of two means: over its boundary and over its interior. A mean over no pixels is 0. Then the
    mean over the classes present in a group is taken, and the mean over groups.
    """
    classes = logits.shape[1]
    valid = labels != IGNORE
    probability = teacher.detach().softmax(dim=1)
    entropy = -(probability * (probability + EPS).log()).sum(dim=1) * valid  # (N,h,w)
    log_probability = logits.log_softmax(dim=1)
    # Ignored pixels take class 0 here; their weight, the entropy above, is 0.
    own = log_probability.gather(1, torch.where(valid, labels, 0).long().unsqueeze(1)).squeeze(1)
    pixel_loss = -0.5 * (probability * log_probability).sum(dim=1) - 0.5 * own  # (N,h,w)
    if edges:
        edge = boundary_map(labels).float()
        weights = torch.stack([entropy * edge, entropy * (1 - edge)], dim=-1).flatten(1, 2)  # (N,P,2)
    else:
        weights = entropy.flatten(1).unsqueeze(-1)  # (N,P,1)
    summands = torch.cat([weights * pixel_loss.flatten(1).unsqueeze(-1), weights], dim=-1)  # (N,P,4 or 2)
    one_hot = one_hot_pixels(labels, classes)
    sums = torch.einsum("gn,nks->gks", members, one_hot @ summands)  # (G,K,4 or 2)
    weighted, weight = sums.chunk(2, dim=-1)
    per_class = (weighted / (weight + EPS)).mean(dim=-1)  # (G,K)
    present = (members @ one_hot.sum(dim=-1) > 0).float()
    return ((per_class * present).sum(dim=1) / present.sum(dim=1).clamp(min=1.0)).mean()


def semantic_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Inter-class relation distillation between semantic prototypes, both (N,K,C) → (N,), per image.

    Relations: softmax of 15 · cosine over the classes. Only relations that are stronger in the student have a loss.
    """
    excess = (_relations(student) - _relations(teacher.detach())).clamp(min=0.0)
    off_diagonal = 1 - torch.eye(student.shape[1], device=student.device)
    return (excess * off_diagonal).sum(dim=2).mean(dim=1)


def _relations(prototypes: Tensor) -> Tensor:
    """(N,K,C) → (N,K,K); gradients flow only through the row's class."""
    return (15 * cosine(prototypes, prototypes.detach())).softmax(dim=2)


def spatial_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy between the softmaxes over channels of spatial prototypes, both (N,K,C) → (N,), per image."""
    return -(teacher.detach().softmax(dim=2) * student.log_softmax(dim=2)).sum(dim=2).mean(dim=1)


def directions(vectors: Tensor) -> Tensor:
    """(N,·,C) → (N,·,C): each vector divided by its norm + 1e-12."""
    return vectors / above_zero(vectors.norm(dim=2, keepdim=True))


def above_zero(sums: Tensor) -> Tensor:
    """Sums + 1e-12. Not a scalar: the optimiser of ONNX files leaves out "+ 1e-12", as if it were 0."""
    return sums + torch.full((1,), EPS, device=sums.device, dtype=sums.dtype)


def pixel_directions(feature: Tensor) -> Tensor:
    """`directions` of a feature's pixels. (N,C,h,w) → (N,P,C)."""
    return directions(feature.flatten(2).transpose(1, 2))


def cosine(rows: Tensor, columns: Tensor) -> Tensor:
    """Cosines between (N,K,C) and (N,P,C) → (N,K,P)."""
    return directions(rows) @ directions(columns).transpose(1, 2)


def cosine_logits(feature: Tensor, prototypes: Tensor, pixels: Tensor | None = None) -> Tensor:
    """15 · cosine of each pixel with each prototype. (N,C,h,w), (N,K,C) → (N,K,h,w).

    `pixels`: `pixel_directions` of the feature, if already computed.
    """
    pixels = pixel_directions(feature) if pixels is None else pixels
    return (directions(prototypes) @ pixels.transpose(1, 2)).mul_(15).unflatten(2, feature.shape[-2:])


def resize_labels(labels: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(N,H,W) integer → (N,h,w), nearest neighbour as in `F.interpolate` of float labels."""
    small = [F.interpolate(label[None, None].float(), tuple(size), mode="nearest")[0, 0] for label in labels]
    return torch.stack(small).long()
