"""Look through a whole data set before time is spent on it: find everything that is wrong, not only the first error."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np

from ssaseg.datasets.base import IGNORED, DataError, Dataset, PairFacts, Problem, evenly, grouped
from ssaseg.datasets.checking.images import Images, passed_over
from ssaseg.datasets.checking.splits import shared_images
from ssaseg.datasets.checking.storage import Storage, about_255
from ssaseg.datasets.pairs import PairDataset, first_names
from ssaseg.datasets.workers import Work, read_ahead


def require_same_classes(train: Sequence[str], val: Sequence[str]) -> None:
    """Raises DataError where the classes of the splits differ: each annotation file has classes of its own."""
    if tuple(train) != tuple(val):
        differ = [name for name in (*train, *val) if (name in train) != (name in val)]
        found = f"only one of them has {', '.join(differ[:3])}" if differ else "their order differs"
        raise DataError(
            f"the training and the validation split have different classes: {len(train)} and {len(val)}; {found}\n"
            "set data.classes: the names of the classes to use, in the order of the train ids"
        )


# A data set of this size is read in about a second: reading only a sample of it would save nothing.
SMALL = 512

# Images of a sample that are decoded. Of the other images only the header and the end are read.
DECODED = 64

# Causes of problems that are printed in full.
MOST_MESSAGES = 10

DRAWN = "built-in scenes"  # the kind of the note on scenes in the layout of a published data set

# An ignored id with more than this share of all pixels is probably a class, not only unlabelled pixels.
LARGE_SHARE = 0.5


@dataclass
class Findings:
    """What was found in a split. All counts are of the pairs that were read."""

    read: int  # pairs
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # per raw id
    masks: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # masks that hold the raw id
    images: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # images that hold the train id
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width) [pixels] of images
    palettes: Counter[bytes] = field(default_factory=Counter)  # RGB triples of the masks that have a palette
    problems: list[Problem] = field(default_factory=list)
    named: dict[tuple[int, int], str] = field(default_factory=dict)  # one image of each size
    storage: Storage = field(default_factory=Storage)  # of ids in masks
    headers: Images = field(default_factory=Images)  # of images

    def joined(self, other: Findings) -> Findings:
        """These findings and those of another split together."""
        return Findings(
            self.read + other.read,
            self.pixels + other.pixels,
            self.masks + other.masks,
            self.images + other.images,
            self.sizes + other.sizes,
            self.palettes + other.palettes,
            self.problems + other.problems,
            other.named | self.named,
            self.storage.joined(other.storage),
            self.headers.joined(other.headers),
        )

    def count(self, severity: str) -> int:
        """Number of problems of a severity."""
        return sum(problem.severity == severity for problem in self.problems)

    def messages(self, severity: str) -> list[str]:
        """Texts of the problems of a severity, one for each of ten causes; then one that counts the others."""
        causes = grouped(problem for problem in self.problems if problem.severity == severity)
        texts = [text for _, text in causes[:MOST_MESSAGES]]
        if more := Counter(first.kind for first, _ in causes[MOST_MESSAGES:]):
            kinds = ", ".join(f"{count} x {kind}" for kind, count in more.most_common())
            texts.append(f"{more.total()} more {severity}s in the {self.read} pairs that were read: {kinds}")
        return texts


def check_dataset(dataset: Dataset, sample: int | None = None) -> Findings:
    """What is wrong with `sample` evenly spaced pairs, or with all of them (None, and data sets of up to 512 pairs).

    Quick: only some images are decoded. Scenes that a program draws are right by construction and are not read.
    """
    return look_through(dataset, sample, DECODED) if dataset.image_files else Findings(0)


def look_through(
    dataset: Dataset,
    sample: int | None = None,
    decoded: int | None = None,
    workers: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Findings:
    """Read `sample` evenly spaced pairs (None, and of data sets of up to 512 pairs: all) and find what is wrong.

    Errors: images without mask that the data set left out; images and masks that are damaged or differ in size; masks
    in colours; palettes in another order; ids out of range. If there is none of these: that no pixel is labelled.
    Warnings: JPEG data that the decoder had to guess; images that their EXIF orientation turns, that use few of their
    16 bits, or have pages that are not read. If all pairs are read, also: a label 0 that perhaps has another meaning;
    classes without a pixel (not if there is an error, which may be the cause); masks without an image.

    decoded: how many of the images are decoded (None: all); of the others only the header and the end are read.
    workers: processes that read; 0: this process reads. progress: called with 1 after each pair.
    """
    indices = evenly(len(dataset), len(dataset) if sample is None or len(dataset) <= SMALL else sample)
    chosen = {indices[at] for at in evenly(len(indices), len(indices) if decoded is None else decoded)}
    findings = Findings(len(indices))
    findings.problems += [Problem("error", str(error), "incomplete") for error in dataset.incomplete]
    # Pairs are read one after the other and not kept: memory depends on the largest pair, not on their number.
    stream: Any = read_ahead(_Inspect(dataset, chosen), indices, workers)
    with closing(stream):
        for index, facts in zip(indices, stream, strict=True):
            _add(findings, facts, dataset, index)
            if progress is not None:
                progress(1)
    if not is_published(dataset):
        findings.problems += findings.headers.problems(dataset.levels)
        findings.problems += passed_over(dataset)
    per_class = np.bincount(dataset.label_lut, findings.pixels, 256)[: len(dataset.classes)]
    if findings.count("error") == 0 and not per_class.any():
        text = (
            f"no labelled pixel in the {findings.read} masks that were read; ids in them: {_ids(findings.pixels)}\n"
            f"expected pixels of {len(dataset.classes)} classes, but all of these ids are ignored\n"
            f"{dataset.fix or 'check data.ignore_index, data.reduce_zero_label and data.raw_to_train'}"
        )
        findings.problems.append(Problem("error", text, "nothing labelled"))
    # Only COCO-format annotations have pixels in no region; of a sample, the share is about the same.
    if (uncovered := getattr(dataset, "uncovered", None)) and (text := uncovered(findings.pixels)):
        findings.problems.append(Problem("warning", text, "pixels in no region"))
    if len(indices) == len(dataset):
        broken = findings.count("error") > 0
        if not broken and is_published(dataset) and _is_drawn(findings):
            text = (
                f"the masks hold {np.count_nonzero(per_class)} classes of built-in scenes (`ssaseg data export`), "
                f"whose names are not those of the {len(dataset.classes)} classes of this data set"
            )
            findings.problems.append(Problem("note", text, DRAWN))
            return findings
        warnings = [
            *(_zero_label(dataset, findings) if per_class.any() else ()),
            *_warnings(dataset, findings, broken, per_class),
        ]
        findings.problems += [Problem("warning", text) for text in warnings]
    return findings


def compare_masks(splits: Sequence[Dataset], found: Sequence[Findings]) -> list[Problem]:
    """What is wrong with all pairs of a data set together: palettes that number colours differently, two ids for one
    object, soft edges, an object that is ignored, a range of 16 bits without effect. `found`: the findings of each
    split.
    """
    both = reduce(Findings.joined, found)
    headers = both.headers
    if splits[0].levels is not None and headers.read and not headers.deep and not is_published(splits[0]):
        text = "data.range has no effect: no image has more than 8 bits\nremove the key"
        both.problems = [Problem("warning", text, "bits")]
    else:
        both.problems = []
    pairs = [split for split in splits if isinstance(split, PairDataset) and not is_published(split)]
    if not pairs or len(pairs) < len(splits):
        return both.problems
    lut = pairs[0].label_lut
    return [
        *both.problems,
        *both.storage.problems(lut),
        *(() if both.storage.two_whites else about_255(both.pixels, lut)),
    ]


def compare_images(train: Dataset, val: Dataset, content: bool = False) -> list[Problem]:
    """Whether images are in both splits, see `shared_images`; of published data sets this is not asked."""
    return [] if is_published(train) or is_published(val) else list(shared_images(train, val, content))


# ---- one pair ----------------------------------------------------------------------------------------------------
class _Inspect(Work):
    """Inspects pairs, in the main process or in a worker."""

    def __init__(self, dataset: Dataset, decoded: set[int]) -> None:
        super().__init__(dataset)
        self.decoded = decoded

    def __getitem__(self, index: int) -> PairFacts:
        self.note(index)
        with _captured_stderr() as lines:
            facts = self.dataset.inspect(index, index in self.decoded)
        self.note(-1)
        if lines:
            file = self.dataset.image_files[index] if self.dataset.image_files else self.dataset.name(index)
            text = f"{file}: damaged inside; its decoder says: {lines[0]}"
            facts.problems.append(Problem("warning", text, "image damaged inside"))
        return facts


def _is_drawn(findings: Findings) -> bool:
    """Whether all masks have the palette of built-in scenes."""
    from ssaseg.datasets.synthetic import mask_palette

    return findings.palettes == {mask_palette(True): findings.read}


def is_published(dataset: Dataset) -> bool:
    """Whether its masks are those of a published data set, whose meaning is known."""
    return dataset.fix is not None and bool(dataset.mask_files)


def _add(findings: Findings, facts: PairFacts, dataset: Dataset, index: int) -> None:
    label_lut = dataset.label_lut
    findings.problems += [replace(problem, name=dataset.name(index)) for problem in facts.problems]
    if facts.size is not None:
        findings.sizes[facts.size] += 1
        findings.named.setdefault(facts.size, dataset.name(index))
    if dataset.image_files:
        findings.headers.add(dataset.image_files[index], facts.image, facts.size, facts.top)
    if dataset.mask_files:
        findings.storage.add(dataset.mask_files[index], facts, label_lut)
    if facts.palette is not None:
        findings.palettes[facts.palette] += 1
    if facts.pixels is not None:
        findings.pixels += facts.pixels
        findings.masks += facts.pixels > 0
        # Several raw ids may belong to one class: an image counts once for a class.
        findings.images[np.unique(label_lut[facts.pixels > 0])] += 1


@contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Yields a list that at the end holds the lines that libjpeg wrote to stderr in the meantime.

    This is the only way in which libjpeg reports data that it had to guess. Nothing reaches the terminal: the lines do
    not name a file. Lines of other libraries are dropped.
    """
    lines: list[str] = []
    if sys.stderr is None:  # the process has no file descriptor 2 to replace
        yield lines
        return
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
        file.seek(0)
        lines += [line for line in file.read().decode(errors="replace").splitlines() if "JPEG" in line]


# ---- the whole set -----------------------------------------------------------------------------------------------
def _zero_label(dataset: Dataset, findings: Findings) -> Iterator[str]:
    """Signs that 0 has another meaning than it is read with: labels shifted by one are the commonest mistake.

    Only raw ids that are numbered without gaps can show such signs (`Dataset.zero_ignored`).
    """
    if dataset.zero_ignored is None:
        return
    # For a published data set the recipe has no keys about ids: only other masks help.
    own = dataset.fix is None
    pixels, last = findings.pixels, len(dataset.classes)
    masks = f"{findings.masks[0]} of {findings.read} masks"
    if dataset.zero_ignored:
        share = pixels[0] / pixels.sum()
        # Where ids reach the last class, they cannot have been reduced by one before.
        reduced_before = pixels[last] == 0
        if reduced_before and (pixels[0] == 0 or findings.masks[0] == findings.read):
            why = "data.reduce_zero_label=true" if own else "0 is read as 'ignored'"
            yield (
                f"label 0 is in {masks} and id {last}, the last class, in none, although {why}\n"
                f"ids found: {_ids(pixels)}; if they are already reduced by one, to 0..{last - 1}: "
                f"{dataset.fix or 'set data.reduce_zero_label=false'}"
            )
        elif share > LARGE_SHARE and own:
            yield (
                f"label 0 is in {masks} with {share:.0%} of the pixels, all ignored by data.reduce_zero_label=true\n"
                "if 0 is a class, such as background: set data.reduce_zero_label=false, and name it first in classes"
            )
    elif pixels[0] == 0 and dataset.label_lut[0] != IGNORED:
        yield (
            f"label 0 is in {masks}: class 0, {dataset.classes[0]}, has no pixel; ids found: {_ids(pixels)}\n"
            f"if the ids start at 1: {dataset.fix or 'set data.reduce_zero_label=true'}"
        )


def _warnings(dataset: Dataset, findings: Findings, broken: bool, per_class: Iterable[float]) -> Iterator[str]:
    """Classes without a pixel, and masks without an image. `per_class`: pixels of each train id."""
    absent = [name for name, count in zip(dataset.classes, per_class, strict=True) if count == 0]
    if absent and not broken:
        text = (
            f"{len(absent)} of {len(dataset.classes)} classes have no pixel in {findings.read} masks: "
            f"{first_names(absent, 8)}; ids found: {_ids(findings.pixels)}"
        )
        if dataset.fix is None:
            text += "; check data.classes, reduce_zero_label, raw_to_train"
        yield text
    if dataset.unused_masks:
        count, files = len(dataset.unused_masks), [str(file) for file in dataset.unused_masks]
        yield f"{count} mask{'s have' if count > 1 else ' has'} no image: {first_names(files, 3)}"


def _ids(pixels: np.ndarray) -> str:
    """The raw ids that occur, at most the first 20."""
    return first_names([str(value) for value in np.flatnonzero(pixels)], 20)
