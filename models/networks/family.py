"""A family of networks in one row: its variants, what builds them, and what their tensors are called elsewhere."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ssaseg.models.classifiers.base import Classifier
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.decoder import AuxiliaryHead, Decoder
from ssaseg.models.rows import Row


class Parts(NamedTuple):
    """What a network is assembled from, all but its classifier."""

    backbone: nn.Module
    decoder: Decoder
    auxiliary: Mapping[str, AuxiliaryHead] = {}


@dataclass(frozen=True)
class Family:
    """One row; it stands at the end of the network's file.

    Official names: those of SSA-Seg (commit e67fc2f) on mmsegmentation 0.30, which calls the network `backbone` and
    everything behind it `decode_head`. A classifier brings rows of its own.
    """

    variants: Mapping[str, Any]  # name → its numbers
    build: Callable[[str, int, float | None], Parts]  # (name, number of classes, drop path; None: the network's own)
    rows: Sequence[Row]  # of backbone, decoder and auxiliary decoders
    mark: str  # what an official backbone key of this family begins with, and of no other
    imagenet: Sequence[Row] | None = None  # of an ImageNet file, behind "backbone."; None: as `rows`
    # Our prefix of each classifier → the official one.
    heads: Mapping[str, str] = field(default_factory=lambda: {"classifier": "decode_head"})
    losses: Mapping[str, str] = field(default_factory=dict)  # of auxiliary heads and a first stage: name → meaning
    left_out: Mapping[str, str] = field(default_factory=dict)  # official keys (`*`: any text) that ours lacks → why
    not_pretrained: tuple[str, ...] = ()  # ends of official keys that no ImageNet file has
    renamed: Sequence[tuple[re.Pattern[str], str]] = ()  # other names that files have for a tensor → the one in `rows`
    # Of a network's official keys: key → further names under which the official code looks for the same tensor.
    aliases: Callable[[Collection[str]], dict[str, list[str]]] = lambda keys: {}
    # The family's own plain classifier, which `linear` stands for, and the parts that go with it.
    plain: type[Classifier] = LinearClassifier
    build_plain: Callable[[str, int, float | None], Parts] | None = None
