"""FCN: ResNet with a decoder of three 3×3 convolutions, and that decoder as auxiliary head of other networks.

Source: "Fully Convolutional Networks" (Long et al., arXiv 1411.4038) as in mmsegmentation 0.30, `FCNHead`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.decoder import AuxiliaryHead, Decoder
from ssaseg.models.layers import ConvNorm, init_conv_module
from ssaseg.models.networks.family import Family, Parts
from ssaseg.models.networks.resnet import DEPTHS, LAYOUTS, ROWS, ResNet
from ssaseg.models.rows import Row, conv_norm

VARIANTS = {f"fcn_{name}": depths for name, depths in DEPTHS.items()}


class FCNDecoder(Decoder):
    """3×3 convolutions of one of the backbone's maps; with `concat`, a last one of their input and output together."""

    def __init__(self, inputs: int, channels: int, convs: int, level: int, stride: int, concat: bool) -> None:
        super().__init__()
        self.channels, self.stride, self.level = channels, stride, level
        self.convs = nn.ModuleList(ConvNorm(channels if k else inputs, channels, 3) for k in range(convs))
        self.merge = ConvNorm(inputs + channels, channels, 3) if concat else None
        init_conv_module(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The backbone's maps → feature (N,channels,h,w), of the size of map `level`."""
        x = maps[self.level]
        feature = x
        for conv in self.convs:
            feature = F.relu(conv(feature), inplace=True)
        if self.merge is not None:
            feature = F.relu(self.merge(torch.cat([x, feature], dim=1)), inplace=True)
        return feature


def auxiliary_head(inputs: int, level: int, stride: int, num_classes: int) -> AuxiliaryHead:
    """mmsegmentation's auxiliary head: one 3×3 convolution to 256 channels, and the plain classifier."""
    decoder = FCNDecoder(inputs, 256, convs=1, level=level, stride=stride, concat=False)
    return AuxiliaryHead(decoder, LinearClassifier(decoder.channels, num_classes))


AUXILIARY_ROWS: list[Row] = [*conv_norm("auxiliary.aux.decoder.convs.{}", "auxiliary_head.convs.{}")]
AUXILIARY_HEADS = {"classifier": "decode_head", "auxiliary.aux.classifier": "auxiliary_head"}
AUXILIARY_LOSSES = {"aux_ce": "cross entropy of the auxiliary head on the backbone's third map"}


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone, decoder and auxiliary head of a variant in `VARIANTS`; `drop_path` has no effect on a ResNet."""
    backbone = ResNet(VARIANTS[name])
    decoder = FCNDecoder(backbone.channels[3], 512, convs=2, level=3, stride=8, concat=True)
    return Parts(backbone, decoder, {"aux": auxiliary_head(backbone.channels[2], 2, 8, num_classes)})


FAMILY = Family(
    variants=VARIANTS,
    build=build,
    rows=[
        *ROWS,
        *conv_norm("decoder.convs.{}", "decode_head.convs.{}"),
        *conv_norm("decoder.merge", "decode_head.conv_cat"),
        *AUXILIARY_ROWS,
    ],
    mark="backbone.stem.",
    layouts=LAYOUTS,
    not_pretrained=("backbone.stem.*",),  # where the file came from torchvision
    heads=AUXILIARY_HEADS,
    losses=AUXILIARY_LOSSES,
)
