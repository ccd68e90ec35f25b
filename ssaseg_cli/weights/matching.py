"""Fits the tensors of a file to a network: what matched, what did not, and which network they look like."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.cli.weights.foreign import Weights
from ssaseg.files.text import KEPT, printable
from ssaseg.models import Segmenter, list_mask_models, list_models
from ssaseg.models.build import build_outline, family_of
from ssaseg.models.masks.base import MASKS
from ssaseg.models.official import (
    COUNTERS,
    NOT_USED,
    families_like,
    layout_for,
    left_out,
    official_entries,
    official_keys,
)
from ssaseg.models.rows import Entry, Row
from ssaseg.models.stem import RGB, inflate

LISTED = 8  # how many names of each list are shown
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # in a name


@dataclass(frozen=True)
class Match:
    """How a file's tensors fit a model; `str(match)` is the text for the user.

    Lists hold the file's own names, without counters.
    """

    heading: str  # what was read, and as which network
    matched: Sequence[str]
    missing: Sequence[str]
    unexpected: Sequence[str]
    misshapen: Sequence[str]  # with both shapes; with both types if only one is of integers
    not_used: Sequence[str]  # known tensors that a model does not compute with
    fresh: Sequence[str]  # these keep their initial values: in no ImageNet file, or of other classes
    backbone: tuple[int, int]  # matched; wanted or unexpected (so a deeper network of the same widths does not match)
    notes: Sequence[str] = ()  # what was changed, or is special
    rows: Sequence[str] = ()  # lines that say which classes the classifier's rows are kept for

    @property
    def backbone_share(self) -> float:
        """The share of the backbone's tensors, the model's and the file's together, that matched: 0 to 1."""
        return self.backbone[0] / max(self.backbone[1], 1)

    @property
    def strangers(self) -> int:
        """How many names only one side has."""
        return len(self.missing) + len(self.unexpected)

    @property
    def complete(self) -> bool:
        """Whether every tensor matched, and every other tensor in the file is known not to be used."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        wanted = len(self.matched) + len(self.missing) + len(self.misshapen)
        lists = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrong shape": self.misshapen,
            "not used": self.not_used,
            **({"new weights": self.fresh} if self.fresh else {}),
        }
        lines = [self.heading, f"  matched      {of_all(len(self.matched), wanted)}; backbone {of_all(*self.backbone)}"]
        for title, names in lists.items():
            shown = self._grouped(names) if names is self.not_used or names is self.fresh else names
            lines.append(f"  {title:12} {len(names)}{': ' if names else ''}{_listed(shown)}")
        lines += [f"  note         {note}" for note in self.notes]
        return printable("\n".join([*lines, *self.rows]), KEPT)

    def _grouped(self, names: Sequence[str]) -> Sequence[str]:
        """Long lists in short: one name, with `*`, for a part of which nothing matched, and for equal names."""
        if len(names) <= LISTED:
            return names
        used = {_part(name) for name in self.matched}
        groups = Counter(NUMBER.sub("*", name) if _part(name) in used else f"{_part(name)}.*" for name in names)
        return [f"{name} ({count})" for name, count in groups.items()]


def _part(name: str) -> str:
    """The part of a network that a tensor belongs to: the first two parts of its name."""
    return ".".join(name.split(".")[:2])


def of_all(count: int, wanted: int) -> str:
    """A count as text: `3 of 4 (75.0 %)`."""
    return f"{count} of {wanted} ({100 * count / max(wanted, 1):.1f} %)"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def match(
    model: Segmenter, weights: Weights, heading: str = "", other: Collection[str] = ()
) -> tuple[Match, dict[str, Tensor]]:
    """Fits a file to a model: (match, tensors by our key that are present and have the right shape).

    A file that holds only a backbone is fitted to the model's backbone only. `other`: the file's names of tensors that
    belong to other classes than the model's; they are not taken.
    """
    own = model.state_dict()
    wanted = file_entries(model, weights)
    found, notes = _resized(own, weights, wanted, model)
    found, inflated = _inflated(own, found, wanted, model)
    notes += inflated
    fresh = _fresh_names(model, weights, wanted, other)
    tensors: dict[str, Tensor] = {}
    matched: list[str] = []
    missing: list[str] = []
    misshapen: list[str] = []
    for entry in wanted:
        # Counters may be missing. They are taken if present, but are in no list and no share.
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
    patterns = left_out(model, weights.layout, weights.is_backbone)
    not_used = [key for key in left if _is_known(key, patterns)]
    unexpected = [key for key in left if key not in not_used]
    named = {key for entry in wanted for key in entry.ours}
    unnamed = [key for key in backbone_keys(own) if key not in named and not key.endswith(COUNTERS)]
    backbone = [len(backbone_keys(names)) for names in (matched, missing, misshapen, unexpected)]
    result = Match(
        heading=heading,
        matched=matched,
        missing=missing,
        unexpected=unexpected,
        misshapen=misshapen,
        not_used=not_used,
        fresh=[key for entry in wanted for key in entry.theirs if key in fresh and not key.endswith(COUNTERS)]
        + unnamed,
        backbone=(backbone[0], sum(backbone)),
        notes=notes,
    )
    return result, tensors


def _resized(
    own: Mapping[str, Tensor], weights: Weights, wanted: Sequence[Entry], model: Segmenter
) -> tuple[Mapping[str, Tensor], list[str]]:
    """The file's tensors, those of another shape resized where that is known to work; and notes for the user."""
    layout = layout_for(model, weights.layout)
    if layout is None:
        return weights.tensors, []
    found, notes = dict(weights.tensors), [layout.note] if layout.note else []
    for entry in wanted:
        for name in set(entry.theirs) & layout.resized.keys() & found.keys():
            shape, before = entry.give(own)[name].shape, found[name]
            found[name] = layout.resized[name](before, shape)
            if found[name].shape != before.shape:
                notes.append(f"{name} resized from {tuple(before.shape)} to {tuple(shape)}")
    return found, notes


def _inflated(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], wanted: Sequence[Entry], model: Segmenter
) -> tuple[Mapping[str, Tensor], list[str]]:
    """The file's tensors, stems for RGB changed to the model's channels (see `inflate`); and a note for the user."""
    if model.channels == RGB:
        return found, []
    stems, changed = {f"{name}.weight" for name in model.stems}, dict(found)
    for entry in wanted:
        for name in entry.theirs if stems & set(entry.ours) else ():
            shape, before = entry.give(own)[name].shape, found.get(name)
            if before is not None and before.dim() == 4 and before.shape == (shape[0], RGB, *shape[2:]):
                changed[name] = inflate(before, model.channels)
    inflated = [name for name in changed if changed[name] is not found[name]]
    how = "of each new channel: the mean of red, green and blue"
    if model.channels < RGB:
        how = f"of each channel: the sum of red, green and blue{f' / {model.channels}' if model.channels > 1 else ''}"
    return changed, [f"{', '.join(inflated)}: from 3 to {model.channels} channels; {how}"] if inflated else []


def stem_channels(model: Segmenter, weights: Weights) -> int | None:
    """How many channels the images of a file's network have; None if the file has no such tensor."""
    names = file_names(model, weights)
    found = (weights.tensors.get(names.get(f"{stem}.weight", "")) for stem in model.stems)
    return next((each.shape[1] for each in found if each is not None and each.dim() == 4), None)


def _fresh_names(model: Segmenter, weights: Weights, wanted: Sequence[Entry], other: Collection[str]) -> set[str]:
    """Names of tensors that are not taken from the file: they belong to other classes, are in no ImageNet file, or are
    those of auxiliary heads that a folder says it has not.
    """
    if not weights.is_backbone:
        headless = weights.stated is not None and not weights.stated.auxiliary
        heads = (entry for entry in wanted if headless and entry.ours[0].startswith("auxiliary."))
        return {*other, *(name for entry in heads for name in entry.theirs)}
    official, patterns = official_keys(model), family_of(model.name).not_pretrained
    return {
        entry.theirs[0]
        for entry in wanted
        if any(fnmatchcase(official[entry.ours[0]], each) for each in patterns)
        and entry.theirs[0] not in weights.tensors
    }


def file_entries(model: Segmenter, weights: Weights, whole: bool = False) -> list[Entry]:
    """The model's tensors with their names in the file; if the file is a backbone, only those, unless `whole`."""
    backbone = weights.is_backbone and not whole
    if weights.header is None:
        return official_entries(model, backbone, weights.layout)
    keys = [key for key in model.state_dict() if not backbone or key.startswith("backbone.")]
    return [Entry((key,), (key,), Row(key, key)) for key in keys]


def file_names(model: Segmenter, weights: Weights) -> dict[str, str]:
    """Our key of each tensor of the model → its name in the file; the first name if there are several."""
    return {key: entry.theirs[0] for entry in file_entries(model, weights, whole=True) for key in entry.ours}


def _fits(found: Tensor, own: Tensor) -> bool:
    """Whether the shapes are the same, and both tensors are of floating-point numbers or both of integers."""
    return found.shape == own.shape and found.is_floating_point() == own.is_floating_point()


def _difference(name: str, found: Tensor, expected: Tensor) -> str:
    return f"{name} {_outline_of(found, expected)}, expected {_outline_of(expected, found)}"


def _outline_of(tensor: Tensor, other: Tensor) -> str:
    """The shape of a tensor if `other` has another shape, else its type."""
    return str(tuple(tensor.shape) if tensor.shape != other.shape else tensor.dtype)


def _is_known(key: str, patterns: Mapping[str, str]) -> bool:
    return key.startswith(tuple(NOT_USED)) or any(fnmatchcase(key, pattern) for pattern in patterns)


def backbone_keys(keys: Iterable[str]) -> list[str]:
    """The keys of a backbone, by our names or official names."""
    return [key for key in keys if key.startswith("backbone.")]


def describe_source(path: Path, weights: Weights, reading: str) -> str:
    """The first line about a file: what it holds, what of it was taken or changed, and as what it is read."""
    taken = ", ".join([f"{len(weights.tensors)} tensors", *weights.notes])
    return f"{path}: {taken} ({weights.nesting}), read as {reading}"


def best_guess(name: str, fitting: float) -> str:
    """The result of `likely_model` as text."""
    percent = math.floor(100 * fitting)  # 100 only if all of it fits
    return f"its tensors look like {name} ({percent} % of that backbone)" if name else "no network of ssaseg fits"


def likely_model(weights: Weights) -> tuple[str, float]:
    """The network whose backbone fits a file's tensors best, and the share that fits, 0 to 1; "" and 0 if none fits.

    Raises CommandError if the file is of a mask method whose packages are not installed.
    """
    marked = families_like(weights.tensors, weights.layout)
    candidates = [name for name in (*list_models(), *list_mask_models()) if family_of(name) in marked]
    found = {name: match(outline(name), weights)[0] for name in candidates}
    # Some networks have the same backbone, and differ in the decoder.
    best = max(found, key=lambda name: (found[name].backbone_share, -found[name].strangers), default="")
    return best, found[best].backbone_share if best else 0.0


@cache
def outline(name: str) -> Segmenter:
    """A network with two classes that has only keys and shapes, and no memory for weights.

    Raises CommandError for a mask method whose packages are not installed.
    """
    try:
        return build_outline(name, 2, MASKS if name in list_mask_models() else "linear")
    except ValueError as error:
        raise CommandError(str(error)) from None


def explain_mismatch(source: Path, weights: Weights, network: Segmenter, found: Match) -> str:
    """An error of three lines: why a file was refused, what it looks like, and the fix."""
    first = (
        f"{source}: does not fit {network.name} with {network.classifier_name}: {len(found.missing)} missing, "
        f"{len(found.unexpected)} unexpected, {len(found.misshapen)} of another shape"
    )
    given, other = network.classifier_name, weights.classifier
    if found.backbone_share == 1 and given != other and (weights.mark(given) or weights.mark(other)):
        mark = weights.mark(other)
        looks = f"it has {mark}" if mark else f"it has no {weights.mark(given)}"
        return f"{first}\nit looks like {other}: {looks}\nuse --classifier {other}"
    name, fitting = likely_model(weights)
    if weights.stated is not None:
        return f"{first}\nits config.json says {network.name}; {best_guess(name, fitting)}\ncorrect config.json"
    if name != network.name and fitting > found.backbone_share:
        return f"{first}\n{best_guess(name, fitting)}\nuse --model {name}"
    example = next(iter([*found.misshapen, *found.missing, *found.unexpected]))
    fix = "use --allow-partial to convert what fits" if found.matched else "give another file, or another --model"
    return f"{first}\nthe first of them: {printable(example)}\n{fix}"
