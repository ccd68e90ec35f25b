"""The classes in `ssaseg convert`: what they are called, and how a classifier's rows follow the names elsewhere."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from ssaseg.cli.console import CommandError
from ssaseg.datasets import stated_classes
from ssaseg.datasets.labels import label_space, list_label_spaces
from ssaseg.datasets.published import LAYOUTS
from ssaseg.models import Segmenter

# What a classifier holds a row per class of, plain or SSA.
CLASS_ROWS = ("classifier.conv_seg.weight", "classifier.conv_seg.bias", "classifier.spatial_prototypes")
SEPARATORS = re.compile("[;,]")  # between the synonyms of one class: "car;auto", "building, edifice"
OF_ITS_RUN = ("recipe", "step", "scores")  # metadata that is not true of other classes


# ---- names -------------------------------------------------------------------------------------------------------


def own_classes(source: Path, dataset: str | None, meta: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """Metadata of an official file's classes: by `--dataset`, the file itself, or the count of ADE20K.

    Empty where none of them names the classes, which are then numbered. Raises CommandError for another count.
    """
    stated, palette = _stated(meta)
    if dataset is None and isinstance(stated, list | tuple) and len(stated) == classes:
        same = [name for name in list_label_spaces() if label_space(name).classes == list(stated)]
        if not same:
            return {"classes": [str(c) for c in stated], "palette": _palette(palette, classes)}
        dataset = same[0]
    if dataset is None and isinstance(stated, list | tuple):
        click.echo(f"  classes      the file names {len(stated)}, its head has {classes}: names not taken")
    if dataset is None and classes == len(label_space("ade20k").classes):
        dataset = "ade20k"
    if dataset is None:
        click.echo(f"  classes      {classes} without names, so numbered; --dataset would name them")
        return {}
    metadata = dataset_metadata(dataset)
    if len(metadata["classes"]) != classes:
        raise CommandError(
            f"--dataset {dataset} has {len(metadata['classes'])} classes, {source} has {classes}\n"
            f"expected one with as many; known: {', '.join(list_label_spaces())}, or a recipe"
        )
    click.echo(f"  classes      of {dataset}")
    return metadata


def _stated(meta: Mapping[str, Any]) -> tuple[Any, Any]:
    """Classes and palette that a file states: mmsegmentation 1.x puts them one level lower than 0.x."""
    inner = meta.get("dataset_meta")
    if isinstance(inner, Mapping):
        return inner.get("classes"), inner.get("palette")
    return meta.get("CLASSES"), meta.get("PALETTE")


def _palette(palette: Any, classes: int) -> list[list[int]] | None:
    """A foreign file's palette as our metadata has it; None where it is not one RGB triple in 0..255 per class."""
    try:
        colours = [[int(value) for value in colour] for colour in palette]
    except (TypeError, ValueError):
        return None
    fits = len(colours) == classes and all(len(c) == 3 and 0 <= min(c) <= max(c) <= 255 for c in colours)
    return colours if fits else None


def dataset_metadata(name: str, option: str = "--dataset") -> dict[str, Any]:
    """Checkpoint metadata (classes, palette, protocol, ...) of a published data set, or of a recipe's data.

    Raises CommandError, naming the option, where there is neither.
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
            f"{option} {name}: the classes are in its annotation files\nstate data.classes in the recipe"
        )
    return {
        "classes": classes,
        "palette": palette,
        "mean": list(data.mean),
        "std": list(data.std),
        "protocol": recipe.test.model_dump(mode="json"),
    }


def wished_classes(value: str) -> dict[str, Any]:
    """Metadata of `--classes`: a published data set's, a recipe's, or of names with commas between.

    Raises CommandError where there is no such data set, or the names are no two to 255 different ones.
    """
    if "," not in value:
        return dataset_metadata(value, "--classes")
    names = [name.strip() for name in value.split(",")]
    distinct = {name.casefold() for name in names}
    if "" in distinct or len(distinct) < len(names) or len(names) > 255:
        raise CommandError(f"--classes {value}: a name is empty or there twice\nexpected 2 to 255 names: sky,road,car")
    return {"classes": names, "palette": None}


# ---- rows --------------------------------------------------------------------------------------------------------


def rows_by_name(source: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """For each wanted class the index of its namesake in `source`, or None.

    Upper and lower case are one. Where no whole name is the same, a synonym may be: the only class of `source` that
    shares one is taken, and none where several do.
    """

    def namesake(name: str) -> int | None:
        same = [k for k, other in enumerate(source) if other.strip().casefold() == name.strip().casefold()]
        same = same or [k for k, other in enumerate(source) if _synonyms(other) & _synonyms(name)]
        return same[0] if len(same) == 1 else None

    return [namesake(name) for name in wanted]


def _synonyms(name: str) -> set[str]:
    return {part.strip().casefold() for part in SEPARATORS.split(name)} - {""}


def take_rows(network: Segmenter, rows: Sequence[int | None], fresh: Segmenter) -> None:
    """Fills `fresh`, which has len(rows) classes, from `network`: class k from class rows[k], None leaving it fresh."""
    kept = [k for k, row in enumerate(rows) if row is not None]
    taken = [row for row in rows if row is not None]
    state = fresh.state_dict()
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if key in CLASS_ROWS:
                state[key][kept] = value[taken]
            else:
                state[key].copy_(value)


def follow_names(
    network: Segmenter, metadata: Mapping[str, Any], wished: Mapping[str, Any], fresh: Segmenter
) -> tuple[dict[str, Any], bool]:
    """Fills `fresh`, with the classes `wished`, from `network` by name, and says which; (its metadata, any kept?)."""
    rows = rows_by_name(metadata["classes"], wished["classes"])
    take_rows(network, rows, fresh)
    kept = [
        name if metadata["classes"][row] == name else f"{name} ({metadata['classes'][row]})"
        for name, row in zip(wished["classes"], rows, strict=True)
        if row is not None
    ]
    new = [name for name, row in zip(wished["classes"], rows, strict=True) if row is None]
    click.echo(f"  rows kept    {len(kept)}: {', '.join(kept) or 'no class has a namesake'}")
    click.echo(f"  rows fresh   {len(new)}: {', '.join(new) or 'none'}")
    return {**{key: value for key, value in metadata.items() if key not in OF_ITS_RUN}, **wished}, bool(kept)
