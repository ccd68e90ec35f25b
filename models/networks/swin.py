"""Swin transformer: attention within windows of 7×7 positions that every second block shifts.

Source: "Swin Transformer" (Liu et al., ICCV 2021, arXiv 2103.14030), as in mmsegmentation 0.30, `SwinTransformer`.

Axes: N images, C channels, H×W positions, M windows of P = 49 positions.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.layers import Checkpointed, DropPath, drop_path_rates, init_linear
from ssaseg.models.networks.family import Layout
from ssaseg.models.rows import Row, query_key_value, rows_of

WINDOW = 7
SHIFT = WINDOW // 2
MLP_RATIO = 4
MASKED = -100.0  # added to the attention between positions that are not neighbours in the image


@dataclass(frozen=True)
class Variant:
    """One size: channels of the first stage, blocks and heads per stage."""

    width: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]


VARIANTS = {
    "t": Variant(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "s": Variant(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "b": Variant(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "l": Variant(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


def relative_index() -> Tensor:
    """For each pair of positions in a window, the row of the bias table: int64 (P,P), (dy+6)·13 + dx+6."""
    # On the CPU: arithmetic on the meta device loads PyTorch's compiler.
    places = torch.tensor([*product(range(WINDOW), repeat=2)], device="cpu")
    difference = places[:, None] - places[None] + WINDOW - 1
    return (difference[..., 0] * (2 * WINDOW - 1) + difference[..., 1]).to(torch.get_default_device())


def parts(side: int, size: int) -> int:
    """Number of parts of `size` that cover a side. Divided like this, an export can follow a symbolic side."""
    return (side + size - 1) // size


def to_windows(x: Tensor) -> Tensor:
    """(N,H,W,...) with H and W multiples of 7 → (N,M,P,...)."""
    rows, columns = (parts(side, WINDOW) for side in x.shape[1:3])
    x = x.unflatten(2, (columns, WINDOW)).unflatten(1, (rows, WINDOW)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`."""
    x = x.unflatten(2, (WINDOW, WINDOW)).unflatten(1, (height // WINDOW, width // WINDOW)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def shifted_mask(height: int, width: int, device: torch.device) -> Tensor:
    """What is added to the attention after a shift: (M,1,P,P), 0 or MASKED."""

    def regions(side: int) -> Tensor:
        places = torch.arange(side, device=device)
        return (places >= side - WINDOW).long() + (places >= side - SHIFT).long()

    region = regions(height)[:, None] * 3 + regions(width)[None]
    windows = to_windows(region[None])[0]
    apart = windows[:, :, None] != windows[:, None, :]
    return torch.where(apart, MASKED, 0.0)[:, None]


class WindowAttention(nn.Module):
    """Multi-head attention within each window, with a learnt bias for each relative position."""

    index: Tensor

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.register_buffer("index", relative_index(), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(N,M,P,C), mask (M,1,P,P) → (N,M,P,C)."""
        images, windows = x.shape[:2]
        # Images and windows are one axis: PyTorch's fused kernel takes tensors of four axes only.
        qkv = self.qkv(x).flatten(0, 1)
        query, key, value = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias_table[self.index].permute(2, 0, 1)[None]
        if mask is not None:
            bias = (bias + mask).repeat(images, 1, 1, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype))
        return self.project(mixed.transpose(1, 2).flatten(2).unflatten(0, (images, windows)))


class Block(nn.Module):
    """Window attention and an MLP, both residual and after a norm."""

    def __init__(self, channels: int, heads: int, shifted: bool, drop_path: float) -> None:
        super().__init__()
        self.shifted = shifted
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads)
        self.mlp_norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, MLP_RATIO * channels)
        self.project = nn.Linear(MLP_RATIO * channels, channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N,H,W,C) → (N,H,W,C)."""
        x = x + self.drop_path(self.attend(self.attention_norm(x)))
        return x + self.drop_path(self.project(F.gelu(self.expand(self.mlp_norm(x)))))

    def attend(self, x: Tensor) -> Tensor:
        """Padding with zeros, which take part as keys and values; shift, attention, and back. (N,H,W,C), the same."""
        height, width = x.shape[1:3]
        tall, wide = (parts(side, WINDOW) * WINDOW for side in (height, width))
        x = F.pad(x, (0, 0, 0, wide - width, 0, tall - height))
        mask = None
        if self.shifted:
            x = x.roll((-SHIFT, -SHIFT), (1, 2))
            mask = shifted_mask(tall, wide, x.device)
        x = from_windows(self.attention(to_windows(x), mask), tall, wide)
        if self.shifted:
            x = x.roll((SHIFT, SHIFT), (1, 2))
        return x[:, :height, :width]


class Merge(nn.Module):
    """Half the resolution: 2×2 positions become one, with twice the channels.

    The order of the four inputs is that of `unfold`: channel by channel, not position by position.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduce = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N,H,W,C) → (N,⌈H/2⌉,⌈W/2⌉,2C)."""
        height, width = x.shape[1:3]
        rows, columns = parts(height, 2), parts(width, 2)
        x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))
        x = x.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))  # (N,h,2,w,2,C)
        return self.reduce(self.norm(x.permute(0, 1, 3, 5, 2, 4).flatten(3)))


class Swin(Checkpointed):
    """Backbone: four stages at strides 4, 8, 16, 32."""

    def __init__(self, variant: Variant, drop_path: float | None = None) -> None:
        super().__init__()
        rates = iter(drop_path_rates(0.3 if drop_path is None else drop_path, variant.depths))
        self.channels = tuple(variant.width * 2**k for k in range(4))
        self.embed = nn.Conv2d(3, variant.width, 4, 4)
        self.embed_norm = nn.LayerNorm(variant.width)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, heads, k % 2 == 1, next(rates)) for k in range(depth)))
            for width, depth, heads in zip(self.channels, variant.depths, variant.heads, strict=True)
        )
        self.merges = nn.ModuleList(Merge(width) for width in self.channels[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels)
        init_linear(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N,3,H,W) → four maps (N,C,⌈H/s⌉,⌈W/s⌉), finest first: s = 4, 8, 16, 32."""
        height, width = images.shape[-2:]
        x = self.embed(F.pad(images, (0, 4 * parts(width, 4) - width, 0, 4 * parts(height, 4) - height)))
        x = self.embed_norm(x.permute(0, 2, 3, 1))
        maps = []
        for k, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            if k:
                x = self.merges[k - 1](x)
            for block in stage.children():
                x = self.run(block, x)
            maps.append(norm(x).permute(0, 3, 1, 2))
        return maps


ROWS: list[Row] = [
    Row("backbone.embed", "backbone.patch_embed.projection"),
    Row("backbone.embed_norm", "backbone.patch_embed.norm"),
    *rows_of(
        "backbone.stages.{}.{}",
        "backbone.stages.{}.blocks.{}",
        {
            "attention_norm": "norm1",
            "attention.bias_table": "attn.w_msa.relative_position_bias_table",
            "attention.qkv": "attn.w_msa.qkv",
            "attention.project": "attn.w_msa.proj",
            "mlp_norm": "norm2",
            "expand": "ffn.layers.0.0",
            "project": "ffn.layers.1",
        },
    ),
    *rows_of("backbone.merges.{}", "backbone.stages.{}.downsample", {"norm": "norm", "reduce": "reduction"}),
    Row("backbone.norms.{}", "backbone.norm{}"),
]
INDICES = "indices that follow from the size of the window"
NOT_PRETRAINED = ("backbone.norm?.*",)
# Files that mmsegmentation converted have official names, and these.
PRETRAINED_ONLY = {"backbone.stages.*.attn_mask": "masks that follow from the size of the image"}


def from_positions(value: Tensor) -> tuple[Tensor]:
    """(...,4C) of `Merge`: the authors' order, left column before right one, of the positions' channels → ours."""
    return (value.unflatten(-1, (2, 2, -1)).transpose(-1, -3).flatten(-3),)


def to_positions(value: Tensor) -> tuple[Tensor]:
    """The inverse of `from_positions`."""
    return (value.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3),)


def _layout(name: str, merged: str, mark: str) -> Layout:
    """Names of the authors and of timm, which differ in the stage that a `Merge` belongs to."""
    return Layout(
        name=name,
        mark=re.compile(re.escape(mark)),
        rows=[
            Row("backbone.embed", "backbone.patch_embed.proj"),
            Row("backbone.embed_norm", "backbone.patch_embed.norm"),
            *rows_of(
                "backbone.stages.{}.{}",
                "backbone.layers.{}.blocks.{}",
                {
                    "attention_norm": "norm1",
                    "attention.bias_table": "attn.relative_position_bias_table",
                    "attention.qkv": "attn.qkv",
                    "attention.project": "attn.proj",
                    "mlp_norm": "norm2",
                    "expand": "mlp.fc1",
                    "project": "mlp.fc2",
                },
            ),
            Row("backbone.merges.{}.norm", f"{merged}.norm", from_positions, to_positions),
            Row("backbone.merges.{}.reduce", f"{merged}.reduction", from_positions, to_positions),
            Row("backbone.norms.{}", "backbone.norm{}"),
        ],
        left_out={
            "backbone.layers.*.attn.relative_position_index": INDICES,
            "backbone.layers.*.attn_mask": "masks that follow from the size of the image",
        },
    )


LAYOUTS = (
    _layout("Swin's authors", "backbone.layers.{}.downsample", "backbone.layers.0.downsample.reduction.weight"),
    _layout("timm's Swin", "backbone.layers.{+1}.downsample", "backbone.layers.3.downsample.reduction.weight"),
)
TRANSFORMERS_ROWS: list[Row] = [
    Row("backbone.embed", "backbone.embeddings.patch_embeddings.projection"),
    Row("backbone.embed_norm", "backbone.embeddings.norm"),
    *rows_of(
        "backbone.stages.{}.{}",
        "backbone.encoder.layers.{}.blocks.{}",
        {
            "attention_norm": "layernorm_before",
            "attention.bias_table": "attention.self.relative_position_bias_table",
            "attention.project": "attention.output.dense",
            "mlp_norm": "layernorm_after",
            "expand": "intermediate.dense",
            "project": "output.dense",
        },
    ),
    *(
        query_key_value(
            f"backbone.stages.{{}}.{{}}.attention.qkv.{kind}",
            f"backbone.encoder.layers.{{}}.blocks.{{}}.attention.self.*.{kind}",
        )
        for kind in ("weight", "bias")
    ),
    *(
        Row(
            f"backbone.merges.{{}}.{ours}",
            f"backbone.encoder.layers.{{}}.downsample.{theirs}",
            from_positions,
            to_positions,
        )
        for ours, theirs in (("norm", "norm"), ("reduce", "reduction"))
    ),
    Row("backbone.norms.{}", "backbone.hidden_states_norms.stage{+1}"),
]


def refuse(tensors: Mapping[str, Tensor]) -> str:
    """Names the window of a file if it is another one; else ""."""
    tables = (
        len(table) for key, table in tensors.items() if key.endswith("relative_position_bias_table") and table.dim()
    )
    rows = next((rows for rows in tables if rows != (2 * WINDOW - 1) ** 2), None)
    if rows is None:
        return ""
    side = (math.isqrt(rows) + 1) // 2
    return (
        f"Swin with windows of {side}×{side} positions (relative_position_bias_table has {rows} rows)\n"
        f"expected {WINDOW}×{WINDOW}, {(2 * WINDOW - 1) ** 2} rows\n"
        f"give the file for window {WINDOW} and images of 224 pixels, such as swin_base_patch4_window7_224"
    )
