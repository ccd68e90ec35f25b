"""Pixel-level classifiers: the plain 1×1 convolution, and SSA-Seg's with prototypes that adapt to the image.

A network is handed its classifier and knows none by name. What it relies on:

- `forward(feature)` → logits; pure: no buffer written, no randomness in evaluation.
- `stages(feature)` → logits, and the logits before adaptation where the classifier `adapts`.
- `training_step(feature, labels, pairs)` → `TrainingStep`; owns dropout, upsampling conventions and float32 islands.
- `step_pairs(labels)` → what a loss must know of the *whole* optimiser step before its first micro-batch. A classifier
  that does not adapt is not asked, and gets None.
- `update(memories)`, after the optimiser's step: state that is not learnt by gradient. Nothing by default.
- `training_only()`: prefixes of the state dict that a deploy form drops.

Axes: N images, K classes, C channels, h×w feature pixels, P = h·w, G groups of images.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssaseg.models.classifiers import losses

# Order in which losses are logged; the weights are those of the official code (spec: section "Training").
LOSS_WEIGHTS: Mapping[str, float] = {
    "main_ce": 1.0,
    "coarse_ce": 1.0,
    "teacher_ce": 1.0,
    "main_dice": 1.0,
    "teacher_dice": 1.0,
    "response": 1.0,
    "semantic": 10.0,
    "spatial": 0.4,
}


@dataclass(frozen=True)
class Distillation:
    """Settings of the training losses: images per group, and a weight per term (0 switches a term off)."""

    group: int = 4
    weights: Mapping[str, float] = field(default_factory=lambda: dict(LOSS_WEIGHTS))


@dataclass(frozen=True)
class LossOptions:
    """Changes of the cross entropies; the defaults are what the published results were trained with.

    Class weights and label smoothing are those of `F.cross_entropy` and apply to every cross entropy. What a mean
    divides by follows the code that each comes from: the main one, mmsegmentation 0.30's CrossEntropyLoss, by the
    number of all pixels, whatever they weigh; coarse and teacher, `nn.CrossEntropyLoss`, by the weights of the pixels
    that are not ignored. Hard example mining is of the main one alone, where mmsegmentation's sampler sits, image by
    image, so that it does not depend on how a step is cut: see `losses.Weighing`. Dices and distillation stay as they
    are.
    """

    class_weights: tuple[float, ...] | None = None  # (K,), 0 or more, not all 0; None: 1 each
    label_smoothing: float = 0.0  # in [0, 1]
    ohem_threshold: float | None = None  # probability in (0, 1]; None: no hard example mining
    ohem_min_kept: int = 100_000  # pixels of an image

    def weights(self, num_classes: int) -> Tensor | None:
        """`class_weights` as a tensor. Raises ValueError where they are not one for each class, 0 or more, or all 0."""
        found = self.class_weights
        if found is None:
            return None
        if len(found) != num_classes or not all(0 <= weight < math.inf for weight in found):
            raise ValueError(f"class_weights are {len(found)} numbers, expected {num_classes}, finite, 0 or more")
        if not any(found):
            raise ValueError("class_weights are all 0, so that no pixel counts; expected one above 0")
        return torch.tensor(found, dtype=torch.float32)


class TrainingStep(NamedTuple):
    """What a classifier gives back in training: logits (N,K,h,w), weighted losses by name, and food for `update`."""

    logits: Tensor
    losses: dict[str, Tensor]
    memory: Any = None


class Classifier(nn.Module):
    """What every classifier shares: the 1×1 convolution `conv_seg` with channel dropout before it, and the contract."""

    training_step: Callable[..., TrainingStep]
    adapts = False

    class_weights: Tensor | None

    def __init__(
        self, channels: int, num_classes: int, dropout: float, settings: Distillation, loss: LossOptions | None = None
    ) -> None:
        super().__init__()
        self.channels, self.num_classes, self.settings = channels, num_classes, settings
        self.loss = loss or LossOptions()
        # On the model's device, yet no part of its weights: a checkpoint is the same with and without.
        self.register_buffer("class_weights", self.loss.weights(num_classes), persistent=False)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, 0.0, 0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def coarse(self, feature: Tensor) -> Tensor:
        """Logits of the 1×1 convolution alone. (N,C,h,w) → (N,K,h,w)."""
        return self.conv_seg(self.dropout(feature))

    def stages(self, feature: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N,C,h,w) → logits (N,K,h,w), and those before adaptation where there is one."""
        return self(feature), None

    def step_pairs(self, labels: Tensor) -> Tensor:
        """What `training_step` must know of the labels (N,H,W) of a whole step, averaged over them; here nothing."""
        return torch.zeros((), device=labels.device)

    @property
    def weighing(self) -> losses.Weighing:
        """How pixels count in the main cross entropy."""
        loss = self.loss
        return losses.Weighing(self.class_weights, loss.label_smoothing, loss.ohem_threshold, loss.ohem_min_kept)

    def update(self, memories: list[Any]) -> None:
        """Takes in what the step's micro-batches left in `TrainingStep.memory`; nothing here."""

    def training_only(self) -> tuple[str, ...]:
        """State-dict prefixes, relative to the classifier, that inference never reads."""
        return ()
