"""Weights that training starts from: `model.pretrained`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from ssaseg.cli.errors import CommandError
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
)
from ssaseg.models import Segmenter
from ssaseg.models.official import CLASSES_KEY

PRETRAINED_SHARE = 0.95  # of the backbone's tensors, that a pre-trained file must bring


def load_pretrained(model: Segmenter, path: str | Path, classes: Sequence[str] | None = None) -> Match:
    """Loads what fits of a checkpoint into `model` and returns the match, which the caller prints.

    Takes an ImageNet checkpoint (backbone alone), an official segmentation checkpoint, or a file of ours, of a whole
    model or of a backbone. Beyond the backbone every tensor of the same name and shape is taken. The classifier's rows
    follow the names of the classes, `classes` being the model's: those without a namesake in the file start fresh.
    Where either side has no names, rows are taken in their order if there are as many, else none. Raises CommandError
    where less than 95 % of the backbone's tensors match, FileNotFoundError where there is no file; `model` is then as
    before.
    """
    try:
        weights = read_weights(Path(path))
    except (CommandError, FileNotFoundError) as error:  # both begin with the path
        raise type(error)(f"model.pretrained={error}") from None
    header = weights.header
    reading = f"{model.name} to start from"
    if weights.is_backbone:
        reading += ", backbone alone"
    rows = count_rows(weights.tensors.get(CLASSES_KEY if header is None else "classifier.conv_seg.weight"))
    if rows not in (0, model.num_classes):
        reading += f"; {rows} classes there, {model.num_classes} here"
    lines: list[str] = []
    other: list[str] = []
    if rows and not weights.is_backbone:
        weights, lines, other = _rows_for(model, weights, rows, classes)
    found, tensors = match(model, weights, describe_source(Path(path), weights, reading), other)
    found = replace(found, rows=lines)
    if found.backbone_share < PRETRAINED_SHARE:
        click.echo(found, err=True)
        looks = best_guess(*likely_model(weights)) if header is None else f"its header says {header.get('model')}"
        raise CommandError(
            f"model.pretrained={path}: only {of_all(*found.backbone)} of the backbone match {model.name}\n"
            f"expected at least {100 * PRETRAINED_SHARE:.0f} %; {looks}\nname another file, or another model.name"
        )
    model.load_state_dict(tensors, strict=False)
    return found


def _rows_for(
    model: Segmenter, weights: Weights, rows: int, classes: Sequence[str] | None
) -> tuple[Weights, list[str], list[str]]:
    """A file of `rows` classes with class rows for the model's `classes`.

    Returns it, lines that say which rows are kept, and the file's names of the tensors of which none is.
    """
    names = file_names(model, weights)
    of_classes = [names[key] for key in model.class_rows()]
    source = names_in(weights.header, weights.meta or {}, rows)
    if source is not None and classes is not None:
        follow = rows_by_name(source, classes)
        if not any(row is not None for row in follow):
            there = ", ".join(source[:LISTED]) + (", ..." if rows > LISTED else "")
            return weights, [f"  rows fresh   all {len(follow)}: no class has a namesake there ({there})"], of_classes
        lines = describe_rows(source, classes, follow)
        if follow == list(range(rows)):
            lines = [f"  rows kept    all {rows}: the same classes in the same order"]
        return replace(weights, tensors=keep_rows(model, weights.tensors, names, follow)), lines, []
    side = "the file's classes have" if source is None else "the model's classes have"
    if rows == model.num_classes:
        return weights, [f"  rows kept    all {rows}, in their order: {side} no names to go by"], []
    return weights, [f"  rows fresh   all {model.num_classes}: {side} no names to go by"], of_classes
