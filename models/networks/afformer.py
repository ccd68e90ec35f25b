"""AFFormer: a network without a heavy head. It computes prototypes on a coarse grid in parallel to the pixels.

Source: "Head-Free Lightweight Semantic Segmentation with Linear Transformer" (Dong et al., AAAI 2023,
arXiv 2301.04648), its `tools/afformer.py` and configurations `configs/AFFormer/AFFormer_{tiny,small,base}_ade20k.py`.
The official head also has a layer `align` of 66,048 parameters, which is never called; it is left out here.

Axes: N images, C channels, H×W pixels, P = H·W, h heads, D channels of one head.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.decoder import Decoder
from ssaseg.models.layers import (
    ConvGroupNorm,
    ConvNorm,
    Depthwise,
    DropPath,
    drop_path_rates,
    init_conv_module,
    init_fan_out,
    resize_bilinear,
)
from ssaseg.models.networks.family import Family, Parts
from ssaseg.models.rows import Row, conv_norm, rows_of

HEADS = 8

MLP_RATIO = 2

WINDOWS = ((3, 2), (5, 3), (7, 3))  # high-pass kernels, and the number of heads of each

POOLS = (1, 2, 3, 6)  # sides of the low-pass grids, each for a quarter of the channels

STRIDES = ((1, 1), (2, 1), (1, 2), (1, 4))  # of the two embeddings of each stage


@dataclass(frozen=True)
class Variant:
    """One size: channels and transformer blocks per stage. The first stage has no block; its 1 is for the rates."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    channels: int = 256
    drop_path: float = 0.0


# Rows of numbers from the official files named in the module's docstring.
VARIANTS = {
    "afformer_t": Variant(widths=(32, 64, 160, 216), depths=(1, 2, 4, 2)),
    "afformer_s": Variant(widths=(32, 64, 176, 216), depths=(1, 2, 4, 2)),
    "afformer_b": Variant(widths=(32, 96, 176, 216), depths=(1, 2, 6, 2)),
}


def to_tokens(maps: Tensor) -> Tensor:
    """(N,C,H,W) → (N,P,C)."""
    return maps.flatten(2).transpose(1, 2)


def to_maps(tokens: Tensor, size: torch.Size) -> Tensor:
    """(N,P,C) → (N,C,H,W), a view."""
    return tokens.transpose(1, 2).unflatten(2, size)


class Embedding(nn.Module):
    """Depthwise 3×3 and pointwise convolution, then one norm and Hardswish."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.pointwise = ConvNorm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,⌈H/stride⌉,⌈W/stride⌉)."""
        return F.hardswish(self.pointwise(self.depthwise(x)))


class Restore(nn.Module):
    """Bottleneck that restores detail: half the channels, depthwise 3×3, all channels again; residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 2
        self.reduce = ConvNorm(channels, hidden)
        self.depthwise = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.expand = ConvNorm(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        return x + self.expand(F.hardswish(self.depthwise(F.hardswish(self.reduce(x)))))


class FrequencyFilter(nn.Module):
    """Splits the values by frequency: high frequencies by small kernels, low ones by pooling to coarse grids."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sizes = [heads * (channels // HEADS) for _, heads in WINDOWS]
        self.high_pass = nn.ModuleList(
            Depthwise(size, kernel) for size, (kernel, _) in zip(self.sizes, WINDOWS, strict=True)
        )

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(N,C,H,W) → high and low frequencies, both (N,C,H,W)."""
        inputs = values.split(self.sizes, dim=1)
        high = torch.cat([conv(each) for conv, each in zip(self.high_pass, inputs, strict=True)], dim=1)
        quarters = values.chunk(len(POOLS), dim=1)
        pooled = (F.adaptive_avg_pool2d(quarter, side) for quarter, side in zip(quarters, POOLS, strict=True))
        low = torch.cat([resize_bilinear(grid, values.shape[-2:]) for grid in pooled], dim=1)
        return high, F.relu(low)


class Block(nn.Module):
    """Linear attention with frequency filters, and an MLP with a depthwise convolution; both residual, after norms.

    The blocks of an encoder share its position encoding and its filter.
    """

    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        hidden = channels * MLP_RATIO
        self.attention_norm = nn.LayerNorm(channels, eps=1e-6)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.attention_project = nn.Linear(channels, channels)
        self.mlp_norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, hidden)
        self.depthwise = Depthwise(hidden, 3)
        self.project = nn.Linear(hidden, channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: torch.Size, frequencies: FrequencyFilter) -> Tensor:
        """Tokens (N,P,C) of maps of `size` (H, W) → (N,P,C)."""
        x = x + self.drop_path(self.attention_project(self.attend(self.attention_norm(x), size, frequencies)))
        hidden = self.expand(self.mlp_norm(x))
        hidden = F.gelu(hidden + to_tokens(self.depthwise(to_maps(hidden, size))))
        return x + self.drop_path(self.project(hidden))

    def attend(self, x: Tensor, size: torch.Size, frequencies: FrequencyFilter) -> Tensor:
        """Tokens (N,P,C) → (N,P,C). The cost is linear in P, as keys and values are multiplied first."""
        query, key, value = self.query_key_value(x).chunk(3, dim=-1)
        high, low = (to_tokens(maps) for maps in frequencies(to_maps(value, size)))
        # The channels of a head are adjacent: channel = head · D + d. The softmax is over tokens.
        heads = [t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (query, key.softmax(dim=1), value)]  # (N,h,P,D)
        context = heads[1].transpose(-2, -1) @ heads[2]  # (N,h,D,D)
        attended = (heads[0] @ context).transpose(1, 2).flatten(2)  # (N,P,C)
        return (x.shape[2] // HEADS) ** -0.5 * attended + (query * high + low)


class Encoder(nn.Module):
    """Transformer blocks on the coarse grid. They share one position encoding and one frequency filter."""

    def __init__(self, channels: int, rates: list[float]) -> None:
        super().__init__()
        self.position = Depthwise(channels, 3)
        self.frequencies = FrequencyFilter(channels)
        self.blocks = nn.ModuleList(Block(channels, rate) for rate in rates)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        size = x.shape[-2:]
        for block in self.blocks:
            x = x + self.position(x)
            x = to_maps(block(to_tokens(x), size, self.frequencies), size)
        return x


class Stage(nn.Module):
    """Two embeddings in sequence. Pixels are restored from the first one, prototypes are encoded from the second one.

    The first stage has no encoder: it restores the sum of the two.
    """

    def __init__(self, channels: int, outputs: int, strides: tuple[int, int], rates: list[float]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(Embedding(channels, stride) for stride in strides)
        self.restore = Restore(channels)
        self.encoder = Encoder(channels, rates) if rates else None
        self.aggregate = ConvNorm(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,outputs,h,w), at the first embedding's resolution."""
        pixels = self.embeddings[0](x)
        prototypes = self.embeddings[1](pixels)
        if self.encoder is None:
            merged = self.restore(pixels + prototypes)
        else:
            merged = self.restore(pixels) + _resize_to_corners(self.encoder(prototypes), pixels.shape[-2:])
        return F.hardswish(self.aggregate(merged))


def _resize_to_corners(maps: Tensor, size: torch.Size) -> Tensor:
    """Bilinear with align_corners=True; maps of this size are returned unchanged."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


class AFFormer(nn.Module):
    """Backbone: a stem at 1/4 and four stages. The last three are at 1/8, prototypes of the last two at 1/16, 1/32."""

    def __init__(self, variant: Variant, drop_path: float | None = None) -> None:
        super().__init__()
        rates = drop_path_rates(variant.drop_path if drop_path is None else drop_path, variant.depths)
        widths = variant.widths
        self.stem = nn.Sequential(
            ConvNorm(3, widths[0] // 2, 3, stride=2),
            nn.Hardswish(),
            ConvNorm(widths[0] // 2, widths[0], 3, stride=2),
            nn.Hardswish(),
        )
        starts = [sum(variant.depths[:stage]) for stage in range(5)]
        self.stages = nn.ModuleList(
            Stage(width, after, strides, rates[start:end] if stage else [])
            for stage, (width, after, strides, start, end) in enumerate(
                zip(widths, (*widths[1:], widths[-1]), STRIDES, starts, starts[1:], strict=False)
            )
        )
        self.channels = widths[-1]
        init_fan_out(self)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,H,W) → the last stage's map (N,C,⌈H/8⌉,⌈W/8⌉)."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return x


class ClassHead(Decoder):
    """Decoder: one 1×1 convolution with GroupNorm and ReLU."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.squeeze = ConvGroupNorm(inputs, channels)
        init_conv_module(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H/8,W/8) → feature (N,channels,H/8,W/8)."""
        return F.relu(self.squeeze(x))


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone and decoder of a variant in `VARIANTS`, initialised as the official code does without a checkpoint."""
    variant = VARIANTS[name]
    backbone = AFFormer(variant, drop_path)
    return Parts(backbone, ClassHead(backbone.channels, variant.channels))


def _aliases(keys: Collection[str]) -> dict[str, list[str]]:
    """Official key → other names: each transformer layer lists again what it shares with its encoder."""
    found = {}
    for key in keys:
        for pattern, names in _SHARED.items():
            before, shared, after = key.partition(pattern)
            if shared:
                layers = sum(
                    other.startswith(f"{before}mhca_blks.") and other.endswith(".norm1.bias") for other in keys
                )
                found[key] = [before + name.format(layer) + after for layer in range(layers) for name in names]
    return found


# Part of an official key → names of the same module in a layer, {}.
_SHARED = {
    "mhca_blks.0.cpe.": ("mhca_blks.0.MHCA_layers.{}.cpe.",),
    "mhca_blks.0.crpe.": ("mhca_blks.0.MHCA_layers.{}.crpe.", "mhca_blks.0.MHCA_layers.{}.factoratt_crpe.crpe."),
}

FAMILY = Family(
    variants=VARIANTS,
    build=build,
    rows=[
        *conv_norm("backbone.stem.0", "backbone.stem.0"),
        *conv_norm("backbone.stem.2", "backbone.stem.1"),
        *(
            row.below("backbone.stages.{}.embeddings.{}", "backbone.patch_embed_stages.{}.patch_embeds.{}.patch_conv")
            for row in (
                Row("depthwise", "dwconv"),
                Row("pointwise.conv", "pwconv"),
                Row("pointwise.norm", "bn"),
            )
        ),
        *(
            row.below("backbone.stages.{}", "backbone.mhca_stages.{}")
            for row in (
                *conv_norm("restore.reduce", "Restore.conv1"),
                Row("restore.depthwise.conv", "Restore.dwconv"),
                Row("restore.depthwise.norm", "Restore.norm"),
                *conv_norm("restore.expand", "Restore.conv2"),
                *conv_norm("aggregate", "aggregate"),
                Row("encoder.position", "mhca_blks.0.cpe.proj"),
                Row("encoder.frequencies.high_pass.{}", "mhca_blks.0.crpe.conv_list.{}"),
                *rows_of(
                    "encoder.blocks.{}",
                    "mhca_blks.0.MHCA_layers.{}",
                    {
                        "attention_norm": "norm1",
                        "query_key_value": "factoratt_crpe.qkv",
                        "attention_project": "factoratt_crpe.proj",
                        "mlp_norm": "norm2",
                        "expand": "mlp.fc1",
                        "depthwise": "mlp.dwconv.dwconv",
                        "project": "mlp.fc2",
                    },
                ),
            )
        ),
        *conv_norm("decoder.squeeze", "decode_head.squeeze", norm="gn"),
    ],
    mark="backbone.mhca_stages.",
    left_out={"decode_head.align.*": "a layer that is never called"},
    renamed=[(re.compile(r"\.MHCA_layers\.\d+\.(?:factoratt_crpe\.)?(cpe|crpe)\."), r".\1.")],
    aliases=_aliases,
)
