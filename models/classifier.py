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

from ssaseg.models import distillation, losses
from ssaseg.models.distillation import PrototypeProjections

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


class Adapted(NamedTuple):
    """The SSA classifier's intermediate results for one batch."""

    coarse: Tensor  # (N,K,h,w) logits before adaptation
    spatial_feature: Tensor  # (N,C,h,w) F_p
    feature: Tensor  # (N,C,h,w) F + F_p
    pixels: Tensor  # (N,P,C) its pixels, each divided by its norm
    semantic: Tensor  # (N,K,C) adapted semantic prototypes S'
    spatial: Tensor  # (N,K,C) adapted spatial prototypes P'
    logits: Tensor  # (N,K,h,w)


class SSAClassifier(Classifier):
    """SSA-Seg: semantic (SEPA) and spatial (SPPA) prototypes adapted to the image, compared by cosine.

    Source: arXiv 2405.06525, sections 3.2 and 3.3. All arithmetic is float32, under autocast too: its 1e-12 and its
    sums over thousands of pixels do not exist in half precision. Its weights therefore stay float32, too: for speed
    there are autocast and `ssaseg.models.fast`, not `.half()`.
    """

    adapts = True

    def __init__(
        self, channels: int, num_classes: int, dropout: float, settings: Distillation, loss: LossOptions | None = None
    ) -> None:
        super().__init__(channels, num_classes, dropout, settings, loss)
        self.spatial_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.spatial_prototypes = nn.Parameter(torch.randn(num_classes, channels))
        self.student = PrototypeProjections(channels)
        self.teacher = PrototypeProjections(channels)

    def forward(self, feature: Tensor) -> Tensor:
        """(N,C,h,w) → logits (N,K,h,w) in [−15, 15], float32."""
        return self.adapt(feature).logits

    def stages(self, feature: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N,C,h,w) → final and coarse logits, both (N,K,h,w), in one pass."""
        adapted = self.adapt(feature)
        return adapted.logits, adapted.coarse

    def adapt(self, feature: Tensor) -> Adapted:
        """(N,C,h,w) → everything that the classifier computes on the way to its logits."""
        with torch.autocast(feature.device.type, enabled=False):
            feature = feature.float()
            coarse = self.coarse(feature)
            spatial_feature = self.spatial_conv(feature)
            scores = coarse.flatten(2)  # (N,K,P)
            by_class = scores.softmax(dim=1)
            mass = by_class.sum(dim=2, keepdim=True) + losses.EPS
            semantic_mean = by_class @ feature.flatten(2).transpose(1, 2) / mass  # (N,K,C)
            spatial_mean = scores.softmax(dim=2) @ spatial_feature.flatten(2).transpose(1, 2)  # (N,K,C)
            # The orders differ, and trained weights depend on them: the image's mean first for semantic prototypes,
            # the fixed table first for spatial ones.
            semantic, spatial, prototypes = self.student(
                (semantic_mean, self.semantic_prototypes), (self.spatial_prototypes, spatial_mean)
            )
            adapted = feature + spatial_feature
            pixels = losses.pixel_directions(adapted)
            logits = losses.cosine_logits(adapted, prototypes, pixels)
            return Adapted(coarse, spatial_feature, adapted, pixels, semantic, spatial, logits)

    @property
    def semantic_prototypes(self) -> Tensor:
        """Fixed semantic prototypes (K,C): the weight of the 1×1 convolution."""
        return self.conv_seg.weight.flatten(1)

    def training_step(self, feature: Tensor, labels: Tensor, pairs: Tensor | None = None) -> TrainingStep:
        """Weighted losses of online multi-domain distillation by name; terms of weight 0 are not listed.

        labels (N,H,W) integer in [0, K) or 255. `pairs`: (image, class) pairs per micro-batch, averaged over the
        optimiser's step; None takes this batch for the whole step.
        """
        student = self.adapt(feature)
        with torch.autocast(feature.device.type, enabled=False):
            teacher = distillation.teach(self, feature.float(), student, labels)
            terms = distillation.terms(student, teacher, labels, pairs, self.settings, self.weighing)
        return TrainingStep(student.logits, terms)

    def step_pairs(self, labels: Tensor) -> Tensor:
        """Number of (image, class) pairs in labels (N,H,W): the dice's denominator."""
        return (losses.class_pixels(labels, self.num_classes) > 0).sum().float()

    def training_only(self) -> tuple[str, ...]:
        """The teacher branch."""
        return ("teacher.",)


CLASSIFIERS: Mapping[str, type[Classifier]] = {"linear": LinearClassifier, "ssa": SSAClassifier}
