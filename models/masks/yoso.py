"""YOSO with ResNet-50.

Source: "You Only Segment Once" (Hu et al., arXiv 2303.14651) and the facts of its released code. Its authors published
only a configuration for panoptic segmentation of ADE20K; this is its network.

Axes: N images, Q queries, C channels, H×W positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.layers import resize_bilinear
from ssaseg.models.masks.base import QUERIES, MaskDecoder, Masks
from ssaseg.models.masks.deform import DeformUp, deform_rows
from ssaseg.models.masks.resnet import detectron2, resnet50
from ssaseg.models.networks.family import Family, Parts
from ssaseg.models.networks.resnet import PLAIN_ROWS
from ssaseg.models.rows import Row, rows_of

AGGREGATED, WIDTH = 128, 256  # channels of the pyramid's sum; of queries and masks
FEED = 2048  # of the feed-forward layers
STAGES, HEADS = 2, 8
TAPS = 3  # of the dynamic convolution along the channels
TEMPERATURE = 0.5  # class logits are divided by it


class PixelDecoder(nn.Module):
    """Pyramid with deformable convolutions on its way down; the sum of all its levels, with coordinates."""

    def __init__(self, inputs: Sequence[int]) -> None:
        super().__init__()
        widths = [each // 2 for each in inputs]
        self.lateral = nn.ModuleList(nn.Conv2d(*each, 1) for each in reversed(list(zip(inputs, widths, strict=True))))
        self.up = nn.ModuleList(DeformUp(widths[k], widths[k - 1]) for k in (3, 2, 1))
        self.sum = nn.ModuleList(nn.Conv2d(each, AGGREGATED, 1, bias=False) for each in reversed(widths))
        self.bias = nn.Parameter(torch.zeros(1, AGGREGATED, 1, 1))
        self.smooth = nn.Conv2d(AGGREGATED, AGGREGATED, 3, padding=1)
        self.locate = nn.Conv2d(AGGREGATED + 2, WIDTH, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps at strides 4, 8, 16, 32 → feature (N,256,h,w) at stride 4."""
        height, width = maps[0].shape[2:]
        x = self.lateral[0](maps[3])
        total: Tensor = self.bias
        for index, each in enumerate(self.sum):  # from the coarsest map on
            if index:
                x = self.lateral[index](maps[3 - index]) + self.up[index - 1](x)[1]
            total = total + resize_bilinear(each(x), (height, width))
        x = self.smooth(total)
        down, right = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in (height, width))
        places = torch.stack((right.expand(height, -1), down[:, None].expand(-1, width)))
        return self.locate(torch.cat((x, places.expand(len(x), -1, -1, -1)), dim=1))


class DynamicConvolution(nn.Module):
    """A separable convolution of the queries along their channels, whose weights come from other queries."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.norm = nn.Linear(WIDTH, TAPS + QUERIES), nn.LayerNorm(WIDTH)

    def forward(self, queries: Tensor, values: Tensor) -> Tensor:
        """Both (N,Q,C) → (N,Q,C)."""
        depth, point = self.weights(queries).split((TAPS, QUERIES), dim=2)
        windows = F.pad(values, (TAPS // 2, TAPS // 2)).unfold(2, TAPS, 1)  # (N,Q,C,TAPS)
        return self.norm(point @ F.relu((windows @ depth[..., None]).squeeze(3)))


class Stage(nn.Module):
    """Refines the queries from what the feature has under their masks."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.pooled, self.pooled_norm = DynamicConvolution(), nn.LayerNorm(WIDTH)
        self.kernels, self.kernels_norm = DynamicConvolution(), nn.LayerNorm(WIDTH)
        self.attention, self.attention_norm = nn.MultiheadAttention(WIDTH, HEADS), nn.LayerNorm(WIDTH)
        self.expand, self.reduce, self.feed_norm = nn.Linear(WIDTH, FEED), nn.Linear(FEED, WIDTH), nn.LayerNorm(WIDTH)
        self.classes, self.masks = Head(num_classes + 1), Head(WIDTH)

    def forward(self, feature: Tensor, queries: Tensor, masks: Tensor) -> Tensor:
        """Feature (N,C,h,w), queries (N,Q,C), mask logits (N,Q,h,w) → queries (N,Q,C)."""
        pooled = torch.einsum("nqhw,nchw->nqc", (masks.sigmoid() > 0.5).to(feature.dtype), feature)
        pooled = self.pooled_norm(pooled + self.pooled(queries, pooled))
        queries = self.kernels_norm(pooled + self.kernels(queries, pooled))
        each = queries.transpose(0, 1)
        queries = self.attention_norm(queries + self.attention(each, each, each, need_weights=False)[0].transpose(0, 1))
        return self.feed_norm(queries + self.reduce(F.relu(self.expand(queries))))


class Head(nn.Sequential):
    """Linear, norm, ReLU, linear."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.hidden, self.norm = nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH)
        self.relu, self.out = nn.ReLU(), nn.Linear(WIDTH, outputs)


class YOSO(MaskDecoder):
    """Pixel decoder, proposals of masks, and stages that refine them."""

    def __init__(self, inputs: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.pixels = PixelDecoder(inputs)
        self.proposals = nn.Conv2d(WIDTH, QUERIES, 1)
        self.stages = nn.ModuleList(Stage(num_classes) for _ in range(STAGES))

    def forward(self, maps: Sequence[Tensor]) -> Masks:
        """Maps of a ResNet at strides 4, 8, 16, 32. Class logits are those of the last stage; others need none."""
        feature = self.pixels(maps)
        masks = self.proposals(feature)
        queries = self.proposals.weight.flatten(1).expand(len(feature), -1, -1)
        stage: Any
        for stage in self.stages:
            queries = stage(feature, queries, masks)
            masks = torch.einsum("nqc,nchw->nqhw", stage.masks(queries), feature)
        return Masks(stage.classes(queries) / TEMPERATURE, masks)


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone and decoder of yoso_r50."""
    backbone = resnet50()
    return Parts(backbone, YOSO(backbone.channels, num_classes))


PIXELS, STAGE, NECK, HEAD = "decoder.pixels", "decoder.stages.{}", "pixel_decoder.deconv", "predictor.mask_heads.{}"
ROWS: list[Row] = [
    *PLAIN_ROWS,
    Row(f"{PIXELS}.lateral.{{}}", f"{NECK}.lateral_conv{{}}"),
    *deform_rows(f"{PIXELS}.up.{{}}", f"{NECK}.deform_conv{{+1}}"),
    *(Row(f"{PIXELS}.sum.{index}", f"{NECK}.conv_a{5 - index}") for index in range(4)),
    Row(f"{PIXELS}.bias", f"{NECK}.bias"),
    Row(f"{PIXELS}.smooth", f"{NECK}.output_conv"),
    Row(f"{PIXELS}.locate", "pixel_decoder.loc_conv"),
    Row("decoder.proposals", "predictor.kernels"),
    *rows_of(
        STAGE,
        HEAD,
        {
            "pooled.weights": "f_atten.weight_linear",
            "pooled.norm": "f_atten.norm",
            "pooled_norm": "f_atten_norm",
            "kernels.weights": "k_atten.weight_linear",
            "kernels.norm": "k_atten.norm",
            "kernels_norm": "k_atten_norm",
            "attention": "s_atten",
            "attention_norm": "s_atten_norm",
            "expand": "ffn.layers.0.0",
            "reduce": "ffn.layers.1",
            "feed_norm": "ffn_norm",
            "classes.hidden": "cls_fcs.0",
            "classes.norm": "cls_fcs.1",
            "classes.out": "fc_cls",
            "masks.hidden": "mask_fcs.0",
            "masks.norm": "mask_fcs.1",
            "masks.out": "fc_mask",
        },
    ),
]
FAMILY = Family(
    variants={"yoso_r50": None},
    build=build,
    rows=ROWS,
    mark="pixel_decoder.deconv.",
    layouts=(
        detectron2(
            "YOSO",
            ROWS,
            "yoso_neck.",
            "yoso_head.mask_heads.1.fc_cls",
            pixel_decoder="yoso_neck",
            predictor="yoso_head",
        ),
    ),
    heads={"classifier": "predictor.mask_heads.1"},
    last="fc_cls",
)
