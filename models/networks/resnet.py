"""ResNet v1c with output stride 8, the backbone of FCN, and plain ResNet, that of the mask methods.

Source: "Deep Residual Learning" (He et al., arXiv 1512.03385); the stem of three 3×3 convolutions is that of "Bag of
Tricks" (He et al., arXiv 1812.01187); stride and dilations: mmsegmentation 0.30, `_base_/models/fcn_r50-d8.py`.

Axes: N images, C channels, H×W pixels.
"""

import re

from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.layers import ConvNorm, init_conv_module, run_stages
from ssaseg.models.networks.family import Layout
from ssaseg.models.rows import Row, rows_of

EXPANSION = 4  # a block's output has 4 times the channels of its 3×3 convolution
PLANES = (64, 128, 256, 512)
STRIDES, PLAIN_STRIDES = (1, 2, 1, 1), (1, 2, 2, 2)
# Of the first block of a stage, and of the others: the first keeps the dilation of the stage before it.
DILATIONS, PLAIN_DILATIONS = ((1, 1), (1, 1), (1, 2), (2, 4)), ((1, 1),) * 4

DEPTHS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution with a residual connection; the stride is that of the 3×3 convolution.

    `norm_weight`: with 0, a block starts as its shortcut.
    """

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, norm_weight: float = 1.0) -> None:
        super().__init__()
        outputs = planes * EXPANSION
        self.reduce = ConvNorm(inputs, planes)
        self.spatial = ConvNorm(planes, planes, 3, stride, dilation=dilation)
        self.expand = ConvNorm(planes, outputs, norm_weight=norm_weight)
        self.shortcut = ConvNorm(inputs, outputs, stride=stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,4·planes,⌈H/stride⌉,⌈W/stride⌉)."""
        # In place: a norm's backward pass does not need its output.
        branch = F.relu(self.spatial(F.relu(self.reduce(x), inplace=True)), inplace=True)
        return F.relu(self.expand(branch).add_(self.shortcut(x)), inplace=True)


class ResNet(nn.Module):
    """Backbone: a stem and four stages, at strides 4, 8, 8, 8.

    `plain`: as in torchvision, with a stem of one 7×7 convolution, and strides 4, 8, 16, 32.
    """

    def __init__(self, depths: tuple[int, int, int, int], plain: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvNorm(3, 64, 7, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1),
        ) if plain else nn.Sequential(
            ConvNorm(3, 32, 3, stride=2), nn.ReLU(inplace=True), ConvNorm(32, 32, 3), nn.ReLU(inplace=True),
            ConvNorm(32, 64, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1),
        )  # fmt: skip
        layout = (PLAIN_STRIDES, PLAIN_DILATIONS) if plain else (STRIDES, DILATIONS)
        self.stages = nn.ModuleList()
        inputs = 64
        for planes, depth, stride, (first, rest) in zip(PLANES, depths, *layout, strict=True):
            blocks = [Bottleneck(inputs, planes, stride, first, norm_weight=0.0)]
            inputs = planes * EXPANSION
            blocks += [Bottleneck(inputs, planes, 1, rest, norm_weight=0.0) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*blocks))
        self.channels = tuple(planes * EXPANSION for planes in PLANES)
        init_conv_module(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N,3,H,W) → four maps (N,C,⌈H/s⌉,⌈W/s⌉): C = 256, 512, 1024, 2048; s = 4, 8, 8, 8, or 4, 8, 16, 32."""
        return run_stages(self.stages, self.stem(images))


# Names of a `Bottleneck` → mmsegmentation's.
BOTTLENECK_ROWS = {
    "reduce.conv": "conv1",
    "reduce.norm": "bn1",
    "spatial.conv": "conv2",
    "spatial.norm": "bn2",
    "expand.conv": "conv3",
    "expand.norm": "bn3",
    "shortcut.conv": "downsample.0",
    "shortcut.norm": "downsample.1",
}
STAGE_ROWS = rows_of("backbone.stages.{}.{}", "backbone.layer{+1}.{}", BOTTLENECK_ROWS)
ROWS: list[Row] = [
    *rows_of(
        "backbone.stem",
        "backbone.stem",
        {"0.conv": "0", "0.norm": "1", "2.conv": "3", "2.norm": "4", "4.conv": "6", "4.norm": "7"},
    ),
    *STAGE_ROWS,
]
PLAIN_ROWS = [Row("backbone.stem.0.conv", "backbone.conv1"), Row("backbone.stem.0.norm", "backbone.bn1"), *STAGE_ROWS]
LAYOUTS = (
    Layout(
        name="timm's ResNet-C",
        mark=re.compile(r"backbone\.conv1\.0\.weight"),
        rows=[
            *rows_of(
                "backbone.stem",
                "backbone.conv1",
                {"0.conv": "0", "0.norm": "1", "2.conv": "3", "2.norm": "4", "4.conv": "6"},
            ),
            Row("backbone.stem.4.norm", "backbone.bn1"),
            *STAGE_ROWS,
        ],
    ),
    Layout(
        name="torchvision's ResNet",
        mark=re.compile(r"backbone\.layer4\.0\.conv1\.weight"),
        without=re.compile(r"backbone\.(stem|conv1\.0)\.|pixel_decoder\."),  # mask methods have this backbone
        rows=STAGE_ROWS,
        left_out=dict.fromkeys(("backbone.conv1.weight", "backbone.bn1.*"), "the stem of one 7×7 convolution"),
        note="not ResNet v1c: its stem, one 7×7 convolution, is not used; three 3×3 convolutions get new weights",
    ),
)
