"""The names that official files have for the tensors of a model.

Source: SSA-Seg (commit e67fc2f) on mmsegmentation 0.30. Keys start with `backbone`, or with `decode_head` for decoder
and classifier. ImageNet checkpoints have the backbone's keys without this prefix.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from ssaseg.models.build import all_families, family_of
from ssaseg.models.classifiers.base import Classifier
from ssaseg.models.networks.family import Family, Layout
from ssaseg.models.rows import Entry, Row, entries, several
from ssaseg.models.segmenter import Segmenter

# Prefixes of keys that no network here uses, and what these tensors are.
NOT_USED = {
    "auxiliary_head.": "a training-only head that these configurations do not have",
    **dict.fromkeys(("cls_head.", "dist_head.", "fc.", "head.", "linear.", "norm."), "the ImageNet classifier"),
}
# Last parts of keys of counters. A file may have them or not.
COUNTERS = ("num_batches_tracked",)


def official_entries(model: Segmenter, backbone: bool = False, layout: str = "") -> list[Entry]:
    """Tensors of a model from `build_model`, in the order of its state dict.

    Args:
        model: the model.
        backbone: whether only the tensors of its backbone.
        layout: the name of a `Layout` of its family, whose names are given instead of official ones; a tensor without
            a name there is left out. A name that the family does not have means official names.
    """
    family = family_of(model.name)
    keys = [key for key in model.state_dict() if not backbone or key.startswith("backbone.")]
    own = _layout(family, layout)
    if own is None:
        return entries([*family.rows, *_classifier_rows(model, family)], keys)
    rows = [*own.rows, *_classifier_rows(model, own if own.heads else family)]
    if not own.heads:
        rows += [row for row in family.rows if not several(row.ours)[0].startswith("backbone")]
    return entries(rows, keys, partial=True)


def layout_of(keys: Collection[str]) -> str:
    """The name of the `Layout` that a file's keys have, with `backbone.`; "" for official names."""
    found = (each for family in all_families() for each in family.layouts if each.fits(keys))
    return next((each.name for each in found), "")


def layout_for(model: Segmenter, name: str) -> Layout | None:
    """The layout of this name in the model's family; None if it has none."""
    return _layout(family_of(model.name), name)


def _layout(family: Family, name: str) -> Layout | None:
    return next((each for each in family.layouts if each.name == name), None)


def families_like(keys: Collection[str], layout: str) -> list[Family]:
    """The families whose mark, or whose layout, a file has."""
    if layout:
        return [family for family in all_families() if _layout(family, layout)]
    return [family for family in all_families() if any(key.startswith(family.mark) for key in keys)]


def refusal(tensors: Mapping[str, Tensor], layout: str) -> str:
    """Why no network can use a file with the marks of one: lines for the user; "" if there is no reason."""
    return next((reason for each in families_like(tensors, layout) if (reason := each.refuse(tensors))), "")


def main_head(keys: Collection[str], layout: str = "") -> str:
    """The prefix of the main classifier in a file of a `Layout`: of a cascade, that of the last stage."""
    prefixes = {names.heads["classifier"] for names in _naming(layout) if names.heads}
    found = [each for each in prefixes if any(key.startswith(f"{each}.") for key in keys)]
    return max(found, key=len, default="decode_head")


def last_layer(keys: Collection[str], layout: str = "") -> str:
    """The name, below `main_head`, of the layer with one row for each class in a file of a `Layout`."""
    head = main_head(keys, layout)
    return next((names.last for names in _naming(layout) if names.heads.get("classifier") == head), "conv_seg")


def _naming(layout: str) -> list[Family | Layout]:
    """What has the names of a whole network in files of a `Layout`; the families themselves if it has no such names."""
    own = [each for family in all_families() if (each := _layout(family, layout)) and each.heads]
    return [*own] or [*all_families()]


def _classifier_rows(model: Segmenter, names: Family | Layout) -> list[Row]:
    found = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, Classifier)]
    rows = [(prefix, row) for prefix, module in found if prefix in names.heads for row in module.ROWS]
    own = [(prefix, replace(row, theirs=names.last) if row.theirs == "conv_seg" else row) for prefix, row in rows]
    return [row.below(prefix, names.heads[prefix]) for prefix, row in own]


def official_keys(model: Segmenter) -> dict[str, str]:
    """Our state-dict key → the official key (the first, if there are several), in the order of the state dict."""
    return {key: entry.theirs[0] for entry in official_entries(model) for key in entry.ours}


def canonical(key: str) -> str:
    """The name in the rows for an official key of any version of the official files."""
    for family in all_families():
        for pattern, name in family.renamed:
            key = pattern.sub(name, key)
    return key


def aliases(model: Segmenter, keys: Collection[str]) -> dict[str, list[str]]:
    """For a model's official keys: key → other names of the same tensor, where it has any."""
    return family_of(model.name).aliases(keys)


def left_out(model: Segmenter, layout: str = "", backbone: bool = False) -> dict[str, str]:
    """Tensors that a model leaves out because nothing computes with them: official key (`*`: any text) → what it is.

    Reading a file accepts them; an exported file does not have them. `layout`: as in `official_entries`. `backbone`:
    whether to add those that only ImageNet files have.
    """
    family = family_of(model.name)
    found = {f"{family.heads['classifier']}.{key}": reason for key, reason in model.classifier.LEFT_OUT.items()}
    found |= family.left_out
    if backbone:
        found |= family.pretrained_only
    own = _layout(family, layout)
    return found if own is None else found | dict(own.left_out)
