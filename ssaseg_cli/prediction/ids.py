"""Ids of images and categories in `rle.json`: made from names, or those of a COCO-format file."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.sources import EXAMPLES, Source
from ssaseg.cli.printing import echo
from ssaseg.datasets.annotations import read_ids
from ssaseg.files.text import printable


class Ids(NamedTuple):
    """Numbers of images and categories in `rle.json`."""

    images: Mapping[str, int] | None = None  # by the path below the INPUT; None: made from it
    categories: Sequence[int | None] | None = None  # of each class, None: it is left out; None: the class numbers

    def image(self, name: str) -> int:
        """The id of an image. One that is made depends on its path alone, so that it is the same in each run."""
        if self.images is not None:
            return self.images[name]
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") >> 11  # 53 bits, which any JSON reader keeps

    def category(self, index: int) -> int | None:
        """The id of a class."""
        return index if self.categories is None else self.categories[index]


def ids_of(annotations: Path, sources: Sequence[Source]) -> dict[str, int]:
    """Ids of the sources' images in a COCO-format file: by the path below the INPUT, or else by the file's name alone
    where only one image there has it. Raises CommandError for images that it does not list, DataError for such a file.
    """
    known = read_ids(annotations).images
    alone: dict[str, int | None] = {}
    for name, number in known.items():
        base = name.rpartition("/")[2]
        alone[base] = None if base in alone else number
    found = {each.relative: known.get(each.relative, alone.get(each.relative.rpartition("/")[2])) for each in sources}
    if missing := [name for name, number in found.items() if number is None]:
        names = ", ".join(map(printable, missing[:EXAMPLES])) + ", …" * (len(missing) > EXAMPLES)
        what = f"has no id for {len(missing)} of {len(found)} images: {names}"
        raise CommandError(f"--annotations {printable(str(annotations))}: {what}\nexpected each of them in `images`")
    return {name: number for name, number in found.items() if number is not None}


def categories_of(annotations: Path, classes: Sequence[str]) -> list[int | None]:
    """Ids of the categories with the classes' names in a COCO-format file; classes that it does not have are reported.

    Raises CommandError if it has none of them, DataError for a file that is not in COCO format.
    """
    known = {name.strip().casefold(): number for name, number in read_ids(annotations).categories.items()}
    found = [known.get(name.strip().casefold()) for name in classes]
    missing = [name for name, number in zip(classes, found, strict=True) if number is None]
    names = ", ".join(map(printable, missing[:EXAMPLES])) + ", …" * (len(missing) > EXAMPLES)
    if len(missing) == len(classes):
        expected = "expected categories with the names of the classes"
        raise CommandError(f"--annotations {printable(str(annotations))}: has no category {names}\n{expected}")
    if missing:
        echo(f"note: {len(missing)} classes are no categories there and not in rle.json: {names}", err=True)
    return found
