"""Losses as pure functions of tensors: nothing here holds state, waits for the device or loops over what data decides.

Axes: N images, K classes, C channels, H×W label pixels, h×w logit pixels, P = h·w, G groups of images, R band rows.
Labels are integers in [0, K), or `IGNORE`. Source of the definitions: "SSA-Seg" (NeurIPS 2024, arXiv 2405.06525)
and its official implementation, whose behaviour is kept where the two differ.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = 255
EPS = 1e-12
# On a CPU a band of full-resolution logits should stay in the cache: 2 MiB of float32.
BAND_ELEMENTS = 1 << 19


# ---- images of one group -----------------------------------------------------------------------------------------


def group_matrix(images: int, group: int, device: torch.device) -> Tensor:
    """Membership (G,N), 0 or 1, of N images cut in order into groups of `group`; the last group may be smaller."""
    groups = torch.arange(images, device=device) // group
    count = (images + group - 1) // group
    return (groups == torch.arange(count, device=device)[:, None]).float()


def group_ratio(numerator: Tensor, denominator: Tensor, members: Tensor) -> Tensor:
    """Mean over groups of (sum of numerator) / (sum of denominator, at least 1). (N,), (N,), (G,N) → scalar."""
    return ((members @ numerator) / (members @ denominator).clamp(min=1.0)).mean()


# ---- full-resolution cross entropy and dice ----------------------------------------------------------------------


class ImageTerms(NamedTuple):
    """Per-image sums, each (N,) float32; `cross_entropy` and `dice` are differentiable."""

    cross_entropy: Tensor  # summed over the pixels that are not ignored
    dice: Tensor  # summed over the classes present in the image
    valid: Tensor  # pixels not ignored
    pairs: Tensor  # classes present


def full_resolution_terms(
    logits: Tensor, labels: Tensor, align_corners: bool, dice: bool, pixels: Tensor | None = None
) -> ImageTerms:
    """Cross entropy and dice of logits upsampled bilinearly to the labels' size, summed per image.

    logits (N,K,h,w) float, labels (N,H,W) integer. The upsampled logits exist for one band of one image at a time, and
    backward keeps only gradients of the size of `logits`: their memory does not depend on H×W or N·H×W·K.
    Dice of a present class: 1 − (2Σpt + 1) / (Σp + Σt + 1), p = sigmoid, t = its mask, Σ over all pixels of the image.
    Without `dice` that term is 0. `pixels`: `class_pixels` of the labels, where it is known already.
    """
    if pixels is None:
        pixels = class_pixels(labels, logits.shape[1])
    cross_entropy, dices = _FullResolutionTerms.apply(logits.float(), labels, pixels, align_corners, dice)
    return ImageTerms(cross_entropy, dices, pixels.sum(dim=1), (pixels > 0).sum(dim=1).float())


def class_pixels(labels: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class in each image. (N,H,W) integer → (N,K) float32; ignored pixels are not counted."""
    counts = []
    for label in labels:  # one image at a time, so that no index map is larger than one image
        index = torch.where(label == IGNORE, num_classes, label).long().flatten()
        ones = torch.ones_like(index, dtype=torch.float32)
        counts.append(ones.new_zeros(num_classes + 1).scatter_add_(0, index, ones)[:num_classes])
    return torch.stack(counts)


class _FullResolutionTerms(torch.autograd.Function):
    """Forward also computes both gradients with respect to the small logits, so backward is a weighted sum of them."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, pixels: Tensor, align_corners: bool, dice: bool
    ) -> tuple[Tensor, Tensor]:
        images = [
            _image_terms(*image, align_corners, dice, gradient=ctx.needs_input_grad[0])
            for image in zip(logits, labels, pixels, strict=True)
        ]
        entropy, dices, entropy_grad, dice_grad = (torch.stack(parts) for parts in zip(*images, strict=True))
        ctx.save_for_backward(entropy_grad, dice_grad)
        ctx.dice = dice
        return entropy, dices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        entropy_grad, dice_grad = ctx.saved_tensors
        gradient = grads[0][:, None, None, None] * entropy_grad
        if ctx.dice:
            gradient = gradient + grads[1][:, None, None, None] * dice_grad
        return gradient, None, None, None, None


def _image_terms(
    logits: Tensor, label: Tensor, pixels: Tensor, align_corners: bool, dice: bool, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One image of `full_resolution_terms`. (K,h,w), (H,W), (K,) → two scalars and their gradients (K,h,w)."""
    classes, height, _ = logits.shape
    rows = interpolation_matrix(label.shape[0], height, align_corners, logits.device)  # (H,h)
    columns = interpolation_matrix(label.shape[1], logits.shape[2], align_corners, logits.device)  # (W,w)
    # The horizontal step first, one h-th of an image's worth. Rows lead, so that the vertical step of a band, and its
    # transpose, is one matrix product over classes and columns together.
    wide = logits.transpose(0, 1) @ columns.T  # (h,K,W)
    sums = _BandSums.zeros(wide)
    for start, stop in _bands(label.shape[0], classes * label.shape[1], logits.device):
        # A band of output rows reads few input rows; which ones, geometry alone decides.
        first, last = _source_rows(start, stop, label.shape[0], height, align_corners)
        _add_band(sums, wide, label[start:stop], rows[start:stop, first:last], slice(first, last), dice, gradient)
    entropy_grad = (sums.entropy_grad @ columns).transpose(0, 1)  # (K,h,w)
    if not dice:
        return sums.entropy, torch.zeros_like(sums.entropy), entropy_grad, torch.zeros_like(logits)
    numerator, denominator = 2 * sums.overlap + 1, sums.area + pixels + 1
    present = (pixels > 0).float()
    dices = (present * (1 - numerator / denominator)).sum()
    # d dice / d sigmoid = numerator/denominator² everywhere, and −2/denominator more where the label is the class.
    slope = sums.slope_all.mul_((present * numerator / denominator**2).unsqueeze(1))
    slope.addcmul_(sums.slope_label, (present * 2 / denominator).unsqueeze(1), value=-1.0)
    return sums.entropy, dices, entropy_grad, (slope @ columns).transpose(0, 1)


class _BandSums(NamedTuple):
    """What the bands of one image add up to, updated in place."""

    entropy: Tensor  # scalar
    area: Tensor  # (K,) sum of sigmoids
    overlap: Tensor  # (K,) sum of sigmoids where the label is the class
    entropy_grad: Tensor  # (h,K,W) softmax minus one-hot, brought down to h rows
    slope_all: Tensor  # (h,K,W) sigmoid's slope s(1−s), brought down
    slope_label: Tensor  # (h,K,W) the same, only where the label is the class

    @classmethod
    def zeros(cls, wide: Tensor) -> "_BandSums":
        per_class = wide.new_zeros(wide.shape[1])
        return cls(wide.new_zeros(()), per_class, per_class.clone(), *(torch.zeros_like(wide) for _ in range(3)))


def _add_band(
    sums: _BandSums, wide: Tensor, label: Tensor, rows: Tensor, source: slice, dice: bool, gradient: bool
) -> None:
    """Adds one band to `sums`. wide (h,K,W), label (R,W), rows (R,r): the band's share of the row interpolation."""
    valid = label != IGNORE
    index = torch.where(valid, label, 0).long().unsqueeze(1)  # (R,1,W)
    weight = valid.float().unsqueeze(1)
    logits = (rows @ wide[source].flatten(1)).unflatten(1, wide.shape[1:])  # (R,K,W)
    top = logits.amax(dim=1, keepdim=True)
    softmax = (logits - top).exp_()
    total = softmax.sum(dim=1, keepdim=True)
    sums.entropy.add_(((total.log() + top - logits.gather(1, index)) * weight).sum())
    if gradient:
        softmax.mul_(weight / total).scatter_add_(1, index, -weight)
        sums.entropy_grad[source].flatten(1).addmm_(rows.T, softmax.flatten(1))
    if not dice:
        return
    sigmoid = logits.sigmoid_()
    own = sigmoid.gather(1, index) * weight  # (R,1,W) the label's own class
    sums.area.add_(sigmoid.sum(dim=(0, 2)))
    sums.overlap.scatter_add_(0, index.flatten(), own.flatten())
    if gradient:
        slope = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1.0, out=softmax)
        sums.slope_all[source].flatten(1).addmm_(rows.T, slope.flatten(1))
        only_label = slope.zero_().scatter_(1, index, own * (1 - own))
        sums.slope_label[source].flatten(1).addmm_(rows.T, only_label.flatten(1))


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
    # Past the last input its weight stays 1: the edge is repeated.
    return (1 - distance.clamp(max=1.0)) + (position > inputs - 1)[:, None] * (distance < 1) * distance


def _bands(rows: int, row_elements: int, device: torch.device) -> list[tuple[int, int]]:
    """Bands of output rows: all at once on a GPU, where launches cost more than memory; cache-sized on a CPU."""
    step = max(BAND_ELEMENTS // row_elements, 1) if device.type == "cpu" else rows
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _source_rows(start: int, stop: int, outputs: int, inputs: int, align_corners: bool) -> tuple[int, int]:
    """Range of input rows that output rows [start, stop) may read, a row to spare on both sides."""
    scale = (inputs - 1) / max(outputs - 1, 1) if align_corners else inputs / outputs
    return max(int(start * scale) - 2, 0), min(int(stop * scale) + 3, inputs)


# ---- low-resolution terms ----------------------------------------------------------------------------------------


def one_hot_pixels(labels: Tensor, num_classes: int) -> Tensor:
    """(N,h,w) integer → (N,K,P) float32, all zero at ignored pixels."""
    return (labels.flatten(1).unsqueeze(1) == torch.arange(num_classes, device=labels.device)[:, None]).float()


def response_loss(logits: Tensor, teacher: Tensor, labels: Tensor, members: Tensor) -> Tensor:
    """Boundary-aware response distillation at the logits' own resolution.

    logits and teacher (N,K,h,w), labels (N,h,w), members (G,N) → scalar. Soft target: half the teacher's softmax, half
    the label; pixels weigh by the teacher's entropy; per class the mean over its boundary and the mean over its
    interior are averaged, an empty side counting as 0; then the mean over the classes present in a group, over groups.
    """
    classes = logits.shape[1]
    valid = labels != IGNORE
    probability = teacher.detach().softmax(dim=1)
    entropy = -(probability * (probability + EPS).log()).sum(dim=1) * valid  # (N,h,w)
    log_probability = logits.log_softmax(dim=1)
    # An ignored pixel takes class 0 here; its weight, the entropy above, is already 0.
    own = log_probability.gather(1, torch.where(valid, labels, 0).long().unsqueeze(1)).squeeze(1)
    pixel_loss = -0.5 * (probability * log_probability).sum(dim=1) - 0.5 * own  # (N,h,w)
    edge = boundary_map(labels).float()
    weights = torch.stack([entropy * edge, entropy * (1 - edge)], dim=-1).flatten(1, 2)  # (N,P,2)
    parts = torch.cat([weights * pixel_loss.flatten(1).unsqueeze(-1), weights], dim=-1)  # (N,P,4)
    one_hot = one_hot_pixels(labels, classes)
    sums = torch.einsum("gn,nks->gks", members, one_hot @ parts)  # (G,K,4)
    per_class = (sums[..., :2] / (sums[..., 2:] + EPS)).mean(dim=-1)  # (G,K)
    present = (members @ one_hot.sum(dim=-1) > 0).float()
    return ((per_class * present).sum(dim=1) / present.sum(dim=1).clamp(min=1.0)).mean()


def semantic_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Inter-class relation distillation between semantic prototypes, both (N,K,C) → (N,), per image.

    Relations: softmax over the other classes of 15 · cosine. Only relations that the student has too strong cost.
    """
    excess = (_relations(student) - _relations(teacher.detach())).clamp(min=0.0)
    off_diagonal = 1 - torch.eye(student.shape[1], device=student.device)
    return (excess * off_diagonal).sum(dim=2).mean(dim=1)


def _relations(prototypes: Tensor) -> Tensor:
    """(N,K,C) → (N,K,K); the gradient flows through the row's class alone."""
    return (15 * cosine(prototypes, prototypes.detach())).softmax(dim=2)


def spatial_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy between spatial prototypes' softmaxes over channels, both (N,K,C) → (N,), per image."""
    return -(teacher.detach().softmax(dim=2) * student.log_softmax(dim=2)).sum(dim=2).mean(dim=1)


def cosine(rows: Tensor, columns: Tensor) -> Tensor:
    """Cosines between (N,K,C) and (N,P,C) → (N,K,P); each vector is divided by its norm + 1e-12."""
    rows = rows / (rows.norm(dim=2, keepdim=True) + EPS)
    columns = columns / (columns.norm(dim=2, keepdim=True) + EPS)
    return rows @ columns.transpose(1, 2)


def cosine_logits(feature: Tensor, prototypes: Tensor) -> Tensor:
    """15 · cosine of each pixel with each prototype. (N,C,h,w), (N,K,C) → (N,K,h,w)."""
    pixels = feature.flatten(2).transpose(1, 2)  # (N,P,C)
    return 15 * cosine(prototypes, pixels).unflatten(2, feature.shape[-2:])


def resize_labels(labels: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(N,H,W) integer → (N,h,w), nearest neighbour as `F.interpolate` takes it from float labels."""
    small = [F.interpolate(label[None, None].float(), tuple(size), mode="nearest")[0, 0] for label in labels]
    return torch.stack(small).long()


def boundary_map(labels: Tensor) -> Tensor:
    """Label edges as the official code finds them, on the device: (N,h,w) integer → (N,h,w) bool.

    Equal to `cv2.Canny(label as uint8, 0.1, 0.2)`, then a frame of 6 pixels zeroed, then dilation by a 3×3 square.
    OpenCV floors both thresholds to 0, so hysteresis adds nothing: an edge is a local maximum of the L1 Sobel
    gradient along its direction, found in OpenCV's integers. A side of 12 pixels or fewer leaves no edge.
    """
    height, width = labels.shape[-2:]
    edges = _local_maxima(*_sobel(labels.int()))
    inside = torch.zeros(height, width, dtype=torch.bool, device=labels.device)
    inside[6 : max(height - 6, 6), 6 : max(width - 6, 6)] = True
    grown = F.max_pool2d((edges & inside).float().unsqueeze(1), 3, stride=1, padding=1)
    return grown.squeeze(1) > 0


def _sobel(image: Tensor) -> tuple[Tensor, Tensor]:
    """3×3 Sobel with the border repeated. (N,h,w) int32 → horizontal and vertical gradients, in grey levels."""
    rows = torch.cat([image[:, :1], image, image[:, -1:]], dim=1)
    padded = torch.cat([rows[:, :, :1], rows, rows[:, :, -1:]], dim=2)
    smooth_rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    smooth_columns = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return smooth_rows[:, :, 2:] - smooth_rows[:, :, :-2], smooth_columns[:, 2:] - smooth_columns[:, :-2]


def _local_maxima(dx: Tensor, dy: Tensor) -> Tensor:
    """Non-maximum suppression along the gradient, in four directions. (N,h,w) int32 twice → bool."""
    magnitude = dx.abs() + dy.abs()
    padded = F.pad(magnitude, (1, 1, 1, 1))
    height, width = magnitude.shape[-2:]

    def neighbour(down: int, right: int) -> Tensor:
        return padded[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    # tan 22.5° in 15-bit fixed point; tan 67.5° = tan 22.5° + 2. All values stay below 2^27.
    x, y = dx.abs(), dy.abs() << 15
    shallow = x * 13573
    steep = shallow + (x << 16)
    # The earlier neighbour must be lower, the later one not higher, so that a plateau of two gives one edge;
    # on diagonals OpenCV asks for lower on both sides.
    horizontal = (magnitude > neighbour(0, -1)) & (magnitude >= neighbour(0, 1))
    vertical = (magnitude > neighbour(-1, 0)) & (magnitude >= neighbour(1, 0))
    falling = (magnitude > neighbour(-1, -1)) & (magnitude > neighbour(1, 1))
    rising = (magnitude > neighbour(-1, 1)) & (magnitude > neighbour(1, -1))
    diagonal = torch.where((dx ^ dy) < 0, rising, falling)
    maximum = torch.where(y < shallow, horizontal, torch.where(y > steep, vertical, diagonal))
    return (magnitude > 0) & maximum
