"""The plain pixel-level classifier.

Axes: N images, K classes, C channels, h×w feature pixels.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ssaseg.models.classifiers.base import Classifier, LossOptions, TrainingStep, class_convolution
from ssaseg.models.classifiers.upsampled import Branch, full_resolution_terms
from ssaseg.models.rows import Row


class LinearClassifier(Classifier):
    """Channel dropout, 1×1 convolution."""

    CLASS_ROWS: ClassVar[Sequence[str]] = ("conv_seg.weight", "conv_seg.bias")
    ROWS: ClassVar[Sequence[Row]] = (Row("conv_seg", "conv_seg"),)

    def __init__(
        self, channels: int, num_classes: int, dropout: float = 0.1, loss: LossOptions | None = None, group: int = 1
    ) -> None:
        super().__init__(channels, num_classes, dropout, loss, group)
        self.conv_seg = class_convolution(channels, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        """(N,C,h,w) → logits (N,K,h,w)."""
        return self.conv_seg(self.dropout(feature))

    def training_step(self, feature: Tensor, labels: Tensor, totals: Tensor | None = None) -> TrainingStep:
        """One loss: cross entropy at the labels' size (align_corners=False), averaged over all pixels, ignored too."""
        logits = self(feature)
        with torch.autocast(logits.device.type, enabled=False):
            (terms,) = full_resolution_terms([Branch(logits, align_corners=False, weighing=self.weighing)], labels)
            main = terms.cross_entropy.sum() / labels.numel()
        return TrainingStep(logits, {"main_ce": self.weights["main_ce"] * main})
