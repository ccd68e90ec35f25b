"""Which mask belongs to which image, by their names.

Files are written as "number/name": the number is that of a pair of folders, and only equal numbers belong together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from unicodedata import normalize

from ssaseg.datasets.pairs import JPEG
from ssaseg.datasets.survey.places import IMAGES, MASKS, POOR, rank_images, rank_mask, words_of

# How many endings of image names are tried, of how many words, and by which share of the images.
MOST_ENDINGS, MOST_WORDS, LEAST_SHARE = 8, 3, 0.02

WHOLE = re.compile(r"/[^\W\d_]+(\.\w+)?")  # a whole name of one word, such as image.png and mask.png
NUMBER = re.compile(r"[\W_]*\d+(?=\.)")  # at the end of a name

Paths = list[tuple[str, str]]  # images and their masks


@dataclass
class Match:
    """For each image its mask; and the endings after the part of the name that both share."""

    ending: str  # of the masks, of most pairs, in lower case, such as "_mask.png"
    rank: int  # of this ending
    masks: dict[str, str] = field(default_factory=dict)  # image -> mask
    endings: set[str] = field(default_factory=set)  # all that are used
    words: set[str] = field(default_factory=set)  # endings of the images: "", or such as "_training"
    several: list[tuple[str, str, str]] = field(default_factory=list)  # an image and two masks that fit it equally


def match_names(
    images: Sequence[str], masks: Sequence[str], parts: Sequence[str], together: bool, jpeg: bool = False
) -> Match | None:
    """The pairs of two lists of files; None without a pair.

    A mask's name starts with that of its image without suffix, and what follows starts with a sign such as _ or a dot.
    Of several such endings the one whose words say most that it is a mask of class ids is chosen, then the one of most
    masks. In folders where no mask has this ending, the best of their endings is used. `parts`: the folders that only
    masks have. `together`: images and masks are the same files. JPEG files are masks only with `jpeg`.
    """
    usable = [file for file in masks if jpeg or not file.lower().endswith(JPEG)]
    words: dict[tuple[str, str], str] = {}
    plain = [file for file in images if not together or not _says(MASKS, _last_word(file))]
    found = _direct(plain, usable, together)  # first without X_mask.png, which could be the image of X_mask_2.png
    if not found:
        found, words = _by_word(plain, usable, parts, together)
    if not found and together:
        found = _direct(images, usable, together)
    if not found:
        return None
    ranks = {each: rank_mask(parts, each, together) for each in found}
    few = dict(zip(found, too_few([(ranks[each], len(found[each])) for each in found]), strict=True))

    def order(each: str) -> tuple[bool, int, int, int, str]:
        return few[each], ranks[each], -len(found[each]), len(each), each

    best, *others = sorted(found, key=order)
    match = Match(best, ranks[best], dict(reversed(found[best])), {best})
    equal = [each for each in others if ranks[each] == ranks[best]]
    filled = {_number(file) for file in match.masks}
    for each in equal:
        same_word = each.rpartition(".")[0] == best.rpartition(".")[0]  # only the format differs
        new = {
            image: mask
            for image, mask in found[each]
            if image not in match.masks and (same_word or _number(image) not in filled)
        }
        match.endings |= {each} if new else set()
        match.masks |= new
        filled |= set(map(_number, new))
    # The mask of an image is not the image of another mask.
    for mask in set(match.masks.values()) & set(match.masks) if together else ():
        del match.masks[mask]
    if not match.masks:
        return None
    match.words = {words.get((ending, image), "") for ending in match.endings for image in match.masks}
    match.words -= {""} if words else set()
    # X_mask_1.png beside X_mask.png is another mask too, even if X_mask.png has the better name.
    several = {each for each in others if ranks[each] == ranks[best] or NUMBER.sub("", each) == NUMBER.sub("", best)}
    used = {*match.masks.values(), *(match.masks if together else ())}
    match.several = [
        (image, match.masks[image], mask)
        for image, mask in dict(pair for each in sorted(several) for pair in found[each]).items()
        if image in match.masks and mask not in used
    ]
    return match


def too_few(candidates: Sequence[tuple[int, int]]) -> list[bool]:
    """For the rank and the number of pairs of each candidate: whether it is too rare to be chosen for its rank.

    A candidate needs half of the most pairs. Masks that hold no ids count only where all others have less than a tenth
    of their number.
    """
    most = max(pairs for _, pairs in candidates)
    most_ids = max((pairs for rank, pairs in candidates if rank < POOR), default=0)
    if 10 * most_ids < most:
        most_ids = most
    return [2 * pairs < most_ids if rank < POOR else False for rank, pairs in candidates]


def _last_word(file: str) -> str:
    return re.split(r"[\W_]+", file.rpartition(".")[0])[-1]


def _number(file: str) -> str:
    return file.partition("/")[0]


def _direct(images: Iterable[str], masks: Iterable[str], together: bool) -> dict[str, Paths]:
    """Pairs by the ending that a mask adds to the name of an image without suffix.

    `together`: a file is not its own mask.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    for file in images:
        by_stem[normalize("NFC", file.rpartition(".")[0])].append(file)
    endings: dict[str, Paths] = defaultdict(list)
    for file in masks:
        composed = normalize("NFC", file)
        # Not within a word or number: 10.png is not the mask of 1.png.
        for at in (match.start() for match in re.finditer(r"[\W_]", composed)):
            image = next((each for each in by_stem.get(composed[:at], ()) if not (together and each == file)), None)
            if image is not None:
                endings[composed[at:].lower()].append((image, file))
    return endings


def _by_word(
    images: Sequence[str], masks: Sequence[str], parts: Sequence[str], together: bool
) -> tuple[dict[str, Paths], dict[tuple[str, str], str]]:
    """As `_direct`, where image names end in a word too, as in 0_image.jpg and 0_mask.png. And these words, by the
    mask's ending and the image.

    The word must say that it is an image, or the mask's word or folder that it is a mask. In one folder it must be the
    mask's word, as X_depth.png is not a mask.
    """
    by_word: dict[str, list[str]] = defaultdict(list)
    for file in images:
        stem = file.rpartition(".")[0]
        starts = [start.start() for start in re.finditer(r"[\W_](?=[^\W_]*[^\W\d_])", stem)]
        for at in starts[-MOST_WORDS:]:
            if stem[at] != "/" or WHOLE.fullmatch(stem[at:]):
                by_word[stem[at:]].append(file)
    mask_folder = not together and any(MASKS.fullmatch(word) for part in parts for word in words_of(part))
    found: dict[str, Paths] = defaultdict(list)
    words: dict[tuple[str, str], str] = {}
    filled: dict[str, set[str]] = defaultdict(set)  # mask's ending -> numbers of folders in which it has an image

    def order(item: tuple[str, list[str]]) -> tuple[int, bool, int, int]:
        word, files = item
        return rank_images((), word + "."), not _says(IMAGES, word), -len(files), len(word)

    # Only the commonest endings: names that all end in different words show nothing.
    common = [item for item in by_word.items() if len(item[1]) >= LEAST_SHARE * len(images)]
    common = sorted(common, key=lambda item: (-len(item[1]), len(item[0])))[:MOST_ENDINGS]
    for word, files in sorted(common, key=order):
        bare: dict[str, str] = {}
        for file in files:
            suffix = PurePosixPath(file).suffix
            bare.setdefault(file[: -len(suffix)].removesuffix(word) + suffix, file)
        own = set(files)
        for ending, pairs in _direct(bare, (file for file in masks if file not in own), False).items():
            mask_says = mask_folder or _says(MASKS, ending.rpartition(".")[0])
            if ending.startswith("/") and not WHOLE.fullmatch(ending):
                continue
            new = [(bare[image], mask) for image, mask in pairs if _number(image) not in filled[ending]]
            if new and (mask_says or (_says(IMAGES, word) and not together)):
                found[ending] += new
                words |= {(ending, image): word for image, _ in new}
        for ending, pairs in found.items():
            filled[ending] |= {_number(image) for image, _ in pairs}
    return found, words


def _says(pattern: re.Pattern[str], text: str) -> bool:
    return any(map(pattern.fullmatch, words_of(text)))
