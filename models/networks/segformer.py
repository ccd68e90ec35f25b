"""SegFormer: the hierarchical transformer MiT with a decoder of 1×1 convolutions.

Source: "SegFormer" (Xie et al., NeurIPS 2021, arXiv 2105.15203), as in mmsegmentation 0.30, `MixVisionTransformer` and
`SegformerHead`. There the decoder has norms and 256 channels in every size; for that of the authors' code see
`segformer_nvidia`.

Axes: N images, C channels, H×W pixels, P = H·W positions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.decoder import Decoder
from ssaseg.models.layers import (
    Checkpointed,
    ConvNorm,
    Depthwise,
    DropPath,
    drop_path_rates,
    init_conv_module,
    init_fan_out,
    init_linear,
    resize_bilinear,
    run_stages,
)
from ssaseg.models.networks.family import Family, Layout, Parts, Quadratic
from ssaseg.models.rows import Row, conv_norm, query_key_value, rows_of

HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)  # of the sides of the map that keys and values are taken from
MLP_RATIO = 4
EPS = 1e-6  # of every LayerNorm
QUADRATIC = Quadratic(pixels=2_400_000)  # measured with B0


@dataclass(frozen=True)
class Variant:
    """One size: channels of the first stage for each head, and blocks per stage."""

    base: int
    depths: tuple[int, int, int, int]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the four stages."""
        return tuple(self.base * heads for heads in HEADS)


VARIANTS = {
    "segformer_b0": Variant(32, (2, 2, 2, 2)),
    "segformer_b1": Variant(64, (2, 2, 2, 2)),
    "segformer_b2": Variant(64, (3, 4, 6, 3)),
    "segformer_b3": Variant(64, (3, 4, 18, 3)),
    "segformer_b4": Variant(64, (3, 8, 27, 3)),
    "segformer_b5": Variant(64, (3, 6, 40, 3)),
}


class Attention(nn.Module):
    """Multi-head attention; keys and values come from a map whose sides are smaller by `reduction`."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.qkv_bias = nn.Parameter(torch.zeros(3 * channels))
        nn.init.xavier_uniform_(self.qkv_weight)
        self.project = nn.Linear(channels, channels)
        if reduction > 1:
            self.reduce = nn.Conv2d(channels, channels, reduction, reduction)
            self.norm = nn.LayerNorm(channels, eps=EPS)
        self.reduction = reduction

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """(N,P,C) of a map of `size` (H,W) → (N,P,C)."""
        source = x
        if self.reduction > 1:
            source = self.reduce(x.mT.unflatten(2, size)).flatten(2).mT
            source = self.norm(source)
        channels = x.shape[2]
        (to_query, to_rest), (own, rest) = (
            each.split((channels, 2 * channels)) for each in (self.qkv_weight, self.qkv_bias)
        )
        query = F.linear(x, to_query, own).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = F.linear(source, to_rest, rest).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.project(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two 1×1 convolutions with a depthwise 3×3 convolution between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels * MLP_RATIO
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.depthwise = Depthwise(hidden, 3)
        self.project = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """(N,P,C) of a map of `size` (H,W) → (N,P,C)."""
        return self.project(F.gelu(self.depthwise(self.expand(x.mT.unflatten(2, size))))).flatten(2).mT


class Block(nn.Module):
    """Attention and MLP, both residual and after a norm."""

    def __init__(self, channels: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels, eps=EPS)
        self.attention = Attention(channels, heads, reduction)
        self.mlp_norm = nn.LayerNorm(channels, eps=EPS)
        self.mlp = MLP(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """(N,P,C) of a map of `size` (H,W) → (N,P,C)."""
        x = x + self.drop_path(self.attention(self.attention_norm(x), size))
        return x + self.drop_path(self.mlp(self.mlp_norm(x), size))


class Stage(Checkpointed):
    """Overlapping patches of a quarter (first stage) or half the resolution, blocks, and a norm."""

    def __init__(self, inputs: int, channels: int, patch: int, heads: int, reduction: int, rates: list[float]) -> None:
        super().__init__()
        stride = (patch + 1) // 2  # 7 → 4, 3 → 2
        self.embed = nn.Conv2d(inputs, channels, patch, stride, patch // 2)
        self.embed_norm = nn.LayerNorm(channels, eps=EPS)
        self.blocks = nn.ModuleList(Block(channels, heads, reduction, rate) for rate in rates)
        self.norm = nn.LayerNorm(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C',H,W) → (N,C,h,w)."""
        x = self.embed(x)
        size = x.shape[-2:]
        x = self.embed_norm(x.flatten(2).mT)
        for block in self.blocks:
            x = self.run(block, x, size)
        return self.norm(x).mT.unflatten(2, size)


class MiT(nn.Module):
    """Backbone: four stages at strides 4, 8, 16, 32."""

    def __init__(self, variant: Variant, drop_path: float | None = None, eps: float = EPS) -> None:
        super().__init__()
        rates = iter(drop_path_rates(0.1 if drop_path is None else drop_path, variant.depths))
        self.channels = variant.widths
        inputs = (3, *self.channels)
        self.stages = nn.ModuleList(
            Stage(inputs[k], inputs[k + 1], 3 if k else 7, HEADS[k], REDUCTIONS[k], [next(rates) for _ in range(depth)])
            for k, depth in enumerate(variant.depths)
        )
        init_fan_out(self)
        init_linear(self)
        for layer in self.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.eps = eps

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N,3,H,W) → four maps (N,C,⌈H/s⌉,⌈W/s⌉), finest first: s = 4, 8, 16, 32."""
        return run_stages(self.stages, images)


class SegFormerDecoder(Decoder):
    """Every map to 256 channels and to the size of the finest, then one 1×1 convolution of all."""

    stride = 4

    def __init__(self, inputs: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.channels = channels
        self.projects = nn.ModuleList(ConvNorm(width, channels) for width in inputs)
        self.merge = ConvNorm(channels * len(inputs), channels)
        init_conv_module(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps, finest first → feature (N,256,H/4,W/4)."""
        size = maps[0].shape[-2:]
        projected = [F.relu(project(each), inplace=True) for project, each in zip(self.projects, maps, strict=True)]
        together = torch.cat([resize_bilinear(each, size) for each in projected], dim=1)
        return F.relu(self.merge(together), inplace=True)


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone and decoder of a variant in `VARIANTS`."""
    backbone = MiT(VARIANTS[name], drop_path)
    return Parts(backbone, SegFormerDecoder(backbone.channels))


def fuse(query: Tensor, rest: Tensor) -> tuple[Tensor]:
    """Query (C,...), key and value (2C,...) → (3C,...)."""
    return (torch.cat([query, rest]),)


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `fuse`."""
    channels = value.shape[0] // 3
    return value[:channels].clone(), value[channels:].clone()


def to_conv(value: Tensor) -> tuple[Tensor]:
    """The weight of a linear layer as that of a 1×1 convolution."""
    return (value[:, :, None, None],)


def to_linear(value: Tensor) -> tuple[Tensor]:
    """The inverse of `to_conv`."""
    return (value.flatten(1),)


_BLOCK, _NVIDIA_BLOCK = "backbone.stages.{}.blocks.{}", "backbone.block{+1}.{}"
NVIDIA = Layout(
    name="NVIDIA's MiT",
    mark=re.compile(r"backbone\.block1\.0\.attn\.q\."),
    rows=[
        *rows_of("backbone.stages.{}", "backbone.patch_embed{+1}", {"embed": "proj", "embed_norm": "norm"}),
        Row("backbone.stages.{}.norm", "backbone.norm{+1}"),
        *rows_of(
            _BLOCK,
            _NVIDIA_BLOCK,
            {
                "attention_norm": "norm1",
                "attention.project": "attn.proj",
                "attention.reduce": "attn.sr",
                "attention.norm": "attn.norm",
                "mlp_norm": "norm2",
                "mlp.expand.bias": "mlp.fc1.bias",
                "mlp.depthwise": "mlp.dwconv.dwconv",
                "mlp.project.bias": "mlp.fc2.bias",
            },
        ),
        *(
            Row(
                f"{_BLOCK}.attention.qkv_{kind}",
                (f"{_NVIDIA_BLOCK}.attn.q.{kind}", f"{_NVIDIA_BLOCK}.attn.kv.{kind}"),
                fuse,
                split,
            )
            for kind in ("weight", "bias")
        ),
        *(
            Row(f"{_BLOCK}.mlp.{ours}.weight", f"{_NVIDIA_BLOCK}.mlp.{theirs}.weight", to_conv, to_linear)
            for ours, theirs in (("expand", "fc1"), ("project", "fc2"))
        ),
    ],
)
# In the files `segformer.encoder` stands where `backbone.encoder` stands here: see `renamed`.
TRANSFORMERS = Layout(
    name="transformers' SegFormer",
    mark=re.compile(r"backbone\.encoder\.patch_embeddings\.0\."),
    rows=[
        *rows_of(
            "backbone.stages.{}",
            "backbone.encoder",
            {
                "embed": "patch_embeddings.{}.proj",
                "embed_norm": "patch_embeddings.{}.layer_norm",
                "norm": "layer_norm.{}",
            },
        ),
        *rows_of(
            _BLOCK,
            "backbone.encoder.block.{}.{}",
            {
                "attention_norm": "layer_norm_1",
                "attention.project": "attention.output.dense",
                "attention.reduce": "attention.self.sr",
                "attention.norm": "attention.self.layer_norm",
                "mlp_norm": "layer_norm_2",
                "mlp.expand.bias": "mlp.dense1.bias",
                "mlp.depthwise": "mlp.dwconv.dwconv",
                "mlp.project.bias": "mlp.dense2.bias",
            },
        ),
        *(
            query_key_value(
                f"{_BLOCK}.attention.qkv_{kind}", f"backbone.encoder.block.{{}}.{{}}.attention.self.*.{kind}"
            )
            for kind in ("weight", "bias")
        ),
        *(
            Row(
                f"{_BLOCK}.mlp.{ours}.weight",
                f"backbone.encoder.block.{{}}.{{}}.mlp.{theirs}.weight",
                to_conv,
                to_linear,
            )
            for ours, theirs in (("expand", "dense1"), ("project", "dense2"))
        ),
    ],
    left_out={"backbone.classifier.*": "the ImageNet classifier"},
)
TRANSFORMERS_RENAMED = (re.compile(r"^(backbone\.)?segformer\."), "backbone.")

FAMILY = Family(
    variants=VARIANTS,
    build=build,
    rows=[
        *rows_of(
            "backbone.stages.{}",
            "backbone.layers.{}",
            {"embed": "0.projection", "embed_norm": "0.norm", "norm": "2"},
        ),
        *rows_of(
            "backbone.stages.{}.blocks.{}",
            "backbone.layers.{}.1.{}",
            {
                "attention_norm": "norm1",
                "attention.qkv_weight": "attn.attn.in_proj_weight",
                "attention.qkv_bias": "attn.attn.in_proj_bias",
                "attention.project": "attn.attn.out_proj",
                "attention.reduce": "attn.sr",
                "attention.norm": "attn.norm",
                "mlp_norm": "norm2",
                "mlp.expand": "ffn.layers.0",
                "mlp.depthwise": "ffn.layers.1",
                "mlp.project": "ffn.layers.4",
            },
        ),
        *conv_norm("decoder.projects.{}", "decode_head.convs.{}"),
        *conv_norm("decoder.merge", "decode_head.fusion_conv"),
    ],
    mark="backbone.layers.0.0.projection",
    layouts=[NVIDIA, TRANSFORMERS],
    renamed=[TRANSFORMERS_RENAMED],
    quadratic=QUADRATIC,
)
