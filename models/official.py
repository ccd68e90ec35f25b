"""The tensors of a model under the names that official files have for them.

Sources: SSA-Seg (commit e67fc2f) on mmsegmentation 0.30, which calls the network `backbone` and everything behind it
`decode_head`; the ImageNet checkpoints have the backbone's keys without that prefix.
"""

from collections.abc import Collection

from ssaseg.models.build import FAMILIES, family_of
from ssaseg.models.classifiers.base import Classifier
from ssaseg.models.rows import Entry, Row, entries
from ssaseg.models.segmenter import Segmenter

# Beginnings of keys that belong to something else in the same file, and what that is.
NOT_USED = {
    "auxiliary_head.": "a training-only head that these configurations do not have",
    **dict.fromkeys(("cls_head.", "dist_head.", "head.", "linear.", "norm."), "the ImageNet classifier"),
}
# Last parts of keys: of counters, that a file may hold or lack.
COUNTERS = ("num_batches_tracked",)
# Official keys that tell what a file is: of any segmentation network, and of one with the SSA classifier.
CLASSES_KEY = "decode_head.conv_seg.weight"
SSA_KEY = "decode_head.center_pos.weight"


def official_entries(model: Segmenter, imagenet: bool = False) -> list[Entry]:
    """All tensors of a model from `build_model`, in the order of its state dict; `imagenet`: of its backbone alone."""
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
    """Our state-dict key → the official one, in the order of the state dict; the first of several."""
    return {key: entry.theirs[0] for entry in official_entries(model) for key in entry.ours}


def canonical(key: str) -> str:
    """The name that the rows have for an official key of any dialect."""
    for family in FAMILIES.values():
        for pattern, name in family.renamed:
            key = pattern.sub(name, key)
    return key


def aliases(model: Segmenter, keys: Collection[str]) -> dict[str, list[str]]:
    """Of a model's official keys: key → further names of the same tensor, for those that have any."""
    return family_of(model.name).aliases(keys)


def left_out(model: Segmenter) -> dict[str, str]:
    """Official tensors that a model does not hold since nothing computes with them: key (`*`: any text) → what it is.

    Known when they come in; an exported file lacks them.
    """
    family = family_of(model.name)
    found = {f"{family.heads['classifier']}.{key}": reason for key, reason in model.classifier.LEFT_OUT.items()}
    return {**found, **family.left_out}
