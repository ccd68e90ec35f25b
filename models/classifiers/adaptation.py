"""What CAC's and SSA-Seg's classifiers share: class means of an image, projections, and losses at full resolution.

Sources: "Context-aware Classifier" (AAAI 2023, arXiv 2303.11633) and "SSA-Seg" (NeurIPS 2024, arXiv 2405.06525), with
their official implementations.

Axes: N images, K classes, C channels, h×w feature pixels, P = h·w, G groups of images.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssaseg.models.classifiers import losses
from ssaseg.models.classifiers.upsampled import Branch, full_resolution_terms


def squeeze(channels: int) -> nn.Sequential:
    """Two linear layers with a bottleneck: (…,2C) → (…,C)."""
    hidden = channels // 2
    return nn.Sequential(nn.Linear(2 * channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels))


def concatenate(first: Tensor, second: Tensor) -> Tensor:
    """Along channels; (K,C) is repeated for each image of the other, (N,K,C)."""
    return torch.cat(torch.broadcast_tensors(first, second), dim=-1)


def semantic_means(feature: Tensor, scores: Tensor) -> Tensor:
    """The image's mean of each class. (N,C,h,w), logits before adaptation (N,K,P) → (N,K,C).

    A pixel's weight is its softmax over the classes.
    """
    by_class = scores.softmax(dim=1)
    mass = losses.above_zero(by_class.sum(dim=2, keepdim=True))
    return by_class @ feature.flatten(2).transpose(1, 2) / mass


def class_means(sums: Tensor, pixels: Tensor, fallback: Tensor) -> Tensor:
    """Class means; for a class without pixels, its row of `fallback` (K,C), detached."""
    return torch.where(pixels > 0, sums / (pixels + losses.EPS), fallback.detach())


def upsampled_terms(
    branches: Mapping[str, Branch], labels: Tensor, members: Tensor, pairs: Tensor | None = None
) -> dict[str, Tensor]:
    """Cross entropy (and dice) of each branch, upsampled to the labels' size, by name."""
    found: dict[str, Tensor] = {}
    if not branches:
        return found
    for name, image in zip(branches, full_resolution_terms(list(branches.values()), labels), strict=True):
        # The denominator of the main mean is the number of all pixels, ignored ones too (mmseg's avg_non_ignore=False),
        # independent of class weights. That of the others is the sum of the weights of pixels that are not ignored.
        all_pixels = torch.full_like(image.valid, float(labels[0].numel()))
        counted = all_pixels if name == "main" else image.valid
        found[f"{name}_ce"] = losses.group_ratio(image.cross_entropy, counted, members)
        if branches[name].dice:
            # Without `pairs` this batch is the whole step. With it, the loop's mean over micro-batches gives the sum.
            count = image.pairs.sum() if pairs is None else pairs
            found[f"{name}_dice"] = image.dice.sum() / torch.where(count > 0, count, 1.0)
    return found
