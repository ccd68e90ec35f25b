"""What the headers of all images say together: orientations, bits, bands and pages that a user may not expect."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssaseg.datasets.base import Dataset, ImageFacts, Levels, Problem
from ssaseg.datasets.pairs import IMAGE_SUFFIXES, first_names
from ssaseg.files.listing import prefix_of, texts_of, walk_below
from ssaseg.files.text import printable

HALF = 2**15  # of the values of 16 bits: where nearly all values are below, most of the range is unused
SENSORS = (2**10 - 1, 2**12 - 1, 2**14 - 1)  # largest values of 10, 12 and 14 bits
# Texts beside images, such as lists, names and annotations: nobody expects that they are read as images.
TEXTS = (".txt", ".csv", ".tsv", ".lst", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".db", ".ini", ".log", "")


@dataclass
class Images:
    """What was found in images."""

    read: int = 0
    kinds: dict[str, tuple[int, Path]] = field(default_factory=dict)  # what is odd -> number of images, the first one
    deep: int = 0  # images of more than 8 bits
    largest: int = 0  # value of these
    most: int = 0  # the value that 99.9 % of an image's values do not exceed: the largest of all images

    def add(self, file: Path, facts: ImageFacts | None, size: tuple[int, int] | None, top: Levels | None) -> None:
        """Adds an image. `size`: height and width as shown. `top`: its largest value, and that of 99.9 % of the values;
        None for images of 8 bits.
        """
        self.read += 1
        if facts is None or size is None:
            return
        if facts.orientation != 1 and (facts.orientation <= 4 or size[0] == size[1]):
            self._count("turned", file)
        if facts.paged:
            self._count("paged", file)
        if facts.bands in (2, 4):
            self._count("bands", file)
        if top is not None:
            self.deep += 1
            self.largest, self.most = max(self.largest, top[0]), max(self.most, top[1])

    def _count(self, kind: str, file: Path) -> None:
        count, first = self.kinds.get(kind, (0, file))
        self.kinds[kind] = count + 1, first

    def joined(self, other: Images) -> Images:
        """This and another part of a set together."""
        kinds = dict(self.kinds)
        for kind, (count, first) in other.kinds.items():
            known, file = kinds.get(kind, (0, first))
            kinds[kind] = known + count, file
        largest, most = max(self.largest, other.largest), max(self.most, other.most)
        return Images(self.read + other.read, kinds, self.deep + other.deep, largest, most)

    def problems(self, levels: Levels | None) -> Iterator[Problem]:
        """What a user should look at. `levels`: `data.range` of the recipe."""
        for kind, (what, fix) in _TEXTS.items():
            if kind in self.kinds:
                count, first = self.kinds[kind]
                verb = "image has" if count == 1 else "images have"
                severity = "note" if kind == "bands" else "warning"
                yield Problem(severity, f"{count} {verb} {what}: {first}{', …' * (count > 1)}\n{fix}", kind)
        if levels is None and self.fitting:
            yield Problem("warning", self._unused(), "bits")
        elif levels is not None and self.deep and self.most < levels[0] + (levels[1] - levels[0]) / 8:
            low, high = levels
            text = f"16 bits, largest value {self.largest}, with data.range: [{low}, {high}]: images are nearly black"
            yield Problem("warning", f"{text}\nset data.range: [0, {self.upper_value}]", "bits")

    @property
    def fitting(self) -> Levels | None:
        """The range that 16-bit images need; None where there are none, or their values use most of 16 bits."""
        return (0, self.upper_value) if self.deep and self.most < HALF else None

    @property
    def upper_value(self) -> int:
        """The upper value of a range that fits: that of a sensor if values come near to it."""
        sensor = next((each for each in SENSORS if 0.85 * each <= self.largest <= each), None)
        # Single pixels far above all others, as of defects, are not counted.
        return sensor or max(self.largest if self.largest < 2 * self.most else self.most, 1)

    def _unused(self) -> str:
        levels = (self.largest >> 8) + 1
        above = f", 99.9 % of them up to {self.most}" if self.largest >= 2 * self.most else ""
        return (
            f"{self.deep} image{'s have' if self.deep > 1 else ' has'} 16 bits, largest value {self.largest}{above}: "
            f"only {levels} grey level{'s are' if levels > 1 else ' is'} left\n"
            f"set data.range: [0, {self.upper_value}], which becomes 0..255"
        )


_TEXTS = {
    "turned": (
        "an EXIF orientation that turns the picture and keeps its size, so that masks fit either way",
        "look whether masks fit (`ssaseg train` writes batch.png); if not, turn the masks or remove the orientation",
    ),
    "paged": ("more than one page or frame", "only the first is read: save the others as files of their own"),
    "bands": ("a further band, such as alpha or infrared", "it is not used: only the colours, or the grey, are read"),
}


def passed_over(dataset: Dataset) -> Iterator[Problem]:
    """A note on the files in the folders of images that are not images by their suffix. Masks and texts are not meant.

    The folders are the one that was searched, with all below it, or else those that hold the listed images.
    """
    folder: Path | None = getattr(dataset, "image_folder", None)
    # Lists name files of any suffix; those of the other split may be in the same folder.
    listed = () if folder else {file.suffix.lower() for file in (*dataset.image_files, *dataset.mask_files)} - {""}
    suffixes = (*(suffix.lower() for suffix in getattr(dataset, "image_suffixes", IMAGE_SUFFIXES)), *listed)
    if folder:
        folders, start = [folder], prefix_of(folder)
        files: Iterable[Path] = (Path(start + name) for name in walk_below(folder) if not _ends_in(name, suffixes))
    else:
        folders = sorted({file.parent for file in dataset.image_files})
        files = (path for each in folders for path in _files_in(each) if not _ends_in(path.name, suffixes))
    others = [path for path in files if path.suffix.lower() not in TEXTS]
    if others:
        used = {*texts_of(dataset.mask_files), *texts_of(dataset.unused_masks)}
        others = [path for path in others if str(path) not in used]
    if others:
        where = f"{folders[0]}{f' and {len(folders) - 1} more folders' * (len(folders) > 1)}"
        names = ", ".join(sorted(printable(path.name) for path in others[:3])) + ", …" * (len(others) > 3)
        text = f"{count_suffixes(Counter(path.suffix.lower() for path in others))} in {where}: {names}"
        fix = "\nif they are images: add their suffixes to data.image_suffixes" if folder else ""
        yield Problem("note", text + fix, "other types")


def in_no_list(splits: Sequence[Dataset]) -> Iterator[Problem]:
    """A note on images in the folders of images that the lists of all splits leave out. None where no list is used."""
    if not all(getattr(split, "listed", False) for split in splits):
        return
    folders: dict[Path, None] = {}
    for split in splits:
        searched: Path | None = getattr(split, "image_folder", None)
        folders |= dict.fromkeys([searched] if searched else sorted({file.parent for file in split.image_files}))
    used = {file for split in splits for files in (split.image_files, split.mask_files) for file in texts_of(files)}
    suffixes = tuple(suffix for split in splits for suffix in getattr(split, "image_suffixes", IMAGE_SUFFIXES))
    left = sorted(
        {
            f"{prefix_of(folder)}{name}"
            for folder in folders
            for name in walk_below(folder)
            if _ends_in(name, suffixes) and f"{prefix_of(folder)}{name}" not in used
        }
    )
    if left:
        names = first_names([printable(name) for name in left])
        text = f"{len(left)} image{'s are' if len(left) > 1 else ' is'} in no list of a split, and not used: {names}"
        yield Problem("note", text, "in no list")


def _ends_in(file: str, suffixes: tuple[str, ...]) -> bool:
    return file.lower().endswith(suffixes)


def _files_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(entry) for entry in entries if not entry.name.startswith(".") and entry.is_file()]


def count_suffixes(counts: Counter[str]) -> str:
    """What was left out, for a message: `3 files of other types are left out: 2 .heic, 1 .txt`."""
    kinds = [f"{count} {printable(suffix[:20]) or 'without suffix'}" for suffix, count in counts.most_common(8)]
    more = ", …" if len(counts) > 8 else ""
    total = counts.total()
    verb = "file of another type is" if total == 1 else "files of other types are"
    return f"{total} {verb} left out: {', '.join(kinds)}{more}"
