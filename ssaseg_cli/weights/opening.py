"""Networks from files of official weights: for `ssaseg convert`, and in memory for the commands that run a network.

`foreign` reads files, `matching` fits them to a network, `classes` finds the names of their classes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.weights.classes import own_classes, untrained
from ssaseg.cli.weights.foreign import Weights, count_rows
from ssaseg.cli.weights.matching import (
    best_guess,
    describe_source,
    explain_mismatch,
    likely_model,
    match,
    outline,
    stem_channels,
)
from ssaseg.cli.weights.pretrained import PRETRAINED_SHARE
from ssaseg.models import Segmenter, build_model, list_mask_models, list_models
from ssaseg.models.checkpoint import numbered
from ssaseg.models.header import DEFAULTS, MOST_CLASSES
from ssaseg.models.masks.base import MASKS


class Given(NamedTuple):
    """What a user says about official weights; None: as the file says, or looks."""

    model: str | None = None
    classifier: str | None = None
    dataset: str | None = None  # a published data set or a recipe, which names the classes
    allow_partial: bool = False
    metadata: Mapping[str, Any] = MappingProxyType({})  # for our header, before what the file says
    option: str = "--dataset"  # of the command, that names the classes


class Loaded(NamedTuple):
    """What a source holds: a whole network, or only the tensors of a backbone."""

    name: str
    network: Segmenter | None
    metadata: dict[str, Any]  # of a network; without `classes` if these have no names
    backbone: dict[str, Tensor]
    complete: bool = True  # everything matched


def open_official(source: Path, weights: Weights, given: Given, report: Callable[[str], object] = echo) -> Loaded:
    """A network with official weights, as they are read from `source`; of a backbone alone, its tensors.

    `report` gets the lines for the user; the first text says what matched. Raises CommandError if it is not clear which
    network it is, or if tensors do not match and `given.allow_partial` is not set.
    """
    name = model_name(source, weights, given.model)
    return (_open_backbone if weights.is_backbone else _open_whole)(source, weights, name, given, report)


def _open_whole(source: Path, weights: Weights, name: str, given: Given, report: Callable[[str], object]) -> Loaded:
    key = weights.classes_key
    classes = count_rows(weights.tensors.get(key))
    if classes == 0:
        raise CommandError(f"{source}: has no {key}\nexpected it, with one row for each class, to count the classes")
    if classes > MOST_CLASSES:
        raise CommandError(f"{source}: {key} has {classes} rows\nexpected one for each class, up to {MOST_CLASSES}")
    likely = weights.classifier
    if name in list_mask_models():
        classes, likely = max(classes - 1, 1), MASKS  # the last row is of "no object"
    # A mask method's package may not be installed, and its images have three channels.
    channels = (stem_channels(outline(name), weights) or 3) if likely != MASKS else 3
    network = fresh(name, classes, given.classifier or likely, channels=channels)
    heading = describe_source(source, weights, f"{name}, {network.classifier_name}, {classes} classes")
    found, tensors = match(network, weights, heading)
    report(str(found))
    if not (found.complete or (given.allow_partial and found.matched)):
        raise CommandError(explain_mismatch(source, weights, network, found))
    network.load_state_dict(tensors, strict=False)
    metadata = dict(given.metadata)
    if "classes" not in metadata:
        metadata = own_classes(source, given.dataset, weights.meta or {}, classes, report, given.option) | metadata
    elif len(metadata["classes"]) != classes:
        raise CommandError(
            f"{source}: {classes} classes, {given.option} names {len(metadata['classes'])}\n"
            f"expected one name for each class"
        )
    if len(metadata.get("mean", DEFAULTS["mean"])) != channels:
        raise CommandError(
            f"{source}: a network for images of {channels} channels, whose mean and std are not known\n"
            f"give {given.option} a recipe with data.channels: {channels}, data.mean and data.std"
        )
    if likely == MASKS and "protocol" in metadata:  # the official code pads images to multiples, as the network here
        metadata["protocol"] = {**metadata["protocol"], "multiple": None}
    if weights.stated is not None:
        stated = weights.stated.metadata.get("protocol")
        metadata = {**weights.stated.metadata, **metadata}
        for line in weights.stated.lines:
            report(line)
        if stated is not None and "protocol" not in given.metadata and metadata["protocol"] != stated:
            scale = metadata["protocol"]["scale"]
            said = "but these are the classes of a published data set, so as there"
            report(f"  images       {said}: fitted into {scale}")
    if not found.complete and any(key.startswith("classifier.") and key not in tensors for key in network.class_rows()):
        metadata = metadata | untrained(metadata.get("classes") or numbered(classes))
    return Loaded(name, network, metadata, {}, found.complete)


def _open_backbone(source: Path, weights: Weights, name: str, given: Given, report: Callable[[str], object]) -> Loaded:
    network = outline(name)
    found, tensors = match(network, weights, describe_source(source, weights, f"{name}, only the backbone"))
    report(str(found))
    if found.backbone_share < PRETRAINED_SHARE and not (given.allow_partial and found.matched):
        raise CommandError(explain_mismatch(source, weights, network, found))
    return Loaded(name, None, {}, tensors, found.complete)


def model_name(source: Path, weights: Weights, given: str | None) -> str:
    """The name of the network that official weights belong to.

    Raises CommandError if `given` is not a network, or if it is None and the file does not fit one network completely.
    """
    stated = None if weights.stated is None else weights.stated.model
    if stated is not None and (given is None or (given != stated and not weights.is_backbone)):
        if given is None:
            return stated
        raise CommandError(f"{source}: its config.json says {stated}, --model says {given}\nleave --model out")
    known = [*list_models(), *list_mask_models()]
    if given in known:
        return str(given)
    if given is not None:
        raise CommandError(f"--model {given}: no such network\nexpected one of: {', '.join(known)}")
    name, fitting = likely_model(weights)
    if fitting < 1:
        raise CommandError(
            f"{source}: not clear which network this is: {best_guess(name, fitting)}\n"
            f"give its name with --model, one of: {', '.join(known)}"
        )
    return name


def fresh(
    name: str, classes: int, classifier: str, options: Mapping[str, Any] | None = None, channels: int = 3
) -> Segmenter:
    """A network whose random weights are always the same. Does not change the caller's random generator.

    Raises CommandError for a mask method with a classifier, or one whose package is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return build_model(name, classes, classifier, options=options, memory=False, channels=channels)
        except ValueError as error:
            raise CommandError(str(error)) from None
