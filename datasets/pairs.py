"""Pairs of image and mask files in two folders, and the reading of both.

Letters: H, W height and width [pixels]; K classes. "Raw ids" are the numbers in a mask file, "train ids" are 0..K-1,
and 255 where a pixel is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from ssaseg.datasets.base import IGNORED, DataError, default_palette
from ssaseg.datasets.decoding import read_image, read_mask

Decoded = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # image, raw ids, colours of a palette file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class PairDataset:
    """Images and masks paired by relative path: `a/b.jpg` belongs to `a/b` + `mask_suffix`.

    Suffixes are matched whatever their case, folders are searched recursively, hidden files are passed over, and
    pairs are sorted by name. Without `palette` the classes get PASCAL VOC's colours. For the meaning of raw ids see
    `label_table`. `cache` keeps every decoded pair in memory, as read-only arrays; `preload` before forking lets all
    workers share them. `names` is a file that lists the pairs to take, one name a line, as PASCAL VOC's ImageSets do;
    without it all that is in the folders is taken. With `partial` incomplete pairs are left out, and `incomplete` has
    the errors that would otherwise be raised for them.

    Raises DataError where a folder is missing or empty, two files would have one name, an image has no mask, or the
    list names what is not there; the loading methods raise it for files that cannot be used.
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
    ) -> None:
        self.classes = tuple(classes)
        self.palette = tuple((r, g, b) for r, g, b in palette) if palette else default_palette(len(self.classes))
        # Colours that nobody chose say nothing about a mask file's own palette.
        self.palette_given = bool(palette)
        self.ignore_index, self.reduce_zero_label, self.raw_to_train = ignore_index, reduce_zero_label, raw_to_train
        self.label_lut, self.valid_raw = label_table(len(self.classes), ignore_index, reduce_zero_label, raw_to_train)
        self.mend: str | None = None  # for ids out of range, where the recipe decides nothing about them
        self._bad_raw = (~self.valid_raw).astype(np.uint8)

        self.incomplete: list[DataError] = []
        self._names, self.image_files, self.mask_files, self.unused_masks = pair_files(
            Path(images), Path(masks), image_suffixes, mask_suffix, names, self.incomplete if partial else None
        )
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
        return read_image(self.image_files[index])

    def preload(self) -> None:
        """Fill the cache, if there is one. Processes forked afterwards share its pages, as nobody writes the arrays."""
        for index in range(len(self) if self._cache is not None else 0):
            self._read(index)

    def _read(self, index: int) -> Decoded:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        image, (raw, colours) = read_image(self.image_files[index]), read_mask(self.mask_files[index])
        if image.shape[:2] != raw.shape:
            raise self.size_error(index, image.shape, raw.shape)
        if self._cache is not None:
            image.flags.writeable = raw.flags.writeable = False
            self._cache[index] = image, raw, colours
        return image, raw, colours

    def size_error(self, index: int, image: Sequence[int], mask: Sequence[int]) -> DataError:
        """The error for an image and a mask whose shapes (H, W, …) differ."""
        mend = "give the mask the image's size; nothing is resized on reading"
        if tuple(mask[:2]) == (image[1], image[0]):
            mend = "the image's EXIF orientation turns it; turn the mask too, or strip the orientation and turn neither"
        return DataError(
            f"{self.mask_files[index]}: mask of {mask[1]}x{mask[0]} pixels (width x height)\n"
            f"expected {image[1]}x{image[0]}, as its image {self.image_files[index]}\n{mend}"
        )

    def label_error(self, index: int, raw: np.ndarray | None = None) -> DataError:
        """The error for a mask with ids out of range. `raw` is the whole mask; without it the file is read again."""
        file = self.mask_files[index]
        counts = np.bincount((read_mask(file)[0] if raw is None else raw).ravel(), minlength=256)
        bad = [int(value) for value in np.flatnonzero(counts * self._bad_raw)]
        found = "; ".join(f"id {value} in {counts[value]} pixels" for value in bad[:3])
        more = f"; {len(bad) - 3} more ids" if len(bad) > 3 else ""
        mend = self.mend or self._mend(bad, counts, file)
        return DataError(f"{file}: {found}{more}\nexpected {self._expected()}\n{mend}")

    def palette_error(self, index: int, raw: np.ndarray, colours: np.ndarray | None) -> DataError | None:
        """The error for a palette file whose indices number the recipe's colours in another order, or None.

        `colours`: RGB (N, 3), the file's own. Most must be the recipe's: a file that merely carries some tool's
        palette, PASCAL VOC's above all, may share a colour or two with the recipe by chance.
        """
        if colours is None or not self.palette_given:
            return None
        owner = {colour: train_id for train_id, colour in enumerate(self.palette)}
        counts = np.bincount(raw.ravel(), minlength=256)
        # Ignored ids, often 255, have no class: neither they nor the unused entries before them are evidence.
        last = int(np.flatnonzero((counts > 0) & (self.label_lut != IGNORED)).max(initial=-1))
        own = [(int(red), int(green), int(blue)) for red, green, blue in colours[: last + 1]]
        known, wrong = [], []
        for value, colour in enumerate(own):
            train_id = int(self.label_lut[value])
            if train_id == IGNORED:
                continue
            found = owner.get(colour)
            known.append(found is not None)
            if found is not None and counts[value] and found != train_id:
                wrong.append((value, self.classes[train_id], self.classes[found]))
        if not wrong or 2 * sum(known) <= len(known) or tuple(own) == default_palette(len(own)):
            return None
        value, read_as, shown_as = wrong[0]
        return DataError(
            f"{self.mask_files[index]}: id {value} ({read_as}) has the colour of {shown_as} in the file's own palette\n"
            f"expected indices that are class ids; this palette has data.palette's colours in another order\n"
            f"write class ids as indices, say where each belongs in data.raw_to_train, or leave out data.palette"
        )

    def _expected(self) -> str:
        count = len(self.classes)
        ignored = " or ".join(str(value) for value in sorted({self.ignore_index, IGNORED}))
        if self.raw_to_train is not None:
            return f"the {len(self.raw_to_train)} ids of data.raw_to_train, or {ignored} (ignored)"
        if self.reduce_zero_label:
            return f"ids 1..{count} ({count} classes, data.reduce_zero_label=true), 0 or {ignored} (ignored)"
        return f"ids 0..{count - 1} ({count} classes) or {ignored} (ignored)"

    def _mend(self, bad: Sequence[int], counts: np.ndarray, file: Path) -> str:
        """The likeliest cause: a mask is seldom wrong in one pixel, mostly it follows another convention."""
        if file.suffix.lower() in (".jpg", ".jpeg"):
            return "JPEG changes ids; store masks without loss, as PNG"
        if self.raw_to_train is not None:
            return f"add {bad[0]} to data.raw_to_train, with {IGNORED} if it is to be ignored"
        if bad == [len(self.classes)] and not self.reduce_zero_label:
            void = f"if {bad[0]} is void: data.ignore_index={bad[0]}"
            return f"if ids run from 1 to {bad[0]} and 0 is unlabelled: data.reduce_zero_label=true; {void}"
        if len(bad) == 1:
            return f"if {bad[0]} is void: data.ignore_index={bad[0]}; else name it in data.classes or data.raw_to_train"
        if len(bad) >= np.count_nonzero(counts) / 2:
            return "grey levels of a colour mask? write class ids; raw ids of a larger set? give data.raw_to_train"
        return "name their classes in data.classes, or say where each id belongs in data.raw_to_train"


def label_table(
    classes: int,
    ignore_index: int = IGNORED,
    reduce_zero_label: bool = False,
    raw_to_train: Mapping[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Two tables over the 256 raw ids: the train id (uint8, 255 = ignored) and whether the id means anything (bool).

    `reduce_zero_label` as in mmsegmentation: 0 is ignored and k becomes k-1. With `raw_to_train` only its keys are
    valid, and its values of 255 or `ignore_index` mean ignored. `ignore_index` and 255 are ignored in any case,
    unless `raw_to_train` names them.
    """
    table = np.full(256, IGNORED, np.uint8)
    valid = np.zeros(256, bool)
    valid[[ignore_index, IGNORED]] = True
    if raw_to_train is not None:
        for raw, train_id in raw_to_train.items():
            table[raw], valid[raw] = (IGNORED if train_id == ignore_index else train_id), True
        return table, valid
    first = int(reduce_zero_label)
    last = min(first + classes, IGNORED)
    table[first:last] = np.arange(last - first)
    valid[:last] = True  # with reduce_zero_label 0 too: it is ignored
    table[ignore_index] = IGNORED
    return table, valid


def pair_files(
    images: Path,
    masks: Path,
    image_suffixes: Sequence[str],
    mask_suffix: str,
    listed: Path | None = None,
    incomplete: list[DataError] | None = None,
) -> tuple[list[str], list[Path], list[Path], list[Path]]:
    """Names, image files and mask files of all pairs, sorted by name, and the mask files that no image claims.

    With a file of names, `listed`, only its pairs count, and no mask is spare: the others are another split's.
    Raises DataError for a folder that is missing or has no such file, for files of one name, for images without mask,
    and for listed names without image; of the last two `incomplete`, where it is given, is told instead.
    """
    mask_files = files_by_name(masks, [mask_suffix], "masks")
    # One folder may hold both, or the masks lie below the images: what counts as a mask is then no image.
    apart = set(mask_files.values()) if masks.is_relative_to(images) else set()
    image_files = files_by_name(images, image_suffixes, "images", apart)
    names = sorted(image_files) if listed is None else read_names(listed)
    # Spaces around a name are a part of it only where an image is named so.
    names = sorted({name if name in image_files else name.strip() for name in names})
    absent = [name for name in names if name not in image_files]
    if absent:
        error = DataError(
            f"{listed}: {len(absent)} of {len(names)} names have no image: {some(absent)}\n"
            f"expected {images / absent[0]} + one of {', '.join(image_suffixes)} for the first\n"
            "write names as paths below the image folder, without suffix; or add the images"
        )
        _raise_or_keep(error, incomplete)
    missing = [name for name in names if name not in mask_files]
    if missing:
        first = missing[0]
        near = [file.name for file in walk((masks / first).parent) if file.name.startswith(Path(first).name)]
        error = DataError(
            f"{images}: {len(missing)} of {len(names)} images have no mask: {some(missing)}\n"
            f"expected {masks / (first + mask_suffix)} for the first"
            + (f"; found {some(near)}: set data.mask_suffix to what follows the name" if near else "")
            + "\nadd the masks, remove the images, or correct data.mask_suffix and the masks' folder"
        )
        _raise_or_keep(error, incomplete)
    names = [name for name in names if name in image_files and name in mask_files]
    unused = sorted(file for name, file in mask_files.items() if name not in image_files and listed is None)
    return names, [image_files[name] for name in names], [mask_files[name] for name in names], unused


def _raise_or_keep(error: DataError, kept: list[DataError] | None) -> None:
    if kept is None:
        raise error
    kept.append(error)


def read_names(file: Path) -> list[str]:
    """The names in a list file, one a line, sorted. Raises DataError where it is missing, empty or no list of names.

    Names are taken as they are, with their spaces: only line feeds end a line, a carriage return before one is dropped.
    """
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file\nexpected the list of names, one a line") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason})\nexpected the list of names, one a line") from None
    names = sorted(line.removesuffix("\r") for line in lines if line.strip())
    twice = next((name for name, following in pairwise(names) if name == following), None)
    if twice is not None:
        raise DataError(f"{file}: {twice} is there twice\nexpected each name once\nremove the repeated lines")
    if not names:
        raise DataError(f"{file}: no names in this file\nexpected one name a line")
    return names


def files_by_name(folder: Path, suffixes: Sequence[str], kind: str, apart: Set[Path] = frozenset()) -> dict[str, Path]:
    """Files below `folder` that end in one of `suffixes`, but for `apart`, by their relative path without suffix."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder\nexpected the folder of {kind}\ncheck data.root and the folders below it"
        )
    endings = sorted((suffix.lower() for suffix in suffixes), key=len, reverse=True)  # _mask.png before .png
    found: dict[str, Path] = {}
    for path in walk(folder):
        ending = next((suffix for suffix in endings if path.name.lower().endswith(suffix)), None)
        if ending is None or path in apart:
            continue
        name = path.relative_to(folder).as_posix()[: -len(ending)]
        if name in found:
            pair = f"{found[name]} and {path}"
            raise DataError(f"{pair}: two {kind} of one name\nexpected one file a name\nremove or rename one")
        found[name] = path
    if not found:
        wanted = f"files ending in {', '.join(suffixes)}"
        raise DataError(f"{folder}: no {kind} in this folder\nexpected {wanted}\ncheck the folder and the suffixes")
    return found


def walk(folder: Path) -> Iterator[Path]:
    """Visible files below `folder`, in a fixed order. Links are followed, except back into a folder that holds them."""
    for where, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        here = Path(where).resolve()
        folders[:] = sorted(
            name for name in folders if name[0] != "." and not here.is_relative_to(Path(where, name).resolve())
        )
        yield from (Path(where, name) for name in sorted(files) if name[0] != ".")


def _raise(error: OSError) -> None:
    raise error


def some(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, for a message, and a sign that there are more."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
