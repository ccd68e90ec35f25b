"""What the names of folders and files say: images or masks, which split, and which kind of mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ssaseg.datasets.pairlist import SPLITS

# Words in the names of folders and at the end of file names, in lower case and without digits.
IMAGES = re.compile(
    r"images?|imgs?|jpe?gs?|jpegimages|imagesets?|pictures?|photos?|frames?|inputs?|rgb|leftimgbit|orig(inals?)?"
)
MASKS = re.compile(
    r"masks?|maskpngs?|labell?ed(approved)?|labs?|annotations?|annots?|annos?|ann|labels?|lbls?|labels?(train)?ids|gts?|gtfine|gtcoarse|truth"
    r"|groundtruth|manual|segmentations?|segmentationclass\w*|segmentationobject|segmented|semantics?|semseg|trimaps?"
    r"|seg(map)?s?|targets?|colou?rmaps?"
)
# Masks that are made to be looked at, or that hold something else than class ids.
NO_IDS = re.compile(
    r"colou?rs?|colou?red|colou?r(map|mask|label)s?|palettes?|rgb|vis|viz|visuali[sz](ation|ed)s?|overlays?|blend"
    r"|previews?|preds?|predictions?|results?|depths?|disparit(y|ies)|instances?|inst|insts?|instance(ids|mask)s?"
    r"|objects?|panoptic|polygons?|edges?|boundar(y|ies)|contours?|superpixels?|weights?|confidence|normals?|flow"
    r"|coarse|gtcoarse|scribbles?|bbox(es)?|roi|fov|thumb(nail)?s?|scores?|heatmaps?|probs?|human"
)
# Pictures of the same scene that are not plain colour images.
NO_COLOUR = re.compile(
    r"depths?|disparit(y|ies)|thermals?|ir|nir|swir|infrareds?|lwir|fir|normals?|flow|lidar|dsm|ndsm|dem|elevation"
    r"|height|elevations|events?|right|rightimgbit|sonar|radar|sar|hha|gr[ae]y"
)
TRAIN_IDS = re.compile(r"labeltrainids?|trainids?")
IDS = re.compile(r"labelids?|ids?|raw|segmentationclassraw|manual|machine|index|indexed|indices")
TRAINVAL = re.compile(r"train[\W_]*val(?!\w*test)", re.IGNORECASE)
FOLD = re.compile(r"(.*[\W_])?(folds?|cv)[\W_]*\d+", re.IGNORECASE)  # of cross-validation
SECOND = re.compile(r"(2nd|second)\w*")  # the second opinion of two annotators

# Files that nobody expects to be read as an image or a mask.
TEXTS = (".txt", ".csv", ".tsv", ".lst", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".db", ".ini", ".log", "")

PIECE = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\dA-Z_]+")  # of a word such as trainImages

# How good a kind of mask is. Smaller is better.
BEST, GOOD, PLAIN, BARE_BESIDE, OTHER, POOR = range(6)


class Place(NamedTuple):
    """A folder with pictures in it, below the root."""

    parts: tuple[str, ...]
    general: tuple[str, ...]  # the same with * in place of the words of splits
    split: str | None  # "train", "val", "test"

    @property
    def folder(self) -> str:
        """The path, "." for the root."""
        return "/".join(self.parts) or "."


def read_place(parts: Sequence[str]) -> Place:
    """The split that the last folder with such a word names, and the path without these words."""
    split, general = None, []
    for part in parts:
        named = set()
        for word in dict.fromkeys([*re.findall(r"[^\W_]+", part), *PIECE.findall(part)]):
            bare = re.sub(r"\d", "", word.lower())
            of_word = next((name for name, pattern in SPLITS.items() if pattern.fullmatch(bare)), None)
            if of_word or bare == "trainval":
                named.add(of_word or "train")
                part = part.replace(word, re.sub(r"^\D*?(?=annot|\d|$)", "*", word, count=1, flags=re.IGNORECASE), 1)
        if named:  # "train_val" is for training
            split = "train" if "train" in named else sorted(named)[-1]
        general.append(part)
    return Place(tuple(parts), tuple(general), split)


def words_of(text: str) -> list[str]:
    """Words in lower case and without digits: those between signs, and those that a capital letter starts."""
    words: list[str] = []
    for word in re.findall(r"[^\W_]+", text):
        words += [re.sub(r"\d", "", each.lower()) for each in dict.fromkeys([word, *PIECE.findall(word)])]
    return [word for word in words if word]


@lru_cache(2**16)
def role_of(parts: tuple[str, ...]) -> str | None:
    """ "images" or "masks", by the last folder that says it. Of "label_images" it is "masks"."""
    role = None
    for part in parts:
        part = re.sub(r"with[\W_]*[a-z]+", "", part, flags=re.IGNORECASE)  # "frames with annotations" are images
        words = words_of(part)
        for kind, pattern in (("images", IMAGES), ("masks", MASKS)):
            if any(map(pattern.fullmatch, words)):
                role = kind
    return role


def rank_mask(parts: Sequence[str], ending: str, beside: bool) -> int:
    """How likely masks hold class ids, by the folders that only they have, and the ending after the image's name.

    `beside`: they are in the folder of the images.
    """
    word, dot, _ = ending.rpartition(".")
    words = [*(each for part in parts for each in words_of(part)), *words_of(word if dot else ending)]
    raw = re.findall(r"[^\W_]+", " ".join([*parts, word]).lower())
    if any(map(NO_IDS.fullmatch, words)) or any(map(SECOND.fullmatch, raw)):
        return POOR
    if any(map(TRAIN_IDS.fullmatch, words)):
        return BEST
    if any(map(IDS.fullmatch, words)):
        return GOOD
    own = words_of(word)
    if not own and not re.search(r"\d", word):
        return BARE_BESIDE if beside else PLAIN
    return PLAIN if any(map(MASKS.fullmatch, own)) else OTHER


def rank_images(parts: Sequence[str], ending: str) -> int:
    """1 for depth, infrared and the like, 0 for other images."""
    words = [*(each for part in parts for each in words_of(part)), *words_of(ending.rpartition(".")[0])]
    return int(any(map(NO_COLOUR.fullmatch, words)))


def are_siblings(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether two paths go through scenes that do not belong together, such as scene_a and scene_b, or 01 and 02."""
    if not one or not other or role_of(one[:1]) or role_of(other[:1]) or one[0] == other[0]:
        return False
    bare = [re.sub(r"([\W_]+[a-z]|[\W_]*\d+)$", "", part[0].lower()) for part in (one, other)]
    return bare[0] == bare[1]
