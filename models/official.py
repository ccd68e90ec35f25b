"""The names that official files have for the tensors of a model.

Source: SSA-Seg (commit e67fc2f) on mmsegmentation 0.30. Keys start with `backbone`, or with `decode_head` for decoder
and classifier. ImageNet checkpoints have the backbone's keys without this prefix.
"""

from collections.abc import Collection

from ssaseg.models.build import FAMILIES, family_of
from ssaseg.models.classifiers.base import Classifier
from ssaseg.models.rows import Entry, Row, entries
from ssaseg.models.segmenter import Segmenter

# Prefixes of keys that no network here uses, and what these tensors are.
NOT_USED = {
    "auxiliary_head.": "a training-only head that these configurations do not have",
    **dict.fromkeys(("cls_head.", "dist_head.", "head.", "linear.", "norm."), "the ImageNet classifier"),
}
# Last parts of keys of counters. A file may have them or not.
COUNTERS = ("num_batches_tracked",)
# Official keys that show what a file is. The first: any segmentation network; the second: one with the SSA classifier.
CLASSES_KEY = "decode_head.conv_seg.weight"
SSA_KEY = "decode_head.center_pos.weight"


def official_entries(model: Segmenter, imagenet: bool = False) -> list[Entry]:
    """All tensors of a model from `build_model`, in the order of its state dict; `imagenet`: only its backbone."""
    family, keys = family_of(model.name), list(model.state_dict())
    if imagenet:
        rows = family.rows if family.imagenet is None else family.imagenet
        return entries(rows, [key for key in keys if key.startswith("backbone.")])
    return entries([*family.rows, *_classifier_rows(model)], keys)


def _classifier_rows(model: Segmenter) -> list[Row]:
    heads = family_of(model.name).heads
    found = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, Classifier)]
    return [row.below(prefix, heads[prefix]) for prefix, module in found for row in module.ROWS]


def official_keys(model: Segmenter) -> dict[str, str]:
    """Our state-dict key → the official key (the first, if there are several), in the order of the state dict."""
    return {key: entry.theirs[0] for entry in official_entries(model) for key in entry.ours}


def canonical(key: str) -> str:
    """The name in the rows for an official key of any version of the official files."""
    for family in FAMILIES.values():
        for pattern, name in family.renamed:
            key = pattern.sub(name, key)
    return key


def aliases(model: Segmenter, keys: Collection[str]) -> dict[str, list[str]]:
    """For a model's official keys: key → other names of the same tensor, where it has any."""
    return family_of(model.name).aliases(keys)


def left_out(model: Segmenter) -> dict[str, str]:
    """Official tensors that a model leaves out because nothing computes with them: key (`*`: any text) → what it is.

    Reading a file accepts them; an exported file does not have them.
    """
    family = family_of(model.name)
    found = {f"{family.heads['classifier']}.{key}": reason for key, reason in model.classifier.LEFT_OUT.items()}
    return {**found, **family.left_out}
