"""CGRSeg: pyramid context, features reconstructed along rows and columns, and a classifier guided by prototypes.

Source: "Context-Guided Spatial Feature Reconstruction for Efficient Semantic Segmentation" (Ni et al., ECCV 2024,
arXiv 2405.06228), its configurations `local_configs/cgrseg/cgrseg-{t,b,l}_ade20k_160k.py`.

Axes: N images, C channels, H×W pixels, P = H·W, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.classifiers.base import LossOptions
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.decoder import Decoder
from ssaseg.models.layers import ConvNorm, Depthwise, init_conv_module, resize_bilinear
from ssaseg.models.networks import efficientformer
from ssaseg.models.networks.efficientformer import EfficientFormerV2
from ssaseg.models.networks.family import Family, Parts, Quadratic
from ssaseg.models.rows import Row, conv_norm, rows_of

MLP_RATIO = 2

SCALE = 1e-6  # of residual branches at the start


@dataclass(frozen=True)
class Variant:
    """One size: backbone, channels of the decoder, number of context blocks, length of the band kernels."""

    backbone: str
    channels: int
    context: int
    band: int


# Rows of numbers from the official files named in the module's docstring.
VARIANTS = {
    "cgrseg_t": Variant(backbone="s1", channels=128, context=5, band=11),
    "cgrseg_b": Variant(backbone="s2", channels=256, context=6, band=11),
    "cgrseg_l": Variant(backbone="l", channels=256, context=5, band=9),
}


class RectangularAttention(nn.Module):
    """Rectangular self-calibration attention (section 3.2): row means plus column means, shaped by two band kernels."""

    def __init__(self, channels: int, band: int) -> None:
        super().__init__()
        self.local = Depthwise(channels, 3)
        self.horizontal = ConvNorm(channels, channels, (1, band), groups=channels, bias=True)
        self.vertical = Depthwise(channels, (band, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        rectangle = x.mean(dim=3, keepdim=True) + x.mean(dim=2, keepdim=True)
        return torch.sigmoid(self.vertical(F.relu(self.horizontal(rectangle)))) * self.local(x)


class CalibrationBlock(nn.Module):
    """Rectangular self-calibration module: `RectangularAttention`, norm and MLP; residual, with a learnt scale."""

    def __init__(self, channels: int, band: int) -> None:
        super().__init__()
        self.attention = RectangularAttention(channels, band)
        self.norm = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, channels * MLP_RATIO, 1)
        self.project = nn.Conv2d(channels * MLP_RATIO, channels, 1)
        self.scale = nn.Parameter(torch.full((channels,), SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        branch = self.project(F.gelu(self.expand(self.norm(self.attention(x)))))
        return x + branch * self.scale[:, None, None]


class Fusion(nn.Module):
    """Gates local features by the context: local · upsample(hard-sigmoid(context))."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.local = ConvNorm(inputs, outputs)
        self.gate = ConvNorm(inputs, outputs)

    def forward(self, local: Tensor, context: Tensor) -> Tensor:
        """(N,C,H,W), (N,C,h,w) → (N,outputs,H,W)."""
        gate = F.hardsigmoid(self.gate(context))
        return self.local(local) * resize_bilinear(gate, local.shape[-2:])


class Guided(NamedTuple):
    """Input of `GuidedClassifier`: the decoder's feature before and after its output layer."""

    raw: Tensor  # (N,C,H/8,W/8)
    fused: Tensor  # (N,C,H/8,W/8)


class GuidedDecoder(Decoder):
    """Decoder: context at 1/64 from all maps together; then each map is reconstructed with it, the coarsest first."""

    def __init__(self, inputs: tuple[int, ...], variant: Variant) -> None:
        super().__init__()
        self.inputs, self.channels = inputs, variant.channels
        total = sum(inputs)
        self.context = nn.Sequential(*(CalibrationBlock(total, variant.band) for _ in range(variant.context)))
        self.rebuild = nn.ModuleList(CalibrationBlock(width, variant.band) for width in inputs)
        self.fuse = nn.ModuleList(Fusion(width, self.channels) for width in inputs)
        # From a coarser result to the next finer map.
        self.descend = nn.ModuleList(nn.Conv2d(self.channels, width, 1) for width in inputs[:-1])
        self.output = ConvNorm(self.channels, self.channels, groups=self.channels)
        # mmcv initialises its own modules; other convolutions keep PyTorch's initialisation.
        init_conv_module(self.fuse)
        init_conv_module(self.output)

    def forward(self, maps: list[Tensor]) -> Guided:
        """Maps, finest first → the feature (N,channels,H/8,W/8) before and after the output layer."""
        height, width = maps[-1].shape[-2:]
        half = ((height + 1) // 2, (width + 1) // 2)
        pyramid = torch.cat([F.adaptive_avg_pool2d(each, half) for each in maps], dim=1)
        contexts = self.context(pyramid).split(self.inputs, dim=1)
        local, last = maps[-1], len(maps) - 1
        raw = self.fuse[last](self.rebuild[last](local), contexts[last])
        for i in range(last - 1, -1, -1):
            local = maps[i] + self.descend[i](resize_bilinear(raw, maps[i].shape[-2:]))
            raw = self.fuse[i](self.rebuild[i](local), contexts[i])
        return Guided(raw, F.relu(self.output(raw)))


class FusedDecoder(GuidedDecoder):
    """The same decoder for other classifiers: it returns only the feature after the output layer."""

    def forward(self, maps: list[Tensor]) -> Tensor:  # type: ignore[override]
        """Maps, finest first → feature (N,channels,H/8,W/8)."""
        return super().forward(maps).fused


class GuidedClassifier(LinearClassifier):
    """CGRSeg's own plain classifier, with its dynamic-prototype guidance (section 3.3).

    A first prediction gives one prototype per class of the image. Together they weight the feature's channels for the
    second prediction, which uses the same 1×1 convolution. Only the second one has a loss, as in the official code.
    """

    ROWS: ClassVar[Sequence[Row]] = (
        *LinearClassifier.ROWS,
        Row("weigh", "lgc.conv_mask"),
        Row("enter", "lgc.channel_mul_conv.0"),
        Row("norm", "lgc.channel_mul_conv.1"),
        Row("leave", "lgc.channel_mul_conv.3"),
    )

    def __init__(
        self, channels: int, num_classes: int, dropout: float = 0.1, loss: LossOptions | None = None, group: int = 1
    ) -> None:
        super().__init__(channels, num_classes, dropout, loss, group)
        self.weigh = nn.Conv2d(channels, 1, 1)
        self.enter = nn.Conv2d(channels, channels, 1)
        self.norm = nn.LayerNorm([channels, 1, 1])
        self.leave = nn.Conv2d(channels, channels, 1)
        nn.init.kaiming_normal_(self.weigh.weight, mode="fan_in", nonlinearity="relu")
        for zero in (self.weigh.bias, self.leave.weight, self.leave.bias):
            nn.init.zeros_(zero)  # type: ignore[arg-type]

    def forward(self, feature: Guided) -> Tensor:  # type: ignore[override]
        """Features (N,C,h,w) → logits (N,K,h,w) of the second prediction."""
        raw = feature.raw
        prototypes = self.prototypes(super().forward(feature.fused), raw)
        weights = self.weigh(prototypes).softmax(dim=2)  # (N,1,K,1)
        summary = (prototypes * weights).sum(dim=2, keepdim=True)  # (N,C,1,1)
        gate = torch.sigmoid(self.leave(F.relu(self.norm(self.enter(summary)))))
        return super().forward(raw * gate + raw)

    def prototypes(self, logits: Tensor, feature: Tensor) -> Tensor:
        """Logits (N,K,h,w), feature (N,C,h,w) → mean of the feature for each class (N,C,K,1)."""
        with torch.autocast(feature.device.type, enabled=False):
            # A softmax over thousands of pixels gives values that are too small for half precision.
            where = logits.float().flatten(2).softmax(dim=2)  # (N,K,P)
            means = where @ feature.float().flatten(2).mT
        return means.mT.unsqueeze(3).to(feature.dtype)


def _build(name: str, drop_path: float | None, decoder: type[GuidedDecoder]) -> Parts:
    variant = VARIANTS[name]
    backbone = EfficientFormerV2(efficientformer.VARIANTS[variant.backbone], drop_path)
    return Parts(backbone, decoder(backbone.channels, variant))


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone and decoder of a variant in `VARIANTS` for any classifier, initialised as in the official run."""
    return _build(name, drop_path, FusedDecoder)


def build_guided(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """As `build`, but with the decoder for `GuidedClassifier`."""
    return _build(name, drop_path, GuidedDecoder)


_CALIBRATION = {
    "attention.local": "token_mixer.dwconv_hw",
    "attention.horizontal.conv": "token_mixer.excite.0",
    "attention.horizontal.norm": "token_mixer.excite.1",
    "attention.vertical": "token_mixer.excite.3",
    "norm": "norm",
    "expand": "mlp.fc1",
    "project": "mlp.fc2",
    "scale": "gamma",
}


def _attention_bytes(pixels: int) -> float:
    """Of `AttentionDownsample`: its scores, biases and their sum are in memory together."""
    queries, keys = pixels / 32**2, pixels / 16**2
    return 3 * 4 * efficientformer.HEADS * queries * keys


FAMILY = Family(
    variants=VARIANTS,
    build=build,
    rows=[
        *efficientformer.ROWS,
        *conv_norm("decoder.fuse.{}.local", "decode_head.SIM.{}.fuse1"),
        *conv_norm("decoder.fuse.{}.gate", "decode_head.SIM.{}.fuse2"),
        *conv_norm("decoder.output", "decode_head.linear_fuse"),
        *rows_of("decoder.context.{}", "decode_head.trans.transformer_blocks.{}", _CALIBRATION),
        *rows_of("decoder.rebuild.{}", "decode_head.meta.{}", _CALIBRATION),
        Row("decoder.descend.{}", "decode_head.conv.{}"),
    ],
    mark="backbone.network.",
    left_out={
        "backbone.*.attention_biases": "biases of the ImageNet network, for a grid of 7×7",
        "backbone.*.attention_bias_idxs": "indices into these biases",
        "backbone.*.attention_bias_idxs_seg": "indices that follow from the grid's size",
    },
    not_pretrained=("*.attention_biases_seg",),
    plain=GuidedClassifier,
    build_plain=build_guided,
    quadratic=Quadratic(pixels=800_000, memory=_attention_bytes),
)
