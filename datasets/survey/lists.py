"""Lists in a user's folder: of pairs, one image and its mask a line, and of the names of each split."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from unicodedata import normalize

from ssaseg.datasets.base import DataError
from ssaseg.datasets.pairlist import choose_splits, list_splits, looks_like_pairs, read_pairs, split_of
from ssaseg.datasets.pairs import LARGEST_LIST, Pairs, read_names
from ssaseg.datasets.survey.found import Found
from ssaseg.files.reading import decode_text, read_file

SUFFIXES = (".txt", ".lst", ".csv", ".tsv")
# Words in the name of a list, beside that of the split.
WORDS = re.compile(
    r"lists?|ids?|images?|imgs?|files?|filenames?|names?|splits?|pairs?|pair|masks?|labels?|seg|segmentation|data|dataset"
    r"|metadata|meta|index|annotations?|all"
)
# Lists that are tried, groups of lists, and folders above a list whose name says no split.
MOST_LISTS, DEEPEST = 20, 2


class Listed(NamedTuple):
    """The images of each split, according to two lists of names."""

    files: dict[str, str]  # split -> list, below the root
    images: dict[str, list[str]]  # split -> images, below the root
    exact: bool  # whether each name is a path below the folder of images, without suffix


def find_pair_lists(root: Path, files: Sequence[PurePosixPath], pictures: int) -> Found | None:
    """Pairs by lists such as train.txt and val.txt, or one list of all pairs; None where no list has existing files.

    pictures: number of pictures below the root; a list whose name says no split must have at least half of them.
    """
    for group in _groups(files, any_words=True):
        if not looks_like_pairs(root / group["train"]) or (train := _read(root, group["train"])) is None:
            continue
        lists = {split: each for split, file in group.items() if split != "train" and (each := _read(root, file))}
        lists["train"] = train
        splits, more = choose_splits(lists) or ({"all": "train"}, [])
        files_of = {split: group[name] for split, name in splits.items()}
        return _found(root, files_of, {split: lists[name] for split, name in splits.items()}, more)
    for file in _single_lists(files):
        if not looks_like_pairs(root / file):
            continue
        splits, notes = choose_splits(list_splits(root / file)) or ({}, [])
        read: dict[str, tuple[Pairs, list[str]]]
        read = {split: each for split, name in splits.items() if (each := _read(root, file, name))}
        if len(read) < 2:
            everything = next(iter(read.values()), None) or _read(root, file)
            read, notes = {"all": everything} if everything else {}, []
        if read and 4 * sum(len(pairs.names) for pairs, _ in read.values()) >= pictures:
            found = _found(root, dict.fromkeys(read, file), read, notes)
            if splits.get("val") == "test" and "val" in read:
                found.lists = {}  # of the file itself, the rows of a validation split would be read
            return found
    return None


def why_unread(root: Path, files: Sequence[PurePosixPath]) -> DataError | None:
    """What is wrong with the first list that looks like one of pairs; None where no list does.

    Only for a folder without pairs: text that only looks like a list is then worth a message, too.
    """
    lists = [*(group["train"] for group in _groups(files, any_words=True)), *_single_lists(files)]
    for file in dict.fromkeys(lists):
        if looks_like_pairs(root / file):
            try:
                read_pairs(root / file, root)
            except DataError as error:
                return error
            except OSError:
                continue
    return None


def _read(root: Path, file: PurePosixPath, split: str | None = None) -> tuple[Pairs, list[str]] | None:
    """Pairs and notes of a list, of which most lines must have existing files."""
    incomplete: list[DataError] = []
    try:
        pairs, notes = read_pairs(root / file, root, split, incomplete)
    except (DataError, OSError):
        return None
    if incomplete:
        reason = str(incomplete[0]).split("\n")[0].removeprefix(f"{root / file}: ")
        notes = [*notes, f"{file} has lines without image or mask, which are left out: {reason}"]
    return pairs, notes


def _found(
    root: Path,
    lists: Mapping[str, PurePosixPath],
    read: Mapping[str, tuple[Pairs, list[str]]],
    more: Sequence[str] = (),
) -> Found:
    found = Found({}, lists={split: file.as_posix() for split, file in lists.items()})
    names = " and ".join(dict.fromkeys(found.lists.values()))
    found.notes += [f"the pairs are those of {names}", *more]
    for split, (pairs, notes) in read.items():
        found.notes += [note for note in notes if note not in found.notes]
        found.pairs[split] = [
            (image.relative_to(root).as_posix(), mask.relative_to(root).as_posix())
            for image, mask in zip(pairs.images, pairs.masks, strict=True)
        ]
        if any("left out" in note for note in notes):
            found.lists = {}  # the list itself would be refused: a list of the complete pairs is written
    if "all" in found.pairs:
        found.lists = {}
    return found


def _groups(files: Sequence[PurePosixPath], any_words: bool = False) -> Iterator[dict[str, PurePosixPath]]:
    """Lists by split that belong together: in one folder, with names that differ only in the split, or where only the
    training list has more words, as train_aug.txt and val.txt. `any_words`: the other words of their names may be any.
    """
    groups: dict[tuple[PurePosixPath, str, tuple[str, ...]], dict[str, PurePosixPath]] = defaultdict(dict)
    for file in files:
        if file.suffix.lower() in SUFFIXES and (split := split_of(file.stem)):
            words = tuple(word for word in re.split(r"[\W_]+", file.stem.lower()) if split_of(word) is None)
            groups[file.parent, file.suffix.lower(), words].setdefault(split, file)
    found = []
    for (folder, suffix, words), group in groups.items():
        usual = all(map(WORDS.fullmatch, words))
        if "train" not in group or not (usual or any_words):
            continue
        if words and len(group) == 1:
            group = {**groups.get((folder, suffix, ()), {}), **group}
        found.append((len(folder.parts), not usual, len(group) == 1, len(words), group["train"].name, group))
    yield from (group for *_, group in sorted(found, key=lambda each: each[:-1])[:MOST_LISTS])


def _single_lists(files: Sequence[PurePosixPath]) -> Iterator[PurePosixPath]:
    single = [
        file
        for file in files
        if file.suffix.lower() in SUFFIXES and len(file.parts) <= DEEPEST and split_of(file.stem) is None
    ]
    # Folders of text files, one for each image, hold no lists.
    yield from sorted(single, key=lambda file: (len(file.parts), file.suffix.lower() != ".csv", file))[:MOST_LISTS]


def find_name_lists(
    root: Path, files: Sequence[PurePosixPath], images: Sequence[str], folder: str | None
) -> Listed | None:
    """Lists of names of training and validation, where all names belong to `images` (paths below the root).

    Names may have a suffix or folders before them. `folder`: the one folder of the images, if there is one.
    """
    by_end: dict[str, str | None] = {}  # the last parts of a path without suffix -> the image; None: several images
    for image in images:
        stem = normalize("NFC", image.rpartition(".")[0])
        for at in (0, *(found.end() for found in re.finditer("/", stem))):
            by_end[stem[at:]] = None if stem[at:] in by_end else image
    for group in _groups(files):
        names_of = choose_splits(group)
        if names_of is None:
            continue
        chosen = {split: group[name] for split, name in names_of[0].items()}
        lines = {split: _names(root / file) for split, file in chosen.items()}
        found = {split: [_find(name, by_end) for name in names] for split, names in lines.items()}
        if not all(found.values()) or any(image is None for each in found.values() for image in each):
            continue
        exact = folder is not None and all(
            PurePosixPath(folder, name.strip()).as_posix() == str(image).rpartition(".")[0]
            for split, names in lines.items()
            for name, image in zip(names, found[split], strict=True)
        )
        splits = {split: sorted({str(image) for image in each}) for split, each in found.items()}
        return Listed({split: file.as_posix() for split, file in chosen.items()}, splits, exact)
    return None


def _names(file: Path) -> list[str]:
    try:
        return read_names(file)
    except (DataError, OSError):  # not a list of names, or one of paths that start with /
        pass
    try:
        lines = decode_text(read_file(file, LARGEST_LIST)).splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [line.strip().replace("\\", "/") for line in lines if line.strip()]


def _find(name: str, by_end: Mapping[str, str | None]) -> str | None:
    """The image of a name: without suffix, then with one; without its first folders where they are others."""
    name = normalize("NFC", name.strip())
    for stem in dict.fromkeys([name, re.sub(r"\.\w{2,5}$", "", name)]):
        for at in (0, *(found.end() for found in re.finditer("/", stem))):
            if image := by_end.get(stem[at:]):
                return image
    return None
