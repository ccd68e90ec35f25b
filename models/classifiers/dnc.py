"""A variant of DNC's classifier: ProtoSeg's prototypes, found in a memory of pixels, with the cross entropy alone.

Source of the idea: "Visual Recognition with Deep Nearest Centroids" (ICLR 2023, arXiv 2209.07383). Its code for
segmentation was never published, and the solver of its code for classification gives each sample to the prototype that
is least similar. So this is not the authors' classifier, and no reference exists that it could be compared with.

Axes: K classes, M prototypes per class, D channels, T entries of a memory, S samples, G groups of images, P pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ssaseg.models.classifiers.base import Loss, LossOptions, Option, Peers
from ssaseg.models.classifiers.losses import IGNORE
from ssaseg.models.classifiers.protoseg import ProtoSegClassifier
from ssaseg.models.classifiers.prototypes import Scored, evenly, gathered, new_bank, one_hot, sinkhorn, write_ring
from ssaseg.models.rows import Row

EMPTY, WRONG, RIGHT = 0, 1, 2


class DNCClassifier(ProtoSegClassifier):
    """DNC, a variant without reference: prototypes are means of pixels that a memory keeps of each class.

    Each group of images adds up to `samples` pixels of each class; others are not used. Then all pixels of the memory
    are assigned to the prototypes of their class, and those that were classified correctly move them. All ranks have
    the same memory.
    """

    assigns: ClassVar[bool] = False  # `update` assigns those of the memory
    NOTE: ClassVar[str] = "variant, no reference"
    LOSSES: ClassVar[Mapping[str, Loss]] = {"main_ce": Loss(1.0, "cross entropy of the logits")}
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "prototypes": Option(10, "prototypes per class", least=1, most=65_535),
        "momentum": Option(0.999, "of the prototypes", least=0, most=1),
        "memory": Option(1000, "pixels kept of each class; costs classes × channels × memory × 4 B", least=1),
        "samples": Option(100, "pixels of each class that a group of images adds to the memory", least=1),
    }
    CLASS_ROWS: ClassVar[Sequence[str]] = (*ProtoSegClassifier.CLASS_ROWS, "queue", "marks", "pointer")
    MEMORY: ClassVar[Sequence[str]] = ("queue", "marks", "pointer")
    WITHOUT_MEMORY: ClassVar[Mapping[str, Any]] = {"memory": 1, "samples": 1}
    ROWS: ClassVar[Sequence[Row]] = (
        *(Row(name, name) for name in ("prototypes", "feat_norm", "mask_norm")),
        *(Row(name, name) for name in MEMORY),
    )

    queue: Tensor
    marks: Tensor
    pointer: Tensor

    def __init__(
        self,
        channels: int,
        num_classes: int,
        dropout: float = 0.1,
        loss: LossOptions | None = None,
        group: int = 4,
        prototypes: int = 10,
        momentum: float = 0.999,
        memory: int = 1000,
        samples: int = 100,
    ) -> None:
        super().__init__(channels, num_classes, dropout, loss, group, prototypes, momentum, False, "argmax")
        self.samples = samples
        self.register_buffer("queue", new_bank(num_classes, memory, channels, samples=samples).zero_())
        self.register_buffer("marks", torch.zeros(num_classes, memory, dtype=torch.uint8))
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.long))

    @classmethod
    def bank_bytes(cls, channels: int, num_classes: int, **options: Any) -> int:
        """Bytes of the memory."""
        return num_classes * channels * options.get("memory", cls.OPTIONS["memory"].default) * 4

    def observe(self, scored: Scored) -> Any:
        """For `update`: embeddings (G,K,S,D), marks (G,K,S,1) and how many of the S count (G,K)."""
        found = []
        for embedding, labels, correct in zip(
            *(each.split(self.group) for each in (scored.embedding, scored.labels, scored.correct)), strict=True
        ):
            segments = torch.where(labels == IGNORE, self.num_classes, labels.long()).flatten()
            chosen = evenly(segments, self.num_classes, self.samples)
            marks = torch.where(correct.flatten(), RIGHT, WRONG).to(torch.uint8)[chosen.positions]
            found.append((embedding.detach().flatten(0, 1)[chosen.positions], marks.unsqueeze(2), chosen.number))
        return tuple(torch.stack(each) for each in zip(*found, strict=True))

    def update(self, memories: list[Any], peers: Peers, held: Tensor) -> None:
        """Adds the pixels of all groups, of all micro-batches and ranks, to the memory; then moves the prototypes."""
        updates = held == 0
        for embedding, marks, count in zip(*(gathered(memories, each, peers) for each in range(3)), strict=True):
            pointer = self.pointer.clone()  # the second writing has to start where the first did
            write_ring(self.queue, pointer, embedding, count * updates)
            write_ring(self.marks.unsqueeze(2), self.pointer, marks, count * updates)
        prototypes = F.normalize(self.prototypes, dim=-1)
        own = (self.queue @ prototypes.mT).flatten(0, 1)  # (K·T,M)
        classes = torch.arange(self.num_classes, device=own.device).unsqueeze(1)
        labels = torch.where(self.marks == EMPTY, IGNORE, classes).flatten()
        chosen = sinkhorn(own, labels, self.num_classes).argmax(dim=1).unflatten(0, self.marks.shape)
        right = one_hot(chosen, self.count) * (self.marks == RIGHT).unsqueeze(2)  # (K,T,M)
        sums, counts = right.mT @ self.queue, right.sum(dim=1).unsqueeze(2)
        moved = self.moved(sums.flatten(0, 1), counts.flatten(0, 1)).view_as(prototypes)
        self.prototypes.copy_(torch.where(updates, moved, self.prototypes))
