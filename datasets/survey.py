"""Find out how somebody's own folder is laid out: where images and masks are, what pairs them, what the ids mean.

Nothing here is certain: every guess comes with a note that says what was seen, for the person who reads the recipe.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ssaseg.datasets import IGNORED, DataError
from ssaseg.datasets.pairs import IMAGE_SUFFIXES, read_names, some, walk

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
NAME_FILES = ("classes.txt", "labels.txt", "labelmap.txt", "label_map.txt", "class_names.txt", "class_dict.csv")
JPEG = (".jpg", ".jpeg")
# More ids than this are the grey levels of a picture rather than classes.
MOST_IDS = 200
# Of more folders than these without a telling name, not every two are compared.
MOST_UNNAMED = 20


@dataclass
class Found:
    """Where the pairs are, below a root: one pair of folders a split, or one of them all, "all", still to be split."""

    folders: dict[str, tuple[str, str]]  # split -> folder of images, folder of masks
    mask_suffix: str
    lists: dict[str, str] = field(default_factory=dict)  # split -> file of names
    notes: list[str] = field(default_factory=list)


class Place(NamedTuple):
    """A folder that pictures lie below, and what its name says."""

    folder: PurePosixPath
    role: str | None  # "images", "masks"
    split: str | None  # "train", "val", "test"


@dataclass
class Labels:
    """What raw ids are taken to mean: keys of a recipe's data section, and why."""

    classes: list[str]
    raw_ids: list[int]  # one a class
    reduce_zero_label: bool = False
    raw_to_train: dict[int, int] | None = None
    palette: list[tuple[int, int, int]] | None = None
    notes: list[str] = field(default_factory=list)


class Names(NamedTuple):
    """Class names that a file gives, by the id that it gives or by line, and their colours, if it has any."""

    file: Path
    names: dict[int, str]
    colours: dict[int, tuple[int, int, int]]
    numbered: bool  # whether the file gives the ids


# ---- folders -----------------------------------------------------------------------------------------------------


def find_folders(root: Path) -> Found:
    """Look for folders of images and masks below `root`.

    Roles and splits are read from the words in folders' names; which of several candidates it is, and what a mask's
    name has behind its image's, is decided by the number of pairs. Raises DataError where nothing fits together.
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
    """Two places that belong together, and what their masks' names have behind their images'."""

    pairs: int
    images: Place
    masks: Place
    ending: str


def _best_pair(places: Mapping[Place, Sequence[str]]) -> _Match | None:
    """Of all pairs of places the one whose names say most, then the one of most pairs."""
    best, best_score = None, (0, 0)
    for images, image_files in places.items():
        for masks, mask_files in places.items():
            if images.role == "masks" or (masks.role == "images" and masks != images):
                continue
            if images.role is masks.role is None and masks != images and len(places) > MOST_UNNAMED:
                continue
            ending, pairs = _common_ending(image_files, mask_files, images == masks)
            score = ((images.role == "images") + (masks.role == "masks"), pairs)
            if pairs and score > best_score:
                best, best_score = _Match(pairs, images, masks, ending), score
    return best


def _common_ending(images: Iterable[str], masks: Iterable[str], together: bool) -> tuple[str, int]:
    """What most masks' names have behind an image's name without suffix, and how many have it.

    `together`: images and masks are the same files, so that a file is not its own mask. JPEG files are no masks.
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


def _choose_splits(matches: Mapping[str | None, _Match]) -> Found:
    """Training and validation folders; or the largest part as "all", where there is no second."""
    second = next((split for split in ("val", "test") if split in matches), None)
    if "train" not in matches or second is None:
        split, match = max(matches.items(), key=lambda item: item[1].pairs)
        notes = [] if split is None else [f"the only split found is {split}: it is split again"]
        if len(matches) > 1:
            notes = [f"no folders of training and validation: {match.images.folder} has most pairs and is split"]
        return Found({"all": _folders(match)}, match.ending, notes=notes)
    train, val = matches["train"], matches[second]
    if train.ending != val.ending:
        raise DataError(
            f"{train.masks.folder} has masks that end in {train.ending}, {val.masks.folder} in {val.ending}\n"
            "expected one ending, as a recipe has one data.mask_suffix\nrename the masks of one of them"
        )
    notes = [] if second == "val" else ["no validation folder: the test images, which have masks, are taken for it"]
    return Found({"train": _folders(train), "val": _folders(val)}, train.ending, notes=notes)


def _folders(match: _Match) -> tuple[str, str]:
    return str(match.images.folder), str(match.masks.folder)


def _left_out(places: Mapping[Place, Sequence[str]], found: Found) -> list[str]:
    used = {folder for pair in found.folders.values() for folder in pair}
    others = sorted(str(place.folder) for place in places if str(place.folder) not in used)
    return [f"other folders with pictures, left out: {some(others, 6)}"] if others else []


def _find_lists(root: Path, places: Mapping[Place, Sequence[str]], found: Found) -> dict[str, str]:
    """train.txt and val.txt of one folder, as PASCAL VOC's ImageSets, where each of their names is an image's."""
    images = found.folders["all"][0]
    stems = {
        file.rpartition(".")[0] for place, files in places.items() if str(place.folder) == images for file in files
    }
    for train in (path for path in walk(root) if path.name == "train.txt"):
        pair = {"train": train, "val": train.with_name("val.txt")}
        try:
            fits = all(stems.issuperset(read_names(file)) for file in pair.values())
        except DataError:  # some other list
            continue
        if fits:
            found.notes.append(f"the splits are those of {train.parent.relative_to(root)}/train.txt and val.txt")
            return {split: file.relative_to(root).as_posix() for split, file in pair.items()}
    return {}


def split_names(names: Sequence[str]) -> dict[str, list[str]]:
    """A fifth of the names for validation, those of the lowest hashes: the same at every call, whatever their order.

    Neither part is empty; a single name is in both.
    """
    order = sorted(names, key=lambda name: (zlib.crc32(name.encode(errors="surrogateescape")), name))
    val = order[: max(round(len(order) / 5), 1)]
    return {"train": sorted(order[len(val) :] or val), "val": sorted(val)}


def _nothing_fits(root: Path, places: Mapping[Place, Sequence[str]]) -> DataError:
    """Why there is no pair: the commonest reasons by name."""
    if not places:
        kinds = ", ".join(IMAGE_SUFFIXES)
        return DataError(f"{root}: no images here\nexpected files of {kinds}\ncheck the folder")
    masks = [(place, files) for place, files in places.items() if place.role == "masks"]
    images = [(place, files) for place, files in places.items() if place.role != "masks"]
    seen = some([f"{place.folder} ({len(files)})" for place, files in places.items()], 6)
    if any(file.lower().endswith(JPEG) for _, files in masks for file in files):
        place, files = masks[0]
        return DataError(
            f"{root / place.folder / files[0]}: a mask as JPEG, which changes ids\n"
            "expected masks stored without loss\nwrite them as PNG, one byte a pixel"
        )
    if masks and images:
        one, other = (Path(root, places[0].folder, sorted(places[1])[0]) for places in (images[0], masks[0]))
        return DataError(
            f"{root}: no mask is named as an image, such as {one} and {other}\n"
            f"expected a mask to have its image's name, and perhaps an ending: X.jpg and X_mask.png; found {seen}\n"
            "rename one side"
        )
    mend = "masks are PNG files of the image's size, whose pixels are class ids"
    if any(path.suffix == ".json" for path in walk(root)):
        mend = "COCO-format JSON is read by a recipe with data.dataset: coco_json"
    return DataError(
        f"{root}: images, but no masks; found {seen}\n"
        f"expected each image's mask beside it (X.jpg, X_mask.png) or in a folder such as masks or annotations\n{mend}"
    )


# ---- ids ---------------------------------------------------------------------------------------------------------


def guess_labels(ids: Sequence[int], names: Names | None, palette: bytes | None) -> Labels:
    """What the raw ids that occur (sorted) are taken to mean.

    `palette`: RGB triples that all mask files share, or None. Raises DataError where the ids cannot be classes.
    """
    present = [value for value in ids if value != IGNORED]
    if len(ids) > MOST_IDS:
        raise DataError(
            f"the masks hold {len(ids)} different values: grey levels of a picture rather than class ids\n"
            f"expected one small number a class\nwrite class ids 0, 1, 2, … without smoothing"
        )
    labels = None if names is None else _named(present, names)
    if labels is None:
        labels = _unnamed(list(ids), present)
        if names is not None:
            labels.notes.append(f"{names.file.name} is not used: its {len(names.names)} names do not fit the ids")
    if len(labels.classes) < 2:
        raise DataError(
            f"the masks hold one class, id {some([str(value) for value in ids])}: there is nothing to tell apart\n"
            "expected 2 classes or more\ngive background a class id of its own"
        )
    if IGNORED in ids and IGNORED not in labels.raw_ids:
        labels.notes.append("255 is in the masks: taken as 'ignored', its usual meaning")
    if names is not None and names.colours.keys() >= set(labels.raw_ids):
        labels.palette = [names.colours[value] for value in labels.raw_ids]
    elif palette is not None and 3 * max(labels.raw_ids) < len(palette):
        colours = [tuple(palette[3 * value : 3 * value + 3]) for value in labels.raw_ids]
        # Equal colours would say nothing: a palette that was never filled in.
        if len(set(colours)) == len(colours):
            labels.palette = [(r, g, b) for r, g, b in colours]
            labels.notes.append("colours: the palette of the mask files")
    return labels


def _named(present: Sequence[int], names: Names) -> Labels | None:
    """Labels as a file of names has them, or None where it does not fit."""
    given = {value: name for value, name in names.names.items() if value != IGNORED}
    note = f"class names: {names.file.name}"
    if names.numbered:
        ids = sorted({*given, *present})
        unnamed = [str(value) for value in present if value not in given]
        notes = [note] + ([f"ids that it does not name: {some(unnamed, 10)}"] if unnamed else [])
        classes = [given.get(value, f"class_{value}") for value in ids]
        return _with_map(Labels(classes, ids, notes=notes))
    count = len(given)
    if all(value < count for value in present):
        return Labels(list(given.values()), list(range(count)), notes=[note])
    if max(present) == count:
        reason = f"0 is taken as 'ignored': {names.file.name} has {count} names, and ids go up to {count}"
        return Labels(list(given.values()), list(range(1, count + 1)), True, notes=[note, reason])
    return None


def _unnamed(ids: Sequence[int], present: Sequence[int]) -> Labels:
    if ids == [0, IGNORED]:
        note = "0 and 255 are the only ids: taken as two classes, not as a class and 'ignored'"
        return Labels(["class_0", "class_255"], [0, IGNORED], raw_to_train={0: 0, IGNORED: 1}, notes=[note])
    labels = Labels([f"class_{value}" for value in present], list(present))
    labels.notes.append("class names are made up, from the ids: write the real ones")
    if present and present == list(range(1, len(present) + 1)):
        labels.reduce_zero_label = True
        labels.notes.append("ids run from 1 and 0 is nowhere: 0 is taken as 'ignored' (reduce_zero_label)")
        return labels
    if 0 in present:
        labels.notes.append("0 is taken as a class; if it means 'unlabelled', map it to 255 in raw_to_train")
    return _with_map(labels)


def _with_map(labels: Labels) -> Labels:
    """With `raw_to_train`, where the ids do not run on from 0."""
    if labels.raw_ids != list(range(len(labels.raw_ids))):
        labels.raw_to_train = {raw: train_id for train_id, raw in enumerate(labels.raw_ids)}
        labels.notes.append(f"the ids have gaps or start late: raw_to_train numbers them 0..{len(labels.raw_ids) - 1}")
    return labels


def read_class_names(root: Path) -> Names | None:
    """Class names from a file such as classes.txt in `root`: one name a line, perhaps with an id or a colour.

    Understood are `name`, `3 name`, `3: name`, CVAT's `name:R,G,B:…` and `name,R,G,B`. None where there is no such
    file, or it cannot be read as one.
    """
    for file in (root / name for name in NAME_FILES):
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError):
            continue
        lines = [line for line in lines if line and line[0] != "#" and not re.match(r"name\s*,\s*r\s*,", line)]
        if lines:
            return _parse_names(file, lines)
    return None


def _parse_names(file: Path, lines: Sequence[str]) -> Names:
    colours: dict[int, tuple[int, int, int]] = {}
    names: dict[int, str] = {}
    matches = [re.fullmatch(r"(\d+)\s*[:;,\s]\s*(.+)", line) for line in lines]
    numbered = all(match is not None and int(match[1]) < 256 for match in matches)
    for number, (line, match) in enumerate(zip(lines, matches, strict=True)):
        key, name = (int(match[1]), match[2]) if numbered and match else (number, line)
        if colour := re.fullmatch(r"(.+?)\s*[:,;]\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\b.*", name):
            name, rgb = colour[1], tuple(min(int(part), 255) for part in colour.groups()[1:])
            colours[key] = rgb[0], rgb[1], rgb[2]
        names[key] = f"{name}_{key}" if name in names.values() else name
    return Names(file, names, colours, numbered)
