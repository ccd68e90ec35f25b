"""Weights that training starts from: `model.pretrained`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.weights.classes import describe_rows, keep_rows, names_in, rows_by_name
from ssaseg.cli.weights.foreign import Weights, count_rows, read_weights
from ssaseg.cli.weights.matching import (
    LISTED,
    Match,
    best_guess,
    describe_source,
    file_names,
    likely_model,
    match,
    of_all,
    stem_channels,
)
from ssaseg.models import CheckpointError, Segmenter
from ssaseg.models.segmenter import is_below
from ssaseg.models.stem import RGB

PRETRAINED_SHARE = 0.95  # of the backbone's tensors, that a pre-trained file must have


def load_pretrained(model: Segmenter, path: str | Path, classes: Sequence[str] | None = None) -> Match:
    """Loads what fits of a checkpoint into `model` and returns the match, which the caller prints.

    Accepts an ImageNet checkpoint (only a backbone), an official segmentation checkpoint, or a file of ours, of a whole
    model or of a backbone. Apart from the backbone, every tensor of the same name and shape is taken. The classifier's
    rows are taken by class name; `classes` are the model's. Rows of classes that are not in the file keep their initial
    values. If the file or the model has no class names, rows are taken in their order if both have the same number,
    otherwise none. Weights for RGB fit a model of other channels, see `inflate`. Raises CommandError if less than 95 %
    of the backbone's tensors match or the file is for a third number of channels, and FileNotFoundError if there is no
    file; `model` is then unchanged.
    """
    try:
        weights = read_weights(Path(path))
    except (CommandError, CheckpointError, FileNotFoundError) as error:  # both messages begin with the path
        raise type(error)(f"model.pretrained={error}") from None
    header = weights.header
    reading = f"{model.name} to start from"
    if weights.is_backbone:
        reading += ", only the backbone"
    rows = count_rows(weights.tensors.get(weights.classes_key))
    if rows not in (0, model.num_classes):
        reading += f"; the file has {rows} classes, the model {model.num_classes}"
    lines: list[str] = []
    other: list[str] = []
    if rows and not weights.is_backbone:
        weights, lines, other = _rows_for(model, weights, rows, classes)
    if (channels := stem_channels(model, weights)) not in (None, RGB, model.channels):
        raise CommandError(
            f"model.pretrained={path}: a network for images of {channels} channels; data.channels is {model.channels}\n"
            f"expected weights for {'' if model.channels == RGB else f'{RGB} or '}{model.channels} channels\n"
            f"give another file, or set data.channels: {channels} if the images have as many"
        )
    found, tensors = match(model, weights, describe_source(Path(path), weights, reading), other)
    found = replace(found, rows=[*lines, *(weights.stated.lines if weights.stated else ())])
    if found.backbone_share < PRETRAINED_SHARE:
        echo(str(found), err=True)
        looks = best_guess(*likely_model(weights)) if header is None else f"its header says {header.get('model')}"
        raise CommandError(
            f"model.pretrained={path}: only {of_all(*found.backbone)} of the backbone's tensors match {model.name}\n"
            f"expected at least {100 * PRETRAINED_SHARE:.0f} %; {looks}\ngive another file, or another model.name"
        )
    model.load_state_dict(tensors, strict=False)
    memory = model.memory()
    own = [key for key in tensors if key.startswith("classifier.")]
    if memory and own and not any(is_below(key, memory) for key in own):
        model.classifier.restore_memory()
    return found


def _rows_for(
    model: Segmenter, weights: Weights, rows: int, classes: Sequence[str] | None
) -> tuple[Weights, list[str], list[str]]:
    """Changes the class rows of a file with `rows` classes to those of the model's `classes`.

    Returns the changed file, lines that say which rows are kept, and the file's names of the tensors to leave out: all
    that have class rows, if no row is kept.
    """
    names = file_names(model, weights)
    of_classes = [names[key] for key in model.class_rows() if key in names]
    if names.get(f"classifier.{model.classifier.CLASS_ROWS[0]}") != weights.classes_key:
        return weights, [f"  rows new     all {model.num_classes}: the file has another kind of classifier"], of_classes
    source = names_in(weights.header, weights.meta or {}, rows)
    if source is not None and classes is not None:
        taken = rows_by_name(source, classes)
        if not any(row is not None for row in taken):
            listed = ", ".join(source[:LISTED]) + (", ..." if rows > LISTED else "")
            return (
                weights,
                [f"  rows new     all {len(taken)}: the file has no class of these names ({listed})"],
                of_classes,
            )
        lines = describe_rows(source, classes, taken)
        if taken == list(range(rows)):
            lines = [f"  rows kept    all {rows}: the same classes in the same order"]
        tensors, others = keep_rows(model, weights.tensors, names, taken, rows)
        return replace(weights, tensors=tensors), lines, others
    side = "the file's classes" if source is None else "the model's classes"
    if rows == model.num_classes:
        return weights, [f"  rows kept    all {rows}, in their order, because {side} have no names"], []
    return weights, [f"  rows new     all {model.num_classes}, because {side} have no names"], of_classes
