"""SeaFormer: squeeze-enhanced axial transformer for mobile segmentation, with its light head.

Source: "SeaFormer" (Wan et al., ICLR 2023, arXiv 2301.13156) and its official configurations
`local_configs/seaformer/seaformer_{tiny,small,base,large}.py`.

Axes: N images, C channels, H×W pixels, L positions along one axis, D channels of one head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.decoder import Decoder
from ssaseg.models.layers import ConvNorm, DropPath, init_conv_module, init_fan_out, resize_bilinear
from ssaseg.models.networks.family import Family, Parts
from ssaseg.models.rows import Row, conv_norm

POSITIONS = 16  # stored positions of an axial embedding; interpolated to the axis's length


@dataclass(frozen=True)
class Variant:
    """One size. `mobile[i]`: the inverted residuals of stage i as (kernel, expansion, outputs, stride)."""

    stem: int
    mobile: tuple[tuple[tuple[int, int, int, int], ...], ...]
    depths: tuple[int, ...]
    key_dims: tuple[int, ...]
    heads: int
    mlp_ratios: tuple[int, ...]
    fuse: tuple[int, ...]
    drop_path: float = 0.1

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each mobile stage."""
        return tuple(blocks[-1][2] for blocks in self.mobile)


# Rows of numbers from the official files named in the module's docstring.
VARIANTS = {
    "seaformer_t": Variant(
        stem=16,
        mobile=(
            ((3, 1, 16, 1), (3, 4, 16, 2), (3, 3, 16, 1)),
            ((5, 3, 32, 2), (5, 3, 32, 1)),
            ((3, 3, 64, 2), (3, 3, 64, 1)),
            ((5, 3, 128, 2),),
            ((3, 6, 160, 2),),
        ),
        depths=(2, 2), key_dims=(16, 24), heads=4, mlp_ratios=(2, 4), fuse=(64, 96),
    ),
    "seaformer_s": Variant(
        stem=16,
        mobile=(
            ((3, 1, 16, 1), (3, 4, 24, 2), (3, 3, 24, 1)),
            ((5, 3, 48, 2), (5, 3, 48, 1)),
            ((3, 3, 96, 2), (3, 3, 96, 1)),
            ((5, 4, 160, 2),),
            ((3, 6, 192, 2),),
        ),
        depths=(3, 3), key_dims=(16, 24), heads=6, mlp_ratios=(2, 4), fuse=(96, 128),
    ),
    "seaformer_b": Variant(
        stem=16,
        mobile=(
            ((3, 1, 16, 1), (3, 4, 32, 2), (3, 3, 32, 1)),
            ((5, 3, 64, 2), (5, 3, 64, 1)),
            ((3, 3, 128, 2), (3, 3, 128, 1)),
            ((5, 4, 192, 2),),
            ((3, 6, 256, 2),),
        ),
        depths=(4, 4), key_dims=(16, 24), heads=8, mlp_ratios=(2, 4), fuse=(128, 160),
    ),
    "seaformer_l": Variant(
        stem=32,
        mobile=(
            ((3, 3, 32, 1), (3, 4, 64, 2), (3, 4, 64, 1)),
            ((5, 4, 128, 2), (5, 4, 128, 1)),
            ((3, 4, 192, 2), (3, 4, 192, 1)),
            ((5, 4, 256, 2),),
            ((3, 6, 320, 2),),
        ),
        depths=(3, 3, 3), key_dims=(16, 20, 24), heads=8, mlp_ratios=(2, 4, 6), fuse=(128, 160, 192),
    ),
}  # fmt: skip


class InvertedResidual(nn.Module):
    """MobileNetV2 block: expand 1×1 (left out if expansion is 1), depthwise k×k, project 1×1; ReLU between them."""

    def __init__(self, inputs: int, kernel: int, expansion: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [ConvNorm(inputs, hidden), nn.ReLU(inplace=True)] if expansion != 1 else []
        depthwise = [ConvNorm(hidden, hidden, kernel, stride, groups=hidden), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*expand, *depthwise, ConvNorm(hidden, outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,outputs,⌈H/stride⌉,⌈W/stride⌉)."""
        return x + self.layers(x) if self.residual else self.layers(x)


class AxialAttention(nn.Module):
    """Attention along one axis: each row (or column) is a token, whose channels are means over the other axis."""

    def __init__(self, key_dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, key_dim**-0.5
        keys, values = key_dim * heads, 2 * key_dim * heads
        self.sizes = (keys, keys, values)
        self.query_position = nn.Parameter(torch.randn(1, keys, POSITIONS))
        self.key_position = nn.Parameter(torch.randn(1, keys, POSITIONS))
        self.project = ConvNorm(values, values, norm_weight=0.0)

    def forward(self, qkv: Tensor) -> Tensor:
        """Squeezed queries, keys and values (N,4·heads·D,L) → (N,2·heads·D,L)."""
        query, key, value = qkv.split(self.sizes, dim=1)
        length = query.shape[-1]
        query = query + F.interpolate(self.query_position, length, mode="linear", align_corners=False)
        key = key + F.interpolate(self.key_position, length, mode="linear", align_corners=False)
        # The channels of a head are adjacent: channel = head · D + d.
        query, key, value = (t.unflatten(1, (self.heads, -1)) for t in (query, key, value))  # (N,heads,D,L)
        weights = (query.transpose(-2, -1) @ key * self.scale).softmax(dim=-1)  # (N,heads,L,L)
        out = value @ weights.transpose(-2, -1)  # (N,heads,2D,L)
        return self.project(F.relu6(out.flatten(1, 2)).unsqueeze(-1)).squeeze(-1)


class SeaAttention(nn.Module):
    """Squeeze-enhanced axial attention (section 3.2): axial attention gates a convolutional detail branch."""

    def __init__(self, channels: int, key_dim: int, heads: int) -> None:
        super().__init__()
        keys, values = key_dim * heads, 2 * key_dim * heads
        self.query = ConvNorm(channels, keys)
        self.key = ConvNorm(channels, keys)
        self.value = ConvNorm(channels, values)
        self.row = AxialAttention(key_dim, heads)
        self.column = AxialAttention(key_dim, heads)
        self.project = ConvNorm(values, channels, norm_weight=0.0)
        self.detail_depthwise = ConvNorm(2 * values, 2 * values, 3, groups=2 * values)
        self.detail_pointwise = ConvNorm(2 * values, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        value = self.value(x)
        qkv = torch.cat([self.query(x), self.key(x), value], dim=1)
        detail = self.detail_pointwise(F.relu6(self.detail_depthwise(qkv)))
        row = self.row(qkv.mean(dim=-1)).unsqueeze(-1)  # (N,C,H,1)
        column = self.column(qkv.mean(dim=-2)).unsqueeze(-2)  # (N,C,1,W)
        return F.hardsigmoid(self.project(F.relu6(value + (row + column)))) * detail


class SeaBlock(nn.Module):
    """SeaAttention and a convolutional MLP, both residual, without norms before them."""

    def __init__(self, channels: int, key_dim: int, heads: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        hidden = channels * mlp_ratio
        self.attention = SeaAttention(channels, key_dim, heads)
        self.expand = ConvNorm(channels, hidden)
        # The only convolution of the network with a bias and without a norm.
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = ConvNorm(hidden, channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        x = x + self.drop_path(self.attention(x))
        return x + self.drop_path(self.project(F.relu6(self.depthwise(self.expand(x)))))


class SeaFormer(nn.Module):
    """Backbone: five mobile stages; a transformer stage follows each of the last `len(depths)`."""

    def __init__(self, variant: Variant, drop_path: float | None = None) -> None:
        super().__init__()
        rate = variant.drop_path if drop_path is None else drop_path
        self.stem = ConvNorm(3, variant.stem, 3, stride=2)
        inputs = (variant.stem, *variant.widths)
        self.mobile = nn.ModuleList(
            _mobile_stage(width, blocks) for width, blocks in zip(inputs, variant.mobile, strict=False)
        )
        widths = variant.widths[-len(variant.depths) :]
        self.sea = nn.ModuleList(
            nn.Sequential(
                # The rate grows from 0 in each stage, not over the whole network.
                *(SeaBlock(width, key_dim, variant.heads, ratio, rate * i / max(depth - 1, 1)) for i in range(depth))
            )
            for width, depth, key_dim, ratio in zip(
                widths, variant.depths, variant.key_dims, variant.mlp_ratios, strict=True
            )
        )
        self.channels = (variant.widths[1], *widths)
        init_fan_out(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N,3,H,W) → maps (N,C,⌈H/s⌉,⌈W/s⌉), finest first: s = 8, (16,) 32, 64."""
        x = F.relu(self.stem(images))
        maps = []
        first_sea = len(self.mobile) - len(self.sea)
        for i, stage in enumerate(self.mobile):
            x = stage(x)
            if i == 1:
                maps.append(x)
            if i >= first_sea:
                x = self.sea[i - first_sea](x)
                maps.append(x)
        return maps


def _mobile_stage(inputs: int, blocks: tuple[tuple[int, int, int, int], ...]) -> nn.Sequential:
    stage = nn.Sequential()
    for kernel, expansion, outputs, stride in blocks:
        stage.append(InvertedResidual(inputs, kernel, expansion, outputs, stride))
        inputs = outputs
    return stage


class Fusion(nn.Module):
    """Gates fine features by coarse ones: local · upsample(hard-sigmoid(coarse))."""

    def __init__(self, fine: int, coarse: int, outputs: int) -> None:
        super().__init__()
        self.local = ConvNorm(fine, outputs)
        self.gate = ConvNorm(coarse, outputs)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(N,C,H,W), (N,C',h,w) → (N,outputs,H,W)."""
        local = self.local(fine)
        return local * resize_bilinear(F.hardsigmoid(self.gate(coarse)), local.shape[-2:])


class LightHead(Decoder):
    """Decoder: fuses the coarser maps one by one into the map at 1/8; then a depthwise 1×1 convolution and ReLU."""

    def __init__(self, inputs: tuple[int, ...], fuse: tuple[int, ...]) -> None:
        super().__init__()
        fine = (inputs[0], *fuse)
        self.fuse = nn.ModuleList(Fusion(*sizes) for sizes in zip(fine, inputs[1:], fuse, strict=False))
        self.channels = fuse[-1]
        self.output = ConvNorm(self.channels, self.channels, groups=self.channels)
        init_conv_module(self)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps, finest first → feature (N,channels,H/8,W/8)."""
        x = maps[0]
        for fusion, coarse in zip(self.fuse, maps[1:], strict=True):
            x = fusion(x, coarse)
        return F.relu(self.output(x))


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone and decoder of a variant in `VARIANTS`, initialised as in the official distributed run.

    The norms of `project` start with weight 0. In the official run they keep this value from their construction,
    because the loop that sets weights of norms to 1 does not include SyncBatchNorm.
    """
    variant = VARIANTS[name]
    backbone = SeaFormer(variant, drop_path)
    return Parts(backbone, LightHead(backbone.channels, variant.fuse))


HEAD_ROWS = (
    *conv_norm("decoder.fuse.{}.local", "decode_head.fuse{+1}.local_embedding"),
    *conv_norm("decoder.fuse.{}.gate", "decode_head.fuse{+1}.global_act"),
    *conv_norm("decoder.output", "decode_head.linear_fuse"),
)

_BLOCK = ("backbone.sea.{}.{}", "backbone.trans{+1}.transformer_blocks.{}")

FAMILY = Family(
    variants=VARIANTS,
    build=build,
    rows=[
        *conv_norm("backbone.stem", "backbone.smb1.stem_block.0", conv="c"),
        *conv_norm("backbone.mobile.{}.{}.layers.{}", "backbone.smb{+1}.layer{+1}.conv.{}", conv="c"),
        *(
            row.below(*_BLOCK)
            for row in (
                *conv_norm("attention.query", "attn.to_q", conv="c"),
                *conv_norm("attention.key", "attn.to_k", conv="c"),
                *conv_norm("attention.value", "attn.to_v", conv="c"),
                *conv_norm("attention.project", "attn.proj.1", conv="c"),
                *conv_norm("attention.detail_depthwise", "attn.dwconv", conv="c"),
                *conv_norm("attention.detail_pointwise", "attn.pwconv", conv="c"),
                *conv_norm("attention.row.project", "attn.proj_encode_row.1", conv="c"),
                *conv_norm("attention.column.project", "attn.proj_encode_column.1", conv="c"),
                Row("attention.row.query_position", "attn.pos_emb_rowq.pos_embed"),
                Row("attention.row.key_position", "attn.pos_emb_rowk.pos_embed"),
                Row("attention.column.query_position", "attn.pos_emb_columnq.pos_embed"),
                Row("attention.column.key_position", "attn.pos_emb_columnk.pos_embed"),
                *conv_norm("expand", "mlp.fc1", conv="c"),
                Row("depthwise", "mlp.dwconv"),
                *conv_norm("project", "mlp.fc2", conv="c"),
            )
        ),
        *HEAD_ROWS,
    ],
    mark="backbone.smb1.",
)
