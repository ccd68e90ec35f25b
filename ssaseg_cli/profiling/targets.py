"""What is measured: networks by name, with random weights, or a file."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ssaseg.cli.engine.opening import Opened, open_file
from ssaseg.cli.errors import CommandError
from ssaseg.models import Segmenter, build_model, list_mask_models, list_models
from ssaseg.models.checkpoint import numbered
from ssaseg.models.header import DEFAULTS
from ssaseg.models.masks.base import MASKS

CLASSES = 150  # of a network that is given by name: the classes of ADE20K, as in published figures

SHOWN = ("linear", "ssa")  # classifiers of a network that is given by name


def is_name(target: str) -> bool:
    """Whether it is the name of a network or of a mask method; a file of this name must be given as ./NAME."""
    return target in (*list_models(), *list_mask_models())


def open_targets(
    target: str, classifiers: Sequence[str], classes: int | str | None, protocol: str | None = None
) -> list[Opened]:
    """The networks to measure, on the CPU, in evaluation mode and without gradients: of a name, one per classifier.

    classes: their number; or, for a file that does not say them, their names, as `open_file` takes them, like
    `protocol`. Weights of a name are random, and the same in each call. Raises CommandError if `target` is neither a
    name nor a file, or if classifier or classes are not the file's; and what `open_file` raises.
    """
    if is_name(target):
        if isinstance(classes, str) or protocol is not None:
            option = "--protocol" if protocol is not None else f"--classes {classes}"
            fix = "of a name, give --classes a number"
            raise CommandError(f"{target}: {option} is for a file that does not say it\n{fix}")
        known = SHOWN if target in list_models() else (MASKS,)
        return [_by_name(target, classes or CLASSES, name) for name in classifiers or known]
    if not Path(target).exists():
        names = [*list_models(), *list_mask_models()]
        near = difflib.get_close_matches(target, names, n=1)
        fix = f"did you mean {near[0]}?" if near else f"networks: {', '.join(names)}"
        raise CommandError(f"{target}: neither the name of a network nor an existing checkpoint\n{fix}")
    opened = open_file(Path(target), classes if isinstance(classes, str) else None, protocol)
    own, count = opened.metadata.get("classifier"), len(opened.metadata["classes"])
    by_name = f", or profile the network by name: {opened.model.name}" if opened.model else ""
    if set(classifiers) - {own}:
        got = "" if own is None else f"its classifier is {own}, not "
        raise CommandError(
            f"{target}: {got or '--classifier '}{', '.join(classifiers)}\nleave out --classifier{by_name}"
        )
    if isinstance(classes, int) and classes != count:
        raise CommandError(f"{target}: it has {count} classes, not {classes}\nleave out --classes{by_name}")
    if opened.model is not None:
        opened.model.requires_grad_(False)
    return [opened]


def _by_name(name: str, classes: int, classifier: str) -> Opened:
    torch.manual_seed(0)
    model = mask_model(name, classifier, classes) if name in list_mask_models() else _network(name, classes, classifier)
    metadata: dict[str, Any] = {**DEFAULTS, "model": name, "classifier": classifier, "classes": numbered(classes)}
    return Opened(Path(name), "torch", model, metadata)


def _network(name: str, classes: int, classifier: str) -> Segmenter:
    return build_model(name, classes, classifier, memory=False).eval().requires_grad_(False)


def mask_model(name: str, classifier: str = MASKS, classes: int = CLASSES) -> Segmenter:
    """A mask method to measure. Raises CommandError for a classifier, and if its package is not installed."""
    try:
        return build_model(name, classes, classifier).eval().requires_grad_(False)
    except ValueError as error:
        raise CommandError(str(error)) from None
