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
from ssaseg.models.keys import COUNTERS, MARKS, NOT_PRETRAINED, NOT_USED, family, left_out, official_keys


def _heading(path: Path, weights: Weights, reading: str) -> str:
    return f"{path}: {len(weights.tensors)} tensors ({weights.nesting}), read as {reading}"


def _best_guess(name: str, fitting: float) -> str:
    """`likely_model`'s answer in words."""
    percent = math.floor(100 * fitting)  # 100 only where all of it fits
    return f"its tensors look like {name} ({percent} % of that backbone)" if name else "no network here fits"


LISTED = 8  # names shown of each list


@dataclass(frozen=True)
class Report:
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
        lines = [self.heading, f"  matched      {share(len(self.matched), wanted)}; backbone {share(*self.backbone)}"]
        lines += [f"  {title:12} {len(names)}{': ' if names else ''}{_listed(names)}" for title, names in lists.items()]
        return "\n".join([*lines, *self.rows])


def share(count: int, wanted: int) -> str:
    """A count for readers."""
    return f"{count} of {wanted} ({100 * count / max(wanted, 1):.1f} %)"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def match(
    model: Segmenter, weights: Weights, heading: str = "", other: Collection[str] = ()
) -> tuple[Report, dict[str, Tensor]]:
    """Fits a file to a model: (report, tensors by our key, where present and of the right shape).

    Of a file that holds a backbone alone only that is asked for. `other`: the file's names of tensors that are of other
    classes than the model's, and so not taken.
    """
    own, found, official = model.state_dict(), weights.tensors, official_keys(model)
    names = file_names(model, weights)
    fresh = [name for name in names.values() if name in other]
    if weights.is_backbone:
        names = {key: names[key] for key in backbone_keys(names)}
        fresh = [names[key] for key in names if official[key].endswith(NOT_PRETRAINED) and names[key] not in found]
    fits = {
        ours: theirs in found and theirs not in fresh and _fits(found[theirs], own[ours])
        for ours, theirs in names.items()
    }
    # What may be there or not is taken where it is there, but counts nowhere: shares are of tensors that matter.
    wanted = {o: theirs for o, theirs in names.items() if not official[o].endswith(COUNTERS) and theirs not in fresh}
    fitting = [ours for ours in wanted if fits[ours]]
    known = set(names.values())
    left = [key for key in found if key not in known and not key.endswith(COUNTERS)]
    not_used = [key for key in left if _is_known(key, left_out(model))]
    unexpected = [key for key in left if key not in not_used]
    report = Report(
        heading=heading,
        matched=[wanted[ours] for ours in fitting],
        missing=[theirs for theirs in wanted.values() if theirs not in found],
        unexpected=unexpected,
        misshapen=[
            f"{theirs} {_outline_of(found[theirs], own[ours])}, expected {_outline_of(own[ours], found[theirs])}"
            for ours, theirs in wanted.items()
            if theirs in found and not fits[ours]
        ],
        not_used=not_used,
        fresh=fresh,
        backbone=(len(backbone_keys(fitting)), len(backbone_keys([*wanted, *unexpected]))),
    )
    return report, {ours: found[theirs] for ours, theirs in names.items() if fits[ours]}


def file_names(model: Segmenter, weights: Weights) -> dict[str, str]:
    """Our key of each of the model's tensors → what the file would call it."""
    return official_keys(model) if weights.header is None else {key: key for key in model.state_dict()}


def _fits(found: Tensor, own: Tensor) -> bool:
    """Of the same shape, and both of them fractions or both integers."""
    return found.shape == own.shape and found.is_floating_point() == own.is_floating_point()


def _outline_of(tensor: Tensor, other: Tensor) -> str:
    """What tells it from another: its shape, else its type."""
    return str(tuple(tensor.shape) if tensor.shape != other.shape else tensor.dtype)


def _is_known(key: str, patterns: Mapping[str, str]) -> bool:
    return key.startswith(tuple(NOT_USED)) or any(fnmatchcase(key, pattern) for pattern in patterns)


def backbone_keys(keys: Iterable[str]) -> list[str]:
    """Those of a backbone, in our names or the official ones."""
    return [key for key in keys if key.startswith("backbone.")]


def likely_model(weights: Weights) -> tuple[str, float]:
    """The network whose backbone official tensors fit best, and the share that fits, 0 to 1; "" and 0 for none."""
    marked = {name for name, mark in MARKS.items() if any(key.startswith(mark) for key in weights.tensors)}
    candidates = [name for name in list_models() if family(name) in marked]
    shares = {name: match(_outline(name), weights)[0].backbone_share for name in candidates}
    best = max(shares, key=lambda name: shares[name], default="")
    return best, shares.get(best, 0.0)


@cache
def _outline(name: str) -> Segmenter:
    """A network of keys and shapes only, without memory for its weights."""
    with torch.random.fork_rng(devices=[]):
        # Not built on the meta device, whose first random draw loads PyTorch's compiler: a second.
        return build_model(name, 2, "linear").to("meta")
