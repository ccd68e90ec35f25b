"""PEM with ResNet-50.

Source: "PEM: Prototype-based Efficient MaskFormer" (Cavagnero et al., arXiv 2402.19422), written from the paper and the
facts of its released code. Three facts of that code are kept because weights depend on them: the context gate has two
sigmoids, one norm of the attention is over the queries, and the offsets of `deform`.

Axes: N images, Q queries, C channels, H×W positions, P = H·W.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.layers import ConvNorm, Depthwise, resize_bilinear
from ssaseg.models.masks.base import QUERIES, MaskDecoder, Masks
from ssaseg.models.masks.deform import DeformUp, deform_rows
from ssaseg.models.masks.resnet import detectron2, resnet50
from ssaseg.models.networks.family import Family, Parts
from ssaseg.models.networks.resnet import PLAIN_ROWS
from ssaseg.models.rows import Row, conv_norm, rows_of

CHANNELS, WIDTH = 128, 256  # of the pixel decoder; of queries and masks
FEED = 2048  # of the feed-forward layers
LAYERS, LEVELS, HEADS = 6, 3, 8


class ConvNormReLU(ConvNorm):
    """1×1 convolution without bias, norm and ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class ContextGate(nn.Module):
    """Context-based self-modulation: each channel x becomes x + g·x; g depends on the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = ConvNormReLU(channels, channels // 2)
        self.expand = nn.Conv2d(channels // 2, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W)."""
        gate = self.expand(self.reduce(x.mean(dim=(2, 3), keepdim=True)))
        return x + x * gate.sigmoid().sigmoid()  # twice, as in the released code


class PixelDecoder(nn.Module):
    """Pyramid with deformable convolutions on its way down."""

    def __init__(self, inputs: Sequence[int]) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(ConvNormReLU(each, CHANNELS) for each in inputs)
        self.average = ConvNormReLU(inputs[3], CHANNELS)
        self.gates = nn.ModuleList(ContextGate(CHANNELS) for _ in inputs)
        self.up = nn.ModuleList(DeformUp(CHANNELS, CHANNELS) for _ in inputs[1:])
        self.out = ConvNormReLU(CHANNELS, WIDTH)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Four maps → maps (N,128,·,·) at strides 32, 16, 8, and the mask feature (N,256,h,w) at stride 4."""
        added = self.average(maps[3].mean(dim=(2, 3), keepdim=True))
        levels = []
        for index, gate in enumerate(self.gates):  # from the coarsest map on
            x = gate(self.lateral[3 - index](maps[3 - index])) + added
            if index < 3:
                same, added = self.up[index](x)
                levels.append(same)
        return levels, self.out(x)


class PrototypeAttention(nn.Module):
    """Cross attention in which each head of a query takes one position, its prototype, instead of a mean over all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)
        self.local = Depthwise(WIDTH, 3)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.query_norm, self.query = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(1, 1, WIDTH))

    def forward(self, queries: Tensor, where: Tensor, feature: Tensor, masks: Tensor) -> Tensor:
        """Queries (N,Q,C) with their positions (Q,C), feature (N,C,H,W), mask logits (N,Q,H,W) → queries (N,Q,C)."""
        keys = self.key(self.local(self.norm(feature)).flatten(2).transpose(1, 2))  # (N,P,C)
        keys = F.normalize(keys, dim=2)
        wanted = F.normalize(self.query(self.query_norm(queries + where)), dim=2)
        found = prototypes(keys, wanted, masks.flatten(2) < 0)
        # The norm is over the queries: dim 1, as in the released code.
        return queries + self.out(F.normalize(self.mix(found * wanted), dim=1) * self.scale + found)


def prototypes(keys: Tensor, queries: Tensor, hidden: Tensor) -> Tensor:
    """In each head, the key that is most similar to the query, among those not hidden: (N,Q,C).

    keys (N,P,C), queries (N,Q,C), hidden bool (N,Q,P). A query with all keys hidden takes the first key. Only if all
    keys are hidden from all queries of an image, none is.
    """
    keys, queries = (each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in (keys, queries))  # (N,heads,·,c)
    hidden = hidden & ~hidden.all(dim=(1, 2), keepdim=True)
    similar = (queries @ keys.transpose(2, 3)).masked_fill(hidden[:, None], -torch.inf)  # (N,heads,Q,P)
    best = similar.argmax(dim=3, keepdim=True).expand(-1, -1, -1, keys.shape[3])
    return keys.gather(2, best).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self attention of the queries, with a norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, queries: Tensor, where: Tensor) -> Tensor:
        """(N,Q,C), positions (Q,C) → (N,Q,C)."""
        values = self.norm(queries)
        both = (values + where).transpose(0, 1)  # (Q,N,C)
        return queries + self.attention(both, both, values.transpose(0, 1), need_weights=False)[0].transpose(0, 1)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU, and a norm before them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.expand, self.reduce = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, FEED), nn.Linear(FEED, WIDTH)

    def forward(self, queries: Tensor) -> Tensor:
        """(N,Q,C) → (N,Q,C)."""
        return queries + self.reduce(F.relu(self.expand(self.norm(queries))))


class QueryDecoder(nn.Module):
    """Six layers that refine the queries, with the three levels of the pixel decoder in turn."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.queries, self.where = nn.Embedding(QUERIES, WIDTH), nn.Embedding(QUERIES, WIDTH)
        self.level = nn.Embedding(LEVELS, WIDTH)
        self.project = nn.ModuleList(nn.Conv2d(CHANNELS, WIDTH, 1) for _ in range(LEVELS))
        self.cross = nn.ModuleList(PrototypeAttention() for _ in range(LAYERS))
        self.self = nn.ModuleList(SelfAttention() for _ in range(LAYERS))
        self.feed = nn.ModuleList(FeedForward() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.classes = nn.Linear(WIDTH, num_classes + 1)
        self.mask = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, levels: Sequence[Tensor], feature: Tensor) -> Masks:
        """Levels (N,128,·,·) at strides 32, 16, 8, and the mask feature (N,C,h,w) → masks (N,Q,h,w)."""
        shown = [
            project(level) + own[:, None, None] + sine_positions(level)
            for project, level, own in zip(self.project, levels, self.level.weight, strict=True)
        ]
        where, queries = self.where.weight, self.queries.weight.expand(len(feature), -1, -1)
        masks = self.masks(queries, feature)
        for index in range(LAYERS):
            level = shown[index % LEVELS]
            queries = self.cross[index](queries, where, level, resize_bilinear(masks, level.shape[2:]))
            queries = self.feed[index](self.self[index](queries, where))
            masks = self.masks(queries, feature)
        return Masks(self.classes(self.norm(queries)), masks)

    def masks(self, queries: Tensor, feature: Tensor) -> Tensor:
        """Mask logits (N,Q,h,w) of queries (N,Q,C)."""
        first, second, last = self.mask
        kernels = last(F.relu(second(F.relu(first(self.norm(queries))))))
        return torch.einsum("nqc,nchw->nqhw", kernels, feature)


def sine_positions(maps: Tensor) -> Tensor:
    """DETR's position embedding (WIDTH,H,W) of maps (N,·,H,W): half of the channels for rows, half for columns.

    Source: "End-to-End Object Detection with Transformers" (Carion et al., arXiv 2005.12872), normalised to 2π.
    """
    half = WIDTH // 2
    period = 10000 ** (torch.arange(0, half, 2, device=maps.device).float() / half)
    both = []
    for length in maps.shape[2:]:
        place = torch.arange(1, length + 1, device=maps.device).float() / (length + 1e-6) * (2 * math.pi)
        angle = place / period[:, None]  # (half / 2, length)
        both.append(torch.stack((angle.sin(), angle.cos()), dim=1).flatten(0, 1))
    rows, columns = both
    height, width = maps.shape[2:]
    return torch.cat((rows[:, :, None].expand(-1, -1, width), columns[:, None].expand(-1, height, -1)))


class PEM(MaskDecoder):
    """Pixel decoder and query decoder."""

    def __init__(self, inputs: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.pixels, self.queries = PixelDecoder(inputs), QueryDecoder(num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Masks:
        """Maps of a ResNet at strides 4, 8, 16, 32."""
        return self.queries(*self.pixels(maps))


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """Backbone and decoder of pem_r50."""
    backbone = resnet50()
    return Parts(backbone, PEM(backbone.channels, num_classes))


PIXELS, QUERY = "decoder.pixels", "decoder.queries"
ROWS: list[Row] = [
    *PLAIN_ROWS,
    *conv_norm(f"{PIXELS}.lateral.{{}}", "pixel_decoder.in_projections.{}"),
    *conv_norm(f"{PIXELS}.average", "pixel_decoder.conv_avg"),
    *conv_norm(f"{PIXELS}.gates.{{}}.reduce", "pixel_decoder.csm.{}.mlp.0.mlp", conv="0", norm="1"),
    Row(f"{PIXELS}.gates.{{}}.expand", "pixel_decoder.csm.{}.mlp.0.mlp.3"),
    *deform_rows(f"{PIXELS}.up.{{}}", "pixel_decoder.dcn.{}"),
    *conv_norm(f"{PIXELS}.out", "pixel_decoder.out"),
    *rows_of(
        f"{QUERY}.cross.{{}}",
        "predictor.transformer_cross_attention_layers.{}",
        {
            "norm": "feature_proj.bn",
            "local": "feature_proj.to_query_3x3",
            "key": "feature_proj.out",
            "query_norm": "query_proj.0",
            "query": "query_proj.1",
            "mix": "proj",
            "out": "final",
            "scale": "alpha",
        },
    ),
    Row(f"{QUERY}.self.{{}}.norm", "predictor.transformer_self_attention_layers.{}.norm"),
    Row(f"{QUERY}.self.{{}}.attention", "predictor.transformer_self_attention_layers.{}.self_attn"),
    *rows_of(
        f"{QUERY}.feed.{{}}",
        "predictor.transformer_ffn_layers.{}",
        {"norm": "norm", "expand": "linear1", "reduce": "linear2"},
    ),
    *rows_of(
        QUERY,
        "predictor",
        {
            "queries": "query_feat",
            "where": "query_embed",
            "level": "level_embed",
            "project.{}": "input_proj.{}",
            "norm": "decoder_norm",
            "classes": "class_embed",
            "mask.{}": "mask_embed.layers.{}",
        },
    ),
]
FAMILY = Family(
    variants={"pem_r50": None},
    build=build,
    rows=ROWS,
    mark="pixel_decoder.csm.",
    layouts=(detectron2("PEM", ROWS, "sem_seg_head.pixel_decoder.csm.", "sem_seg_head.predictor.class_embed"),),
    heads={"classifier": "predictor"},
    last="class_embed",
)
