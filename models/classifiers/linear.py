"""The plain pixel-level classifier."""

import torch
from torch import Tensor

from ssaseg.models.classifiers import losses
from ssaseg.models.classifiers.base import Classifier, TrainingStep


class LinearClassifier(Classifier):
    """The plain classifier: channel dropout, 1×1 convolution."""

    def forward(self, feature: Tensor) -> Tensor:
        """(N,C,h,w) → logits (N,K,h,w)."""
        return self.coarse(feature)

    def training_step(self, feature: Tensor, labels: Tensor, pairs: Tensor | None = None) -> TrainingStep:
        """One loss: cross entropy at the labels' size, align_corners=False, averaged over all pixels, ignored too."""
        logits = self(feature)
        with torch.autocast(logits.device.type, enabled=False):
            terms = losses.full_resolution_terms(
                logits, labels, align_corners=False, dice=False, weighing=self.weighing
            )
            main = terms.cross_entropy.sum() / labels.numel()
        return TrainingStep(logits, {"main_ce": self.settings.weights["main_ce"] * main})
