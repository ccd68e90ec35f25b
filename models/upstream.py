"""Official state-dict keys of each network: one visible table, from our names to theirs.

A table's rows are applied in order as plain replacements to a key of ours that starts with the row's section.
Sources: SSA-Seg (commit e67fc2f) on mmsegmentation 0.30, which calls the network `backbone` and everything behind it
`decode_head`; the ImageNet checkpoints have the backbone's keys without that prefix.
"""

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

# By the part of a network's name before its size.
TABLES = {"seaformer": SEAFORMER}

# Beginnings of official keys that hold nothing a model of ours computes with, and what they are.
NOT_USED = {
    "decode_head.ssa_loss.criterion.empty_weight": "a buffer that no loss reads",
    "auxiliary_head.": "a training-only head that these configurations do not have",
    "linear.": "the ImageNet classifier",
    "head.": "the ImageNet classifier",
}

# Official keys of a whole network that ours does not hold, by classifier: what an exported file lacks.
LEFT_OUT = {"ssa": ("decode_head.ssa_loss.criterion.empty_weight",), "linear": ()}

# Last parts of keys that a file may hold or lack: counters, and indices that follow from the geometry.
DERIVED = ("num_batches_tracked", "attention_bias_idxs", "attention_bias_idxs_seg", "relative_position_index")

# Official keys that tell what a file is: of any segmentation network, and of one with the SSA classifier.
CLASSES_KEY = "decode_head.conv_seg.weight"
SSA_KEY = "decode_head.center_pos.weight"


def official_keys(model: nn.Module) -> dict[str, str]:
    """Our state-dict key → the official one, for a model from `build_model`, in the order of its state dict."""
    table = TABLES[str(model.name).rpartition("_")[0]]
    return {key: _official(key, table) for key in model.state_dict()}


def _official(key: str, table: dict[str, Rows]) -> str:
    rows = next(rows for section, rows in table.items() if key.startswith(section))
    for ours, theirs in rows:
        key = key.replace(ours, theirs)
    return key
