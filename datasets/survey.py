"""Find out the layout of a user's folder: where images and masks are, and how their names match.

Nothing here is certain: every guess comes with a note that says what was found, for the person who reads the recipe.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ssaseg.datasets.base import DataError
from ssaseg.datasets.pairs import IMAGE_SUFFIXES, first_names, read_names, walk
from ssaseg.datasets.prepare import count_pairs
from ssaseg.datasets.published import LAYOUTS

# Words in the names of folders, in lower case.
IMAGES = re.compile(r"images?|imgs?|jpe?gs?|jpegimages|pictures|photos|inputs?|rgb|leftimgbit")
MASKS = re.compile(
    r"masks?|annotations?|ann|labels?|labelids|gt|gtfine|groundtruth|segmentations?|segmentationclass(raw)?|semantic"
    r"|seg(map)?s?|targets?|(train|val|test)annot"
)
SPLITS = {
    "train": re.compile(r"train(ing|annot)?"),
    "val": re.compile(r"val(id|idation|annot)?|dev"),
    "test": re.compile(r"test(ing|annot)?"),
}
JPEG = (".jpg", ".jpeg")
# Files that show that a folder is the download of a published data set, which `ssaseg data prepare` reads.
RAW = {
    "cityscapes": "gtFine/*/*/*_gtFine_labelIds.png",
    "coco_stuff10k": "annotations/COCO_*.mat",
    "coco_stuff164k": "stuffthingmaps/train2017/*.png",
    "pascal_context_59": "trainval_merged.json",
}
# Published data sets whose folders have common names: they are recognised by their number of pairs too.
COMMON_FOLDERS = ("camvid", "voc2012")
# How many last words of image names are tried.
MOST_WORDS = 8
# With more folders than this, two folders whose names do not say "images" or "masks" are not tried as a pair.
MOST_UNNAMED = 20


@dataclass
class Found:
    """Where the pairs are, below a root: two folders for each split, or two folders for "all", which is split later."""

    folders: dict[str, tuple[str, str]]  # split -> folder of images, folder of masks
    mask_suffix: str
    image_suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    lists: dict[str, str] = field(default_factory=dict)  # split -> file of names
    notes: list[str] = field(default_factory=list)


class Place(NamedTuple):
    """A folder with pictures below it, and what its name says."""

    folder: PurePosixPath
    role: str | None  # "images", "masks"
    split: str | None  # "train", "val", "test"


# ---- folders -----------------------------------------------------------------------------------------------------


def find_folders(root: Path) -> Found:
    """Look for folders of images and masks below `root`.

    Roles and splits are read from the words in the names of folders. Among several candidates, and among several
    endings that the name of a mask adds to that of its image, the one with most pairs is chosen. Raises DataError where
    no images and masks match.
    """
    places = _places(root)
    matches = {}
    for split in ("train", "val", "test", None):
        here = {place: files for place, files in places.items() if place.split == split}
        if best := _best_pair(here):
            matches[split] = best
    if not matches:
        raise _nothing_fits(root, places)
    found = _choose_splits(matches)
    found.notes += _left_out(places, found)
    if "all" in found.folders:
        found.lists = _find_lists(root, places, found)
    return found


def _places(root: Path) -> dict[Place, list[str]]:
    """Picture files below `root`, as paths below the folder whose name says what they are."""
    places: dict[Place, list[str]] = {}
    for path in walk(root):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        relative = PurePosixPath(path.relative_to(root).as_posix())
        place = _read_place(relative.parent.parts)
        places.setdefault(place, []).append(relative.relative_to(place.folder).as_posix())
    return places


def _read_place(parts: Sequence[str]) -> Place:
    role, split, depth = None, None, 0
    for number, part in enumerate(parts, 1):
        bare = re.sub(r"\d", "", part.lower())
        words = {bare, *re.split(r"[\W_]+", bare)}
        if found := next((name for name, pattern in SPLITS.items() if any(map(pattern.fullmatch, words))), None):
            split, depth = found, number
        for kind, pattern in (("images", IMAGES), ("masks", MASKS)):  # "label_images" are labels
            if any(map(pattern.fullmatch, words)):
                role, depth = kind, number
    return Place(PurePosixPath(*parts[: depth or 1]), role, split)


class _Match(NamedTuple):
    """Two places that belong together, and the endings of their files after the part of the name that they share."""

    pairs: int
    images: Place
    masks: Place
    ending: str
    image_suffixes: tuple[str, ...]


def _best_pair(places: Mapping[Place, Sequence[str]]) -> _Match | None:
    """Of all combinations of two places the one whose names say most about their roles; if equal, with most pairs."""
    best, best_score = None, (0, 0)
    for images, image_files in places.items():
        for masks, mask_files in places.items():
            if images.role == "masks" or (masks.role == "images" and masks != images):
                continue
            if images.role is masks.role is None and masks != images and len(places) > MOST_UNNAMED:
                continue
            suffixes: tuple[str, ...] = IMAGE_SUFFIXES
            ending, pairs = _common_ending(image_files, mask_files, images == masks)
            if not pairs:
                ending, pairs, suffixes = _common_endings(image_files, mask_files, images == masks)
            score = ((images.role == "images") + (masks.role == "masks"), pairs)
            if pairs and score > best_score:
                best, best_score = _Match(pairs, images, masks, ending, suffixes), score
    return best


def _common_ending(images: Iterable[str], masks: Iterable[str], together: bool) -> tuple[str, int]:
    """The ending that most masks add to the name of an image without suffix, and the number of these masks.

    `together`: images and masks are the same files: a file is not its own mask. JPEG files are not taken as masks.
    """
    suffixes: dict[str, set[str]] = {}
    for file in images:
        stem, _, suffix = file.rpartition(".")
        suffixes.setdefault(stem, set()).add(suffix)
    endings: Counter[str] = Counter()
    for file in masks:
        if file.lower().endswith(JPEG):
            continue
        stem, _, suffix = file.rpartition(".")
        # Not within a word or number: 10.png is not the mask of 1.png.
        for at in (match.start() for match in re.finditer(r"[\W_]", file)):
            if file[:at] in suffixes and not (together and at == len(stem) and suffixes[stem] == {suffix}):
                endings[file[at:]] += 1
    return endings.most_common(1)[0] if endings else ("", 0)


def _common_endings(images: Iterable[str], masks: Iterable[str], together: bool) -> tuple[str, int, tuple[str, ...]]:
    """As `_common_ending`, where image names end in a word too, as in 0_image.jpg and 0_mask.png; and the endings of
    the images, with that word.

    The word must say that it is an image, or the mask's word that it is a mask. In one folder it must be the mask's
    word, as X_depth.png is not a mask.
    """
    by_word: dict[str, list[str]] = {}
    for file in images:
        if last := re.search(r"[\W_][^\W_]*[^\W\d_][^\W_]*(?=\.[^.]+$)", file):
            by_word.setdefault(last[0], []).append(file)
    best: tuple[str, int, tuple[str, ...]] = ("", 0, ())
    best_score = (0, 0)
    # Only the commonest words: names that all end in different words show nothing.
    for word, files in sorted(by_word.items(), key=lambda item: -len(item[1]))[:MOST_WORDS]:
        bare = [file[: -len(suffix)].removesuffix(word) + suffix for file, suffix in _with_suffix(files)]
        own = set(files)
        ending, pairs = _common_ending(bare, (file for file in masks if file not in own), False)
        image_says, mask_says = (
            any(map(pattern.fullmatch, re.split(r"[\W_]+", text.lower())))
            for pattern, text in ((IMAGES, word), (MASKS, ending))
        )
        score = (image_says + mask_says, pairs)
        if pairs and (mask_says or (image_says and not together)) and score > best_score:
            best_score = score
            best = ending, pairs, tuple(sorted({word + suffix for _, suffix in _with_suffix(files)}))
    return best


def _with_suffix(files: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((file, PurePosixPath(file).suffix) for file in files)


def _choose_splits(matches: Mapping[str | None, _Match]) -> Found:
    """Folders of training and validation; or the folders with most pairs as "all", where one of the two is missing."""
    second = next((split for split in ("val", "test") if split in matches), None)
    if "train" not in matches or second is None:
        split, match = max(matches.items(), key=lambda item: item[1].pairs)
        notes = [] if split is None else [f"the only split found is {split}: it is divided into two"]
        if len(matches) > 1:
            notes = [f"no folders of training and validation: {match.images.folder} has most pairs and is divided"]
        return Found({"all": _folders(match)}, match.ending, match.image_suffixes, notes=notes)
    train, val = matches["train"], matches[second]
    if train.ending != val.ending:
        raise DataError(
            f"{train.masks.folder} has masks that end in {train.ending}, {val.masks.folder} in {val.ending}\n"
            "expected the same ending, as a recipe has one data.mask_suffix\nrename the masks of one of them"
        )
    notes = [] if second == "val" else ["no validation folder: the test images, which have masks, are used instead"]
    suffixes = train.image_suffixes + tuple(each for each in val.image_suffixes if each not in train.image_suffixes)
    return Found({"train": _folders(train), "val": _folders(val)}, train.ending, suffixes, notes=notes)


def _folders(match: _Match) -> tuple[str, str]:
    return str(match.images.folder), str(match.masks.folder)


def _left_out(places: Mapping[Place, Sequence[str]], found: Found) -> list[str]:
    used = {folder for pair in found.folders.values() for folder in pair}
    others = sorted(str(place.folder) for place in places if str(place.folder) not in used)
    return [f"other folders with pictures, not used: {first_names(others, 6)}"] if others else []


def _find_lists(root: Path, places: Mapping[Place, Sequence[str]], found: Found) -> dict[str, str]:
    """train.txt and val.txt in one folder, as in PASCAL VOC's ImageSets, where all of their names belong to images."""
    images = found.folders["all"][0]
    stems = {
        file.rpartition(".")[0] for place, files in places.items() if str(place.folder) == images for file in files
    }
    for train in (path for path in walk(root) if path.name == "train.txt"):
        pair = {"train": train, "val": train.with_name("val.txt")}
        try:
            fits = all(stems & {name, name.strip()} for file in pair.values() for name in read_names(file))
        except (DataError, OSError):  # not a list of names
            continue
        if fits:
            found.notes.append(f"the splits are those of {train.parent.relative_to(root)}/train.txt and val.txt")
            return {split: file.relative_to(root).as_posix() for split, file in pair.items()}
    return {}


def split_names(names: Sequence[str]) -> dict[str, list[str]]:
    """A fifth of the names for validation: those with the lowest hashes. The order of the names changes nothing.

    Neither split is empty; a single name is in both.
    """
    order = sorted(names, key=lambda name: (zlib.crc32(name.encode(errors="surrogateescape")), name))
    val = order[: max(round(len(order) / 5), 1)]
    return {"train": sorted(order[len(val) :] or val), "val": sorted(val)}


def _nothing_fits(root: Path, places: Mapping[Place, Sequence[str]]) -> DataError:
    """The error where there is no pair: it names the reason if it is one of the commonest."""
    if not places:
        kinds = ", ".join(IMAGE_SUFFIXES)
        return DataError(f"{root}: no images in this folder\nexpected files of {kinds}\ncheck the folder")
    masks = [(place, files) for place, files in places.items() if place.role == "masks"]
    images = [(place, files) for place, files in places.items() if place.role != "masks"]
    seen = first_names([f"{place.folder} ({len(files)})" for place, files in places.items()], 6)
    if any(file.lower().endswith(JPEG) for _, files in masks for file in files):
        place, files = masks[0]
        return DataError(
            f"{root / place.folder / files[0]}: a mask in JPEG format, which changes ids\n"
            "expected masks in a lossless format\nwrite them as PNG, one byte a pixel"
        )
    if pair := _different_starts(root, places):
        one, other = pair
        return DataError(
            f"{one} and {other}: the name of the mask does not start with the name of its image\n"
            f"expected the name of the image, optionally with an ending: {one.name} and {one.stem}_mask{other.suffix}\n"
            f"rename the masks, this one to {one.stem}_mask{other.suffix}"
        )
    if masks and images:
        one, other = (Path(root, places[0].folder, sorted(places[1])[0]) for places in (images[0], masks[0]))
        return DataError(
            f"{root}: no mask has the name of an image: see {one} and {other}\n"
            f"expected the name of the image, optionally with an ending: X.jpg and X_mask.png; found {seen}\n"
            "rename the images or the masks"
        )
    fix = "add masks: PNG files of the same size as the image, whose pixels are class ids"
    if any(path.suffix == ".json" for path in walk(root)):
        fix = "for COCO-format JSON files, write a recipe with data.dataset: coco_json"
    return DataError(
        f"{root}: images, but no masks; found {seen}\n"
        f"expected the mask beside its image (X.jpg, X_mask.png) or in a folder such as masks or annotations\n{fix}"
    )


def _different_starts(root: Path, places: Mapping[Place, Sequence[str]]) -> tuple[Path, Path] | None:
    """An image and a mask whose names differ only in the first word, as img_0.jpg and mask_0.png."""
    seen: dict[str, Path] = {}
    files = sorted(place.folder / file for place, names in places.items() for file in names)
    for role, pattern in (("images", IMAGES), ("masks", MASKS)):
        for file in files:
            parts = re.fullmatch(r"([^\W\d_]+)([\W\d_].*)", file.stem)
            if parts is None or not pattern.fullmatch(parts[1].lower()):
                continue
            if role == "images":
                seen.setdefault(parts[2], root / file)
            elif parts[2] in seen:
                return seen[parts[2]], root / file
    return None


# ---- published data sets -----------------------------------------------------------------------------------------


def find_published(root: Path) -> tuple[str | None, list[str]]:
    """The published data set that is complete in `root`, or None; and notes about folders that only look like one."""
    notes = []
    for name, layout in LAYOUTS.items():
        folders = [root / each[split] for each in (layout.images, layout.masks) for split in layout.counts]
        if not all(folder.is_dir() for folder in folders):
            continue
        counts = count_pairs(layout, root)
        if all(count.pairs == count.published for count in counts.values()):
            return name, []
        if name in COMMON_FOLDERS:
            continue
        found, published = ("+".join(str(count[key]) for count in counts.values()) for key in (2, 3))
        notes.append(
            f"not read as {name}, although the folders have its names: they hold {found} pairs, not {published}; "
            f"if these are a part of {name}, write data: {{dataset: {name}, root: ...}}"
        )
    return None, notes


def require_prepared(root: Path) -> None:
    """Raises DataError where `root` is the download of a data set that has to be prepared before it is read."""
    for name, pattern in RAW.items():
        if file := next(root.glob(pattern), None):
            raise DataError(
                f"{root}: this is the download of {name}: it holds {file.relative_to(root)}\n"
                f"expected the prepared layout, with all of its files\n"
                f"run `ssaseg data prepare {name} --source {root}`"
            )
