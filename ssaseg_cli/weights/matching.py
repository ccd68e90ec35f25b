"""How the tensors of a file fit a network: what matched, what did not, and which network they look like."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ssaseg.cli.weights.foreign import Weights
from ssaseg.models import Segmenter, build_model, list_models
from ssaseg.models.build import FAMILIES, family_of
from ssaseg.models.official import COUNTERS, NOT_USED, left_out, official_entries, official_keys
from ssaseg.models.rows import Entry, Row

LISTED = 8  # names shown of each list


@dataclass(frozen=True)
class Match:
    """How a file's tensors fit a model; `str` of it is for readers.

    Lists hold the file's own names, counters left aside.
    """

    heading: str  # what was read, as what
    matched: Sequence[str]
    missing: Sequence[str]
    unexpected: Sequence[str]
    misshapen: Sequence[str]  # with both shapes, or types where one is of integers
    not_used: Sequence[str]  # known to hold nothing that a model computes with
    fresh: Sequence[str]  # wanted, but known to be in no ImageNet file, or of other classes: as initialised
    backbone: tuple[int, int]  # matched; wanted or unexpected: a deeper network of the same widths is another one
    rows: Sequence[str] = ()  # lines about the classifier's rows, which classes they are kept for

    @property
    def backbone_share(self) -> float:
        """Matched share of the backbone's tensors, the model's and the file's, 0 to 1."""
        return self.backbone[0] / max(self.backbone[1], 1)

    @property
    def complete(self) -> bool:
        """Every tensor matched, and none left over that is not known to be of no use."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        wanted = len(self.matched) + len(self.missing) + len(self.misshapen)
        lists = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrong shape": self.misshapen,
            "not used": self.not_used,
            **({"fresh": self.fresh} if self.fresh else {}),
        }
        lines = [self.heading, f"  matched      {of_all(len(self.matched), wanted)}; backbone {of_all(*self.backbone)}"]
        lines += [f"  {title:12} {len(names)}{': ' if names else ''}{_listed(names)}" for title, names in lists.items()]
        return "\n".join([*lines, *self.rows])


def of_all(count: int, wanted: int) -> str:
    """A count for readers."""
    return f"{count} of {wanted} ({100 * count / max(wanted, 1):.1f} %)"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def match(
    model: Segmenter, weights: Weights, heading: str = "", other: Collection[str] = ()
) -> tuple[Match, dict[str, Tensor]]:
    """Fits a file to a model: (match, tensors by our key, where present and of the right shape).

    Of a file that holds a backbone alone only that is asked for. `other`: the file's names of tensors that are of other
    classes than the model's, and so not taken.
    """
    own, found = model.state_dict(), weights.tensors
    wanted = file_entries(model, weights)
    fresh = _fresh_names(model, weights, wanted, other)
    tensors: dict[str, Tensor] = {}
    matched: list[str] = []
    missing: list[str] = []
    misshapen: list[str] = []
    for entry in wanted:
        # What may be there or not is taken where it is there, but counts nowhere: shares are of tensors that matter.
        counts = not entry.theirs[0].endswith(COUNTERS)
        absent = [name for name in entry.theirs if name not in found]
        if absent or set(entry.theirs) & fresh:
            missing += [name for name in absent if counts and name not in fresh]
            continue
        expected = entry.give(own)  # our tensors as the file would hold them
        wrong = [name for name in entry.theirs if not _fits(found[name], expected[name])]
        if counts:
            matched += [] if wrong else entry.theirs
            misshapen += [_difference(name, found[name], expected[name]) for name in wrong]
        if not wrong:
            tensors |= entry.take(found)
    known = {name for entry in wanted for name in entry.theirs}
    left = [key for key in found if key not in known and not key.endswith(COUNTERS)]
    not_used = [key for key in left if _is_known(key, left_out(model))]
    unexpected = [key for key in left if key not in not_used]
    backbone = [len(backbone_keys(names)) for names in (matched, missing, misshapen, unexpected)]
    result = Match(
        heading=heading,
        matched=matched,
        missing=missing,
        unexpected=unexpected,
        misshapen=misshapen,
        not_used=not_used,
        fresh=[name for entry in wanted for name in entry.theirs if name in fresh],
        backbone=(backbone[0], sum(backbone)),
    )
    return result, tensors


def _fresh_names(model: Segmenter, weights: Weights, wanted: Sequence[Entry], other: Collection[str]) -> set[str]:
    """Names of tensors that are not taken from the file: of other classes, or known to be in no ImageNet file."""
    if not weights.is_backbone:
        return set(other)
    official, ends = official_keys(model), family_of(model.name).not_pretrained
    return {
        entry.theirs[0]
        for entry in wanted
        if ends and official[entry.ours[0]].endswith(ends) and entry.theirs[0] not in weights.tensors
    }


def file_entries(model: Segmenter, weights: Weights, whole: bool = False) -> list[Entry]:
    """The model's tensors and what the file calls them; of a backbone alone only those, unless `whole`."""
    backbone = weights.is_backbone and not whole
    if weights.header is None:
        return official_entries(model, imagenet=backbone)
    keys = [key for key in model.state_dict() if not backbone or key.startswith("backbone.")]
    return [Entry((key,), (key,), Row(key, key)) for key in keys]


def file_names(model: Segmenter, weights: Weights) -> dict[str, str]:
    """Our key of each of the model's tensors → what the file calls it; the first of several names."""
    return {key: entry.theirs[0] for entry in file_entries(model, weights, whole=True) for key in entry.ours}


def _fits(found: Tensor, own: Tensor) -> bool:
    """Of the same shape, and both of them fractions or both integers."""
    return found.shape == own.shape and found.is_floating_point() == own.is_floating_point()


def _difference(name: str, found: Tensor, expected: Tensor) -> str:
    return f"{name} {_outline_of(found, expected)}, expected {_outline_of(expected, found)}"


def _outline_of(tensor: Tensor, other: Tensor) -> str:
    """What tells it from another: its shape, else its type."""
    return str(tuple(tensor.shape) if tensor.shape != other.shape else tensor.dtype)


def _is_known(key: str, patterns: Mapping[str, str]) -> bool:
    return key.startswith(tuple(NOT_USED)) or any(fnmatchcase(key, pattern) for pattern in patterns)


def backbone_keys(keys: Iterable[str]) -> list[str]:
    """Those of a backbone, in our names or the official ones."""
    return [key for key in keys if key.startswith("backbone.")]


def describe_source(path: Path, weights: Weights, reading: str) -> str:
    """The first line about a file: what is in it, and what it is read as."""
    return f"{path}: {len(weights.tensors)} tensors ({weights.nesting}), read as {reading}"


def best_guess(name: str, fitting: float) -> str:
    """`likely_model`'s answer in words."""
    percent = math.floor(100 * fitting)  # 100 only where all of it fits
    return f"its tensors look like {name} ({percent} % of that backbone)" if name else "no network here fits"


def likely_model(weights: Weights) -> tuple[str, float]:
    """The network whose backbone official tensors fit best, and the share that fits, 0 to 1; "" and 0 for none."""
    marked = [each for each in FAMILIES.values() if any(key.startswith(each.mark) for key in weights.tensors)]
    candidates = [name for name in list_models() if family_of(name) in marked]
    shares = {name: match(_outline(name), weights)[0].backbone_share for name in candidates}
    best = max(shares, key=lambda name: shares[name], default="")
    return best, shares.get(best, 0.0)


@cache
def _outline(name: str) -> Segmenter:
    """A network of keys and shapes only, without memory for its weights."""
    with torch.random.fork_rng(devices=[]):
        # Not built on the meta device, whose first random draw loads PyTorch's compiler: a second.
        return build_model(name, 2, "linear").to("meta")
