"""Look through a data set before time is spent on it: all that is wrong at once, not only the first thing."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np

from ssaseg.datasets.base import DataError, Dataset
from ssaseg.datasets.decoding import header_size, read_image, read_mask, require_complete
from ssaseg.datasets.loader import Work, read_ahead
from ssaseg.datasets.pairs import PairDataset, some
from ssaseg.datasets.synthetic import SyntheticScenes


def require_same_classes(train: Sequence[str], val: Sequence[str]) -> None:
    """Raises DataError where the splits' classes differ: annotation files each bring their own."""
    if tuple(train) != tuple(val):
        differ = [name for name in (*train, *val) if (name in train) != (name in val)]
        found = f"only one of them has {', '.join(differ[:3])}" if differ else "their order differs"
        raise DataError(
            f"training and validation split have other classes: {len(train)} and {len(val)}; {found}\n"
            "state data.classes: the names that count, in the order of the train ids"
        )


# A set of this size is read in about a second, so that a sample would save nothing.
SMALL = 512

# Images of a sample that are decoded; of the others the header and the end are read.
DECODED = 64

# Problems told in full. A convention that is misunderstood shows in every file.
TOLD = 10

# More than this share of all pixels is no remainder that nobody labelled: it may well be a class.
MUCH = 0.5


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data: severity "error" or "warning", a text of at most three lines, and what it is
    counted as where there are too many to tell.
    """

    severity: str
    text: str
    kind: str = ""


@dataclass
class Findings:
    """What a look through a split found; all counts are of the pairs that were read."""

    read: int  # pairs
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # per raw id
    masks: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # masks that hold the raw id
    images: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # images that hold the train id
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width) [pixels] of images
    palettes: Counter[bytes] = field(default_factory=Counter)  # RGB triples of the masks that have a palette
    problems: list[Problem] = field(default_factory=list)

    def count(self, severity: str) -> int:
        """Number of problems of a severity."""
        return sum(problem.severity == severity for problem in self.problems)

    def told(self, severity: str) -> list[str]:
        """Texts of the problems of a severity: ten in full, then one that says how many there are besides."""
        chosen = [problem for problem in self.problems if problem.severity == severity]
        texts = [problem.text for problem in chosen[:TOLD]]
        if more := Counter(problem.kind for problem in chosen[TOLD:]):
            kinds = ", ".join(f"{count} x {kind}" for kind, count in more.most_common())
            texts.append(f"{more.total()} more {severity}s in the {self.read} pairs that were read: {kinds}")
        return texts


def check_dataset(dataset: Dataset, sample: int | None = None) -> list[Problem]:
    """What is wrong with `sample` evenly spaced pairs, or with all of them (None, and sets of up to 512 pairs).

    Quick: only some images are decoded. At most ten errors are told in full, one more says how many there are besides.
    Scenes drawn by a program are sound by construction: [].
    """
    if isinstance(dataset, SyntheticScenes):
        return []
    findings = look_through(dataset, sample, DECODED)
    return [Problem(severity, text) for severity in ("error", "warning") for text in findings.told(severity)]


def look_through(
    dataset: Dataset,
    sample: int | None = None,
    decoded: int | None = None,
    workers: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Findings:
    """Read `sample` evenly spaced pairs (None, and of sets of up to 512 pairs: all) and tell everything that is wrong.

    Errors: images without mask, where the data set goes on without them; images and masks that are damaged or differ
    in size, masks in colours, palettes in another order, ids out of range; and where none of these, not one labelled
    pixel. Warnings: JPEG data that its decoder had to guess; and where all pairs are read, a label 0 that should
    perhaps be read otherwise, classes without a pixel (if there is no error, which would explain them), masks without
    an image.

    decoded: how many of the images are decoded (None: all); of the others the header and the end are read. workers:
    processes that read; 0: this one. progress: called with 1 after each pair.
    """
    indices = _evenly(len(dataset), len(dataset) if sample is None or len(dataset) <= SMALL else sample)
    chosen = {indices[at] for at in _evenly(len(indices), len(indices) if decoded is None else decoded)}
    findings = Findings(len(indices))
    findings.problems += [Problem("error", str(error), "incomplete") for error in getattr(dataset, "incomplete", [])]
    # One after the other and never kept: memory depends on the largest pair, not on their number.
    stream: Any = read_ahead(_Look(dataset, chosen), indices, workers)
    with closing(stream):
        for seen in stream:
            _add(findings, seen, dataset.label_lut)
            if progress is not None:
                progress(1)
    per_class = np.bincount(dataset.label_lut, findings.pixels, 256)[: len(dataset.classes)]
    if findings.count("error") == 0 and not per_class.any():
        text = (
            f"no labelled pixel in the {findings.read} masks that were read; ids in them: {_ids(findings.pixels)}\n"
            f"expected pixels of {len(dataset.classes)} classes; these ids are all ignored\n"
            f"{_mend(dataset, 'check data.ignore_index, data.reduce_zero_label and data.raw_to_train')}"
        )
        findings.problems.append(Problem("error", text, "nothing labelled"))
    if len(indices) == len(dataset):
        broken = findings.count("error") > 0
        doubts = [
            *(_zero_label(dataset, findings) if per_class.any() else ()),
            *_warnings(dataset, findings, broken, per_class),
        ]
        findings.problems += [Problem("warning", text) for text in doubts]
    return findings


# ---- one pair ----------------------------------------------------------------------------------------------------
class Seen(NamedTuple):
    """What one pair is like."""

    problems: list[Problem]
    pixels: np.ndarray | None  # int64 (256,) per raw id; None where the mask cannot be read
    size: tuple[int, int] | None  # height and width of the image [pixels]
    palette: bytes | None  # of the mask file


class _Look(Work):
    """Looks at a pair, in whichever process."""

    def __init__(self, dataset: Dataset, decoded: set[int]) -> None:
        super().__init__(dataset)
        self.decoded = decoded

    def __getitem__(self, index: int) -> Seen:
        self.note(index)
        with _overheard() as words:
            seen = self._look(index)
        self.note(-1)
        if words:
            file = getattr(self.dataset, "image_files", {index: self.dataset.name(index)})[index]
            text = f"{file}: damaged inside; its decoder says: {words[0]}"
            seen.problems.append(Problem("warning", text, "image damaged inside"))
        return seen

    def _look(self, index: int) -> Seen:
        if isinstance(self.dataset, PairDataset):
            return _look_at_files(self.dataset, index, index in self.decoded)
        try:
            raw = self.dataset.load_raw(index)[1]
        except (DataError, OSError) as error:
            return Seen([Problem("error", str(error), "pair that cannot be read")], None, None, None)
        counts, problems = count_ids(raw), []
        if counts[~self.dataset.valid_raw].any():
            problems = [Problem("error", str(self.dataset.label_error(index)), "ids out of range")]
        return Seen(problems, counts, (raw.shape[0], raw.shape[1]), None)


def _look_at_files(dataset: PairDataset, index: int, decode: bool) -> Seen:
    problems: list[Problem] = []

    def add(error: Exception, kind: str) -> None:
        problems.append(Problem("error", str(error), kind))

    size = None
    try:
        size = _image_size(dataset, index, decode)
    except (DataError, OSError) as error:
        add(error, "image that cannot be read")
    try:
        raw, colours = read_mask(dataset.mask_files[index])
    except (DataError, OSError) as error:
        add(error, "mask that cannot be used")
        return Seen(problems, None, size, None)
    if size is not None and size != raw.shape:
        add(dataset.size_error(index, size, raw.shape), "sizes that differ")
    counts = count_ids(raw)
    if counts[~dataset.valid_raw].any():
        add(dataset.label_error(index, raw), "ids out of range")
    elif shuffled := dataset.palette_error(index, raw, colours):
        add(shuffled, "palette in another order")
    return Seen(problems, counts, size, None if colours is None else colours.tobytes())


def _add(findings: Findings, seen: Seen, label_lut: np.ndarray) -> None:
    findings.problems += seen.problems
    if seen.size is not None:
        findings.sizes[seen.size] += 1
    if seen.palette is not None:
        findings.palettes[seen.palette] += 1
    if seen.pixels is not None:
        findings.pixels += seen.pixels
        findings.masks += seen.pixels > 0
        # Several raw ids may be one class: an image counts once for it.
        findings.images[np.unique(label_lut[seen.pixels > 0])] += 1


def count_ids(raw: np.ndarray) -> np.ndarray:
    """How many pixels each raw id of a mask uint8 (H, W) has, int64 (256,)."""
    # numpy's bincount would first make eight bytes of each. OpenCV counts in float32, exact up to 2^24 pixels.
    rows = max(2**24 // raw.shape[1], 1)
    parts = (raw[top : top + rows] for top in range(0, raw.shape[0], rows))
    counts = (cv2.calcHist([part], [0], None, [256], [0, 256]).ravel() for part in parts)
    return sum((each.astype(np.int64) for each in counts), np.zeros(256, np.int64))


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """Lines that C libraries write to stderr meanwhile, filled in at the end: libjpeg tells of data that it had to
    guess in no other way. Only its lines are kept, and none reaches the terminal, where it would name no file.
    """
    lines: list[str] = []
    if sys.stderr is None:  # there is no file 2 to set aside
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


def _image_size(dataset: PairDataset, index: int, decode: bool) -> tuple[int, int]:
    """Height and width [pixels] of an image that is whole as far as can be seen; `decode` looks at every pixel."""
    file = dataset.image_files[index]
    if not decode:
        data = file.read_bytes()
        require_complete(file, data)
        if size := header_size(io.BytesIO(data)):
            return size  # of what is not upright, or unknown to Pillow, OpenCV is asked what it makes
    height, width = read_image(file).shape[:2]
    return height, width


# ---- the whole set -----------------------------------------------------------------------------------------------
def _zero_label(dataset: Dataset, findings: Findings) -> Iterator[str]:
    """Doubts about what 0 means: the commonest mistake of the field, labels shifted by one.

    Only a data set of raw ids that run on says something by its 0; `raw_to_train` names each id's meaning.
    """
    if not isinstance(dataset, PairDataset) or dataset.raw_to_train is not None:
        return
    # Of a published data set the recipe says nothing about ids: what can be done is to have other masks.
    own = dataset.mend is None
    pixels, last = findings.pixels, len(dataset.classes)
    masks = f"{findings.masks[0]} of {findings.read} masks"
    if dataset.reduce_zero_label:
        share = pixels[0] / pixels.sum()
        # Ids that reach the last class cannot have been reduced before.
        reduced_before = pixels[last] == 0
        if reduced_before and (pixels[0] == 0 or findings.masks[0] == findings.read):
            why = "data.reduce_zero_label=true" if own else "0 is read as 'ignored'"
            yield (
                f"label 0 is in {masks} and id {last}, the last class, in none, though {why}\n"
                f"ids there: {_ids(pixels)}; if they are reduced already, 0..{last - 1}: "
                f"{_mend(dataset, 'data.reduce_zero_label=false')}"
            )
        elif share > MUCH and own:
            yield (
                f"label 0 is in {masks} with {share:.0%} of the pixels, all ignored by data.reduce_zero_label=true\n"
                "if it is a class, such as background: data.reduce_zero_label=false, and name it first in data.classes"
            )
    elif pixels[0] == 0 and dataset.ignore_index != 0:
        yield (
            f"label 0 is in {masks}: class 0, {dataset.classes[0]}, has no pixel; ids there: {_ids(pixels)}\n"
            f"if ids run from 1: {_mend(dataset, 'data.reduce_zero_label=true')}"
        )


def _warnings(dataset: Dataset, findings: Findings, broken: bool, per_class: Iterable[float]) -> Iterator[str]:
    """What a whole set's ids suggest, and its unpaired files. `per_class`: pixels per train id."""
    absent = [name for name, count in zip(dataset.classes, per_class, strict=True) if count == 0]
    if absent and not broken:
        text = (
            f"{len(absent)} of {len(dataset.classes)} classes have no pixel in {findings.read} masks: "
            f"{some(absent, 8)}; ids there: {_ids(findings.pixels)}"
        )
        if isinstance(dataset, PairDataset) and dataset.mend is None:
            text += "; check data.classes, reduce_zero_label, raw_to_train"
        yield text
    unused: Sequence[object] = getattr(dataset, "unused_masks", [])
    if unused:
        count, files = len(unused), [str(file) for file in unused]
        yield f"{count} mask{'s have' if count > 1 else ' has'} no image: {some(files, 3)}"


def _mend(dataset: Dataset, keys: str) -> str:
    """`keys`, which say what to set, or what can be done about a data set that does not heed them."""
    if isinstance(dataset, PairDataset):
        return dataset.mend or keys
    return "check data.classes and data.background"


def _ids(pixels: np.ndarray) -> str:
    """The raw ids that occur, the first 20 of them."""
    return some([str(value) for value in np.flatnonzero(pixels)], 20)


def _evenly(count: int, sample: int) -> list[int]:
    """`sample` of the indices 0..count-1 (all if there are fewer), evenly spaced, the first among them."""
    sample = min(count, sample)
    return [at * count // sample for at in range(sample)]
