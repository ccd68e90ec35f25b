"""Find out the layout of a user's folder: where images and masks are, and how their names match.

Nothing here is certain: every guess comes with a note that says what was found, for the person who reads the recipe.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ssaseg.datasets.base import DataError
from ssaseg.datasets.pairlist import choose_splits
from ssaseg.datasets.pairs import IMAGE_SUFFIXES, first_names
from ssaseg.datasets.survey.choosing import Choice, choose
from ssaseg.datasets.survey.found import Found, Paths
from ssaseg.datasets.survey.lists import find_name_lists, find_pair_lists, why_unread
from ssaseg.datasets.survey.messages import nothing_fits, tie_error
from ssaseg.datasets.survey.places import FOLD, TRAINVAL, Place, read_place, role_of
from ssaseg.datasets.survey.published import is_segnet_camvid
from ssaseg.files.listing import walk_below

# Files that are searched for images and masks.
PICTURES = (*IMAGE_SUFFIXES, ".ppm", ".pgm", ".pbm", ".pnm")

Names = dict[Place, list[str]]  # names of the pictures in each folder


def find_folders(root: Path, images: str | None = None, masks: str | None = None, jpeg: bool = False) -> Found:
    """Look for images and masks below `root`: in lists of pairs first, then in folders.

    Roles and splits are read from the words in the names of folders. Of several candidates the one is chosen whose
    names say most, then the one with the better kind of masks (ids before colours), then the one with most pairs.
    images: the folder of the images, where the user names it; masks: that of the masks, or the ending of their names.
    `jpeg`: masks may be JPEG files. Raises DataError where no images and masks match, or several match equally well.
    """
    pictures, files = _list_files(root)
    pictures, notes = _one_fold(pictures)
    given = images is not None or masks is not None
    if not given and (listed := find_pair_lists(root, files, sum(map(len, pictures.values())))):
        _note_folders(listed)
        _note_published(listed, listed.pairs)
        return listed
    chosen = _named(root, pictures, images, "--images"), _named(root, pictures, masks, "--masks")
    choice, equal = choose(*chosen, given, jpeg)
    if choice is None:
        raise why_unread(root, files) or nothing_fits(root, pictures, files)
    if equal:
        raise tie_error(root, choice, equal)
    pairs, alone = _pairs(choice), _unpaired(choice, pictures)
    found = _to_found(choice, pairs, alone)
    found.notes += notes
    if "all" in (found.folders or found.pairs):
        _use_lists(root, found, files, pairs.values(), alone)
    _note_folders(found)
    _note_published(found, pairs)
    found.notes += _unused_folders(pictures, found)
    return found


def _list_files(root: Path) -> tuple[Names, list[PurePosixPath]]:
    """The pictures in each folder, and the paths of all other files below the root."""
    pictures: Names = defaultdict(list)
    others: list[PurePosixPath] = []
    places: dict[str, Place] = {}
    for file in walk_below(root):
        folder, _, name = file.rpartition("/")
        if _suffix(name) not in PICTURES:
            others.append(PurePosixPath(file))
            continue
        if folder not in places:
            places[folder] = read_place(PurePosixPath(folder).parts)
        pictures[places[folder]].append(name)
    return pictures, others


def _suffix(name: str) -> str:
    """In lower case, as in Path.suffix."""
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""


def _one_fold(pictures: Names) -> tuple[Names, list[str]]:
    """Without folders that would put validation images into training: of the folds of a cross-validation, all but the
    first, and `trainval` where `train` exists too. Folds without splits stay: each image is in one of them only.
    """
    both = [place for place in pictures if any(map(TRAINVAL.search, place.parts))]
    if both and any(place.split == "train" for place in pictures.keys() - set(both)):
        kept = {place: names for place, names in pictures.items() if place not in both}
        return kept, [f"not used, as its images are in other splits too: {both[0].folder}"]
    folds = sorted({part for place in pictures for part in place.parts if FOLD.fullmatch(part)})
    if len(folds) < 2 or not any(place.split for place in pictures):
        return pictures, []
    others = set(folds[1:])
    kept = {place: names for place, names in pictures.items() if others.isdisjoint(place.parts)}
    return kept, [f"of the {len(folds)} folds of a cross-validation only {folds[0]} is used"]


def _named(root: Path, pictures: Names, name: str | None, option: str) -> Names:
    """The pictures in the folder that the user names, or those with the ending of files; all where nothing is named."""
    if name is None:
        return pictures
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not (root / name).is_dir():
        ending = name.lower().lstrip("*")
        chosen = {place: [file for file in files if file.lower().endswith(ending)] for place, files in pictures.items()}
    else:
        chosen = {place: files for place, files in pictures.items() if place.parts[: len(parts)] == parts}
    chosen = {place: files for place, files in chosen.items() if files}
    if not chosen:
        expected = "a folder below it with images in it, or the ending of files, such as _mask.png"
        raise DataError(f"{option} {name}: neither a folder nor an ending of files in {root}\nexpected {expected}")
    return chosen


# ---- from the choice to folders or lists -------------------------------------------------------------------------


def _pairs(choice: Choice) -> dict[str | None, Paths]:
    """The pairs by split, as paths below the root."""
    pairs: dict[str | None, Paths] = defaultdict(list)
    for image, mask in choice.match.masks.items():
        pairs[choice.split(image)].append((choice.path(image, 0), choice.path(mask, 1)))
    for each in pairs.values():
        each.sort()
    return pairs


def _to_found(choice: Choice, pairs: Mapping[str | None, Paths], others: Sequence[str]) -> Found:
    """Training and validation; or the split with most pairs as "all", where one of the two is missing.

    others: pictures in the folders of images that have no pair.
    """
    match = choice.match
    splits, notes = _choose_splits(pairs)
    found = Found({}, notes=notes, several=len(match.several))
    if match.several:
        image, one, other = match.several[0]
        found.example = choice.path(image, 0), choice.path(one, 1), choice.path(other, 1)
    used = set(map(_suffix, match.masks))
    if folders := _folders(choice, splits):
        found.folders = folders
        found.mask_suffix = next(iter(match.masks.values()))[-len(match.ending) :]
        usual = match.words == {""} and used <= set(IMAGE_SUFFIXES)
        if not usual or not set(map(_suffix, others)) <= used:
            found.image_suffixes = tuple(sorted(word + suffix for word in match.words for suffix in used))
        return found
    found.pairs = {split: pairs for split, (pairs, _) in splits.items()}
    count = len({(_parent(image), _parent(mask)) for each in found.pairs.values() for image, mask in each})
    what = [f"in {count} pairs of folders"] if count > 1 else []
    if len(match.endings) > 1:
        what.append(f"with masks that end in {' and '.join(sorted(match.endings)[:3])}")
    found.notes.append(
        f"pairs {' and '.join(what or ['of different names'])}: written as lists, an image and its mask a line"
    )
    if alone := sorted(file for file in others if _suffix(file) in used and match.words == {""}):
        found.notes.append(f"images without mask, not used: {len(alone)} ({first_names(alone)})")
    return found


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "."


def _unpaired(choice: Choice, pictures: Names) -> list[str]:
    """Pictures in the folders of images, below the root, that are neither an image nor a mask of a pair."""
    used = {choice.path(image, 0) for image in choice.match.masks}
    if not choice.distance:
        used |= {choice.path(mask, 1) for mask in choice.match.masks.values()}
    places = {choice.place(image, 0) for image in choice.match.masks}
    files = ("/".join((*place.parts, name)) for place in places for name in pictures[place])
    return [file for file in files if file not in used]


def _choose_splits(pairs: Mapping[str | None, Paths]) -> tuple[dict[str, tuple[Paths, str | None]], list[str]]:
    """The pairs of each split and the name that this split has in the folders; and notes."""
    chosen = choose_splits(pairs)
    if chosen is None:
        split, most = max(pairs.items(), key=lambda item: len(item[1]))
        notes = [] if split is None else [f"the only split found is {split}: it is divided into two"]
        if len(pairs) > 1:
            folder = PurePosixPath(most[0][0]).parent
            notes = [f"no folders of training and validation: {folder} has most pairs and is divided"]
        return {"all": (most, split)}, notes
    return {split: (pairs[name], name) for split, name in chosen[0].items()}, chosen[1]


def _folders(choice: Choice, splits: Mapping[str, tuple[Paths, str | None]]) -> dict[str, tuple[str, str]] | None:
    """The two folders of each split; None where two folders do not hold all pairs of a split, or more than these."""
    match = choice.match
    if len(match.endings) > 1 or any(word.startswith("/") for word in match.words):
        return None
    tops: dict[str | None, set[tuple[str, str]]] = defaultdict(set)
    for image in {image.partition("/")[0]: image for image in match.masks}.values():
        tops[choice.split(image)].add(_top(choice.place(image, 0), choice.place(image, 1)))
    folders = {}
    for split, (_, name) in splits.items():
        if len(tops[name]) > 1:
            return None
        folders[split] = next(iter(tops[name]))
    for at in (0, 1):
        if len({pair[at] for pair in folders.values()}) < len(folders):  # two splits share a folder
            return None
    return folders


def _top(images: Place, masks: Place) -> tuple[str, str]:
    """The folders to write in a recipe: without the last folders that both have, except names of roles and splits."""
    ends, least = 0, 1 if images == masks else 0
    for image_part, mask_part in zip(reversed(images.general), reversed(masks.general), strict=False):
        short = min(len(images.parts), len(masks.parts)) - ends
        if image_part != mask_part or "*" in image_part or role_of((image_part,)) or short <= least:
            break
        ends += 1
    both = (PurePosixPath(*place.parts[: len(place.parts) - ends]).as_posix() for place in (images, masks))
    one, other = both
    return one, other


def _use_lists(
    root: Path, found: Found, files: Sequence[PurePosixPath], pairs: Iterable[Paths], alone: Sequence[str]
) -> None:
    """Splits by train.txt and val.txt, as in PASCAL VOC's ImageSets, where all of their names belong to images."""
    masks = {image: mask for each in pairs for image, mask in each}
    listed = find_name_lists(root, files, [*masks, *alone], found.folders.get("all", (None,))[0])
    if listed is None:
        return
    found.notes = [note for note in found.notes if "divided" not in note]
    found.notes.append(f"the splits are those of {' and '.join(listed.files.values())}")
    if listed.exact and found.folders:
        found.lists = listed.files
    else:
        found.folders = {}
        found.pairs = {
            split: [(image, masks[image]) for image in images if image in masks]
            for split, images in listed.images.items()
        }


# ---- notes -------------------------------------------------------------------------------------------------------


def _note_folders(found: Found) -> None:
    """Fill in the folders of images and masks."""
    if found.pairs:
        both = [{_parent(pair[at]) for each in found.pairs.values() for pair in each} for at in (0, 1)]
    else:
        both = [{pair[at] for pair in found.folders.values()} for at in (0, 1)]
    found.image_folders, found.mask_folders = sorted(both[0]), sorted(both[1])


def _note_published(found: Found, pairs: Mapping[Any, Paths]) -> None:
    if is_segnet_camvid(pairs):
        found.published = "camvid"
        counts = "/".join(str(len(pairs[split])) for split in ("train", "val", "test") if split in pairs)
        found.notes.append(f"this is SegNet's CamVid ({counts} frames): 11 classes, and 11 in the masks is ignored")


def _is_below(folder: str, above: Iterable[str]) -> bool:
    return any(each == "." or folder == each or folder.startswith(f"{each}/") for each in above)


def _unused_folders(pictures: Names, found: Found) -> list[str]:
    used = [*found.image_folders, *found.mask_folders]
    counts: Counter[str] = Counter()
    for place, files in pictures.items():
        if place.folder in used or (
            found.folders and place.folder != "." and _is_below(place.folder, [each for each in used if each != "."])
        ):
            continue
        # Only as many folders of the path as are needed to tell it from the used ones.
        short = next(
            (
                "/".join(place.parts[:at])
                for at in range(1, len(place.parts) + 1)
                if not any(_is_below(each, ["/".join(place.parts[:at])]) for each in used)
            ),
            place.folder,
        )
        counts[short] += len(files)
    if not counts:
        return []
    return [f"other folders with pictures, not used: {first_names(sorted(counts), 6)}"]
