"""CAC's classifier: semantic prototypes that adapt to the image.

Source: "Learning Context-aware Classifier for Semantic Segmentation" (AAAI 2023, arXiv 2303.11633) and its official
implementation (commit 9d4a17d). SSA-Seg's classifier comes from it: CAC has no spatial prototypes, no dice losses, no
distillation between prototypes, and no difference between boundary and interior.

Axes: N images, K classes, C channels, h×w feature pixels, P = h·w, G groups of images.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ssaseg.models.classifiers import losses
from ssaseg.models.classifiers.adaptation import class_means, concatenate, semantic_means, squeeze, upsampled_terms
from ssaseg.models.classifiers.base import Classifier, Loss, LossOptions, TrainingStep, class_convolution
from ssaseg.models.classifiers.upsampled import Branch
from ssaseg.models.rows import Row


class AdaptedSemantic(NamedTuple):
    """CAC's results for one batch; named as those of SSA, see `distillation.Adapted`."""

    coarse: Tensor  # (N,K,h,w) logits before adaptation
    semantic: Tensor  # (N,K,C) adapted prototypes
    logits: Tensor  # (N,K,h,w)


class CACClassifier(Classifier):
    """CAC: prototypes from the weight of a 1×1 convolution and the image's mean of each class, compared by cosine.

    All arithmetic is float32, under autocast too, as in `SSAClassifier`. A pixel whose feature is 0 has logits 0; the
    official code of OCRNet divides by 0 there.
    """

    # The weights are those of the official code.
    LOSSES: ClassVar[Mapping[str, Loss]] = {
        "main_ce": Loss(1.0, "cross entropy of the final logits"),
        "coarse_ce": Loss(1.0, "cross entropy of the logits before adaptation"),
        "teacher_ce": Loss(1.0, "cross entropy of the teacher's logits"),
        "response": Loss(1.0, "response distillation"),
    }
    has_coarse = uses_groups = True
    CLASS_ROWS: ClassVar[Sequence[str]] = ("conv_seg.weight", "conv_seg.bias")
    MARK: ClassVar[str] = "apd_proj.0.weight"
    ROWS: ClassVar[Sequence[Row]] = (
        Row("conv_seg", "conv_seg"),
        Row("student", "proj"),
        Row("teacher", "apd_proj"),
    )

    def __init__(
        self, channels: int, num_classes: int, dropout: float = 0.1, loss: LossOptions | None = None, group: int = 4
    ) -> None:
        super().__init__(channels, num_classes, dropout, loss, group)
        self.conv_seg = class_convolution(channels, num_classes)
        self.student = squeeze(channels)
        self.teacher = squeeze(channels)

    def forward(self, feature: Tensor) -> Tensor:
        """(N,C,h,w) → logits (N,K,h,w) in [−15, 15], float32."""
        return self.stages(feature)[0]

    def stages(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """(N,C,h,w) → final and coarse logits, both (N,K,h,w), in one pass."""
        adapted = self.adapt(feature)
        return adapted.logits, adapted.coarse

    def adapt(self, feature: Tensor) -> AdaptedSemantic:
        """(N,C,h,w) → logits and prototypes."""
        with torch.autocast(feature.device.type, enabled=False):
            feature = feature.float()
            coarse = self.conv_seg(self.dropout(feature))
            means = semantic_means(feature, coarse.flatten(2))
            prototypes = self.student(concatenate(means, self.semantic_prototypes))
            return AdaptedSemantic(coarse, prototypes, losses.cosine_logits(feature, prototypes))

    @property
    def semantic_prototypes(self) -> Tensor:
        """Fixed prototypes (K,C): the weight of the 1×1 convolution."""
        return self.conv_seg.weight.flatten(1)

    def training_step(self, feature: Tensor, labels: Tensor, totals: Tensor | None = None) -> TrainingStep:
        """Logits and weighted losses by name; losses of weight 0 are left out.

        labels (N,H,W): integers in [0, K) or 255 = ignored. The main cross entropy upsamples with align_corners=False
        and is averaged over all pixels; the others upsample with True and are averaged over those not ignored.
        """
        logits, coarse = self.stages(feature)
        with torch.autocast(feature.device.type, enabled=False):
            small = losses.resize_labels(labels, feature.shape[-2:])
            members = losses.group_matrix(len(labels), self.group, feature.device)
            taught = self.weights["teacher_ce"] or self.weights["response"]
            teacher = self._teach(feature.float(), small, members) if taught else logits
            others = self.weighing._replace(threshold=None)
            branches = {
                "main": Branch(logits, align_corners=False, weighing=self.weighing),
                "coarse": Branch(coarse, align_corners=True, weighing=others),
                "teacher": Branch(teacher, align_corners=True, weighing=others),
            }
            counted = {name: branch for name, branch in branches.items() if self.weights[f"{name}_ce"]}
            found = upsampled_terms(counted, labels, members)
            if self.weights["response"]:
                found["response"] = losses.response_loss(logits, teacher, small, members, edges=False)
        return TrainingStep(logits, {name: self.weights[name] * loss for name, loss in found.items()})

    def _teach(self, feature: Tensor, labels: Tensor, members: Tensor) -> Tensor:
        """The teacher's logits (N,K,h,w), from the class means of each group. labels (N,h,w), members (G,N)."""
        fixed = self.semantic_prototypes
        one_hot = losses.one_hot_pixels(labels, self.num_classes)  # (N,K,P)
        sums = one_hot @ feature.flatten(2).transpose(1, 2)
        group_sums = torch.einsum("gn,nkc->gkc", members, sums)
        group_pixels = torch.einsum("gn,nkc->gkc", members, one_hot.sum(dim=2, keepdim=True))
        prototypes = self.teacher(concatenate(class_means(group_sums, group_pixels, fixed), fixed))  # (G,K,C)
        return losses.cosine_logits(feature, torch.einsum("gn,gkc->nkc", members, prototypes))

    def training_only(self) -> tuple[str, ...]:
        """The teacher branch."""
        return ("teacher",)
