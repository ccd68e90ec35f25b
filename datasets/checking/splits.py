"""What is seen only when the training and the validation split are compared, and what validation needs of an image."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

from ssaseg.datasets.base import Dataset, Problem
from ssaseg.datasets.pairs import first_names
from ssaseg.datasets.transforms import input_sizes
from ssaseg.files.listing import real_path, texts_of
from ssaseg.files.reading import open_file

BLOCK = 2**16  # bytes at the end of a file, which are compared before its whole content


def shared_images(train: Dataset, val: Dataset, content: bool = False) -> Iterator[Problem]:
    """A warning where images are in both splits: the same files, or with `content` also files of the same content.

    Files of different sizes are not read; those of one size are read as a whole only where their ends are equal.
    """
    folders: dict[str, str] = {}
    known = {real_path(file, folders) for file in texts_of(train.image_files)}
    same = {index for index, file in enumerate(texts_of(val.image_files)) if real_path(file, folders) in known}
    if content:
        left = {index: file for index, file in enumerate(val.image_files) if index not in same}
        same |= _equal(train.image_files, left)
    if same:
        count, names = len(same), first_names([val.name(index) for index in sorted(same)])
        verb = "image is a training image" if count == 1 else "images are training images"
        yield Problem(
            "warning",
            f"{count} of {len(val)} validation {verb} too: {names}; their score says nothing about new images\n"
            "remove them from one of the splits",
            "images in both splits",
        )


def _equal(train: Sequence[Path], val: Mapping[int, Path]) -> set[int]:
    """Which of the files `val` have the content of a file in `train`."""
    left: dict[Path, tuple[Hashable, ...]] = dict.fromkeys([*train, *val.values()], ())
    steps: tuple[Callable[[Path], Hashable], ...] = (_size, _end, _checksum)
    for step in steps:
        for file, known in left.items():
            left[file] = (*known, step(file))
        theirs = {left[file] for file in train if file in left}
        chosen = {left[file] for file in val.values() if file in left} & theirs
        left = {file: key for file, key in left.items() if key in chosen and None not in key}
    return {index for index, file in val.items() if file in left}


def _size(file: Path) -> int | None:
    """None for a file that cannot be read, which is reported elsewhere."""
    try:
        return os.stat(file).st_size
    except OSError:
        return None


def _end(file: Path) -> bytes | None:
    return _digest(file, BLOCK)


def _checksum(file: Path) -> bytes | None:
    return _digest(file, None)


def _digest(file: Path, last: int | None) -> bytes | None:
    """Checksum of a file, or of its `last` bytes."""
    total = blake2b(digest_size=16)
    try:
        with open_file(file) as opened:
            if last is not None:
                opened.seek(max(os.fstat(opened.fileno()).st_size - last, 0))
            while block := opened.read(2**20):
                total.update(block)
    except OSError:
        return None
    return total.digest()


def too_small(
    sizes: Mapping[tuple[int, int], str],
    least: int,
    scale: Sequence[int] | None,
    multiple: int | None,
    ratios: Sequence[float],
) -> Iterator[Problem]:
    """An error for each size of image of which the network's input would have a side of less than `least` pixels.

    sizes: (height, width) -> the name of an image of this size. scale, multiple, ratios: see `scaled_inputs`.
    """
    for (height, width), name in sizes.items():
        inputs = input_sizes((height, width), scale, multiple, ratios)
        low, wide = min(inputs, key=min)
        if min(low, wide) < least:
            yield Problem(
                "error",
                f"{name}: too small for validation: {width}x{height} pixels give the network {wide}x{low} "
                f"(test.scale={_text(scale)}, test.multiple={_text(multiple)})\n"
                f"expected {least}x{least} or more\nremove the image, or set test.multiple={least}",
                "images that are too small",
            )


def _text(value: Sequence[int] | int | None) -> str:
    return "null" if value is None else str(list(value) if isinstance(value, Sequence) else value)
