"""OCRNet: HRNet, a first classifier that finds a soft region for each class, and features that attend to these regions.

Source: "Object-Contextual Representations" (Yuan et al., ECCV 2020, arXiv 1909.11065), as in mmsegmentation 0.30,
`OCRHead` after an `FCNHead`.

Axes: N images, K classes, C channels, P = H·W positions at a quarter of the image's resolution.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.decoder import Decoder
from ssaseg.models.layers import ConvNorm, init_conv_module, resize_bilinear
from ssaseg.models.networks.family import Family, Parts
from ssaseg.models.networks.hrnet import PRETRAINED_ONLY, ROWS, WIDTHS, HRNet
from ssaseg.models.rows import conv_norm

VARIANTS = {f"ocrnet_{name}": widths for name, widths in WIDTHS.items()}


class Project(nn.Sequential):
    """1×1 convolutions, each with a norm and ReLU."""

    def __init__(self, *channels: int) -> None:
        super().__init__(*(ConvNorm(a, b) for a, b in pairwise(channels)))

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C',H,W)."""
        for conv in self:
            x = F.relu(conv(x), inplace=True)
        return x


class RegionContext(nn.Module):
    """Each position attends to one feature per class."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.query = Project(channels, inner, inner)
        self.key = Project(channels, inner, inner)
        self.value = Project(channels, inner)
        self.leave = Project(inner, channels)
        self.merge = Project(2 * channels, channels)
        self.scale = inner**-0.5

    def forward(self, feature: Tensor, regions: Tensor) -> Tensor:
        """(N,C,H,W), regions (N,C,K,1) → (N,C,H,W)."""
        query = self.query(feature).flatten(2).mT
        key, value = self.key(regions).flatten(2), self.value(regions).flatten(2).mT
        context = (query @ key * self.scale).softmax(dim=-1) @ value
        context = self.leave(context.mT.unflatten(2, feature.shape[-2:]))
        return self.merge(torch.cat([context, feature], dim=1))


class OCRDecoder(Decoder):
    """A cascade: the first stage's logits say which positions make up the feature of each class.

    mmsegmentation computes the first stage twice in each training step, with the same batch, so the statistics of its
    norm move twice. Here it is computed once. After `use_compat`, one update counts as two.
    """

    stride = 4

    def __init__(self, inputs: Sequence[int], num_classes: int, channels: int = 512, inner: int = 256) -> None:
        super().__init__()
        self.channels = channels
        width = sum(inputs)
        self.first = ConvNorm(width, width)
        self.squeeze = ConvNorm(width, channels, 3)
        self.context = RegionContext(channels, inner)
        init_conv_module(self)
        self.classifier: LinearClassifier = LinearClassifier(width, num_classes, dropout=0.0)
        self.compat = False

    def use_compat(self) -> None:
        """Two updates of the first norm's statistics with the same batch are one with the momentum 1 - (1 - m)²."""
        norm = self.first.norm
        assert norm.momentum is not None
        norm.momentum = 1 - (1 - norm.momentum) ** 2
        self.compat = True

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps, finest first → feature (N,channels,H/4,W/4)."""
        x = self.together(maps)
        return self.second(x, self.classifier(F.relu(self.first(x), inplace=True)))

    def training_step(self, maps: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The feature, and the loss `first_ce`; gradients of the second stage reach the first one's logits."""
        x = self.together(maps)
        norm = self.first.norm
        if self.compat and norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)  # and one more in its forward
        step = self.classifier.training_step(F.relu(self.first(x), inplace=True), labels)
        return self.second(x, step.logits), {"first_ce": step.losses["main_ce"]}

    def together(self, maps: Sequence[Tensor]) -> Tensor:
        """All maps at the size of the finest."""
        size = maps[0].shape[-2:]
        return torch.cat([resize_bilinear(each, size) for each in maps], dim=1)

    def second(self, x: Tensor, logits: Tensor) -> Tensor:
        """The feature, from all maps and the first stage's logits (N,K,H,W)."""
        feature = F.relu(self.squeeze(x), inplace=True)
        shares = logits.flatten(2).softmax(dim=-1)  # over positions
        regions = (shares @ feature.flatten(2).mT).mT.unsqueeze(3)
        return self.context(feature, regions)


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone and decoder of a variant in `VARIANTS`; `drop_path` has no effect."""
    backbone = HRNet(VARIANTS[name])
    return Parts(backbone, OCRDecoder(backbone.channels, num_classes))


CONTEXT = "decode_head.1.object_context_block"
FAMILY = Family(
    variants=VARIANTS,
    build=build,
    rows=[
        *ROWS,
        *conv_norm("decoder.first", "decode_head.0.convs.0"),
        *conv_norm("decoder.squeeze", "decode_head.1.bottleneck"),
        *conv_norm("decoder.context.query.{}", f"{CONTEXT}.query_project.{{}}"),
        *conv_norm("decoder.context.key.{}", f"{CONTEXT}.key_project.{{}}"),
        *conv_norm("decoder.context.value.0", f"{CONTEXT}.value_project"),
        *conv_norm("decoder.context.leave.0", f"{CONTEXT}.out_project"),
        *conv_norm("decoder.context.merge.0", f"{CONTEXT}.bottleneck"),
    ],
    mark="backbone.transition1.",
    heads={"classifier": "decode_head.1", "decoder.classifier": "decode_head.0"},
    losses={"first_ce": "cross entropy of the first stage"},
    pretrained_only=PRETRAINED_ONLY,
    dropout=0.0,
    compat="the statistics of the first stage's BatchNorm are updated twice a step",
)
