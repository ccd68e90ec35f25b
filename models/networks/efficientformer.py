"""EfficientFormerV2, the backbone of CGRSeg: convolutional stages, then attention on a grid of 1/32 of the image.

Source: "Rethinking Vision Transformers for MobileNet Size and Speed" (Li et al., ICCV 2023, arXiv 2212.08059), as
CGRSeg's `models/backbones/efficientformer_v2.py` builds it for segmentation.

Differences from the official code, on purpose:
- Any height and width of at least 32. Officially the query grid is ⌊H/2⌋, which crashes if H/16 is odd; here it has the
  size of the strided convolution's output, and attention is upsampled to the size of its input. For multiples of 32 the
  results are equal.
- The relative bias is computed from its parameter in each pass. Officially `.eval()` caches it, and weights that are
  loaded later are not used.
- BatchNorm is trained, as in the official distributed run; in a run of one process the official code freezes it.

Axes: N images, C channels, H×W pixels, h heads, D channels of a head, Q queries, P keys.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.layers import ConvNorm, Depthwise, DropPath, drop_path_rates, resize_bilinear
from ssaseg.models.rows import Row, conv_norm

HEADS = 8

GRID = 16  # side of the attention's grid for images of 512 pixels; relative biases are stored for it

SCALE = 1e-5  # of residual branches at the start


@dataclass(frozen=True)
class Variant:
    """One size. `expansions[i]`: MLP ratios of stage i's blocks. The last `attention` blocks of stages 2, 3 attend."""

    widths: tuple[int, int, int, int]
    expansions: tuple[tuple[int, ...], ...]
    attention: int
    drop_path: float

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return tuple(len(stage) for stage in self.expansions)


# Rows of numbers from the official file named in the module's docstring.
VARIANTS = {
    "s1": Variant(
        widths=(32, 48, 120, 224),
        expansions=((4,) * 3, (4,) * 3, (4, 4, 3, 3, 3, 3, 4, 4, 4), (4, 4, 3, 3, 4, 4)),
        attention=2,
        drop_path=0.0,
    ),
    "s2": Variant(
        widths=(32, 64, 144, 288),
        expansions=((4,) * 4, (4,) * 4, (4, 4, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4), (4, 4, 3, 3, 3, 3, 4, 4)),
        attention=4,
        drop_path=0.02,
    ),
    "l": Variant(
        widths=(40, 80, 192, 384),
        expansions=(
            (4,) * 5,
            (4,) * 5,
            (4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4),
            (4, 4, 4, 3, 3, 3, 3, 4, 4, 4),
        ),
        attention=6,
        drop_path=0.1,
    ),
}


class RelativeBias(nn.Module):
    """Relative bias of attention: one learnt number per head and distance (|Δy|, |Δx|) between query and key.

    Stored for a grid of 16×16 queries and `stride` times as many keys per side. For other grids the *flattened* matrix
    of queries by keys is resized bicubically, as in the official code.
    """

    distance: Tensor

    def __init__(self, stride: int) -> None:
        super().__init__()
        keys = GRID * stride
        self.table = nn.Parameter(torch.zeros(HEADS, keys * keys))
        distance = (stride * torch.arange(GRID)[:, None] - torch.arange(keys)).abs()
        self.register_buffer("distance", distance, persistent=False)  # (16, keys), for both axes

    def forward(self, queries: int, keys: int) -> Tensor:
        """→ (h,Q,P)."""
        grid, side = self.distance.shape
        table = self.table.unflatten(1, (side, side))
        # Axis by axis, so that the second, larger lookup reads whole rows: (h,|Δy|,|Δx|) → (h,y,y',|Δx|) → (…,x,x').
        offsets = table[:, self.distance.flatten()][:, :, self.distance.flatten()]
        offsets = offsets.view(HEADS, grid, side, grid, side)
        bias = offsets.transpose(2, 3).reshape(HEADS, grid * grid, side * side)
        if bias.shape[1:] == (queries, keys):
            return bias
        return F.interpolate(bias[None], size=(queries, keys), mode="bicubic", align_corners=False)[0]


def split_heads(maps: Tensor) -> Tensor:
    """(N,h·D,H,W) → (N,h,D,P): the channels of a head are adjacent."""
    return maps.flatten(2).unflatten(1, (HEADS, -1))


def merge_heads(tokens: Tensor, size: torch.Size) -> Tensor:
    """(N,h,P,D) → (N,h·D,H,W), channels last in memory like the convolutions here."""
    return tokens.transpose(1, 2).flatten(2).mT.unflatten(2, size)


class TalkingHeads(nn.Conv2d):
    """1×1 convolution over heads as a matrix product, because attention maps are not channels last in memory."""

    def __init__(self) -> None:
        super().__init__(HEADS, HEADS, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """(N,h,Q,P) → (N,h,Q,P)."""
        mixed = self.weight.flatten(1) @ maps.flatten(2) + self.bias[:, None]  # type: ignore[index]
        return mixed.view(maps.shape)


class Attention(nn.Module):
    """Attention with mixing of heads before and after the softmax, plus a depthwise convolution of the values.

    In stage 2 (`stride` 2) the grid has half the resolution, and the result is upsampled.
    """

    def __init__(self, channels: int, stride: int, key_dim: int = 32) -> None:
        super().__init__()
        keys, values = HEADS * key_dim, HEADS * 4 * key_dim
        self.scale = key_dim**-0.5
        self.reduce = (
            ConvNorm(channels, channels, 3, stride, groups=channels, bias=True) if stride > 1 else nn.Identity()
        )
        self.query = ConvNorm(channels, keys, bias=True)
        self.key = ConvNorm(channels, keys, bias=True)
        self.value = ConvNorm(channels, values, bias=True)
        self.local = ConvNorm(values, values, 3, groups=values, bias=True)
        self.bias = RelativeBias(stride=1)
        self.talk_before = TalkingHeads()
        self.talk_after = TalkingHeads()
        self.project = ConvNorm(values, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        size = x.shape[-2:]
        x = self.reduce(x)
        value = self.value(x)
        scores = split_heads(self.query(x)).mT @ split_heads(self.key(x)) * self.scale  # (N,h,P,P)
        scores = self.talk_before(scores + self.bias(*scores.shape[-2:]))
        weights = self.talk_after(scores.softmax(dim=-1))
        attended = merge_heads(weights @ split_heads(value).mT, x.shape[-2:])
        return self.project(F.gelu(resize_bilinear(attended + self.local(value), size)))


class AttentionDownsample(nn.Module):
    """Halves the resolution: attention from queries on a coarse grid to keys on the fine one, plus a convolution."""

    def __init__(self, inputs: int, outputs: int, key_dim: int = 16) -> None:
        super().__init__()
        keys, values = HEADS * key_dim, HEADS * 4 * key_dim
        self.scale = key_dim**-0.5
        self.query_local = Depthwise(inputs, 3, stride=2)
        self.query = ConvNorm(inputs, keys, bias=True)
        self.key = ConvNorm(inputs, keys, bias=True)
        self.value = ConvNorm(inputs, values, bias=True)
        self.local = ConvNorm(values, values, 3, stride=2, groups=values, bias=True)
        self.bias = RelativeBias(stride=2)
        self.project = ConvNorm(values, outputs, bias=True)
        self.conv = ConvNorm(inputs, outputs, 3, stride=2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,outputs,⌈H/2⌉,⌈W/2⌉)."""
        value = self.value(x)
        local = self.local(value)
        query = self.query(self.query_local(x) + x[..., ::2, ::2])
        scores = split_heads(query).mT @ split_heads(self.key(x)) * self.scale  # (N,h,Q,P)
        weights = (scores + self.bias(*scores.shape[-2:])).softmax(dim=-1)
        attended = merge_heads(weights @ split_heads(value).mT, local.shape[-2:])
        return self.project(F.gelu(attended + local)) + self.conv(x)


class ConvMLP(nn.Sequential):
    """1×1 to more channels, depthwise 3×3, 1×1 back to `channels`; each with a norm, GELU between them."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        hidden = channels * ratio
        self.expand = ConvNorm(channels, hidden, bias=True)
        self.expand_act = nn.GELU()
        self.depthwise = ConvNorm(hidden, hidden, 3, groups=hidden, bias=True)
        self.depthwise_act = nn.GELU()
        self.project = ConvNorm(hidden, channels, bias=True)
        for layer in (self.expand.conv, self.project.conv):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


class Residual(nn.Module):
    """x + scale · branch(x) with a learnt vector `scale`."""

    def __init__(self, branch: nn.Module, channels: int, drop_path: float) -> None:
        super().__init__()
        self.branch = branch
        self.scale = nn.Parameter(torch.full((channels, 1, 1), SCALE))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        return x + self.drop_path(self.scale * self.branch(x))


class EfficientFormerV2(nn.Module):
    """Backbone: a stem at 1/4 and four stages at strides 4, 8, 16, 32.

    Convolutions keep PyTorch's initialisation, as in the official code; only 1×1 ones of MLPs have deviation 0.02.
    """

    def __init__(self, variant: Variant, drop_path: float | None = None) -> None:
        super().__init__()
        rates = iter(drop_path_rates(variant.drop_path if drop_path is None else drop_path, variant.depths))
        a, b, c, d = variant.widths
        self.stem = nn.Sequential(
            ConvNorm(3, a // 2, 3, stride=2, bias=True),
            nn.GELU(),
            ConvNorm(a // 2, a, 3, stride=2, bias=True),
            nn.GELU(),
        )
        self.stages = nn.ModuleList()
        for stage, (width, ratios) in enumerate(zip(variant.widths, variant.expansions, strict=True)):
            attending = range(len(ratios) - variant.attention, len(ratios)) if stage >= 2 else ()
            blocks = nn.Sequential()
            for block, ratio in enumerate(ratios):
                rate = next(rates)
                branches: dict[str, nn.Module] = {"mlp": ConvMLP(width, ratio)}
                if block in attending:
                    branches = {"attention": Attention(width, stride=2 if stage == 2 else 1), **branches}
                residuals = {name: Residual(branch, width, rate) for name, branch in branches.items()}
                blocks.append(nn.Sequential(OrderedDict[str, nn.Module](residuals)))
            self.stages.append(blocks)
        self.downsample = nn.ModuleList(
            [ConvNorm(a, b, 3, stride=2, bias=True), ConvNorm(b, c, 3, stride=2, bias=True), AttentionDownsample(c, d)]
        )
        self.channels = variant.widths[1:]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N,3,H,W) → maps (N,C,⌈H/s⌉,⌈W/s⌉), finest first: s = 8, 16, 32. The map at 1/4 is not returned."""
        x = self.stages[0](self.stem(images))
        maps = []
        for downsample, stage in zip(self.downsample, self.stages[1:], strict=False):
            x = stage(downsample(x))
            maps.append(x)
        return maps


def _numbered(ours: str, theirs: str, conv: int = 0) -> tuple[Row, Row]:
    """Rows of a `ConvNorm` that is officially two layers of a numbered sequence."""
    return conv_norm(ours, theirs, conv=str(conv), norm=str(conv + 1))


_BLOCK_ROWS = (
    Row("attention.scale", "layer_scale_1"),
    Row("mlp.scale", "layer_scale_2"),
    Row("mlp.branch.expand.conv", "mlp.fc1"),
    Row("mlp.branch.expand.norm", "mlp.norm1"),
    Row("mlp.branch.depthwise.conv", "mlp.mid"),
    Row("mlp.branch.depthwise.norm", "mlp.mid_norm"),
    Row("mlp.branch.project.conv", "mlp.fc2"),
    Row("mlp.branch.project.norm", "mlp.norm2"),
    *_numbered("attention.branch.reduce", "token_mixer.stride_conv"),
    *_numbered("attention.branch.query", "token_mixer.q"),
    *_numbered("attention.branch.key", "token_mixer.k"),
    *_numbered("attention.branch.value", "token_mixer.v"),
    *_numbered("attention.branch.local", "token_mixer.v_local"),
    Row("attention.branch.bias.table", "token_mixer.attention_biases_seg"),
    Row("attention.branch.talk_before", "token_mixer.talking_head1"),
    Row("attention.branch.talk_after", "token_mixer.talking_head2"),
    *_numbered("attention.branch.project", "token_mixer.proj", conv=1),
)
# Officially the stages and the downsampling layers between them are one numbered list.
ROWS = (
    *_numbered("backbone.stem.0", "backbone.patch_embed"),
    *_numbered("backbone.stem.2", "backbone.patch_embed", conv=3),
    *(
        row.below(f"backbone.stages.{stage}.{{}}", f"backbone.network.{2 * stage}.{{}}")
        for stage in range(4)
        for row in _BLOCK_ROWS
    ),
    *conv_norm("backbone.downsample.0", "backbone.network.1", conv="proj", norm="norm"),
    *conv_norm("backbone.downsample.1", "backbone.network.3", conv="proj", norm="norm"),
    *conv_norm("backbone.downsample.2.conv", "backbone.network.5"),
    *(
        row.below("backbone.downsample.2", "backbone.network.5.attn")
        for row in (
            Row("query_local", "q.local.0"),
            *_numbered("query", "q.proj"),
            *_numbered("key", "k"),
            *_numbered("value", "v"),
            *_numbered("local", "v_local"),
            Row("bias.table", "attention_biases_seg"),
            *_numbered("project", "proj", conv=1),
        )
    ),
)
