"""ViT-Adapter: a plain vision transformer, and a convolutional branch that exchanges features with it.

Source: "Vision Transformer Adapter for Dense Predictions" (Chen et al., ICLR 2023, arXiv 2205.08534), the authors'
`segmentation/mmseg_custom`; deformable attention: "Deformable DETR" (Zhu et al., arXiv 2010.04159).

Axes: N images, C channels, P positions of the transformer (1/16), Q positions of the branch (1/8, 1/16 and 1/32, one
after the other), L levels, S = 4 samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.layers import Checkpointed, ConvNorm, Depthwise, DropPath, drop_path_rates, init_fan_out, init_linear
from ssaseg.models.rows import Row, conv_norm, rows_of

EPS = 1e-6  # of every LayerNorm
PATCH = 16
STRIDES = (4, 8, 16, 32)
SAMPLES = 4
INTERACTIONS = 4
INNER = 64  # channels of the convolutional branch's first maps

Sizes = Sequence[tuple[int, int]]  # (height, width) of each level


@dataclass(frozen=True)
class Variant:
    """One size. `positions`: side of the map of position embeddings; `value_share`: channels that deformable attention
    samples, as a fraction of all. Source: the authors' configurations for ADE20K, segmentation/configs/ade20k (commit
    fd64a51): upernet_deit_adapter_{tiny,small,base}, upernet_augreg_adapter_large. Their augreg_adapter_base has 24
    positions a side, because its ImageNet weights were trained at 384x384.
    """

    width: int
    depth: int
    heads: int
    deformable_heads: int
    value_share: float
    drop_path: float
    positions: int = 14


VARIANTS = {
    "t": Variant(192, 12, 3, 6, 1.0, 0.1),
    "s": Variant(384, 12, 6, 6, 1.0, 0.2),
    "b": Variant(768, 12, 12, 12, 0.5, 0.3),
    "l": Variant(1024, 24, 16, 16, 0.5, 0.4, positions=24),
}


def norm(channels: int) -> nn.LayerNorm:
    """LayerNorm with the eps of this network."""
    return nn.LayerNorm(channels, eps=EPS)


class Attention(nn.Module):
    """Multi-head attention among all positions."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N,P,C) → (N,P,C)."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.project(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, both residual, after norms, and scaled by learnt vectors that start at 1."""

    def __init__(self, channels: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = norm(channels), norm(channels)
        self.attention = Attention(channels, heads)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        self.attention_scale = nn.Parameter(torch.ones(channels))
        self.mlp_scale = nn.Parameter(torch.ones(channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N,P,C) → (N,P,C)."""
        x = x + self.drop_path(self.attention_scale * self.attention(self.attention_norm(x)))
        return x + self.drop_path(self.mlp_scale * self.project(F.gelu(self.expand(self.mlp_norm(x)))))


class DeformableAttention(nn.Module):
    """Each query takes S samples from each level, at learnt places around its own, and weighs them."""

    def __init__(self, channels: int, heads: int, levels: int, value_share: float) -> None:
        super().__init__()
        self.heads, self.levels = heads, levels
        inner = int(channels * value_share)
        self.offsets = nn.Linear(channels, heads * levels * SAMPLES * 2)
        self.weights = nn.Linear(channels, heads * levels * SAMPLES)
        self.value = nn.Linear(channels, inner)
        self.project = nn.Linear(inner, channels)

    def reset(self) -> None:
        """The official start: every head looks in a direction of its own, 1 to 4 positions far, with equal weights."""
        angles = torch.arange(self.heads, device="cpu") * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        directions = directions / directions.abs().amax(dim=1, keepdim=True)
        places = directions[:, None, None] * torch.arange(1, SAMPLES + 1, device="cpu")[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_(places.expand(-1, self.levels, -1, -1).flatten())
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.weights.bias)
        for layer in (self.value, self.project):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, places: Tensor, source: Tensor, sizes: Sizes) -> Tensor:
        """Queries (N,Q,C) at places (Q,2), x and y in [0, 1]; source (N,ΣHW,C), L levels of `sizes` → (N,Q,C)."""
        count = query.shape[0]
        value = self.value(source).unflatten(2, (self.heads, -1))
        offsets = self.offsets(query).unflatten(2, (self.heads, self.levels, SAMPLES, 2))
        weights = self.weights(query).unflatten(2, (self.heads, -1)).softmax(dim=-1)
        weights = weights.unflatten(3, (self.levels, SAMPLES))
        total: Tensor | None = None
        levels = value.split([height * width for height, width in sizes], dim=1)
        for level, ((height, width), content) in enumerate(zip(sizes, levels, strict=True)):
            maps = content.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))  # (N·heads,c,H,W)
            step = torch.tensor([width, height], device=query.device, dtype=offsets.dtype)
            at = places[:, None, None] + offsets[:, :, :, level] / step  # (N,Q,heads,S,2)
            grid = (2 * at - 1).transpose(1, 2).flatten(0, 1)
            sampled = F.grid_sample(maps, grid.to(maps.dtype), align_corners=False)  # (N·heads,c,Q,S)
            share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
            part = (sampled * share).sum(dim=-1)
            total = part if total is None else total + part
        assert total is not None
        return self.project(total.unflatten(0, (count, self.heads)).flatten(1, 2).mT)


class Injector(nn.Module):
    """From the branch to the transformer; residual, scaled by a learnt vector that starts at 0."""

    def __init__(self, channels: int, heads: int, value_share: float) -> None:
        super().__init__()
        self.query_norm, self.source_norm = norm(channels), norm(channels)
        self.attention = DeformableAttention(channels, heads, 3, value_share)
        self.scale = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, places: Tensor, branch: Tensor, sizes: Sizes) -> Tensor:
        """(N,P,C) and the branch (N,Q,C) → (N,P,C)."""
        return x + self.scale * self.attention(self.query_norm(x), places, self.source_norm(branch), sizes)


class Extractor(nn.Module):
    """From the transformer to the branch, then an MLP with a depthwise convolution; both residual."""

    def __init__(self, channels: int, heads: int, value_share: float, drop_path: float) -> None:
        super().__init__()
        self.query_norm, self.source_norm, self.mlp_norm = norm(channels), norm(channels), norm(channels)
        self.attention = DeformableAttention(channels, heads, 1, value_share)
        self.expand = nn.Linear(channels, channels // 4)
        self.depthwise = Depthwise(channels // 4, 3)
        self.project = nn.Linear(channels // 4, channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, branch: Tensor, places: Tensor, x: Tensor, sizes: Sizes) -> Tensor:
        """The branch (N,Q,C), levels of `sizes`, and (N,P,C), a map of the second of them → (N,Q,C)."""
        branch = branch + self.attention(self.query_norm(branch), places, self.source_norm(x), [sizes[1]])
        return branch + self.drop_path(self.mlp(self.mlp_norm(branch), sizes))

    def mlp(self, branch: Tensor, sizes: Sizes) -> Tensor:
        """The same depthwise convolution on each level."""
        levels = self.expand(branch).split([height * width for height, width in sizes], dim=1)
        mixed = [
            self.depthwise(level.mT.unflatten(2, size)).flatten(2).mT for level, size in zip(levels, sizes, strict=True)
        ]
        return self.project(F.gelu(torch.cat(mixed, dim=1)))


class Interaction(Checkpointed):
    """Injector, blocks of the transformer (which it does not own), extractor."""

    def __init__(self, channels: int, heads: int, value_share: float, drop_path: float, extractors: int) -> None:
        super().__init__()
        self.injector = Injector(channels, heads, value_share)
        self.extractors = nn.ModuleList(Extractor(channels, heads, value_share, drop_path) for _ in range(extractors))

    def forward(
        self, x: Tensor, branch: Tensor, blocks: Sequence[nn.Module], own: Tensor, every: Tensor, sizes: Sizes
    ) -> tuple[Tensor, Tensor]:
        """(N,P,C) and the branch (N,Q,C) → both. `own`, `every`: places (P,2) and (Q,2)."""
        x = self.run(self.injector, x, own, branch, sizes)
        for block in blocks:
            x = self.run(block, x)
        for extractor in self.extractors:
            branch = self.run(extractor, branch, every, x, sizes)
        return x, branch


class SpatialPrior(nn.Module):
    """The convolutional branch's start: maps at 1/4, 1/8, 1/16 and 1/32, all with the transformer's channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvNorm(3, INNER, 3, stride=2), nn.ReLU(), ConvNorm(INNER, INNER, 3), nn.ReLU(),
            ConvNorm(INNER, INNER, 3), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1),
        )  # fmt: skip
        widths = (INNER, 2 * INNER, 4 * INNER, 4 * INNER)
        self.halve = nn.ModuleList(ConvNorm(widths[k], widths[k + 1], 3, stride=2) for k in range(3))
        self.projects = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N,3,H,W) → four maps (N,C,H/s,W/s)."""
        x = self.stem(images)
        maps = [self.projects[0](x)]
        for halve, project in zip(self.halve, list(self.projects)[1:], strict=True):
            x = F.relu(halve(x))
            maps.append(project(x))
        return maps


def centres(sizes: Sizes, device: torch.device) -> Tensor:
    """Centres of the positions of several maps, x and y in [0, 1]: (ΣHW,2)."""
    places = []
    for height, width in sizes:
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        places.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=2).flatten(0, 1))
    return torch.cat(places)


class ViTAdapter(nn.Module):
    """Backbone: four maps at strides 4, 8, 16, 32."""

    def __init__(self, variant: Variant, drop_path: float | None = None) -> None:
        super().__init__()
        width, last = variant.width, variant.drop_path if drop_path is None else drop_path
        self.channels = (width,) * 4
        self.embed = nn.Conv2d(3, width, PATCH, PATCH)
        self.positions = nn.Parameter(torch.zeros(1, variant.positions**2 + 1, width))
        self.levels = nn.Parameter(torch.zeros(3, width))
        rates = drop_path_rates(last, (variant.depth,))
        self.blocks = nn.ModuleList(Block(width, variant.heads, rate) for rate in rates)
        self.prior = SpatialPrior(width)
        self.interactions = nn.ModuleList(
            Interaction(width, variant.deformable_heads, variant.value_share, last, 3 if k == INTERACTIONS - 1 else 1)
            for k in range(INTERACTIONS)
        )
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(4))
        self._reset()

    def _reset(self) -> None:
        """Only of the adapter: the authors leave the transformer as PyTorch makes it, and its positions 0."""
        for part in (self.prior, self.interactions, self.up):
            init_fan_out(part)
            init_linear(part)
        nn.init.normal_(self.levels)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset()

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N,3,H,W) → four maps (N,C,⌈H/s⌉,⌈W/s⌉), finest first: s = 4, 8, 16, 32.

        The authors' code takes multiples of 32 only. Other images are padded with zeros here, and the maps cut.
        """
        height, width = images.shape[-2:]
        # Sizes as products, so that an export can follow symbolic ones.
        rows, columns = ((side + STRIDES[-1] - 1) // STRIDES[-1] for side in (height, width))
        images = F.pad(images, (0, columns * STRIDES[-1] - width, 0, rows * STRIDES[-1] - height))
        finest, *coarser = self.prior(images)
        sizes = [(factor * rows, factor * columns) for factor in (4, 2, 1)]
        branch = torch.cat([each.flatten(2).mT + self.levels[k] for k, each in enumerate(coarser)], dim=1)
        x = self.embed(images)
        size = sizes[1]
        x = x.flatten(2).mT + self.position_map(size)
        own, every = centres([size], x.device), centres(sizes, x.device)
        step = len(self.blocks) // INTERACTIONS
        outputs = []
        for k, interaction in enumerate(self.interactions):
            blocks = list(self.blocks)[k * step : (k + 1) * step]
            x, branch = interaction(x, branch, blocks, own, every, sizes)
            outputs.append(x.mT.unflatten(2, size))
        maps = self.together(finest, branch, sizes, outputs)
        return [each[..., : -(-height // s), : -(-width // s)] for each, s in zip(maps, STRIDES, strict=True)]

    def position_map(self, size: tuple[int, int]) -> Tensor:
        """The position embeddings for a map of `size`: (1,P,C). The first one, of a class token, is not used."""
        side = math.isqrt(self.positions.shape[1] - 1)
        maps = self.positions[:, 1:].mT.unflatten(2, (side, side))
        return F.interpolate(maps, size=size, mode="bicubic", align_corners=False).flatten(2).mT

    def together(self, finest: Tensor, branch: Tensor, sizes: Sizes, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The branch's maps with those of the transformer, resized by fixed factors."""
        levels = branch.split([height * width for height, width in sizes], dim=1)
        second, third, fourth = (level.mT.unflatten(2, size) for level, size in zip(levels, sizes, strict=True))
        maps = [self.up(second) + finest, second, third, fourth]
        for k, (each, factor) in enumerate(zip(outputs, (4, 2, 1, 0.5), strict=True)):
            if factor != 1:
                each = F.interpolate(each, scale_factor=factor, mode="bilinear", align_corners=False)
            maps[k] = self.norms[k](maps[k] + each)
        return maps


_DEFORMABLE = {
    "attention.offsets": "attn.sampling_offsets",
    "attention.weights": "attn.attention_weights",
    "attention.value": "attn.value_proj",
    "attention.project": "attn.output_proj",
    "query_norm": "query_norm",
    "source_norm": "feat_norm",
}
_EXTRACTOR = {
    **_DEFORMABLE,
    "mlp_norm": "ffn_norm",
    "expand": "ffn.fc1",
    "depthwise": "ffn.dwconv.dwconv",
    "project": "ffn.fc2",
}
PLAIN_ROWS: list[Row] = [
    Row("backbone.embed", "backbone.patch_embed.proj"),
    Row("backbone.positions", "backbone.pos_embed"),
    *rows_of(
        "backbone.blocks.{}",
        "backbone.blocks.{}",
        {
            "attention_norm": "norm1",
            "attention.qkv": "attn.qkv",
            "attention.project": "attn.proj",
            "mlp_norm": "norm2",
            "expand": "mlp.fc1",
            "project": "mlp.fc2",
        },
    ),
]
ROWS: list[Row] = [
    *PLAIN_ROWS,
    *rows_of("backbone.blocks.{}", "backbone.blocks.{}", {"attention_scale": "gamma1", "mlp_scale": "gamma2"}),
    Row("backbone.levels", "backbone.level_embed"),
    *(row for k, at in enumerate((0, 3, 6)) for row in (
        Row(f"backbone.prior.stem.{2 * k}.conv", f"backbone.spm.stem.{at}"),
        Row(f"backbone.prior.stem.{2 * k}.norm", f"backbone.spm.stem.{at + 1}"),
    )),
    *(row for k in range(3) for row in conv_norm(
        f"backbone.prior.halve.{k}", f"backbone.spm.conv{k + 2}", conv="0", norm="1"
    )),
    Row("backbone.prior.projects.{}", "backbone.spm.fc{+1}"),
    *rows_of(
        "backbone.interactions.{}.injector",
        "backbone.interactions.{}.injector",
        {**_DEFORMABLE, "scale": "gamma"},
    ),
    *rows_of("backbone.interactions.{}.extractors.0", "backbone.interactions.{}.extractor", _EXTRACTOR),
    *rows_of("backbone.interactions.{}.extractors.1", "backbone.interactions.{}.extra_extractors.0", _EXTRACTOR),
    *rows_of("backbone.interactions.{}.extractors.2", "backbone.interactions.{}.extra_extractors.1", _EXTRACTOR),
    Row("backbone.up", "backbone.up"),
    Row("backbone.norms.{}", "backbone.norm{+1}"),
]  # fmt: skip
