"""A family of networks: its variants, the function that builds them, and official names of their tensors."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ssaseg.models.classifiers.base import Classifier
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.decoder import AuxiliaryHead, Decoder
from ssaseg.models.rows import Row


class Parts(NamedTuple):
    """The parts of a network, except its classifier."""

    backbone: nn.Module
    decoder: Decoder
    auxiliary: Mapping[str, AuxiliaryHead] = {}


class Quadratic(NamedTuple):
    """Attention among all positions: its work grows with the square of the number of pixels of an input."""

    pixels: int  # from here on a pixel takes twice the time that it takes at 512×512; measured on a CPU
    # Bytes of the matrices that are in memory at the same time, for an input of so many pixels; None: PyTorch's fused
    # attention keeps none.
    memory: Callable[[int], float] | None = None


@dataclass(frozen=True)
class Layout:
    """Names that another program gives to a family's tensors. A file of a backbone has them after "backbone."."""

    name: str  # of the program, for messages
    mark: re.Pattern[str]  # fits the beginning of some key of every such file, and of no other file
    rows: Sequence[Row]  # of the backbone; of a whole network if the program writes such files
    without: re.Pattern[str] | None = None  # fits the beginning of no key of such files; for files that `mark` fits too
    # As `Family.heads`; empty: `rows` are of the backbone, and everything else has official names.
    heads: Mapping[str, str] = field(default_factory=dict)
    last: str = "conv_seg"  # as `Family.last`
    left_out: Mapping[str, str] = field(default_factory=dict)  # unused keys (`*`: any text) → why
    # Key in the file → a function that brings its value to the shape of the network's, as far as that is possible.
    resized: Mapping[str, Callable[[Tensor, Sequence[int]], Tensor]] = field(default_factory=dict)
    note: str = ""  # for the user of such a file

    def fits(self, keys: Collection[str]) -> bool:
        """Whether a file with these keys has these names."""
        other = self.without is not None and any(map(self.without.match, keys))
        return not other and any(map(self.mark.match, keys))


@dataclass(frozen=True)
class Family:
    """All that the rest of the program knows of a family. It is at the end of the network's file.

    Official names are those of SSA-Seg (commit e67fc2f) on mmsegmentation 0.30: keys start with `backbone`, or with
    `decode_head` for decoder and classifier. A classifier has its own rows.
    """

    variants: Mapping[str, Any]  # name → its settings
    build: Callable[[str, int, float | None], Parts]  # (name, number of classes, drop path; None: the network's own)
    rows: Sequence[Row]  # of backbone, decoder and auxiliary decoders
    mark: str  # beginning of official backbone keys of this family, and of no other family
    layouts: Sequence[Layout] = ()  # of files that other programs write
    # Our prefix of each classifier → the official one.
    heads: Mapping[str, str] = field(default_factory=lambda: {"classifier": "decode_head"})
    last: str = "conv_seg"  # official name of the last layer of each of these heads
    dropout: float = 0.1  # before the classifier, if the recipe does not say
    # Losses of auxiliary heads and a first stage: name → meaning.
    losses: Mapping[str, str] = field(default_factory=dict)
    compat: str = ""  # what `compat=True` of `build_model` does as the official code; empty: nothing differs
    left_out: Mapping[str, str] = field(default_factory=dict)  # unused official keys (`*`: any text) → why
    not_pretrained: tuple[str, ...] = ()  # official keys (`*`: any text) that ImageNet files do not have
    pretrained_only: Mapping[str, str] = field(default_factory=dict)  # unused keys of ImageNet files, as `left_out`
    renamed: Sequence[tuple[re.Pattern[str], str]] = ()  # other official names of a tensor → the name in `rows`
    # Why no network of the family can use a file, in lines: what it has, what is expected, the fix; "": it may be used.
    refuse: Callable[[Mapping[str, Tensor]], str] = lambda tensors: ""
    # From a network's official keys: key → other names under which the official code looks for the same tensor.
    aliases: Callable[[Collection[str]], dict[str, list[str]]] = lambda keys: {}
    # The plain classifier of the family, which `linear` means, and the function that builds the parts for it.
    plain: type[Classifier] = LinearClassifier
    build_plain: Callable[[str, int, float | None], Parts] | None = None
    quadratic: Quadratic | None = None  # of the backbone's attention; None: the work grows with the number of pixels
