"""Official state-dict keys of each network: one visible table, from our names to theirs.

A table's rows are applied in order as plain replacements to a key of ours that starts with the row's section.
Sources: SSA-Seg (commit e67fc2f) on mmsegmentation 0.30, which calls the network `backbone` and everything behind it
`decode_head`; the ImageNet checkpoints have the backbone's keys without that prefix.
"""

import re
from collections.abc import Collection
from itertools import product

from torch import nn

Rows = list[tuple[str, str]]

CLASSIFIER: Rows = [
    ("classifier.spatial_conv.", "decode_head.get_feat_pos."),
    ("classifier.spatial_prototypes", "decode_head.center_pos.weight"),
    ("classifier.student.semantic.", "decode_head.center_content_proj."),
    ("classifier.student.spatial.", "decode_head.center_pos_proj."),
    ("classifier.student.merge.", "decode_head.center_proj."),
    ("classifier.teacher.semantic.", "decode_head.gt_center_content_proj."),
    ("classifier.teacher.spatial.", "decode_head.gt_center_pos_proj."),
    ("classifier.teacher.merge.", "decode_head.gt_center_proj."),
    ("classifier.", "decode_head."),
]

MLP_CONVS = (("expand", "fc1"), ("depthwise", "mid"), ("project", "fc2"))  # of EfficientFormerV2

MLP_NORMS = (("expand", "norm1"), ("depthwise", "mid_norm"), ("project", "norm2"))

FUSIONS = (("local", "fuse1"), ("gate", "fuse2"))  # of CGRSeg

SEAFORMER: dict[str, Rows] = {
    "backbone.": [
        ("backbone.stem.", "backbone.smb1.stem_block.0."),
        *((f"mobile.{i}.{j}.layers.", f"smb{i + 1}.layer{j + 1}.conv.") for i in range(5) for j in range(3)),
        *((f"sea.{i}.", f"trans{i + 1}.transformer_blocks.") for i in range(3)),
        # The MLP first: its `project` has a namesake in the attention.
        *((f"{block}.expand.", f"{block}.mlp.fc1.") for block in range(4)),
        *((f"{block}.depthwise.", f"{block}.mlp.dwconv.") for block in range(4)),
        *((f"{block}.project.", f"{block}.mlp.fc2.") for block in range(4)),
        ("attention.query.", "attn.to_q."),
        ("attention.key.", "attn.to_k."),
        ("attention.value.", "attn.to_v."),
        ("attention.project.", "attn.proj.1."),
        ("attention.detail_depthwise.", "attn.dwconv."),
        ("attention.detail_pointwise.", "attn.pwconv."),
        ("attention.row.project.", "attn.proj_encode_row.1."),
        ("attention.row.query_position", "attn.pos_emb_rowq.pos_embed"),
        ("attention.row.key_position", "attn.pos_emb_rowk.pos_embed"),
        ("attention.column.project.", "attn.proj_encode_column.1."),
        ("attention.column.query_position", "attn.pos_emb_columnq.pos_embed"),
        ("attention.column.key_position", "attn.pos_emb_columnk.pos_embed"),
        # Last, and only with their leaf: an inverted residual has a `conv` above its own.
        (".conv.weight", ".c.weight"),
        (".norm.", ".bn."),
    ],
    "decoder.": [
        *((f"decoder.fuse.{i}.local.", f"decode_head.fuse{i + 1}.local_embedding.") for i in range(3)),
        *((f"decoder.fuse.{i}.gate.", f"decode_head.fuse{i + 1}.global_act.") for i in range(3)),
        ("decoder.output.", "decode_head.linear_fuse."),
        (".norm.", ".bn."),
    ],
    "classifier.": CLASSIFIER,
}

AFFORMER: dict[str, Rows] = {
    "backbone.": [
        ("backbone.stem.2.", "backbone.stem.1."),
        *(
            (f"stages.{i}.embeddings.{j}.", f"patch_embed_stages.{i}.patch_embeds.{j}.patch_conv.")
            for i in range(4)
            for j in range(2)
        ),
        (".patch_conv.depthwise.", ".patch_conv.dwconv."),
        (".patch_conv.pointwise.conv.", ".patch_conv.pwconv."),
        (".patch_conv.pointwise.norm.", ".patch_conv.bn."),
        *((f"backbone.stages.{i}.", f"backbone.mhca_stages.{i}.") for i in range(4)),
        ("restore.reduce.", "Restore.conv1."),
        ("restore.depthwise.conv.", "Restore.dwconv."),
        ("restore.depthwise.norm.", "Restore.norm_."),
        ("restore.expand.", "Restore.conv2."),
        ("encoder.position.", "mhca_blks.0.cpe.proj."),
        ("encoder.frequencies.high_pass.", "mhca_blks.0.crpe.conv_list."),
        ("encoder.blocks.", "mhca_blks.0.MHCA_layers."),
        ("attention_norm.", "norm1."),
        ("query_key_value.", "factoratt_crpe.qkv."),
        ("attention_project.", "factoratt_crpe.proj."),
        ("mlp_norm.", "norm2."),
        *((f"{block}.expand.", f"{block}.mlp.fc1.") for block in range(6)),
        *((f"{block}.depthwise.", f"{block}.mlp.dwconv.dwconv.") for block in range(6)),
        *((f"{block}.project.", f"{block}.mlp.fc2.") for block in range(6)),
        (".norm.", ".bn."),
        (".norm_.", ".norm."),  # the one norm that is not called `bn`
    ],
    "decoder.": [("decoder.", "decode_head."), (".norm.", ".gn.")],
    "classifier.": CLASSIFIER,
}

SEGNEXT: dict[str, Rows] = {
    "backbone.": [
        ("stages.0.embed.0.conv.", "patch_embed1.proj.0."),
        ("stages.0.embed.0.norm.", "patch_embed1.proj.1."),
        ("stages.0.embed.2.conv.", "patch_embed1.proj.3."),
        ("stages.0.embed.2.norm.", "patch_embed1.proj.4."),
        *((f"stages.{i}.embed.conv.", f"patch_embed{i + 1}.proj.") for i in range(1, 4)),
        *((f"stages.{i}.embed.norm.", f"patch_embed{i + 1}.norm.") for i in range(1, 4)),
        *((f"stages.{i}.blocks.", f"block{i + 1}.") for i in range(4)),
        *((f"stages.{i}.norm.", f"norm{i + 1}.") for i in range(4)),
        ("attention_norm.", "norm1."),
        ("attention_scale", "layer_scale_1"),
        ("attention.enter.", "attn.proj_1."),
        ("attention.leave.", "attn.proj_2."),
        ("attention.gate.", "attn.spatial_gating_unit."),
        ("gating_unit.local.", "gating_unit.conv0."),
        *((f"gating_unit.strips.{i}.{j}.", f"gating_unit.conv{i}_{j + 1}.") for i in range(3) for j in range(2)),
        ("gating_unit.mix.", "gating_unit.conv3."),
        ("mlp_norm.", "norm2."),
        ("mlp_scale", "layer_scale_2"),
        (".expand.", ".mlp.fc1."),
        (".depthwise.", ".mlp.dwconv.dwconv."),
        (".project.", ".mlp.fc2."),
    ],
    "decoder.": [
        ("decoder.enter.", "decode_head.hamburger.ham_in.conv."),
        ("decoder.leave.", "decode_head.hamburger.ham_out."),
        ("decoder.", "decode_head."),
        (".norm.", ".gn."),
    ],
    "classifier.": CLASSIFIER,
}

CGRSEG: dict[str, Rows] = {
    "backbone.": [
        *((f"stem.{i}.conv.", f"patch_embed.{i + i // 2}.") for i in (0, 2)),
        *((f"stem.{i}.norm.", f"patch_embed.{i + i // 2 + 1}.") for i in (0, 2)),
        *((f"stages.{i}.", f"network.{2 * i}.") for i in range(4)),
        *((f"downsample.{i}.conv.", f"network.{2 * i + 1}.proj.") for i in range(2)),
        *((f"downsample.{i}.norm.", f"network.{2 * i + 1}.norm.") for i in range(2)),
        ("downsample.2.conv.conv.", "network.5.conv."),
        ("downsample.2.conv.norm.", "network.5.bn."),
        ("downsample.2.query_local.", "network.5.attn.q.local.0."),
        ("downsample.2.query.", "network.5.attn.q.proj."),
        ("downsample.2.", "network.5.attn."),
        ("attention.scale", "layer_scale_1"),
        ("mlp.scale", "layer_scale_2"),
        *((f"mlp.branch.{ours}.conv.", f"mlp.{theirs}.") for ours, theirs in MLP_CONVS),
        *((f"mlp.branch.{ours}.norm.", f"mlp.{theirs}.") for ours, theirs in MLP_NORMS),
        ("attention.branch.", "token_mixer."),
        ("token_mixer.reduce.", "token_mixer.stride_conv."),
        *((f".{ours}.", f".{theirs}.") for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"))),
        (".local.conv.", ".v_local.0."),
        (".local.norm.", ".v_local.1."),
        ("bias.table", "attention_biases_seg"),
        (".talk_before.", ".talking_head1."),
        (".talk_after.", ".talking_head2."),
        (".project.conv.", ".proj.1."),
        (".project.norm.", ".proj.2."),
        *((f".{part}.conv.", f".{part}.0.") for part in ("stride_conv", "q", "q.proj", "k", "v")),
        *((f".{part}.norm.", f".{part}.1.") for part in ("stride_conv", "q", "q.proj", "k", "v")),
    ],
    "decoder.": [
        *((f"fuse.{i}.{ours}.", f"SIM.{i}.{theirs}.") for i in range(3) for ours, theirs in FUSIONS),
        ("decoder.output.", "decoder.linear_fuse."),
        *((f"{part}.norm.", f"{part}.bn.") for part in ("fuse1", "fuse2", "linear_fuse")),
        ("decoder.context.", "decoder.trans.transformer_blocks."),
        ("decoder.rebuild.", "decoder.meta."),
        ("decoder.descend.", "decoder.conv."),
        ("attention.local.", "token_mixer.dwconv_hw."),
        ("attention.horizontal.conv.", "token_mixer.excite.0."),
        ("attention.horizontal.norm.", "token_mixer.excite.1."),
        ("attention.vertical.", "token_mixer.excite.3."),
        (".expand.", ".mlp.fc1."),
        (".project.", ".mlp.fc2."),
        (".scale", ".gamma"),
        ("decoder.", "decode_head."),
    ],
    "classifier.": [
        ("classifier.weigh.", "decode_head.lgc.conv_mask."),
        ("classifier.enter.", "decode_head.lgc.channel_mul_conv.0."),
        ("classifier.norm.", "decode_head.lgc.channel_mul_conv.1."),
        ("classifier.leave.", "decode_head.lgc.channel_mul_conv.3."),
        *CLASSIFIER,
    ],
}

# By the part of a network's name before its size.
TABLES = {"afformer": AFFORMER, "cgrseg": CGRSEG, "seaformer": SEAFORMER, "segnext": SEGNEXT}

# What a family's official backbone keys begin with, and no other family's.
MARKS = {
    "afformer": "backbone.mhca_stages.",
    "cgrseg": "backbone.network.",
    "seaformer": "backbone.smb1.",
    "segnext": "backbone.block1.",
}

# Other names that files have for these tensors: pattern → the name in the tables.
RENAMED = [
    # AFFormer's layers list what they share with their encoder once more, see `SHARED`.
    (re.compile(r"\.MHCA_layers\.\d+\.(?:factoratt_crpe\.)?(cpe|crpe)\."), r".\1."),
    # mmsegmentation since 1.0 has no module around MSCAN's depthwise convolution, nor have its ImageNet files.
    (re.compile(r"^(backbone\.block\d+\.\d+\.mlp\.dwconv)\.(weight|bias)$"), r"\1.dwconv.\2"),
]

# The way back: all names under which the official AFFormer looks for a shared tensor, {} being the layer.
SHARED = {
    "mhca_blks.0.cpe.": ("mhca_blks.0.MHCA_layers.{}.cpe.",),
    "mhca_blks.0.crpe.": ("mhca_blks.0.MHCA_layers.{}.crpe.", "mhca_blks.0.MHCA_layers.{}.factoratt_crpe.crpe."),
}

# Official tensors of a whole network that ours does not hold since nothing computes with them: by classifier or
# family, key (`*` for any text) → what it is. Known when they come in; an exported file lacks them.
LEFT_OUT: dict[str, dict[str, str]] = {
    "linear": {},
    "ssa": {"decode_head.ssa_loss.criterion.empty_weight": "a buffer that no loss reads"},
    "afformer": {"decode_head.align.*": "a layer that nothing calls"},
    "cgrseg": {
        "backbone.*.attention_biases": "ImageNet's biases, for a grid of 7×7",
        "backbone.*.attention_bias_idxs": "indices into them",
        "backbone.*.attention_bias_idxs_seg": "indices that follow from the geometry",
    },
    "seaformer": {},
    "segnext": {},
}

# Beginnings of keys that belong to something else in the same file, and what that is.
NOT_USED = {
    "auxiliary_head.": "a training-only head that these configurations do not have",
    **dict.fromkeys(("cls_head.", "dist_head.", "head.", "linear.", "norm."), "the ImageNet classifier"),
}

# Last parts of keys: of counters, that a file may hold or lack; of what ImageNet files lack and training starts afresh.
COUNTERS = ("num_batches_tracked",)

NOT_PRETRAINED = ("attention_biases_seg",)

# Official keys that tell what a file is: of any segmentation network, and of one with the SSA classifier.
CLASSES_KEY = "decode_head.conv_seg.weight"

SSA_KEY = "decode_head.center_pos.weight"


def family(name: str) -> str:
    """A network's name without its size."""
    return name.rpartition("_")[0]


def official_keys(model: nn.Module) -> dict[str, str]:
    """Our state-dict key → the official one, for a model from `build_model`, in the order of its state dict."""
    table = TABLES[family(str(model.name))]
    return {key: _official(key, table) for key in model.state_dict()}


def _official(key: str, table: dict[str, Rows]) -> str:
    rows = next(rows for section, rows in table.items() if key.startswith(section))
    for ours, theirs in rows:
        key = key.replace(ours, theirs)
    return key


def canonical(key: str) -> str:
    """The name that the tables have for an official key of any dialect."""
    for pattern, name in RENAMED:
        key = pattern.sub(name, key)
    return key


def aliases(keys: Collection[str]) -> dict[str, list[str]]:
    """Of `keys`, a model's official ones: key → further names of the same tensor, for those that have any."""
    found = {}
    for key, (part, names) in product(keys, SHARED.items()):
        before, shared, after = key.partition(part)
        if shared:
            layers = sum(other.startswith(f"{before}mhca_blks.") and other.endswith(".norm1.bias") for other in keys)
            found[key] = [before + name.format(layer) + after for layer in range(layers) for name in names]
    return found


def left_out(model: nn.Module) -> dict[str, str]:
    """`LEFT_OUT` of one model: official key, with `*`, → what it is."""
    return {**LEFT_OUT[str(model.classifier_name)], **LEFT_OUT[family(str(model.name))]}
