"""`ssaseg train --print-config`: all keys of a recipe, and what its data set fixes in place of keys."""

import textwrap
from collections.abc import Iterator

from ssaseg.datasets import stated_classes
from ssaseg.datasets.published import LAYOUTS
from ssaseg.recipes import Recipe, dump_recipe

WIDTH = 110  # of a comment


def config_text(recipe: Recipe) -> str:
    """The recipe as YAML text. Loading it gives an equal recipe.

    Keys that the data set does not use are left out: their defaults are not in force. What is in force in their place
    is written as comments: a recipe cannot change it.
    """
    return dump_recipe(recipe, after_data="".join(f"  # {line}\n" for line in _in_force(recipe)))


def _in_force(recipe: Recipe) -> Iterator[str]:
    """The lines of the comment. Empty where the keys say everything."""
    data = recipe.data
    classes, _ = stated_classes(data.dataset, data.model_dump())
    layout = LAYOUTS.get(data.dataset)
    if layout is None and data.dataset != "synthetic":
        if not classes:
            yield "classes: those of the annotation files, in the order of their ids"
        return
    yield f"fixed by the data set {data.dataset}:"
    if layout is not None:
        for split in ("train", "val"):
            folders = f"images: {layout.images[split]}, masks: {layout.masks[split]}"
            yield f"  {split}: {{{folders}{f', names: {layout.lists[split]}' if layout.lists else ''}}}"
        yield f"  image_suffixes: [{layout.image_suffix}]"
        yield f"  mask_suffix: {layout.mask_suffix}"
        yield f"  reduce_zero_label: {str(layout.reduce_zero_label).lower()}"
        yield "  ignore_index: 255"
    yield f"  {len(classes)} classes:"
    names = ", ".join(classes)
    yield from textwrap.wrap(f"[{names}]", WIDTH, initial_indent="    ", subsequent_indent="    ")
