"""A classifier with all that a contract may hold: options, a memory bank, prototypes, an untouched parameter."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssaseg.models.build import CLASSIFIERS
from ssaseg.models.classifiers.base import LossOptions, Option, Peers, TrainingStep
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.rows import Row


class BankClassifier(LinearClassifier):
    """Prototypes that move towards class means of all ranks, and a ring of the last features of each class."""

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "slots": Option(4, "features kept of each class", least=1, most=100),
        "momentum": Option(0.5, "of the prototypes", least=0, most=1),
        "pull": Option("mean", "what prototypes move to", choices=("mean", "last")),
    }
    CLASS_ROWS: ClassVar[Sequence[str]] = (*LinearClassifier.CLASS_ROWS, "prototypes", "bank", "pointer")
    ROWS: ClassVar[Sequence[Row]] = (
        *LinearClassifier.ROWS,
        *(Row(name, name) for name in ("prototypes", "bank", "pointer", "spare")),
    )

    prototypes: Tensor
    bank: Tensor
    pointer: Tensor

    def __init__(
        self,
        channels: int,
        num_classes: int,
        dropout: float = 0.1,
        loss: LossOptions | None = None,
        group: int = 1,
        slots: int = 4,
        momentum: float = 0.5,
        pull: str = "mean",
    ) -> None:
        super().__init__(channels, num_classes, dropout, loss, group)
        self.momentum = momentum
        self.register_buffer("prototypes", torch.randn(num_classes, channels))
        self.register_buffer("bank", torch.zeros(num_classes, slots, channels))
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.long))
        self.spare = nn.Parameter(torch.ones(3))  # no step touches it

    def forward(self, feature: Tensor) -> Tensor:
        return super().forward(feature) + 0.01 * torch.einsum("kc,nchw->nkhw", self.prototypes, feature)

    def training_step(self, feature: Tensor, labels: Tensor, totals: Tensor | None = None) -> TrainingStep:
        step = super().training_step(feature, labels)
        every = labels.shape[1] // feature.shape[2]
        small = labels[:, ::every, ::every]
        of_class = torch.stack([(small == k).flatten() for k in range(self.num_classes)]).float()
        pixels = feature.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
        return TrainingStep(step.logits, step.losses, (of_class @ pixels, of_class.sum(dim=1)))

    def update(self, memories: list[Any], peers: Peers, held: Tensor) -> None:
        sums = torch.stack([sums for sums, _ in memories]).sum(dim=0)
        counts = torch.stack([count for _, count in memories]).sum(dim=0)
        total, number = peers.total(sums), peers.total(counts)
        seen = (number > 0).unsqueeze(1) & (held == 0)
        mean = total / number.clamp(min=1).unsqueeze(1)
        moved = torch.lerp(mean, self.prototypes, self.momentum)
        self.prototypes.copy_(torch.where(seen, moved, self.prototypes))
        for of_rank in peers.gather(sums):  # one slot a rank, in their order
            slot = (torch.arange(self.bank.shape[1]) == self.pointer.unsqueeze(1)).unsqueeze(2) & seen.unsqueeze(2)
            self.bank.copy_(torch.where(slot, of_rank.unsqueeze(1), self.bank))
            self.pointer.copy_(torch.where(seen.squeeze(1), (self.pointer + 1) % self.bank.shape[1], self.pointer))

    def training_only(self) -> tuple[str, ...]:
        return ("bank", "pointer", "spare")


def register() -> None:
    """Makes recipes and `build_model` know `bank`, for a process of its own."""
    CLASSIFIERS["bank"] = BankClassifier
