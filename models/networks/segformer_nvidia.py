"""SegFormer with the decoder of its authors' code, which Hugging Face `transformers` has too.

Source: github.com/NVlabs/SegFormer, `SegFormerHead`, and `transformers`, `SegformerForSemanticSegmentation`. Other than
mmsegmentation's (`segformer`) it has linear layers without norm, the coarsest map first, and 768 channels from B2 on.

Axes: N images, C channels, H×W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.decoder import Decoder
from ssaseg.models.layers import ConvNorm, init_conv_module, resize_bilinear
from ssaseg.models.networks import segformer
from ssaseg.models.networks.family import Family, Parts
from ssaseg.models.networks.segformer import to_conv, to_linear
from ssaseg.models.rows import Row, conv_norm

EPS = 1e-5  # of every LayerNorm, as in `transformers`; in the authors' code those of blocks and stages have 1e-6


@dataclass(frozen=True)
class Variant(segformer.Variant):
    """One size: also the channels of the decoder."""

    channels: int


VARIANTS = {
    name.replace("_", "_nvidia_"): Variant(backbone.base, backbone.depths, 256 if name[-2:] in ("b0", "b1") else 768)
    for name, backbone in segformer.VARIANTS.items()
}


class LinearDecoder(Decoder):
    """A linear layer for each map, all to the size of the finest, then one 1×1 convolution of all, coarsest first."""

    stride = 4

    def __init__(self, inputs: Sequence[int], channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.projects = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in inputs)
        self.merge = ConvNorm(channels * len(inputs), channels)
        init_conv_module(self.merge)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps, finest first → feature (N,channels,H/4,W/4)."""
        size = maps[0].shape[-2:]
        projected = [resize_bilinear(project(each), size) for project, each in zip(self.projects, maps, strict=True)]
        return F.relu(self.merge(torch.cat(projected[::-1], dim=1)))


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone and decoder of a variant in `VARIANTS`."""
    backbone = segformer.MiT(VARIANTS[name], drop_path, EPS)
    return Parts(backbone, LinearDecoder(backbone.channels, VARIANTS[name].channels))


NVIDIA = replace(
    segformer.NVIDIA,
    rows=[
        *segformer.NVIDIA.rows,
        *(
            row
            for k in range(4)
            for row in (
                Row(f"decoder.projects.{k}.weight", f"decode_head.linear_c{k + 1}.proj.weight", to_conv, to_linear),
                Row(f"decoder.projects.{k}.bias", f"decode_head.linear_c{k + 1}.proj.bias"),
            )
        ),
        *conv_norm("decoder.merge", "decode_head.linear_fuse"),
    ],
    heads={"classifier": "decode_head"},
    last="linear_pred",
    left_out={"decode_head.conv_seg.*": "a layer that the authors' code never calls"},
)
TRANSFORMERS = replace(
    segformer.TRANSFORMERS,
    rows=[
        *segformer.TRANSFORMERS.rows,
        Row("decoder.projects.{}.weight", "decode_head.linear_c.{}.proj.weight", to_conv, to_linear),
        Row("decoder.projects.{}.bias", "decode_head.linear_c.{}.proj.bias"),
        Row("decoder.merge.conv", "decode_head.linear_fuse"),
        Row("decoder.merge.norm", "decode_head.batch_norm"),
    ],
    heads={"classifier": "decode_head"},
    last="classifier",
)
FAMILY = Family(
    variants=VARIANTS,
    build=build,
    rows=NVIDIA.rows,
    mark="backbone.patch_embed1.",
    layouts=[NVIDIA, TRANSFORMERS],
    heads=NVIDIA.heads,
    last=NVIDIA.last,
    left_out=NVIDIA.left_out,
    quadratic=segformer.QUADRATIC,
)
