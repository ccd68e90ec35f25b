"""MaskFormer and Mask2Former with ResNet-50: the networks of Hugging Face `transformers`, with their official names.

`transformers` is imported only when such a network is built. Nothing is downloaded: the sizes are below. Given the same
weights they compute what the official code does. MaskFormer's official code also computes the masks of the first
five layers, which only training uses; `transformers` leaves them out.

Source: "Per-Pixel Classification is Not All You Need" (Cheng et al., arXiv 2107.06278), "Masked-attention Mask
Transformer" (Cheng et al., arXiv 2112.01527).
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ssaseg.models.masks.base import MaskDecoder, Masks
from ssaseg.models.masks.resnet import detectron2
from ssaseg.models.networks.family import Family, Parts
from ssaseg.models.rows import Row, rows_of

CHANNELS = [256, 512, 1024, 2048]  # of ResNet-50
NEEDED = ("transformers", "scipy")  # their losses, which `Peer` removes, are made with the networks and need scipy


class Peer(MaskDecoder):
    """A network of `transformers` as a decoder of images. Its losses are left out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        network.criterion = nn.Identity()
        self.network = network

    def forward(self, maps: Tensor) -> Masks:
        """Images (N,3,H,W)."""
        found = self.network(pixel_values=maps)
        return Masks(found.class_queries_logits, found.masks_queries_logits)


def build(name: str, num_classes: int, drop_path: float | None = None) -> Parts:
    """maskformer_r50 or mask2former_r50. Raises ValueError if one of `NEEDED` is missing, or `transformers` is older
    than version 5.
    """
    fix = "install them: pip install 'ssaseg[peers]'"
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise ValueError(f"{name} needs the packages {' and '.join(NEEDED)}, not found: {', '.join(missing)}\n{fix}")
    library = import_module("transformers")
    if int(library.__version__.partition(".")[0]) < 5:  # names of tensors differ
        raise ValueError(f"{name} needs transformers 5 or later, found {library.__version__}\n{fix}")
    resnet = library.ResNetConfig(
        depths=[3, 4, 6, 3], hidden_sizes=CHANNELS, out_features=[f"stage{stage + 1}" for stage in range(4)]
    )
    sizes: dict[str, Any] = {"backbone_config": resnet, "num_labels": num_classes}
    log = import_module("transformers.utils.logging")
    before = log.get_verbosity()
    log.set_verbosity_error()  # it would warn that Mask2Former was published with other backbones, too
    try:
        if name == "maskformer_r50":
            config = library.MaskFormerConfig(decoder_config=library.DetrConfig(), **sizes)
            network = library.MaskFormerForInstanceSegmentation(config)
        else:
            network = library.Mask2FormerForUniversalSegmentation(library.Mask2FormerConfig(**sizes))
    finally:
        log.set_verbosity(before)
    return Parts(nn.Identity(), Peer(network.train()))


# ---- names ---------------------------------------------------------------------------------------------------------


def attention(ours: str, theirs: str, out: str) -> list[Row]:
    """Rows of an attention with three projections, which the official code has in one; `out`: our output projection."""
    split = [
        Row(
            tuple(f"{ours}.{each}_proj.{kind}" for each in "qkv"),
            f"{theirs}.in_proj_{kind}",
            lambda whole: tuple(part.clone() for part in whole.chunk(3)),
            lambda *parts: (torch.cat(parts),),
        )
        for kind in ("weight", "bias")
    ]
    return [*split, Row(f"{ours}.{out}", f"{theirs}.out_proj")]


NETWORK = "decoder.network"
LEVEL, QUERY = f"{NETWORK}.model.pixel_level_module", f"{NETWORK}.model.transformer_module"
ENCODER = f"{LEVEL}.encoder"
BLOCK = {
    **{f"layer.{k}.convolution": f"conv{k + 1}" for k in range(3)},
    **{f"layer.{k}.normalization": f"bn{k + 1}" for k in range(3)},
    "shortcut.convolution": "downsample.0",
    "shortcut.normalization": "downsample.1",
}
BACKBONE_ROWS: list[Row] = [
    Row(f"{ENCODER}.embedder.embedder.convolution", "backbone.conv1"),
    Row(f"{ENCODER}.embedder.embedder.normalization", "backbone.bn1"),
    *rows_of(f"{ENCODER}.encoder.stages.{{}}.layers.{{}}", "backbone.layer{+1}.{}", BLOCK),
]
MASKFORMER_LAYER = "predictor.transformer.decoder.layers.{}"
MASKFORMER_ROWS: list[Row] = [
    *BACKBONE_ROWS,
    Row(f"{LEVEL}.decoder.fpn.stem.0", "pixel_decoder.layer_4"),
    Row(f"{LEVEL}.decoder.fpn.stem.1", "pixel_decoder.layer_4.norm"),
    *(
        Row(f"{LEVEL}.decoder.fpn.layers.{k}.{ours}", f"pixel_decoder.{theirs}")
        for k in range(3)
        for ours, theirs in {
            "proj.0": f"adapter_{3 - k}",
            "proj.1": f"adapter_{3 - k}.norm",
            "block.0": f"layer_{3 - k}",
            "block.1": f"layer_{3 - k}.norm",
        }.items()
    ),
    Row(f"{LEVEL}.decoder.mask_projection", "pixel_decoder.mask_features"),
    *attention(f"{QUERY}.decoder.layers.{{}}.self_attn", f"{MASKFORMER_LAYER}.self_attn", "o_proj"),
    *attention(f"{QUERY}.decoder.layers.{{}}.encoder_attn", f"{MASKFORMER_LAYER}.multihead_attn", "o_proj"),
    *rows_of(
        f"{QUERY}.decoder.layers.{{}}",
        MASKFORMER_LAYER,
        {
            "self_attn_layer_norm": "norm1",
            "encoder_attn_layer_norm": "norm2",
            "final_layer_norm": "norm3",
            "mlp.fc1": "linear1",
            "mlp.fc2": "linear2",
        },
    ),
    Row(f"{QUERY}.decoder.layernorm", "predictor.transformer.decoder.norm"),
    Row(f"{QUERY}.queries_embedder", "predictor.query_embed"),
    Row(f"{QUERY}.input_projection", "predictor.input_proj"),
    Row(f"{NETWORK}.class_predictor", "predictor.class_embed"),
    Row(f"{NETWORK}.mask_embedder.{{}}.0", "predictor.mask_embed.layers.{}"),
]
PIXELS, ENCODER_LAYER = f"{LEVEL}.decoder", "pixel_decoder.transformer.encoder.layers.{}"
MASK2FORMER_ROWS: list[Row] = [
    *BACKBONE_ROWS,
    Row(f"{PIXELS}.level_embed", "pixel_decoder.transformer.level_embed"),
    Row(f"{PIXELS}.input_projections", "pixel_decoder.input_proj"),
    Row(f"{PIXELS}.encoder.layers.{{}}.self_attn", f"{ENCODER_LAYER}.self_attn"),
    *rows_of(
        f"{PIXELS}.encoder.layers.{{}}",
        ENCODER_LAYER,
        {"self_attn_layer_norm": "norm1", "final_layer_norm": "norm2", "fc1": "linear1", "fc2": "linear2"},
    ),
    *rows_of(
        PIXELS,
        "pixel_decoder",
        {
            "mask_projection": "mask_features",
            "adapter_1.0": "adapter_1",
            "adapter_1.1": "adapter_1.norm",
            "layer_1.0": "layer_1",
            "layer_1.1": "layer_1.norm",
        },
    ),
    *attention(
        f"{QUERY}.decoder.layers.{{}}.self_attn", "predictor.transformer_self_attention_layers.{}.self_attn", "out_proj"
    ),
    *rows_of(
        f"{QUERY}.decoder.layers.{{}}",
        "predictor",
        {
            "self_attn_layer_norm": "transformer_self_attention_layers.{}.norm",
            "cross_attn": "transformer_cross_attention_layers.{}.multihead_attn",
            "cross_attn_layer_norm": "transformer_cross_attention_layers.{}.norm",
            "fc1": "transformer_ffn_layers.{}.linear1",
            "fc2": "transformer_ffn_layers.{}.linear2",
            "final_layer_norm": "transformer_ffn_layers.{}.norm",
        },
    ),
    *rows_of(
        QUERY,
        "predictor",
        {
            "queries_embedder": "query_embed",
            "queries_features": "query_feat",
            "level_embed": "level_embed",
            "decoder.layernorm": "decoder_norm",
            "decoder.mask_predictor.mask_embedder.{}.0": "mask_embed.layers.{}",
        },
    ),
    Row(f"{NETWORK}.class_predictor", "predictor.class_embed"),
]


def family(name: str, method: str, rows: list[Row], mark: str) -> Family:
    """One of the two families; mark: the beginning of some key below `pixel_decoder`, of no other mask method."""
    return Family(
        variants={name: None},
        build=build,
        rows=rows,
        mark=f"pixel_decoder.{mark}",
        layouts=(detectron2(method, rows, f"sem_seg_head.pixel_decoder.{mark}", "sem_seg_head.predictor.class_embed"),),
        heads={"classifier": "predictor"},
        last="class_embed",
    )


MASKFORMER_FAMILY = family("maskformer_r50", "MaskFormer", MASKFORMER_ROWS, "layer_4.")
MASK2FORMER_FAMILY = family("mask2former_r50", "Mask2Former", MASK2FORMER_ROWS, "transformer.level_embed")
