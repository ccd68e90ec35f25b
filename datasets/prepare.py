"""What `ssaseg data prepare` makes: linked images, and masks of class ids, one byte a pixel, file by file.

Nothing is written here: the command writes. The pixels come from `read` of a plan: those of a published data set, or of
a convention of annotation tools.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from ssaseg.datasets.base import IGNORED, DataError, default_palette, require_below
from ssaseg.datasets.decoding import header_size
from ssaseg.datasets.inspection import image_size
from ssaseg.datasets.pairs import files_by_name, first_names, read_names
from ssaseg.datasets.published import Layout
from ssaseg.datasets.workers import Work, read_ahead
from ssaseg.files.reading import open_file

if TYPE_CHECKING:
    from ssaseg.datasets.conventions.base import Source

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG file
NAMES = "class_dict.csv"  # the file of class names and colours, which `ssaseg data init` reads


@dataclass
class Plan:
    """Every file of a data set that can be made: its source and its target. The folders of targets may be missing."""

    read: Callable[[Any], np.ndarray]  # label -> ids to write, uint8 (H, W); raises DataError and OSError
    fix: str  # what to do where a mask has another size than its image
    own: bool = False  # whether it is a user's folder in a convention, with labels of type `Item`
    images: list[tuple[Path, Path]] = field(default_factory=list)  # source, target
    masks: list[tuple[Any, Path, Path]] = field(default_factory=list)  # label, target, source of the image
    lists: dict[Path, list[str]] = field(default_factory=dict)  # target, names
    texts: dict[Path, bytes] = field(default_factory=dict)  # target, content
    absent: list[Path] = field(default_factory=list)  # files that are missing in the download

    def __len__(self) -> int:
        """Number of files."""
        return len(self.images) + len(self.masks) + len(self.lists) + len(self.texts)

    def name(self, index: int) -> str:
        """The target of a mask, for messages."""
        return str(self.masks[index][1])


def plan_source(source: Source, root: Path) -> Plan:
    """What to make below `root` from a folder in a convention: images[/SPLIT], masks[/SPLIT] and the class names.

    Raises DataError where `root` holds files of something else, or two images would get the same name.
    """
    plan = Plan(source.read, "correct the annotation, or the image", own=True)
    divided = {item.split for item in source.items} != {"all"}
    taken: dict[tuple[str, str], Path] = {}
    for item in source.items:
        require_below(str(item.image), item.name)
        other = taken.setdefault((item.split, item.name), item.image)
        if other is not item.image:
            raise DataError(
                f"{other} and {item.image}: two images of the same name\n"
                f"expected one image a name: both would have the mask {item.name}.png\nrename one of them"
            )
        folder = item.split if divided else ""
        plan.images.append((item.image, root / "images" / folder / f"{item.name}{item.image.suffix}"))
        plan.masks.append((item, root / "masks" / folder / f"{item.name}.png", item.image))
    plan.texts[root / NAMES] = names_file(source.classes, source.palette)
    targets = {target for _, target in plan.images} | {target for _, target, _ in plan.masks}
    present = [file for part in ("images", "masks") for file in _files(root / part)]
    if strange := [file for file in present if file not in targets]:
        raise DataError(
            f"{root}: holds {len(strange)} files that are not made from this source: {strange[0]}\n"
            "expected a new folder, or one that the same command has made from the same files\n"
            "give another folder with --root, or remove this one"
        )
    return plan


def names_file(classes: Sequence[str], palette: Sequence[Sequence[int]] | None) -> bytes:
    """Content of the file of class names with their colours (None: default ones), in the order of the ids.

    Raises DataError for names that such a file cannot hold, and for more than 255 of them.
    """
    if len(classes) > IGNORED:
        raise DataError(f"{len(classes)} classes\nexpected at most {IGNORED}: a mask has one byte a pixel\nmerge some")
    bad = [name for name in classes if not name.strip() or not name.isprintable() or len(name) > 200]
    if bad or len(set(classes)) != len(classes):
        wrong = bad[0] if bad else next(name for name in classes if list(classes).count(name) > 1)
        expected = "names that differ, each on one line, of at most 200 characters"
        raise DataError(f"class name {wrong[:60]!r}: cannot be used\nexpected {expected}\nrename the class")
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    text.write("name,r,g,b\n")
    writer.writerows((name, *colour) for name, colour in zip(classes, palette or default_palette(classes), strict=True))
    return text.getvalue().encode()


def _files(folder: Path) -> Iterator[Path]:
    """Visible files below a folder that this command has made, or that may be missing."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def is_whole(mask: Path) -> bool:
    """Whether a PNG file exists and is complete: a file that another program wrote may be cut off."""
    try:
        with open_file(mask) as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # missing, or too short
        return False


class Made(NamedTuple):
    """The content of the PNG file of a mask, or the error, in three lines."""

    content: bytes
    wrong: str = ""  # "" where there is no error


def make_masks(plan: Plan, indices: Sequence[int], workers: int) -> Iterator[Made]:
    """Masks of `plan`, in the order of `indices`, made ahead by `workers` processes (0: in this process)."""
    return read_ahead(_MaskWork(plan), indices, workers)


class _MaskWork(Work):
    """Makes masks, in the main process or in a worker."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)  # type: ignore[arg-type]  # only `name` is used
        self.plan = plan

    def __getitem__(self, index: int) -> Made:
        self.note(index)
        label, _, image = self.plan.masks[index]
        try:
            ids = self.plan.read(label)
            # Where the header is not enough, the image may be rotated: only its pixels tell.
            size = header_size(image) or (image_size(image, True) if self.plan.own else None)
            if size and size != ids.shape:
                where = getattr(label, "label", label)
                where = image if self.plan.own and not isinstance(where, Path) else where
                raise DataError(
                    f"{where}: mask of {ids.shape[1]}x{ids.shape[0]} pixels (width x height)\n"
                    f"expected {size[1]}x{size[0]}, as its image {image}\n{self.plan.fix}"
                )
        except OSError as error:
            expected = "expected a file that can be read\ncopy or download it again"
            return Made(b"", f"{error.filename or image}: {error.strerror or error}\n{expected}")
        except DataError as error:
            return Made(b"", str(error))
        finally:
            self.note(-1)
        return Made(cv2.imencode(".png", ids)[1].tobytes())


# ---- what is on disk ---------------------------------------------------------------------------------------------


class Count(NamedTuple):
    """A split on disk."""

    images: int
    masks: int
    pairs: int
    published: int
    missing: list[str]  # for each kind of missing file: how many, and the first names


def count_pairs(layout: Layout, root: Path) -> dict[str, Count]:
    """Files below `root`, by split, and which of them are missing. Only lists of names are opened."""
    counts = {}
    for split, published in layout.counts.items():
        images = _names(root / layout.images[split], layout.image_suffix)
        masks = _names(root / layout.masks[split], layout.mask_suffix)
        missing = []
        if layout.lists is not None:
            file = root / layout.lists[split]
            names = set(read_names(file)) if file.is_file() else set()
            missing = [] if names else [f"the list {file}"]
            missing += _missing(names - images, "listed names have no image", names)
            images, masks = images & names, masks & names
        missing += _missing(images - masks, "images have no mask", images)
        missing += _missing(masks - images, "masks have no image", masks)
        counts[split] = Count(len(images), len(masks), len(images & masks), published, missing)
    return counts


def _names(folder: Path, suffix: str) -> set[str]:
    try:
        return set(files_by_name(folder, [suffix], "files"))
    except DataError:  # the folder is missing or has no such file: the other folders are still counted
        return set()


def _missing(names: Iterable[str], what: str, among: Iterable[str]) -> list[str]:
    found = sorted(names)
    return [f"{len(found)} of {len(set(among))} {what}: {first_names(found)}"] if found else []
