"""Online multi-domain distillation: a teacher branch that sees the labels, and the losses between it and the student.

Source: "SSA-Seg" (NeurIPS 2024, arXiv 2405.06525, section 3.4) and its official implementation.

Axes: N images, K classes, C channels, h×w feature pixels, P = h·w, G groups of images.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssaseg.models.classifiers import losses
from ssaseg.models.classifiers.adaptation import class_means, concatenate, squeeze, upsampled_terms
from ssaseg.models.classifiers.upsampled import Branch, Weighing


class Adapted(NamedTuple):
    """The SSA classifier's intermediate results for one batch."""

    coarse: Tensor  # (N,K,h,w) logits before adaptation
    spatial_feature: Tensor  # (N,C,h,w) F_p
    feature: Tensor  # (N,C,h,w) F + F_p
    pixels: Tensor  # (N,P,C) pixels of `feature`, each divided by its norm
    semantic: Tensor  # (N,K,C) adapted semantic prototypes S'
    spatial: Tensor  # (N,K,C) adapted spatial prototypes P'
    logits: Tensor  # (N,K,h,w)


class PrototypeProjections(nn.Module):
    """φ_s, φ_p and the linear map that merges them. Student and teacher have one such set each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.semantic = squeeze(channels)
        self.spatial = squeeze(channels)
        self.merge = nn.Linear(channels, channels, bias=False)

    def forward(self, semantic: tuple[Tensor, Tensor], spatial: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Two pairs of prototypes, each (K,C) or (N,K,C), in the order of concatenation → S', P' and Z, all (N,K,C)."""
        semantic_out = self.semantic(concatenate(*semantic))
        spatial_out = self.spatial(concatenate(*spatial))
        return semantic_out, spatial_out, self.merge(semantic_out + spatial_out)


class Teaching(NamedTuple):
    """The teacher's results for one batch, with the labels and groups that it used."""

    labels: Tensor  # (N,h,w) at the feature's resolution
    members: Tensor  # (G,N)
    semantic: Tensor  # (N,K,C) S'_gt of each image's group
    spatial: Tensor  # (N,K,C) P'_gt
    logits: Tensor  # (N,K,h,w) T


def teach(
    projections: PrototypeProjections,
    fixed_semantic: Tensor,
    fixed_spatial: Tensor,
    feature: Tensor,
    student: Adapted,
    labels: Tensor,
    group: int,
) -> Teaching:
    """Prototypes from the labels: semantic ones per group, spatial ones per image; absent classes keep the fixed ones.

    projections: the teacher's; fixed prototypes (K,C), feature (N,C,h,w) float32, labels (N,H,W), images per group.
    Gradients of the teacher's own losses flow into both features.
    """
    small = losses.resize_labels(labels, feature.shape[-2:])
    members = losses.group_matrix(len(labels), group, feature.device)
    one_hot = losses.one_hot_pixels(small, len(fixed_semantic))  # (N,K,P)
    pixels = one_hot.sum(dim=2, keepdim=True)  # (N,K,1)
    sums = one_hot @ feature.flatten(2).transpose(1, 2)  # (N,K,C)
    group_sums = torch.einsum("gn,nkc->gkc", members, sums)
    group_pixels = torch.einsum("gn,nkc->gkc", members, pixels)
    semantic_mean = class_means(group_sums, group_pixels, fixed_semantic)  # (G,K,C)
    spatial_sums = one_hot @ student.spatial_feature.flatten(2).transpose(1, 2)
    spatial_mean = class_means(spatial_sums, pixels, fixed_spatial)  # (N,K,C)
    # Here the mean comes first in both pairs, unlike in the student.
    semantic, spatial, prototypes = projections(
        (torch.einsum("gn,gkc->nkc", members, semantic_mean), fixed_semantic),
        (spatial_mean, fixed_spatial),
    )
    logits = losses.cosine_logits(student.feature, prototypes, student.pixels)
    return Teaching(small, members, semantic, spatial, logits)


def terms(
    student: Adapted,
    teacher: Teaching,
    labels: Tensor,
    pairs: Tensor | None,
    weights: Mapping[str, float],
    weighing: Weighing,
) -> dict[str, Tensor]:
    """The weighted losses by name, averaged over groups; dice losses are averaged over the step's (image, class) pairs.

    `weighing`: of the main cross entropy; the other cross entropies use it without hard example mining.
    """
    members = teacher.members
    branches = {
        name: Branch(logits, True, bool(weights.get(f"{name}_dice")), counting)
        for name, logits, counting in (
            ("main", student.logits, weighing),
            ("coarse", student.coarse, weighing._replace(threshold=None)),
            ("teacher", teacher.logits, weighing._replace(threshold=None)),
        )
        if weights[f"{name}_ce"] or weights.get(f"{name}_dice")
    }
    found = upsampled_terms(branches, labels, members, pairs)
    if weights["response"]:
        found["response"] = losses.response_loss(student.logits, teacher.logits, teacher.labels, members)
    images = members.new_ones(len(labels))
    if weights["semantic"]:
        per_image = losses.semantic_loss(student.semantic, teacher.semantic)
        found["semantic"] = losses.group_ratio(per_image, images, members)
    if weights["spatial"]:
        per_image = losses.spatial_loss(student.spatial, teacher.spatial)
        found["spatial"] = losses.group_ratio(per_image, images, members)
    return {name: weight * found[name] for name, weight in weights.items() if weight and name in found}
