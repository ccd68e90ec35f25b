"""ProtoSeg's classifier: prototypes that are means of pixels, not learnt by gradient.

Source: "Rethinking Semantic Segmentation: A Prototype View" (CVPR 2022, arXiv 2203.15102) and its official
implementation (commit 1c4a778).

Axes: N images, K classes, M prototypes per class, D channels of the embedding, h×w feature pixels, P = h·w, G groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.classifiers import losses
from ssaseg.models.classifiers.base import Loss, LossOptions, Option, Peers
from ssaseg.models.classifiers.prototypes import PrototypeClassifier, Scored, known_labels, new_prototypes, one_hot
from ssaseg.models.classifiers.upsampled import Branch, full_resolution_terms
from ssaseg.models.rows import Row


class ProjectionHead(nn.Sequential):
    """Two 1×1 convolutions with ReLU between; the result of each pixel is divided by its norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,h,w) → (N,C,h,w)."""
        return F.normalize(super().forward(x), dim=1)


class ProtoSegClassifier(PrototypeClassifier):
    """ProtoSeg: the logits of a class are its largest cosine with one of M prototypes, normalised over the classes.

    A prototype is a moving average of the directions of pixels that were assigned to it and classified correctly. It
    moves after the optimiser's step. A group of images (`distill.group`) is what one GPU had in the official training:
    pixels are assigned within a group, and the prototypes of all groups are averaged. So a step of several
    micro-batches or ranks is equal to one of a single batch; except that each draws its own noise for `gumbel`.
    """

    LOSSES: ClassVar[Mapping[str, Loss]] = {
        "main_ce": Loss(1.0, "cross entropy of the logits"),
        "contrast": Loss(0.01, "cross entropy of a pixel's cosines with the prototypes of all classes"),
        "distance": Loss(0.001, "squared distance of a pixel's cosine with its prototype from 1"),
    }
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "prototypes": Option(10, "prototypes per class", least=1, most=65_535),
        "momentum": Option(0.999, "of the prototypes", least=0, most=1),
        "projection": Option(True, "whether two 1×1 convolutions come before the comparison"),
        # The official choice is a random one that depends little on the pixel.
        "assignment": Option(
            "gumbel",
            "which prototype a pixel moves: gumbel is official, argmax the paper's",
            choices=("gumbel", "argmax"),
        ),
    }
    CLASS_ROWS: ClassVar[Sequence[str]] = ("prototypes", "mask_norm.weight", "mask_norm.bias")
    ROWS: ClassVar[Sequence[Row]] = (
        Row("prototypes", "prototypes"),
        Row("projection", "proj_head.proj"),
        Row("feat_norm", "feat_norm"),
        Row("mask_norm", "mask_norm"),
    )

    prototypes: Tensor

    def __init__(
        self,
        channels: int,
        num_classes: int,
        dropout: float = 0.1,
        loss: LossOptions | None = None,
        group: int = 4,
        prototypes: int = 10,
        momentum: float = 0.999,
        projection: bool = True,
        assignment: str = "gumbel",
    ) -> None:
        head = ProjectionHead(channels) if projection else None
        super().__init__(channels, num_classes, dropout, loss, group, prototypes, channels, head)
        self.momentum, self.assignment = momentum, assignment
        self.register_buffer("prototypes", new_prototypes(num_classes, prototypes, channels))

    def table(self) -> tuple[Tensor, ...]:
        """The prototypes as unit vectors: (D,K,M)."""
        return (F.normalize(self.prototypes, dim=-1).permute(2, 0, 1),)

    def score(self, embedding: Tensor, table: tuple[Tensor, ...]) -> Tensor:
        """Cosines. (…,D), (D,k) → (…,k)."""
        return embedding @ table[0]

    def unweighted(self, scored: Scored, labels: Tensor) -> dict[str, Tensor]:
        """The cross entropy upsamples with align_corners=True; all means are over the pixels that are not ignored."""
        found: dict[str, Tensor] = {}
        if self.weights["main_ce"]:
            (image,) = full_resolution_terms([Branch(scored.logits, True, weighing=self.weighing)], labels)
            found["main_ce"] = losses.group_ratio(image.cross_entropy, image.valid, scored.members)
        for name, sums in (("contrast", scored.contrast), ("distance", scored.distance)):
            if self.weights.get(name):  # DNC has none
                found[name] = self.mean_over_pixels(sums, scored)
        return found

    def observe(self, scored: Scored) -> Any:
        """For `update`: the sum over groups of the prototypes after this step (K,M,D), and the number of groups ()."""
        shares = scored.assignment
        if self.assignment == "gumbel":
            shares = shares + gumbel_noise(shares)
        chosen = known_labels(scored.labels)[0] * self.count + shares.argmax(dim=-1)  # (N,P)
        number = self.num_classes * self.count
        sums, counts = [], []
        for embedding, index, correct in zip(scored.embedding, chosen, scored.correct, strict=True):
            moved = one_hot(index, number) * correct.unsqueeze(1)  # (P,K·M), of one image
            sums.append(moved.T @ embedding)
            counts.append(moved.sum(dim=0))
        group_sums = torch.einsum("gn,nkd->gkd", scored.members, torch.stack(sums))
        group_counts = scored.members @ torch.stack(counts)
        prototypes = self.moved(group_sums, group_counts.unsqueeze(-1))
        return prototypes.sum(dim=0), scored.members.new_full((), float(len(scored.members)))

    def moved(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Prototypes (…,K·M,D) after a step with sums of pixels (…,K·M,D), numbers of pixels (…,K·M,1); unit norm."""
        old = F.normalize(self.prototypes, dim=-1).flatten(0, 1)
        new = self.momentum * old + (1 - self.momentum) * F.normalize(sums, dim=-1)
        return F.normalize(torch.where(counts > 0, new, old), dim=-1)

    def update(self, memories: list[Any], peers: Peers, held: Tensor) -> None:
        """The mean of the prototypes of all groups, of all micro-batches and ranks."""
        total = peers.total(torch.stack([moved for moved, _ in memories]).sum(dim=0))
        groups = peers.total(torch.stack([number for _, number in memories]).sum(dim=0))
        mean = (total / groups).unflatten(0, (self.num_classes, self.count))
        self.prototypes.copy_(torch.where(held > 0, self.prototypes, mean))


def gumbel_noise(like: Tensor) -> Tensor:
    """Samples of the standard Gumbel distribution."""
    return -torch.empty_like(like).exponential_().log()
