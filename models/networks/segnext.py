"""SegNeXt: the convolutional backbone MSCAN with the light Hamburger decoder.

Source: "SegNeXt" (Guo et al., NeurIPS 2022, arXiv 2209.08575), its configurations
`local_configs/segnext/{tiny,small,base,large}/*.ade.160k.py`; decoder: "Is Attention Better Than Matrix
Decomposition?" (Geng et al., ICLR 2021, arXiv 2109.04553).

Axes: N images, C channels, H×W pixels, P = H·W, R bases.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

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
    run_stages,
)
from ssaseg.models.networks.family import Family, Parts
from ssaseg.models.rows import Row, conv_norm, rows_of

STRIPS = (7, 11, 21)  # lengths of the strip convolutions

MLP_RATIOS = (8, 8, 4, 4)

TRAINING_UPDATES, UPDATES = 6, 7  # of the factorisation, before the last update of the weights alone

EPS = 1e-6


@dataclass(frozen=True)
class Variant:
    """One size: channels and blocks per stage, channels and bases of the decoder."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    channels: int
    bases: int
    drop_path: float = 0.1


# Rows of numbers from the official files named in the module's docstring.
VARIANTS = {
    "segnext_t": Variant(widths=(32, 64, 160, 256), depths=(3, 3, 5, 2), channels=256, bases=16),
    "segnext_s": Variant(widths=(64, 128, 320, 512), depths=(2, 2, 4, 2), channels=256, bases=16),
    "segnext_b": Variant(widths=(64, 128, 320, 512), depths=(3, 3, 12, 3), channels=512, bases=64),
    "segnext_l": Variant(widths=(64, 128, 320, 512), depths=(3, 5, 27, 3), channels=1024, bases=64, drop_path=0.3),
}


class StripGate(nn.Module):
    """Weights each feature by its surroundings at four scales. Strips 1×k and k×1 replace large kernels k×k."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.local = Depthwise(channels, 5)
        self.strips = nn.ModuleList(
            nn.Sequential(Depthwise(channels, (1, length)), Depthwise(channels, (length, 1))) for length in STRIPS
        )
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        local = self.local(x)
        scales = local
        for strip in self.strips:
            scales = scales + strip(local)
        return self.mix(scales) * x


class Attention(nn.Module):
    """`StripGate` between two 1×1 convolutions; residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, channels, 1)
        self.gate = StripGate(channels)
        self.leave = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        return x + self.leave(self.gate(F.gelu(self.enter(x))))


class Block(nn.Module):
    """Attention and a convolutional MLP, both residual, after norms, and scaled by learnt vectors that start at 0.01.

    The attention has a second residual connection inside, which adds the normalised input.
    """

    def __init__(self, channels: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        hidden = channels * mlp_ratio
        self.attention_norm = nn.BatchNorm2d(channels)
        self.attention = Attention(channels)
        self.attention_scale = nn.Parameter(torch.full((channels,), 0.01))
        self.mlp_norm = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.depthwise = Depthwise(hidden, 3)
        self.project = nn.Conv2d(hidden, channels, 1)
        self.mlp_scale = nn.Parameter(torch.full((channels,), 0.01))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        x = x + self.drop_path(self.attention_scale[:, None, None] * self.attention(self.attention_norm(x)))
        hidden = F.gelu(self.depthwise(self.expand(self.mlp_norm(x))))
        return x + self.drop_path(self.mlp_scale[:, None, None] * self.project(hidden))


class Stage(nn.Module):
    """Lower resolution (a quarter in the first stage, then half), blocks, and LayerNorm over channels."""

    def __init__(self, embed: nn.Module, channels: int, mlp_ratio: int, rates: list[float]) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.Sequential(*(Block(channels, mlp_ratio, rate) for rate in rates))
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C',H,W) → (N,C,h,w)."""
        x = self.blocks(self.embed(x))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MSCAN(nn.Module):
    """Backbone: four stages at strides 4, 8, 16, 32."""

    def __init__(self, variant: Variant, drop_path: float | None = None) -> None:
        super().__init__()
        rates = iter(drop_path_rates(variant.drop_path if drop_path is None else drop_path, variant.depths))
        first, *_ = widths = variant.widths
        stem = nn.Sequential(
            ConvNorm(3, first // 2, 3, stride=2, bias=True),
            nn.GELU(),
            ConvNorm(first // 2, first, 3, stride=2, bias=True),
        )
        halving = (ConvNorm(a, b, 3, stride=2, bias=True) for a, b in pairwise(widths))
        self.stages = nn.ModuleList(
            Stage(embed, width, ratio, [next(rates) for _ in range(depth)])
            for embed, width, ratio, depth in zip((stem, *halving), widths, MLP_RATIOS, variant.depths, strict=True)
        )
        self.channels = widths[1:]
        init_fan_out(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N,3,H,W) → maps (N,C,⌈H/s⌉,⌈W/s⌉), finest first: s = 8, 16, 32. The map at 1/4 is not returned."""
        return run_stages(self.stages, images)[1:]


class LightHam(Decoder):
    """Decoder: all maps at 1/8, squeezed, and reconstructed from a few bases by non-negative matrix factorisation.

    The official code draws new random bases in each forward pass, so two evaluations of an image differ. Here, in
    evaluation, the bases are fixed: they come from the seed `bases_seed`, and all images have the same. In training
    they are drawn for each image, as in the official code.
    """

    bases: Tensor

    def __init__(self, inputs: tuple[int, ...], channels: int, bases: int) -> None:
        super().__init__()
        self.channels, self.rank = channels, bases
        self.squeeze = ConvGroupNorm(sum(inputs), channels)
        self.enter = nn.Conv2d(channels, channels, 1)
        self.leave = ConvGroupNorm(channels, channels)
        self.align = ConvGroupNorm(channels, channels)
        self.bases_seed = 0
        init_conv_module(self)

    @property
    def bases_seed(self) -> int:
        """Seed of the bases in evaluation; setting it draws new ones."""
        return self._bases_seed

    @bases_seed.setter
    def bases_seed(self, seed: int) -> None:
        self._bases_seed = seed
        seeded = torch.Generator().manual_seed(seed)
        bases = F.normalize(torch.rand(1, self.channels, self.rank, generator=seeded, device="cpu"), dim=1)
        self.register_buffer("bases", bases.to(self.squeeze.conv.weight.device), persistent=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps, finest first → feature (N,channels,H/8,W/8)."""
        finest = maps[0].shape[-2:]
        x = torch.cat([resize_bilinear(each, finest) for each in maps], dim=1)
        x = F.relu(self.squeeze(x))
        x = F.relu(x + self.leave(self.rebuild(F.relu(self.enter(x)))))
        return F.relu(self.align(x))

    def rebuild(self, x: Tensor) -> Tensor:
        """Non-negative (N,C,H,W) → its approximation by R bases; float32 under autocast too, because of EPS."""
        with torch.autocast(x.device.type, enabled=False):
            updates = TRAINING_UPDATES if self.training else UPDATES
            rebuilt = factorize(x.flatten(2).float(), self.draw(x), updates)
        return rebuilt.unflatten(2, x.shape[-2:]).to(x.dtype)

    def draw(self, x: Tensor) -> Tensor:
        """Initial bases (N,C,R), of unit length over channels, for x (N,C,H,W)."""
        if self.training:
            return F.normalize(torch.rand(len(x), self.channels, self.rank, device=x.device), dim=1)
        return self.bases.float().expand(x.shape[0], -1, -1)  # not len(x): an export would fix the batch


def factorize(x: Tensor, bases: Tensor, updates: int) -> Tensor:
    """Non-negative matrix factorisation by multiplicative updates (Lee and Seung 2001): x ≈ bases · weightsᵀ.

    x (N,C,P) and bases (N,C,R), both non-negative → the product (N,C,P). Gradients flow through every update.
    """

    def fit(weights: Tensor) -> Tensor:
        return weights * (x.mT @ bases) / (weights @ (bases.mT @ bases) + EPS)

    weights = (x.mT @ bases).softmax(dim=-1)  # (N,P,R)
    for _ in range(updates):
        weights = fit(weights)
        bases = bases * (x @ weights) / (bases @ (weights.mT @ weights) + EPS)
    return bases @ fit(weights).mT


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone and decoder of a variant in `VARIANTS`, initialised as the official code does without a checkpoint."""
    variant = VARIANTS[name]
    backbone = MSCAN(variant, drop_path)
    return Parts(backbone, LightHam(backbone.channels, variant.channels, variant.bases))


FAMILY = Family(
    variants=VARIANTS,
    build=build,
    rows=[
        Row("backbone.stages.0.embed.0.conv", "backbone.patch_embed1.proj.0"),
        Row("backbone.stages.0.embed.0.norm", "backbone.patch_embed1.proj.1"),
        Row("backbone.stages.0.embed.2.conv", "backbone.patch_embed1.proj.3"),
        Row("backbone.stages.0.embed.2.norm", "backbone.patch_embed1.proj.4"),
        *conv_norm("backbone.stages.{}.embed", "backbone.patch_embed{+1}", conv="proj", norm="norm"),
        *rows_of(
            "backbone.stages.{}.blocks.{}",
            "backbone.block{+1}.{}",
            {
                "attention_norm": "norm1",
                "attention_scale": "layer_scale_1",
                "attention.enter": "attn.proj_1",
                "attention.leave": "attn.proj_2",
                "attention.gate.local": "attn.spatial_gating_unit.conv0",
                "attention.gate.strips.{}.{}": "attn.spatial_gating_unit.conv{}_{+1}",
                "attention.gate.mix": "attn.spatial_gating_unit.conv3",
                "mlp_norm": "norm2",
                "mlp_scale": "layer_scale_2",
                "expand": "mlp.fc1",
                "depthwise": "mlp.dwconv.dwconv",
                "project": "mlp.fc2",
            },
        ),
        Row("backbone.stages.{}.norm", "backbone.norm{+1}"),
        *conv_norm("decoder.squeeze", "decode_head.squeeze", norm="gn"),
        Row("decoder.enter", "decode_head.hamburger.ham_in.conv"),
        *conv_norm("decoder.leave", "decode_head.hamburger.ham_out", norm="gn"),
        *conv_norm("decoder.align", "decode_head.align", norm="gn"),
    ],
    mark="backbone.block1.",
    # mmsegmentation 1.x and its ImageNet files have no module around MSCAN's depthwise convolution.
    renamed=[(re.compile(r"^(backbone\.block\d+\.\d+\.mlp\.dwconv)\.(weight|bias)$"), r"\1.dwconv.\2")],
)
