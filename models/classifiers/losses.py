"""Losses as pure functions of tensors. None holds state, waits for the device, or has a loop that depends on values.

Axes: N images, K classes, C channels, H×W label pixels, h×w logit pixels, P = h·w, G groups of images.
Labels are integers in [0, K), or `IGNORE`. Source of the definitions: "SSA-Seg" (NeurIPS 2024, arXiv 2405.06525)
and its official implementation; where the two differ, the implementation is followed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssaseg.models.classifiers.edges import boundary_map

IGNORE = 255

EPS = 1e-12


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
