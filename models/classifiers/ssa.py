"""SSA-Seg's classifier: semantic and spatial prototypes that adapt to the image.

Source: arXiv 2405.06525, sections 3.2 and 3.3.

Axes: N images, K classes, C channels, h×w feature pixels, P = h·w.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssaseg.models.classifiers import distillation, losses
from ssaseg.models.classifiers.adaptation import semantic_means
from ssaseg.models.classifiers.base import Classifier, Loss, LossOptions, TrainingStep, class_convolution
from ssaseg.models.classifiers.distillation import Adapted, PrototypeProjections
from ssaseg.models.classifiers.upsampled import class_pixels
from ssaseg.models.rows import Row


class SSAClassifier(Classifier):
    """SSA-Seg: semantic (SEPA) and spatial (SPPA) prototypes adapted to the image, compared by cosine.

    Source: arXiv 2405.06525, sections 3.2 and 3.3. All arithmetic is float32, under autocast too: half precision cannot
    hold its epsilon of 1e-12 and its sums over thousands of pixels. The weights therefore stay float32: for speed use
    autocast or `ssaseg.models.fast`, not `.half()`.
    """

    # The weights are those of the official code.
    LOSSES: ClassVar[Mapping[str, Loss]] = {
        "main_ce": Loss(1.0, "cross entropy of the final logits"),
        "coarse_ce": Loss(1.0, "cross entropy of the logits before adaptation"),
        "teacher_ce": Loss(1.0, "cross entropy of the teacher's logits"),
        "main_dice": Loss(1.0, "dice of the final logits"),
        "teacher_dice": Loss(1.0, "dice of the teacher's logits"),
        "response": Loss(1.0, "response distillation, boundary and interior separately"),
        "semantic": Loss(10.0, "distillation of the semantic prototypes' relations"),
        "spatial": Loss(0.4, "distillation of the spatial prototypes"),
    }
    has_coarse = uses_groups = needs_totals = True
    CLASS_ROWS: ClassVar[Sequence[str]] = ("conv_seg.weight", "conv_seg.bias", "spatial_prototypes")
    ROWS: ClassVar[Sequence[Row]] = (
        Row("conv_seg", "conv_seg"),
        Row("spatial_conv", "get_feat_pos"),
        Row("spatial_prototypes", "center_pos.weight"),
        Row("student.semantic", "center_content_proj"),
        Row("student.spatial", "center_pos_proj"),
        Row("student.merge", "center_proj"),
        Row("teacher.semantic", "gt_center_content_proj"),
        Row("teacher.spatial", "gt_center_pos_proj"),
        Row("teacher.merge", "gt_center_proj"),
    )
    MARK: ClassVar[str] = "center_pos.weight"
    LEFT_OUT: ClassVar[Mapping[str, str]] = {"ssa_loss.criterion.empty_weight": "a buffer that no loss reads"}

    def __init__(
        self, channels: int, num_classes: int, dropout: float = 0.1, loss: LossOptions | None = None, group: int = 4
    ) -> None:
        super().__init__(channels, num_classes, dropout, loss, group)
        self.conv_seg = class_convolution(channels, num_classes)
        self.spatial_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.spatial_prototypes = nn.Parameter(torch.randn(num_classes, channels))
        self.student = PrototypeProjections(channels)
        self.teacher = PrototypeProjections(channels)

    def forward(self, feature: Tensor) -> Tensor:
        """(N,C,h,w) → logits (N,K,h,w) in [−15, 15], float32."""
        if torch.is_grad_enabled():
            return self.adapt(feature).logits
        # The same arithmetic in the place of one tensor: at a quarter of the resolution they are the largest of all.
        with torch.autocast(feature.device.type, enabled=False):
            feature = feature.float()
            spatial_feature = self.spatial_conv(feature)
            coarse = self.conv_seg(self.dropout(feature))
            prototypes = self._prototypes(feature, spatial_feature, coarse)[2]
            del coarse
            pixels = spatial_feature.add_(feature).flatten(2).transpose(1, 2)
            pixels.div_(losses.above_zero(pixels.norm(dim=2, keepdim=True)))
            return losses.cosine_logits(feature, prototypes, pixels)

    def stages(self, feature: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N,C,h,w) → final and coarse logits, both (N,K,h,w), in one pass."""
        adapted = self.adapt(feature)
        return adapted.logits, adapted.coarse

    def adapt(self, feature: Tensor) -> Adapted:
        """(N,C,h,w) → logits and all intermediate results."""
        with torch.autocast(feature.device.type, enabled=False):
            feature = feature.float()
            coarse = self.conv_seg(self.dropout(feature))
            spatial_feature = self.spatial_conv(feature)
            semantic, spatial, prototypes = self._prototypes(feature, spatial_feature, coarse)
            adapted = feature + spatial_feature
            pixels = losses.pixel_directions(adapted)
            logits = losses.cosine_logits(adapted, prototypes, pixels)
            return Adapted(coarse, spatial_feature, adapted, pixels, semantic, spatial, logits)

    def _prototypes(self, feature: Tensor, spatial_feature: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (N,C,h,w) and logits (N,K,h,w) → adapted prototypes S', P' and Z, all (N,K,C)."""
        scores = coarse.flatten(2)  # (N,K,P)
        semantic_mean = semantic_means(feature, scores)
        spatial_mean = scores.softmax(dim=2) @ spatial_feature.flatten(2).transpose(1, 2)  # (N,K,C)
        # Trained weights depend on the orders, which differ: for semantic prototypes the image's mean comes first,
        # for spatial ones the fixed table.
        return self.student((semantic_mean, self.semantic_prototypes), (self.spatial_prototypes, spatial_mean))

    @property
    def semantic_prototypes(self) -> Tensor:
        """Fixed semantic prototypes (K,C): the weight of the 1×1 convolution."""
        return self.conv_seg.weight.flatten(1)

    def training_step(self, feature: Tensor, labels: Tensor, totals: Tensor | None = None) -> TrainingStep:
        """Logits, and weighted losses of online multi-domain distillation by name; losses of weight 0 are left out.

        labels (N,H,W): integers in [0, K) or 255 = ignored. `totals`: (image, class) pairs per micro-batch, averaged
        over the optimiser's step; None: this batch is the whole step.
        """
        student = self.adapt(feature)
        with torch.autocast(feature.device.type, enabled=False):
            teacher = distillation.teach(
                self.teacher,
                self.semantic_prototypes,
                self.spatial_prototypes,
                feature.float(),
                student,
                labels,
                self.group,
            )
            terms = distillation.terms(student, teacher, labels, totals, self.weights, self.weighing)
        return TrainingStep(student.logits, terms)

    def step_totals(self, labels: Tensor) -> Tensor:
        """Number of (image, class) pairs in labels (N,H,W): the denominator of the dice losses."""
        return (class_pixels(labels, self.num_classes) > 0).sum().float()

    def training_only(self) -> tuple[str, ...]:
        """The teacher branch."""
        return ("teacher",)
