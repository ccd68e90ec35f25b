"""HRNetV2: branches of several resolutions side by side, which exchange their maps again and again.

Source: "Deep High-Resolution Representation Learning" (Wang et al., arXiv 1908.07919), as in mmsegmentation 0.30,
`HRNet`.

Axes: N images, C channels, H×W pixels.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.layers import ConvNorm, init_conv_module, resize_bilinear
from ssaseg.models.networks.resnet import BOTTLENECK_ROWS, Bottleneck
from ssaseg.models.rows import Row, conv_norm, rows_of

WIDTHS = {"hr18": (18, 36, 72, 144), "hr48": (48, 96, 192, 384)}  # of the branches, finest first
MODULES = (1, 4, 3)  # of the stages with two, three and four branches
BLOCKS = 4  # in each branch of a module, and in the first stage
STEM = 64


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvNorm(channels, channels, 3)
        self.second = ConvNorm(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        return F.relu(self.second(F.relu(self.first(x), inplace=True)).add_(x), inplace=True)


class Down(nn.Sequential):
    """3×3 convolutions of stride 2; only the last one changes the channels, and has no ReLU."""

    def __init__(self, inputs: int, outputs: int, steps: int) -> None:
        super().__init__(*(ConvNorm(inputs, outputs if k == steps - 1 else inputs, 3, stride=2) for k in range(steps)))

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,outputs,⌈H/2^steps⌉,⌈W/2^steps⌉)."""
        *others, last = self
        for conv in others:
            x = F.relu(conv(x), inplace=True)
        return last(x)


class Exchange(nn.Module):
    """Blocks in each branch; then each branch's map becomes the sum of all maps, brought to its size."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(width) for _ in range(BLOCKS))) for width in widths)
        self.fuse = nn.ModuleList(
            nn.ModuleList(self._path(widths, source, target) for source in range(len(widths)))
            for target in range(len(widths))
        )

    @staticmethod
    def _path(widths: Sequence[int], source: int, target: int) -> nn.Module:
        """From branch `source` to branch `target`."""
        if source > target:  # followed by upsampling
            return ConvNorm(widths[source], widths[target])
        if source < target:
            return Down(widths[source], widths[target], target - source)
        return nn.Identity()

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps of the branches → as many maps of the same sizes."""
        maps = [branch(each) for branch, each in zip(self.branches, maps, strict=True)]
        return [self._fused(target, maps) for target in range(len(maps))]

    def _fused(self, target: int, maps: Sequence[Tensor]) -> Tensor:
        size = maps[target].shape[-2:]
        total: Tensor | None = None
        for source, each in enumerate(maps):  # in this order: sums of floats depend on it
            path = self.fuse[target][source](each)  # type: ignore[index]
            if source > target:
                scale = 2 ** (source - target)
                path = resize_bilinear(path, (path.shape[-2] * scale, path.shape[-1] * scale))
                path = resize_bilinear(path, size)  # where a side is no multiple of the stride
            total = path if total is None else total + path
        assert total is not None
        return F.relu(total, inplace=True)


class HRNet(nn.Module):
    """Backbone: four branches at strides 4, 8, 16, 32, started one after the other."""

    def __init__(self, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvNorm(3, STEM, 3, stride=2), nn.ReLU(inplace=True),
            ConvNorm(STEM, STEM, 3, stride=2), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.first = nn.Sequential(*(Bottleneck(STEM if k == 0 else 4 * STEM, STEM, 1, 1) for k in range(BLOCKS)))
        self.enter = nn.ModuleList(
            [
                ConvNorm(4 * STEM, widths[0], 3),
                ConvNorm(4 * STEM, widths[1], 3, stride=2),
                ConvNorm(widths[1], widths[2], 3, stride=2),
                ConvNorm(widths[2], widths[3], 3, stride=2),
            ]
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(Exchange(widths[: 2 + stage]) for _ in range(count)) for stage, count in enumerate(MODULES)
        )
        self.channels = widths
        init_conv_module(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N,3,H,W) → four maps (N,C,⌈H/s⌉,⌈W/s⌉), finest first: s = 4, 8, 16, 32."""
        x = self.first(self.stem(images))
        maps = [F.relu(self.enter[0](x), inplace=True), F.relu(self.enter[1](x), inplace=True)]
        for number, stage in enumerate(self.stages):
            if number:
                maps.append(F.relu(self.enter[number + 1](maps[-1]), inplace=True))
            for module in stage.children():
                maps = module(maps)
        return maps


ROWS: list[Row] = [
    Row("backbone.stem.0.conv", "backbone.conv1"),
    Row("backbone.stem.0.norm", "backbone.bn1"),
    Row("backbone.stem.2.conv", "backbone.conv2"),
    Row("backbone.stem.2.norm", "backbone.bn2"),
    *rows_of("backbone.first.{}", "backbone.layer1.{}", BOTTLENECK_ROWS),
    *conv_norm("backbone.enter.0", "backbone.transition1.0", conv="0", norm="1"),
    *conv_norm("backbone.enter.1", "backbone.transition1.1.0", conv="0", norm="1"),
    *conv_norm("backbone.enter.2", "backbone.transition2.2.0", conv="0", norm="1"),
    *conv_norm("backbone.enter.3", "backbone.transition3.3.0", conv="0", norm="1"),
    *(
        row
        for stage in range(3)
        for row in rows_of(
            f"backbone.stages.{stage}.{{}}",
            f"backbone.stage{stage + 2}.{{}}",
            {
                "branches.{}.{}.first.conv": "branches.{}.{}.conv1",
                "branches.{}.{}.first.norm": "branches.{}.{}.bn1",
                "branches.{}.{}.second.conv": "branches.{}.{}.conv2",
                "branches.{}.{}.second.norm": "branches.{}.{}.bn2",
                "fuse.{}.{}.conv": "fuse_layers.{}.{}.0",
                "fuse.{}.{}.norm": "fuse_layers.{}.{}.1",
                "fuse.{}.{}.{}.conv": "fuse_layers.{}.{}.{}.0",
                "fuse.{}.{}.{}.norm": "fuse_layers.{}.{}.{}.1",
            },
        )
    ),
]
# In ImageNet files; also those of timm, whose names are the same.
PRETRAINED_ONLY = dict.fromkeys(
    [f"backbone.{part}.*" for part in ("incre_modules", "downsamp_modules", "final_layer", "classifier")],
    "the ImageNet classifier",
)
