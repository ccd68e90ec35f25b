"""GMMSeg's classifier: a mixture of Gaussians for each class, fitted to a memory of pixels.

Source: "GMMSeg: Gaussian Mixture based Generative Semantic Segmentation Models" (NeurIPS 2022, arXiv 2210.02025) and
its official implementation (commit 74f882e).

Axes: N images, K classes, M components per class, D channels of the embedding, T entries of a memory, P pixels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.classifiers import losses
from ssaseg.models.classifiers.base import Loss, LossOptions, Option, Peers
from ssaseg.models.classifiers.prototypes import (
    PrototypeClassifier,
    Scored,
    evenly,
    gathered,
    known_labels,
    new_bank,
    new_prototypes,
    write_ring,
)
from ssaseg.models.classifiers.upsampled import Branch, full_resolution_terms
from ssaseg.models.layers import ConvNorm
from ssaseg.models.rows import Row

VARIANCE_FLOOR = 1e-2
COLLISION = losses.IGNORE  # the number of a component that the official code takes for "ignored"


class GMMSegClassifier(PrototypeClassifier):
    """GMMSeg: the logits of a class are the largest log density of its M Gaussians, normalised over the classes.

    The Gaussians are diagonal. They are fitted to a memory of T pixels per component, which gets a few pixels that were
    classified correctly in each step, of all images of the step. The sums that a fit needs are kept up to date, so that
    no step reads the whole memory. A memory starts with random directions, as in the official code.
    """

    LOSSES: ClassVar[Mapping[str, Loss]] = {
        "main_ce": Loss(1.0, "cross entropy of the logits"),
        "contrast": Loss(0.01, "cross entropy of a pixel's log densities of the components of all classes"),
    }
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "components": Option(5, "Gaussians per class; officially 8 for ADE20K, 5 for COCO-Stuff", least=1, most=65_535),
        "width": Option(64, "channels of the embedding; if the feature has others, it is projected", 1, 4096),
        "memory": Option(32_000, "pixels kept; costs classes × components × width × memory × 4 B", 1),
        "samples": Option(20, "pixels of each Gaussian that enter the memory in a step", least=1),
        "interval": Option(5, "steps between two fits", least=1),
        "momentum": Option(0.999, "of the means", least=0, most=1),
        "std_momentum": Option(0.0, "of the standard deviations", least=0, most=1),
        "official_255": Option(False, "leaves component 255 untrained, as the official code does"),
    }
    CLASS_ROWS: ClassVar[Sequence[str]] = (
        *("means", "stds", "queue", "pointer", "sums", "squares"),
        *("mask_norm.weight", "mask_norm.bias"),
    )
    MEMORY: ClassVar[Sequence[str]] = ("queue", "pointer", "sums", "squares", "counter")
    WITHOUT_MEMORY: ClassVar[Mapping[str, Any]] = {"memory": 1, "samples": 1}
    # Names of our own: the official head has a decoder of its own, so no file of it fits a network here.
    ROWS: ClassVar[Sequence[Row]] = tuple(
        Row(name, name) for name in ("means", "stds", *MEMORY, "projection", "feat_norm", "mask_norm")
    )

    means: Tensor
    stds: Tensor
    queue: Tensor
    pointer: Tensor
    sums: Tensor
    squares: Tensor
    counter: Tensor

    def __init__(
        self,
        channels: int,
        num_classes: int,
        dropout: float = 0.1,
        loss: LossOptions | None = None,
        group: int = 4,
        components: int = 5,
        width: int = 64,
        memory: int = 32_000,
        samples: int = 20,
        interval: int = 5,
        momentum: float = 0.999,
        std_momentum: float = 0.0,
        official_255: bool = False,
    ) -> None:
        projection: nn.Module | None = None
        if width != channels:
            projection = nn.Sequential(ConvNorm(channels, width), nn.ReLU())
        super().__init__(channels, num_classes, dropout, loss, group, components, width, projection)
        self.samples, self.interval, self.official_255 = samples, interval, official_255
        self.momentum, self.std_momentum = momentum, std_momentum
        shape = (num_classes, components, width)
        self.register_buffer("means", new_prototypes(*shape))
        self.register_buffer("stds", torch.ones(shape))
        queue = new_bank(num_classes, components, memory, width, samples=samples).normal_()
        self.register_buffer("queue", queue.div_(queue.norm(dim=-1, keepdim=True)))
        self.register_buffer("pointer", torch.zeros(num_classes, components, dtype=torch.long))
        # Sums over the memory, float64: they change by single entries, and must not drift.
        self.register_buffer("sums", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("counter", torch.zeros((), dtype=torch.long))
        self.sum_up()

    @classmethod
    def bank_bytes(cls, channels: int, num_classes: int, **options: Any) -> int:
        """Bytes of the memory."""
        given = {name: options.get(name, option.default) for name, option in cls.OPTIONS.items()}
        return num_classes * given["components"] * given["memory"] * given["width"] * 4

    def sum_up(self) -> None:
        """Computes `sums` and `squares` from the whole memory, class by class."""
        for k, entries in enumerate(self.queue):  # (M,T,D)
            self.sums[k] = entries.sum(dim=1, dtype=torch.float64)
            self.squares[k] = entries.double().square().sum(dim=1)

    def restore_memory(self) -> None:
        """Draws it from the Gaussians: with random directions, the next fit would forget them."""
        with torch.no_grad():
            self.queue.normal_()
            for entries, means, stds in zip(self.queue, self.means, self.stds, strict=True):  # of one class
                spread = (stds.square() - VARIANCE_FLOOR).clamp(min=0).sqrt()
                entries.mul_(spread.unsqueeze(1)).add_(F.normalize(means, dim=-1).unsqueeze(1))
                entries.div_(entries.norm(dim=-1, keepdim=True))
            self.sum_up()

    def table(self) -> tuple[Tensor, ...]:
        """The log density as factors of the squared embedding, of the embedding, and a constant: (D,K,M) twice, (K,M).

        −½ Σ ((z − μ)/σ)² is two matrix products this way. The other way has a tensor of pixels × components × D.
        """
        means = F.normalize(self.means, dim=-1)
        precision = self.stds.square().reciprocal()
        constant = self.stds.log().sum(dim=-1) + 0.5 * (means.square() * precision).sum(dim=-1)
        constant = -constant - 0.5 * self.width * math.log(2 * math.pi)
        return (-0.5 * precision).permute(2, 0, 1), (means * precision).permute(2, 0, 1), constant

    def score(self, embedding: Tensor, table: tuple[Tensor, ...]) -> Tensor:
        """Log densities. (…,D), table of k Gaussians → (…,k)."""
        of_square, of_embedding, constant = table
        return embedding.square() @ of_square + embedding @ of_embedding + constant

    def nearness(self, own: Tensor, labels: Tensor) -> Tensor:
        """Log densities divided by the largest absolute one of the class. (n,M), labels (n,) → (n,M)."""
        index, valid = known_labels(labels)
        size = own.abs().amax(dim=1) * valid
        largest = size.new_zeros(self.num_classes).scatter_reduce(0, index, size, "amax")[index]
        return own / torch.where(largest > 0, largest, 1.0).unsqueeze(1)

    def counted(self, target: Tensor) -> Tensor:
        """Which pixels `contrast` counts; with `official_255`, not those of component 255."""
        counted = super().counted(target)
        return counted & (target != COLLISION) if self.official_255 else counted

    def unweighted(self, scored: Scored, labels: Tensor) -> dict[str, Tensor]:
        """The cross entropy is that of the plain classifier; the contrast is a mean over the pixels that count."""
        found: dict[str, Tensor] = {}
        if self.weights["main_ce"]:
            (image,) = full_resolution_terms([Branch(scored.logits, False, weighing=self.weighing)], labels)
            found["main_ce"] = image.cross_entropy.sum() / labels.numel()
        if self.weights["contrast"]:
            found["contrast"] = losses.group_ratio(scored.contrast, scored.counted, scored.members)
        return found

    def observe(self, scored: Scored) -> Any:
        """For `update`: embeddings (n,D), the Gaussian of each (n,), K·M if none, and the classes seen (1,K)."""
        index, valid = known_labels(scored.labels)
        segment = torch.where(scored.correct, index * self.count + scored.component, self.num_classes * self.count)
        classes = torch.where(valid, index, self.num_classes).flatten()
        seen = valid.new_zeros(self.num_classes + 1).index_fill(0, classes, True)[:-1]
        return scored.embedding.detach().flatten(0, 1), segment.flatten(), seen.unsqueeze(0)

    def update(self, memories: list[Any], peers: Peers, held: Tensor) -> None:
        """Writes pixels of all micro-batches and ranks into the memory; at its interval, fits the Gaussians."""
        embedding, segments, seen = (gathered(memories, field, peers) for field in range(3))
        updates = held == 0
        chosen = evenly(segments, self.num_classes * self.count, self.samples)
        rings, pointer = self.queue.flatten(0, 1), self.pointer.flatten()  # views
        old, new = (
            each.double().unflatten(0, (self.num_classes, self.count))
            for each in write_ring(rings, pointer, embedding[chosen.positions], chosen.number * updates)
        )
        self.sums += (new - old).sum(dim=2)
        self.squares += (new.square() - old.square()).sum(dim=2)
        means = F.normalize(self.means, dim=-1)
        target, spread = self.fit()
        due = (self.counter % self.interval == 0) & seen.any(dim=0)[:, None, None]
        moved = torch.where(due, self.momentum * means + (1 - self.momentum) * target, means)
        stds = torch.where(due, self.std_momentum * self.stds + (1 - self.std_momentum) * spread, self.stds)
        self.means.copy_(torch.where(updates, moved, self.means))
        self.stds.copy_(torch.where(updates, stds, self.stds))
        self.counter += updates

    def fit(self) -> tuple[Tensor, Tensor]:
        """Means (unit vectors) and standard deviations of the memory, both (K,M,D)."""
        number = self.queue.shape[2]
        mean = F.normalize(self.sums, dim=-1)
        variance = (self.squares - 2 * mean * self.sums) / number + mean.square()
        return mean.float(), (variance.clamp(min=0) + VARIANCE_FLOOR).sqrt().float()
