"""Which folders hold the images and which the masks.

Folders are compared by what they do not have in common: of A/images/B and A/masks/B it is `images` and `masks`. This
`Relation` is the same for all scenes and all splits, so that images of one scene never get masks of another one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ssaseg.datasets.survey.matching import Match, match_names, too_few
from ssaseg.datasets.survey.places import POOR, Place, are_siblings, rank_images, rank_mask, role_of

# Folders of images for which the folders of their masks are searched among all folders, and relations that are tried.
MOST_SEARCHED, MOST_TRIED, MOST_A_FOLDER = 32, 40, 12
# With more folders than this, two folders whose names do not say "images" or "masks" are not tried as a pair.
MOST_UNNAMED = 20

Files = Mapping[Place, Sequence[str]]  # folder -> names of the pictures in it


class Relation(NamedTuple):
    """What only the images' folders have in their path, and what only the masks' folders have."""

    images: tuple[str, ...]
    masks: tuple[str, ...]


@dataclass
class Choice:
    """Pairs of folders that have one relation, and the pairs of files in them."""

    relation: Relation
    score: int  # how many of the two names say that they hold images, and masks
    rank: tuple[int, int]  # of the kind of mask and of image; less is better
    folders: list[tuple[Place, Place]]
    match: Match

    @property
    def pairs(self) -> int:
        return len(self.match.masks)

    @property
    def distance(self) -> int:
        """Number of folders that images and masks do not have in common."""
        return len(self.relation.images) + len(self.relation.masks)

    def place(self, file: str, side: int) -> Place:
        """The folder of a file of `match`. side: 0 for an image, 1 for a mask."""
        return self.folders[int(file.partition("/")[0])][side]

    def path(self, file: str, side: int) -> str:
        """The path of a file of `match` below the root."""
        return "/".join((*self.place(file, side).parts, file.partition("/")[2]))

    @property
    def splits(self) -> set[str | None]:
        """The splits of all pairs."""
        return {self.split(image) for image in {image.partition("/")[0]: image for image in self.match.masks}.values()}

    def split(self, image: str) -> str | None:
        return self.place(image, 0).split or self.place(image, 1).split


def choose(images: Files, masks: Files, given: bool, jpeg: bool) -> tuple[Choice | None, list[Choice]]:
    """The relation with the best pairs, and others that are equally good: usually none.

    images, masks: all pictures below the root, or those that the user names (`given`): then their names decide nothing.

    Names that say "images" and "masks" decide first, then the kind of mask (ids before colours), then the number of
    pairs. A folder of masks belongs to the nearest folder of images, and to no other.
    """
    choices: list[Choice] = []
    taken: dict[Place, int] = {}  # folder of masks -> folders between it and the images that it belongs to
    some_images = any(role_of(place.parts) != "masks" for place in images)
    for relation in _relations(images, masks, given):
        score = _score(relation)
        if choices and score < choices[0].score:
            break
        distance = len(relation.images) + len(relation.masks)
        folders = [
            (one, other)
            for one, other in _apply(relation, images, masks)
            if taken.get(other, distance) >= distance
            # Not two kinds of masks of images that are elsewhere.
            and not (one == other and not given and some_images and role_of(one.parts) == "masks")
        ]
        if found := _match(relation, folders, images, masks, jpeg):
            choices.append(found)
            numbers = {int(image.partition("/")[0]) for image in found.match.masks}
            for number in numbers if found.match.rank < POOR else ():
                taken.setdefault(found.folders[number][1], distance)
    if not choices:
        return None, []
    few = too_few([(each.rank[0], each.pairs) for each in choices])
    order = sorted(
        zip(choices, few, strict=True), key=lambda item: (item[1], item[0].rank, -item[0].pairs, item[0].distance)
    )
    best, *others = (each for each, _ in order)
    equal = [
        each for each in others if (each.rank, each.pairs, each.distance) == (best.rank, best.pairs, best.distance)
    ]
    if best.score < 0 and any(each.relation == best.relation[::-1] for each in equal):
        return None, []  # two folders of the same names: either could hold the masks, most likely none does
    for each in others:
        if (each.score, each.rank) == (best.score, best.rank) and each.splits.isdisjoint({*best.splits, None}):
            best = _join(best, each)  # TrainDataset/image and TestDataset/images
            equal = [other for other in equal if other is not each]
    return best, equal


def _join(one: Choice, other: Choice) -> Choice:
    """The pairs of two relations, one of which has the splits that the other does not have."""
    first = len(one.folders)

    def moved(file: str) -> str:
        number, _, name = file.partition("/")
        return f"{first + int(number)}/{name}"

    match = replace(
        one.match,
        masks={**one.match.masks, **{moved(image): moved(mask) for image, mask in other.match.masks.items()}},
        endings=one.match.endings | other.match.endings,
        words=one.match.words | other.match.words,
        several=[*one.match.several, *((moved(a), moved(b), moved(c)) for a, b, c in other.match.several)],
    )
    return replace(one, folders=[*one.folders, *other.folders], match=match)


def _score(relation: Relation) -> int:
    """How many of the two names say what they hold; -1 for two folders whose names say nothing."""
    return (role_of(relation.images) == "images") + (role_of(relation.masks) == "masks") or -bool(
        relation.images or relation.masks
    )


def _relations(image_files: Files, mask_files: Files, given: bool) -> list[Relation]:
    """Relations between folders: the nearest ones of some folders of images, and of some folders of masks."""
    images, masks = list(image_files), list(mask_files)
    named = [place for place in masks if role_of(place.parts) == "masks"] or masks
    groups = [
        *(([place], masks) for place in images[:: max(len(images) // MOST_SEARCHED, 1)]),
        *((images, [place]) for place in named[:: max(len(named) // MOST_SEARCHED, 1)]),
    ]
    counts: Counter[Relation] = Counter()
    for group in groups:
        near = {
            _relate(one.general, other.general)
            for one in group[0]
            for other in group[1]
            if not (one.split and other.split and one.split != other.split)
        }
        possible = [each for each in near if given or _is_possible(each, len(images))]
        counts.update(sorted(possible, key=lambda each: (*_order(each), each))[:MOST_A_FOLDER])
    return sorted(counts, key=lambda each: (*_order(each), -counts[each], each))[:MOST_TRIED]


def _order(relation: Relation) -> tuple[int, int]:
    return -_score(relation), len(relation.images) + len(relation.masks)


def _is_possible(relation: Relation, folders: int) -> bool:
    if role_of(relation.images) == "masks" or role_of(relation.masks) == "images":
        return False
    return not are_siblings(*relation) and (_score(relation) >= 0 or folders <= MOST_UNNAMED)


def _relate(images: Sequence[str], masks: Sequence[str]) -> Relation:
    """What two paths have between the folders that they share at their start and end."""
    shortest = min(len(images), len(masks))
    start = next((at for at in range(shortest) if images[at] != masks[at]), shortest)
    end = next((at for at in range(shortest - start) if images[-1 - at] != masks[-1 - at]), shortest - start)
    cut = slice(start, -end if end else None)
    return Relation(tuple(images[cut]), tuple(masks[cut]))


def _apply(relation: Relation, image_files: Files, mask_files: Files) -> list[tuple[Place, Place]]:
    """All folders of images for which there is a folder of masks with this relation."""
    by_path: dict[tuple[str, ...], list[Place]] = defaultdict(list)
    for place in mask_files:
        by_path[place.general].append(place)
    length, found = len(relation.images), []
    for images in image_files:
        for at in range(len(images.general) - length + 1):
            if images.general[at : at + length] != relation.images:
                continue
            path = (*images.general[:at], *relation.masks, *images.general[at + length :])
            if _relate(images.general, path) != relation:
                continue
            fitting = [
                each
                for each in by_path.get(path, ())
                if each.split == images.split or not (each.split and images.split)
            ]
            # Of "train" and "training" the one that is written as in the path of the images.
            own = (*images.parts[:at], *images.parts[at + length :])
            same = [each for each in fitting if _without(each.parts, at, len(relation.masks)) == own]
            found += [(images, each) for each in same or fitting]
            if fitting:
                break
    return found


def _without(parts: tuple[str, ...], at: int, count: int) -> tuple[str, ...]:
    return (*parts[:at], *parts[at + count :])


def _match(
    relation: Relation, folders: list[tuple[Place, Place]], image_files: Files, mask_files: Files, jpeg: bool
) -> Choice | None:
    together = not relation.images and not relation.masks
    images = [f"{number}/{name}" for number, (place, _) in enumerate(folders) for name in image_files[place]]
    masks = [f"{number}/{name}" for number, (_, place) in enumerate(folders) for name in mask_files[place]]
    parts = relation.masks
    match = match_names(images, masks, parts, together, jpeg)
    if match is None:
        return None
    rank = rank_mask(parts, match.ending, together), rank_images(relation.images, max(match.words) + ".")
    return Choice(relation, _score(relation), rank, folders, match)
