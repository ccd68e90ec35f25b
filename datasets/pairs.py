"""Pairs of image and mask files in two folders, and the reading of both.

Letters: H, W height and width [pixels]; K classes. "Raw ids" are the numbers in a mask file, "train ids" are 0..K-1,
and 255 where a pixel is ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import cv2
import numpy as np

from ssaseg.datasets.bands.reading import read_bands
from ssaseg.datasets.base import (
    IGNORED,
    DataError,
    PairFacts,
    Problem,
    default_palette,
    file_sizes,
    require_below,
)
from ssaseg.datasets.decoding import Levels, read_mask
from ssaseg.datasets.ids import expected_ids, label_table, likely_fix, palette_error
from ssaseg.datasets.inspection import count_ids, look_at_image
from ssaseg.files.listing import FileList, prefix_of, texts_of, walk_folders
from ssaseg.files.reading import decode_text, read_file
from ssaseg.files.text import describe

Decoded = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # image, raw ids, colours of a palette file

LARGEST_LIST = 2**26  # bytes of a list of names

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".gif", ".jfif", ".jpe", ".jp2", ".avif"),
)
JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
# A line of a list of pairs, where a list of names is expected: two names with suffixes.
TWO_FILES = re.compile(r".*\.\w{2,5}['\"]?\s*[\t ,;]\s*\S.*\.\w{2,5}\b.*")


class Pairs(NamedTuple):
    """Names, image files and mask files of all pairs, in the same order; and the mask files without an image."""

    names: list[str]
    images: Sequence[Path]
    masks: Sequence[Path]
    unused: Sequence[Path] = ()


class PairDataset:
    """Images and masks paired by relative path: `a/b.jpg` belongs to `a/b` + `mask_suffix`.

    Suffixes match in upper and lower case, folders are searched recursively, hidden files are ignored, and pairs are
    sorted by name. Without `palette` the classes get the colours of PASCAL VOC. For the meaning of raw ids see
    `label_table`. `cache` keeps every decoded pair in memory, as read-only arrays; `preload` before forking lets all
    workers use the same memory. `names` is a file that lists the pairs to use, one name a line, as in PASCAL VOC's
    ImageSets; without it all pairs in the folders are used. With `partial`, pairs that miss one of their files are left
    out, and `incomplete` holds the errors that would otherwise be raised for them. `pairs`: the pairs of a list; then
    no folder is searched. `channels`: of the images, in place of 3, see `bands.reading`.

    Raises DataError where a folder is missing or empty, two files have the same name, an image has no mask, or a listed
    name has no image. The loading methods raise it for files that cannot be used.
    """

    def __init__(
        self,
        images: Path,
        masks: Path,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]] | None = None,
        image_suffixes: Sequence[str] = IMAGE_SUFFIXES,
        mask_suffix: str = ".png",
        ignore_index: int = IGNORED,
        reduce_zero_label: bool = False,
        raw_to_train: Mapping[int, int] | None = None,
        cache: bool = False,
        names: Path | None = None,
        partial: bool = False,
        pairs: Pairs | None = None,
        channels: int = 3,
        levels: Levels | None = None,
    ) -> None:
        self.classes, self.channels = tuple(classes), channels
        self.palette = tuple((r, g, b) for r, g, b in palette) if palette else default_palette(self.classes)
        # Only colours that the recipe gives can be compared with a mask file's own palette.
        self.palette_given = bool(palette)
        self.ignore_index, self.reduce_zero_label, self.raw_to_train = ignore_index, reduce_zero_label, raw_to_train
        self.label_lut, self.valid_raw = label_table(len(self.classes), ignore_index, reduce_zero_label, raw_to_train)
        self.zero_ignored = None if raw_to_train is not None else reduce_zero_label
        self.levels, self.image_suffixes = levels, tuple(image_suffixes)
        self.image_folder = Path(images) if pairs is None else None  # of a list of pairs, no folder is searched
        self.listed = names is not None or pairs is not None  # whether a file says which pairs are used
        self.fix: str | None = None  # for wrong ids, where the recipe has no key about ids
        self._bad_raw = (~self.valid_raw).astype(np.uint8)

        self.incomplete: list[DataError] = []
        self.notes: list[str] = []  # how a list of pairs was read
        if pairs is None:
            left_out = self.incomplete if partial else None
            pairs = pair_files(Path(images), Path(masks), image_suffixes, mask_suffix, names, left_out)
        self._names, self.image_files, self.mask_files, self.unused_masks = pairs
        self._cache: dict[int, Decoded] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Path below the image folder, with / and without suffix."""
        return self._names[index]

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image BGR uint8 (H, W, 3) and train ids uint8 (H, W), every id checked. Raises DataError or OSError."""
        image, raw, colours = self._read(index)
        if cv2.LUT(raw, self._bad_raw).any():
            raise self.label_error(index, raw)
        if error := self.palette_error(index, raw, colours):
            raise error
        return image, cv2.LUT(raw, self.label_lut)

    def load_raw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image BGR uint8 (H, W, 3) and raw ids uint8 (H, W), the ids unchecked. Raises DataError or OSError."""
        return self._read(index)[:2]

    def load_image(self, index: int) -> np.ndarray:
        """The image alone, BGR uint8 (H, W, 3). Raises DataError or OSError."""
        return read_bands(self.image_files[index], self.channels, levels=self.levels)

    def preload(self) -> None:
        """Fill the cache, if there is one. Processes that are forked later use the same memory: it is only read."""
        for index in range(len(self) if self._cache is not None else 0):
            self._read(index)

    def _read(self, index: int) -> Decoded:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        image, mask = self.load_image(index), read_mask(self.mask_files[index])
        raw, colours = mask.ids, mask.colours
        if image.shape[:2] != raw.shape:
            raise self.size_error(index, image.shape, raw.shape)
        if self._cache is not None:
            image.flags.writeable = raw.flags.writeable = False
            self._cache[index] = image, raw, colours
        return image, raw, colours

    def inspect(self, index: int, decode: bool) -> PairFacts:
        """See `Dataset.inspect`: unlike `load` it also looks at the mask where the image cannot be read."""
        problems: list[Problem] = []

        def add(error: Exception, kind: str) -> None:
            problems.append(Problem("error", describe(error), kind))

        size = facts = top = None
        try:
            size, facts, top = look_at_image(self.image_files[index], decode, self.channels)
        except (DataError, OSError) as error:
            add(error, "image that cannot be read")
        try:
            raw, colours, white, paged = read_mask(self.mask_files[index])
        except (DataError, OSError) as error:
            add(error, "mask that cannot be used")
            return PairFacts(problems, None, size, None, image=facts, top=top)
        if size is not None and size != raw.shape:
            add(self.size_error(index, size, raw.shape), "sizes that differ")
        if paged:
            text = f"{self.mask_files[index]}: a mask of more than one page or frame\nonly the first is read"
            problems.append(Problem("warning", text, "mask of several pages"))
        counts = count_ids(raw)
        if counts[~self.valid_raw].any():
            add(self.label_error(index, raw), "ids out of range")
        elif shuffled := self.palette_error(index, raw, colours):
            add(shuffled, "palette in another order")
        return PairFacts(problems, counts, size, None if colours is None else colours.tobytes(), white, facts, top)

    def identity(self) -> list[str]:
        """Sizes of the image files, then of the mask files [bytes]. Raises OSError where a file is missing."""
        return file_sizes([*texts_of(self.image_files), *texts_of(self.mask_files)])

    def size_error(self, index: int, image: Sequence[int], mask: Sequence[int]) -> DataError:
        """The error for an image and a mask whose shapes (H, W, …) differ."""
        fix = "resize the mask to the size of its image; masks are not resized when they are read"
        if tuple(mask[:2]) == (image[1], image[0]):
            fix = "width and height are swapped, as by an EXIF orientation: rotate the mask, or remove the orientation"
        return DataError(
            f"{self.mask_files[index]}: mask of {mask[1]}x{mask[0]} pixels (width x height)\n"
            f"expected {image[1]}x{image[0]}, as its image {self.image_files[index]}\n{fix}"
        )

    def label_error(self, index: int, raw: np.ndarray | None = None) -> DataError:
        """The error for a mask with ids out of range. `raw`: the whole mask; without it the file is read again."""
        file = self.mask_files[index]
        counts = np.bincount((read_mask(file).ids if raw is None else raw).ravel(), minlength=256)
        bad = [int(value) for value in np.flatnonzero(counts * self._bad_raw)]
        found = "; ".join(f"id {value} in {counts[value]} pixels" for value in bad[:3])
        more = f"; {len(bad) - 3} more ids" if len(bad) > 3 else ""
        meaning = (self.ignore_index, self.reduce_zero_label, self.raw_to_train)
        fix = self.fix or likely_fix(bad, counts, len(self.classes), *meaning[1:])
        return DataError(f"{file}: {found}{more}\nexpected {expected_ids(len(self.classes), *meaning)}\n{fix}")

    def palette_error(self, index: int, raw: np.ndarray, colours: np.ndarray | None) -> DataError | None:
        """See `ids.palette_error`; None without colours in the recipe."""
        if not self.palette_given:
            return None
        return palette_error(self.mask_files[index], raw, colours, self.palette, self.classes, self.label_lut)


def pair_files(
    images: Path,
    masks: Path,
    image_suffixes: Sequence[str],
    mask_suffix: str,
    listed: Path | None = None,
    incomplete: list[DataError] | None = None,
) -> Pairs:
    """All pairs of two folders, sorted by name, and the mask files without an image.

    Names that differ only in the composition of Unicode letters belong together: macOS writes é as two characters.
    `listed`: a file of names. With it only the listed pairs are used, and no mask counts as without an image: the
    others belong to another split. `incomplete`: a list that takes the errors for images without mask and for listed
    names without image, in place of raising them. Raises DataError for these, for a folder that is missing or has no
    file with such a suffix, and for two files with the same name.
    """
    mask_files = files_by_name(masks, [mask_suffix], "masks")
    # Images and masks may be in the same folder, or the masks below the images: then a mask file is not an image too.
    apart = set(mask_files.values()) if masks.is_relative_to(images) else set()
    image_files = files_by_name(images, image_suffixes, "images", apart)
    names = sorted(image_files)
    if listed is None and names == [*image_files] == [*mask_files]:
        return Pairs(names, FileList(image_files.values()), FileList(mask_files.values()))  # nothing to look up
    if listed is not None:
        # Spaces around a name are part of it only where an image file has this name with the spaces.
        names = sorted({name if name in image_files else name.strip() for name in read_names(listed)})
    _add_other_compositions(names, image_files)
    _add_other_compositions(names, mask_files)
    absent = [name for name in names if name not in image_files]
    if absent:
        error = DataError(
            f"{listed}: {len(absent)} of {len(names)} names have no image: {first_names(absent)}\n"
            f"expected {images / absent[0]} + one of {', '.join(image_suffixes)} for the first\n"
            + (
                "this is a list of pairs: write pairs: FILE in place of images, masks and names"
                if any(map(TWO_FILES.fullmatch, absent))
                else "write names as paths below the image folder, without suffix, or add the images"
            )
        )
        raise_or_keep(error, incomplete)
        names = [name for name in names if name in image_files]
    missing = [name for name in names if name not in mask_files]
    if missing:
        first = missing[0]
        near: list[str] = []
        with suppress(OSError):  # a guess, which must not hide the error
            near = sorted(name for name in os.listdir((masks / first).parent) if name.startswith(Path(first).name))
        error = DataError(
            f"{images}: {len(missing)} of {len(names)} images have no mask: {first_names(missing)}\n"
            f"expected {masks / (first + mask_suffix)} for the first"
            + (f"; found {first_names(near)}: set data.mask_suffix to the part after the name" if near else "")
            + "\nadd the masks, remove the images, or correct data.mask_suffix and the folder of masks"
        )
        raise_or_keep(error, incomplete)
        names = [name for name in names if name in mask_files]
    image_list, mask_list = ([files[name] for name in names] for files in (image_files, mask_files))
    unused = set(mask_files.values()).difference(mask_list) if listed is None else ()
    return Pairs(names, FileList(image_list), FileList(mask_list), sorted(map(Path, unused)))


def _add_other_compositions(names: Sequence[str], files: dict[str, str]) -> None:
    """Adds the names for which `files` has a name of the same letters in another Unicode composition."""
    if missing := [name for name in names if name not in files and not name.isascii()]:
        composed = {normalize("NFC", name): file for name, file in files.items()}
        files |= {name: composed[key] for name in missing if (key := normalize("NFC", name)) in composed}


def raise_or_keep(error: DataError, kept: list[DataError] | None) -> None:
    if kept is None:
        raise error
    kept.append(error)


def read_names(file: Path) -> list[str]:
    """The names in a list file, one a line, sorted. Raises DataError where it is missing, empty or not UTF-8 text, has
    a name twice, or one that leads out of its folder; OSError where it is not a regular file.

    Names keep their spaces. Only a line feed ends a line; a carriage return before it is dropped.
    """
    try:
        lines = decode_text(read_file(file, LARGEST_LIST)).split("\n")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file\nexpected the list of names, one a line") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason})\nexpected the list of names, one a line") from None
    names = sorted(line.removesuffix("\r") for line in lines if line.strip())
    for name in names:
        require_below(str(file), name.strip())
    twice = next((name for name, following in pairwise(names) if name == following), None)
    if twice is not None:
        raise DataError(f"{file}: {twice} is listed twice\nexpected each name once\nremove the repeated lines")
    if not names:
        raise DataError(f"{file}: no names in this file\nexpected one name a line")
    return names


def files_by_name(folder: Path, suffixes: Sequence[str], kind: str, apart: Set[str] = frozenset()) -> dict[str, str]:
    """Files below `folder` that end in one of `suffixes`, except `apart`, by their relative path without suffix. Paths
    of files are text.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder\nexpected the folder of {kind}\ncheck data.root and the folders below it"
        )
    endings = sorted((suffix.lower() for suffix in suffixes), key=len, reverse=True)  # _mask.png before .png
    any_ending, start = tuple(endings), prefix_of(folder)
    found: dict[str, str] = {}
    for here, files in walk_folders(folder):
        for file in files:
            lower = file.lower()
            if not lower.endswith(any_ending) or (path := start + here + file) in apart:
                continue
            name = here + file[: -len(next(filter(lower.endswith, endings)))]
            if found.setdefault(name, path) is not path:
                pair = f"{found[name]} and {path}"
                fix = "remove or rename one"
                raise DataError(f"{pair}: two {kind} with the same name\nexpected one file a name\n{fix}")
    if not found:
        wanted = f"files ending in {', '.join(suffixes)}"
        raise DataError(f"{folder}: no {kind} in this folder\nexpected {wanted}\ncheck the folder and the suffixes")
    return found


def first_names(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, for a message, with "…" at the end if there are more."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
