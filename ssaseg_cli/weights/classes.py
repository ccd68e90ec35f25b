"""The classes of a checkpoint: their names, and how to move a classifier's rows to other classes by name."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.datasets import stated_classes
from ssaseg.datasets.labels import label_space, list_label_spaces
from ssaseg.datasets.pairs import first_names
from ssaseg.datasets.published import LAYOUTS
from ssaseg.models import Segmenter
from ssaseg.models.checkpoint import numbered

SEPARATORS = re.compile("[;,]")  # between the synonyms of one class: "car;auto", "building, edifice"

# Metadata of the training run and of its labels, which are wrong for other classes.
RUN_METADATA = ("recipe", "step", "scores", "reduce_zero_label", "untrained")


# ---- names -------------------------------------------------------------------------------------------------------
def own_classes(
    source: Path,
    dataset: str | None,
    meta: Mapping[str, Any],
    classes: int,
    report: Callable[[str], object] = echo,
    option: str = "--dataset",
) -> dict[str, Any]:
    """Metadata of an official file's classes: from `--dataset`, from the file itself, or ADE20K's if there are 150.

    Empty if none of these applies; the classes are then numbered. `report` gets lines for the user; `option`: of the
    command, for messages. Raises CommandError if `--dataset` has another number of classes.
    """
    stated, palette = meta.get("classes"), meta.get("palette")
    if dataset is None and isinstance(stated, list | tuple) and len(stated) == classes:
        same = [name for name in list_label_spaces() if label_space(name).classes == list(stated)]
        if not same:
            return {"classes": [str(c) for c in stated], "palette": _palette(palette, classes)}
        dataset = same[0]
    if dataset is None and isinstance(stated, list | tuple):
        report(f"  classes      the file names {len(stated)}, but its head has {classes}: the names are not used")
    if dataset is None and classes == len(label_space("ade20k").classes):
        dataset = "ade20k"
    if dataset is None:
        report(f"  classes      {classes} without names: they are numbered; give their names with {option}")
        return {}
    metadata = dataset_metadata(dataset, option)
    if len(metadata["classes"]) != classes:
        raise CommandError(
            f"{option} {dataset} has {len(metadata['classes'])} classes, {source} has {classes}\n"
            f"expected a data set with {classes}; one of: {', '.join(list_label_spaces())}, or a recipe"
        )
    report(f"  classes      of {dataset}")
    return metadata


def names_in(header: Mapping[str, Any] | None, meta: Mapping[str, Any], classes: int) -> list[str] | None:
    """The names of a checkpoint's classes, from our header or an official file's meta; None if there are no names.

    150 classes without names are ADE20K's, as in `ssaseg convert`.
    """
    stated = meta.get("classes") if header is None else header.get("classes")
    if isinstance(stated, list | tuple) and len(stated) == classes:
        names = [str(name) for name in stated]
        return None if names == numbered(classes) else names
    ade20k = label_space("ade20k").classes
    return list(ade20k) if header is None and classes == len(ade20k) else None


def _palette(palette: Any, classes: int) -> list[list[int]] | None:
    """An official file's palette, in the form of our metadata; None unless it is one RGB triple in 0..255 per class."""
    try:
        colours = [[int(value) for value in colour] for colour in palette]
    except (TypeError, ValueError, OverflowError):
        return None
    fits = len(colours) == classes and all(len(c) == 3 and 0 <= min(c) <= max(c) <= 255 for c in colours)
    return colours if fits else None


def dataset_metadata(name: str, option: str = "--dataset") -> dict[str, Any]:
    """Checkpoint metadata (classes, palette, protocol, ...) of a published data set, or of a recipe's data.

    Raises CommandError, which names the option, if `name` is neither.
    """
    labels = LAYOUTS[name].labels if name in LAYOUTS else name
    if labels in list_label_spaces():
        return label_space(labels)._asdict()
    from ssaseg.recipes import RecipeError, load_recipe

    try:
        recipe = load_recipe(name)
    except RecipeError:
        raise CommandError(
            f"{option} {name}: no such data set\nexpected one of: {', '.join(list_label_spaces())}, or a recipe"
        ) from None
    data = recipe.data
    classes, palette = stated_classes(data.dataset, data.model_dump())
    if not classes:
        raise CommandError(
            f"{option} {name}: its class names are only in its annotation files\nadd data.classes to the recipe"
        )
    return {
        "classes": classes,
        "palette": palette,
        "mean": list(data.mean),
        "std": list(data.std),
        "range": None if data.range is None else list(data.range),
        "protocol": recipe.test.model_dump(mode="json"),
    }


def ignores_zero(metadata: Mapping[str, Any]) -> bool:
    """Whether label 0 is ignored in the data of a checkpoint, so that label 1 is class 0, as far as that is known.

    As a folder of transformers has stated it, or by the checkpoint's recipe, or by the published data set that has its
    classes.
    """
    if "reduce_zero_label" in metadata:
        return bool(metadata["reduce_zero_label"])
    data = (metadata["recipe"] or {}).get("data")
    if isinstance(data, dict):
        known = [layout for name, layout in LAYOUTS.items() if name == data.get("dataset")]
        return known[0].reduce_zero_label if known else data.get("reduce_zero_label") is True
    same = [each for each in LAYOUTS.values() if label_space(each.labels).classes == metadata["classes"]]
    return bool(same) and same[0].reduce_zero_label


def requested_classes(value: str) -> dict[str, Any]:
    """Metadata of `--classes`: of a published data set, of a recipe, or of names separated by commas.

    Raises CommandError if there is no such data set, or if there are not 2 to 255 different names.
    """
    if "," not in value:
        return dataset_metadata(value, "--classes")
    names = [name.strip() for name in value.split(",")]
    distinct = {name.casefold() for name in names}
    if "" in distinct or len(distinct) < len(names) or len(names) > 255:
        raise CommandError(
            f"--classes {value}: a name is empty or given twice, or there are more than 255\n"
            "expected 2 to 255 different names, as in sky,road,car"
        )
    return {"classes": names, "palette": None}


# ---- rows --------------------------------------------------------------------------------------------------------
def rows_by_name(source: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """For each wanted class the index of the class with the same name in `source`, or None.

    Upper and lower case are equal. If no whole name is the same, synonyms are used: the class of `source` that has a
    synonym in common, if there is exactly one such class.
    """

    def same_name(name: str) -> int | None:
        same = [k for k, other in enumerate(source) if other.strip().casefold() == name.strip().casefold()]
        same = same or [k for k, other in enumerate(source) if _synonyms(other) & _synonyms(name)]
        return same[0] if len(same) == 1 else None

    return [same_name(name) for name in wanted]


def _synonyms(name: str) -> set[str]:
    return {synonym.strip().casefold() for synonym in SEPARATORS.split(name)} - {""}


def keep_rows(
    model: Segmenter, tensors: Mapping[str, Tensor], names: Mapping[str, str], rows: Sequence[int | None], classes: int
) -> tuple[dict[str, Tensor], list[str]]:
    """A checkpoint's tensors, with class rows for `model`: row k is the checkpoint's row rows[k], or, if that is None,
    the model's own. And the checkpoint's keys of class rows that are not those of its `classes`, which are not moved.

    `names`: our key → the checkpoint's key. A tensor that is missing, or has other channels, stays unchanged.
    """
    others: list[str] = []
    kept = [k for k, row in enumerate(rows) if row is not None]
    taken = [row for row in rows if row is not None]
    own, found = model.state_dict(), dict(tensors)
    for key in model.class_rows():
        theirs = found.get(names.get(key, ""))
        if theirs is None or theirs.dim() != own[key].dim() or theirs.shape[1:] != own[key].shape[1:]:
            continue
        if len(theirs) != classes:  # an auxiliary head may have been trained for others
            others.append(names[key])
            continue
        value = own[key].clone()
        value[kept] = theirs[taken].to(value.dtype)
        found[names[key]] = value
    return found, others


def take_rows(network: Segmenter, rows: Sequence[int | None], fresh: Segmenter) -> None:
    """Fills `fresh`, which has len(rows) classes, from `network`: class k from class rows[k]; None: unchanged."""
    kept = [k for k, row in enumerate(rows) if row is not None]
    taken = [row for row in rows if row is not None]
    state, by_class = fresh.state_dict(), fresh.class_rows()
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if key in by_class:
                state[key][kept] = value[taken]
            else:
                state[key].copy_(value)


def follow_names(
    network: Segmenter, metadata: Mapping[str, Any], requested: Mapping[str, Any], fresh: Segmenter
) -> tuple[dict[str, Any], bool]:
    """Fills `fresh`, a network for `requested` classes, from `network`, by class name. Prints which rows are kept.

    Returns the metadata of `fresh`, and whether any row was kept.
    """
    rows = rows_by_name(metadata["classes"], requested["classes"])
    take_rows(network, rows, fresh)
    for line in describe_rows(metadata["classes"], requested["classes"], rows):
        echo(line)
    known = any(row is not None for row in rows)
    kept = {key: value for key, value in metadata.items() if key not in RUN_METADATA}
    before = untrained_rows(metadata)
    pairs = zip(requested["classes"], rows, strict=True)
    kept |= untrained([name for name, row in pairs if row is None or row in before])
    return {**kept, **requested}, known


def untrained(names: Sequence[str]) -> dict[str, Any]:
    """Metadata of a checkpoint with new weights for these classes, which the commands that run it report."""
    return {"untrained": list(names)} if names else {}


def warn_of_untrained(source: Path, metadata: Mapping[str, Any]) -> None:
    """Prints on stderr which classes of a checkpoint were never trained, if there are any."""
    rows = untrained_rows(metadata)
    if rows:
        names = first_names([metadata["classes"][row] for row in sorted(rows)], 6)
        what = f"{len(rows)} of {len(metadata['classes'])} classes have random weights, never trained"
        echo(f"warning: {source}: {what}: {names}\ntrain it first: model.pretrained={source} in a recipe", err=True)


def untrained_rows(metadata: Mapping[str, Any]) -> set[int]:
    """The classes of a checkpoint, by their numbers, whose weights were never trained."""
    names = set(metadata.get("untrained", ()))
    return {index for index, name in enumerate(metadata["classes"]) if name in names}


def describe_rows(source: Sequence[str], wanted: Sequence[str], rows: Sequence[int | None]) -> list[str]:
    """Lines that say which rows of `wanted` come from `source`, with the name in `source`, and which are new."""
    pairs = list(zip(wanted, rows, strict=True))
    kept = [name if source[row] == name else f"{name} ({source[row]})" for name, row in pairs if row is not None]
    new = [name for name, row in pairs if row is None]
    return [
        f"  rows kept    {len(kept)}: {', '.join(kept) or 'no class has the same name'}",
        f"  rows new     {len(new)}: {', '.join(new) or 'none'}",
    ]
