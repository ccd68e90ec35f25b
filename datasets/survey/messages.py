"""Errors about folders in which no pairs were found, or several kinds of masks that fit equally well."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from ssaseg.datasets.base import DataError
from ssaseg.datasets.pairs import IMAGE_SUFFIXES, JPEG, first_names
from ssaseg.datasets.survey.choosing import Choice
from ssaseg.datasets.survey.found import Found
from ssaseg.datasets.survey.places import IMAGES, MASKS, TEXTS, Place, role_of
from ssaseg.files.text import printable

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


class NoMasks(DataError):
    """Images without any mask: labels may be in files that this room does not read."""


class TieError(DataError):
    """Several folders of masks, or of images, fit equally well. `pairs`: how many pairs each of them gives."""

    pairs = 0


def tie_error(root: Path, choice: Choice, equal: Sequence[Choice]) -> TieError:
    """The error where several folders of masks, or of images, fit equally well: it names both."""
    pairs = [next(iter(each.match.masks.items())) for each in (choice, *equal)]
    shown = [
        [each.folders[int(file.partition("/")[0])][at].folder for at, file in enumerate(pair)]
        for each, pair in zip((choice, *equal), pairs, strict=True)
    ]
    at = 1 if len({masks for _, masks in shown}) > 1 else 0
    kind = ("images", "masks")[at]
    names = sorted({each[at] for each in shown})
    where = " and ".join(printable(name) for name in names[:2]) + (
        f" and {len(names) - 2} more" if len(names) > 2 else ""
    )
    error = TieError(
        f"{root}: {where} hold {kind} that fit equally well ({choice.pairs} pairs each)\n"
        f"expected one folder of {kind} for each folder of {'masks' if at == 0 else 'images'}\n"
        f"choose it with `ssaseg data init DIR --{kind} {printable(names[0])}`, or write the folders in a recipe"
    )
    error.pairs = choice.pairs
    return error


def several_error(root: Path, found: Found) -> DataError:
    """The error where images have several masks that fit equally well. Only where `found.several` is not 0."""
    image, one, other = found.example or ("", "", "")
    stem, name = PurePosixPath(image).stem, PurePosixPath(one).name
    shared = next((at for at, (a, b) in enumerate(zip(stem, name, strict=False)) if a != b), len(stem))
    ending = name[len(stem[:shared].rstrip("_-. ") if shared < len(stem) else stem) :]
    return DataError(
        f"{root}: {found.several} images have several masks, such as {printable(one)} and {printable(other)}\n"
        "expected one mask of class ids for each image\n"
        f"merge the masks of each image into one; or choose one kind: --masks {printable(ending)}"
    )


def nothing_fits(root: Path, pictures: Mapping[Place, Sequence[str]], files: Sequence[PurePosixPath]) -> DataError:
    """The error where there is no pair: it names the reason if it is one of the commonest."""
    if not pictures:
        kinds = ", ".join(IMAGE_SUFFIXES)
        packed = next((file for file in files if file.suffix.lower() in ARCHIVES), None)
        fix = f"unpack {printable(str(packed))} first" if packed else "check the folder"
        return DataError(f"{root}: no images in this folder\nexpected files of {kinds}\n{fix}")
    masks = [(place, names) for place, names in pictures.items() if role_of(place.parts) == "masks"]
    images = [(place, names) for place, names in pictures.items() if role_of(place.parts) != "masks"]
    seen = first_names([f"{printable(place.folder)} ({len(names)})" for place, names in pictures.items()], 6)
    if jpeg := [(place, name) for place, names in masks for name in names if name.lower().endswith(JPEG)]:
        place, name = jpeg[0]
        return DataError(
            f"{root / place.folder / name}: a mask in JPEG format, which changes ids\n"
            "expected masks in a lossless format\n"
            "export them again as PNG, one byte a pixel: these files do not hold the ids any more"
        )
    if pair := _different_starts(pictures):
        one, other = pair
        suffix = other.suffix
        return DataError(
            f"{root / one} and {root / other}: the name of the mask does not start with the name of its image\n"
            f"expected the name of the image, optionally with an ending: {one.name} and {one.stem}_mask{suffix}\n"
            f"rename the masks, this one to {one.stem}_mask{suffix}; or write a list of pairs (data.train.pairs)"
        )
    if pair := _same_names(masks, images):
        return DataError(
            f"{root / pair[0]} and {root / pair[1]}: in folders of different scenes; no scene has images and masks\n"
            "expected the folders of images and masks in one folder for each scene\n"
            "move them; or, if they belong together, write a list of pairs (data.train.pairs)"
        )
    if masks and images:
        one, other = (PurePosixPath(group[0][0].folder, sorted(group[0][1])[0]) for group in (images, masks))
        return DataError(
            f"{root}: no mask has the name of an image: see {root / one} and {root / other}\n"
            f"expected the name of the image, optionally with an ending: X.jpg and X_mask.png; found {seen}\n"
            "rename the images or the masks, or write a list of pairs (data.train.pairs)"
        )
    fix = "add masks: PNG files of the same size as the image, whose pixels are class ids"
    stems = {name.rpartition(".")[0] for names in pictures.values() for name in names}
    if unread := next((file for file in files if file.stem in stems and file.suffix.lower() not in TEXTS), None):
        fix = f"{printable(str(unread))} has the name of an image, but {printable(unread.suffix)} is not read: {fix}"
    return NoMasks(
        f"{root}: images, but no masks; found {seen}\n"
        f"expected the mask beside its image (X.jpg, X_mask.png) or in a folder such as masks or annotations\n{fix}"
    )


def _same_names(
    masks: Sequence[tuple[Place, Sequence[str]]], images: Sequence[tuple[Place, Sequence[str]]]
) -> tuple[PurePosixPath, PurePosixPath] | None:
    """An image and a mask of one name, in folders that were not taken as a pair."""
    stems = {name.rpartition(".")[0]: PurePosixPath(*place.parts, name) for place, names in images for name in names}
    for place, names in masks:
        for name in names:
            if (stem := name.rpartition(".")[0]) in stems:
                return stems[stem], PurePosixPath(*place.parts, name)
    return None


def _different_starts(pictures: Mapping[Place, Sequence[str]]) -> tuple[PurePosixPath, PurePosixPath] | None:
    """An image and a mask whose names differ only in the first word, as img_0.jpg and mask_0.png."""
    seen: dict[str, PurePosixPath] = {}
    files = sorted(PurePosixPath(*place.parts, name) for place, names in pictures.items() for name in names)
    for role, pattern in (("images", IMAGES), ("masks", MASKS)):
        for file in files:
            parts = re.fullmatch(r"([^\W\d_]+)([\W\d_].*)", file.stem)
            if parts is None or not pattern.fullmatch(parts[1].lower()):
                continue
            if role == "images":
                seen.setdefault(parts[2], file)
            elif parts[2] in seen:
                return seen[parts[2]], file
    return None
