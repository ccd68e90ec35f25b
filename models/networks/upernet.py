"""UPerNet: pyramid pooling, and a feature pyramid at a quarter of the resolution, on Swin or ViT-Adapter.

Source: "Unified Perceptual Parsing" (Xiao et al., ECCV 2018, arXiv 1807.10221), as in mmsegmentation 0.30, `UPerHead`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.decoder import Decoder
from ssaseg.models.layers import ConvNorm, init_conv_module, resize_bilinear
from ssaseg.models.networks import swin, vit_adapter
from ssaseg.models.networks.family import Family, Layout, Parts
from ssaseg.models.networks.fcn import AUXILIARY_HEADS, AUXILIARY_LOSSES, AUXILIARY_ROWS, auxiliary_head
from ssaseg.models.rows import Row, conv_norm

POOLS = (1, 2, 3, 6)  # sides of the maps that the coarsest map is pooled to
VARIANTS = {f"upernet_swin_{size}": variant for size, variant in swin.VARIANTS.items()}


class UPerDecoder(Decoder):
    """Pyramid pooling of the coarsest of four maps, then a feature pyramid from coarse to fine, then all together."""

    stride = 4

    def __init__(self, inputs: Sequence[int], channels: int = 512) -> None:
        super().__init__()
        self.channels = channels
        *finer, last = inputs
        self.means = nn.ModuleList(nn.AdaptiveAvgPool2d(side) for side in POOLS)
        self.pools = nn.ModuleList(ConvNorm(last, channels) for _ in POOLS)
        self.pooled = ConvNorm(last + channels * len(POOLS), channels, 3)
        self.laterals = nn.ModuleList(ConvNorm(width, channels) for width in finer)
        self.smooth = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in finer)
        self.merge = ConvNorm(channels * len(inputs), channels, 3)
        init_conv_module(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps, finest first → feature (N,channels,H/4,W/4)."""
        *finer, last = maps
        levels = [F.relu(lateral(each), inplace=True) for lateral, each in zip(self.laterals, finer, strict=True)]
        levels.append(self.pool(last))
        for k in range(len(levels) - 1, 0, -1):  # one after the other: each level has all coarser ones in it
            levels[k - 1] = levels[k - 1] + resize_bilinear(levels[k], levels[k - 1].shape[-2:])
        smooth = [F.relu(conv(level), inplace=True) for conv, level in zip(self.smooth, levels[:-1], strict=True)]
        size = levels[0].shape[-2:]
        together = torch.cat([resize_bilinear(each, size) for each in [*smooth, levels[-1]]], dim=1)
        return F.relu(self.merge(together), inplace=True)

    def pool(self, x: Tensor) -> Tensor:
        """(N,C,h,w) → (N,channels,h,w), with the means of the map in 1, 4, 9 and 36 parts."""
        size = x.shape[-2:]
        means = [F.relu(conv(mean(x))) for conv, mean in zip(self.pools, self.means, strict=True)]
        together = torch.cat([x, *(resize_bilinear(mean, size) for mean in means)], dim=1)
        return F.relu(self.pooled(together), inplace=True)


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone, decoder and auxiliary head of a variant in `VARIANTS`."""
    return with_decoder(swin.Swin(VARIANTS[name], drop_path), num_classes)


def with_decoder(backbone: swin.Swin | vit_adapter.ViTAdapter, num_classes: int) -> Parts:
    """A backbone with UPerNet's decoder, and the auxiliary head on its third map."""
    head = auxiliary_head(backbone.channels[2], 2, 16, num_classes)
    return Parts(backbone, UPerDecoder(backbone.channels), {"aux": head})


DECODER_ROWS: list[Row] = [
    *conv_norm("decoder.pools.{}", "decode_head.psp_modules.{}.1"),
    *conv_norm("decoder.pooled", "decode_head.bottleneck"),
    *conv_norm("decoder.laterals.{}", "decode_head.lateral_convs.{}"),
    *conv_norm("decoder.smooth.{}", "decode_head.fpn_convs.{}"),
    *conv_norm("decoder.merge", "decode_head.fpn_bottleneck"),
]

TRANSFORMERS = Layout(
    name="transformers' Swin",
    mark=re.compile(r"backbone\.embeddings\.patch_embeddings\.projection"),
    rows=[
        *swin.TRANSFORMERS_ROWS,
        *(
            replace(row, theirs=str(row.theirs).replace(".bn", ".batch_norm"))
            for row in (*DECODER_ROWS, *AUXILIARY_ROWS)
        ),
    ],
    heads=AUXILIARY_HEADS,
    last="classifier",
    left_out={
        "backbone.encoder.layers.*.attention.self.relative_position_index": swin.INDICES,
        "backbone.layernorm.*": "a norm that segmentation does not use",
        "backbone.classifier.*": "the ImageNet classifier",
    },
)

FAMILY = Family(
    variants=VARIANTS,
    build=build,
    rows=[*swin.ROWS, *DECODER_ROWS, *AUXILIARY_ROWS],
    mark="backbone.stages.0.blocks.0.attn.w_msa",
    heads=AUXILIARY_HEADS,
    losses=AUXILIARY_LOSSES,
    left_out={"backbone.stages.*.attn.w_msa.relative_position_index": swin.INDICES},
    not_pretrained=swin.NOT_PRETRAINED,
    pretrained_only=swin.PRETRAINED_ONLY,
    layouts=[*swin.LAYOUTS, TRANSFORMERS],
    # `backbone.swin` in files of transformers 5, `swin` in ImageNet files.
    renamed=[(re.compile(r"^(backbone\.)?swin\."), "backbone.")],
    refuse=swin.refuse,
)


# ---- with ViT-Adapter --------------------------------------------------------------------------------------------

ADAPTERS = {f"upernet_vit_adapter_{size}": variant for size, variant in vit_adapter.VARIANTS.items()}


def build_adapter(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone, decoder and auxiliary head of a variant in `ADAPTERS`."""
    return with_decoder(vit_adapter.ViTAdapter(ADAPTERS[name], drop_path), num_classes)


# The convolutional branch, and the scales of layers.
ADAPTER_PARTS = tuple(
    f"backbone.{part}" for part in ("level_embed", "spm.*", "interactions.*", "up.*", "norm?.*", "blocks.*.gamma?")
)


def resize_positions(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Position embeddings (1,1+P,C), or those of DeiT with two tokens before them, for a square of another size.

    As the authors resize them: bicubic. Returns them unchanged if they are not of a square, or have other channels.
    """
    if value.dim() != 3 or value.shape[0] != 1 or value.shape[2] != shape[2]:
        return value
    old, new = (math.isqrt(count) for count in (value.shape[1], shape[1] - 1))
    if not 0 < value.shape[1] - old**2 <= 2:
        return value
    first, maps = value[:, :1], value[:, -(old**2) :]
    if old != new:
        resized = F.interpolate(maps.mT.unflatten(2, (old, old)).float(), (new, new), mode="bicubic")
        maps = resized.flatten(2).mT.to(value.dtype)
    return torch.cat([first, maps], dim=1)


PLAIN_VIT = Layout(
    name="timm's ViT",
    mark=re.compile(r"backbone\.blocks\.0\.attn\.qkv\.weight"),
    without=re.compile(r"backbone\.spm\."),
    rows=vit_adapter.PLAIN_ROWS,
    left_out={
        **dict.fromkeys(("backbone.cls_token", "backbone.dist_token"), "a token that only a classifier reads"),
        "backbone.head_dist.*": "the ImageNet classifier",
    },
    resized={"backbone.pos_embed": resize_positions},
)

ADAPTER_FAMILY = Family(
    variants=ADAPTERS,
    build=build_adapter,
    rows=[*vit_adapter.ROWS, *DECODER_ROWS, *AUXILIARY_ROWS],
    mark="backbone.spm.",
    layouts=[PLAIN_VIT],
    not_pretrained=ADAPTER_PARTS,
    heads=AUXILIARY_HEADS,
    losses=AUXILIARY_LOSSES,
)
