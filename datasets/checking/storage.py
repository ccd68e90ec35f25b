"""Whether all masks of a set mean the same by an id: what is seen only when files are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssaseg.datasets.base import IGNORED, Colour, PairFacts, Problem, hexed

RARE = 0.03  # share of all pixels up to which ids between 0 and 255 are rare
# Of black and white with soft edges or noise:
DARK, BRIGHT = 32, 224  # levels that compression makes of 0 and of 255
MOST_BETWEEN = 0.15  # share of pixels with levels from DARK to BRIGHT
LARGE = 0.03  # share of noise above which it must have several levels, as class ids may be 254 and 255, too
REACH = 32  # by how much the darkest level may be nearer to 0 than the brightest is to 255, or the other way round
THRESHOLD = 128  # from here on, a pixel is the object
MOST_COLOURS = 4096  # that are remembered: palettes that agree have at most 256
MANY = 6  # levels between 0 and 255, of which no set of a few classes has so many
PREPARE = "`ssaseg data prepare binary --source DIR --root OUT` writes 0 and 1, by the threshold 128"


@dataclass
class Storage:
    """How the masks that were read store their ids. Files are the first ones that were found."""

    colours: dict[int, dict[Colour, Path]] = field(default_factory=dict)  # by used id: its colours in palettes
    ids: dict[Colour, dict[int, Path]] = field(default_factory=dict)  # by colour of a used id: the ids that have it
    # By what ids other than 0 a mask has: "bit": only 1, and it is white; "one": only 1; "white": only 255; "other".
    binary: dict[str, Path] = field(default_factory=dict)

    def add(self, file: Path, facts: PairFacts, lut: np.ndarray) -> None:
        """Adds a mask. `lut`: the train ids of the raw ids; ids that are ignored may have any colour."""
        if facts.pixels is None:
            return
        used = [int(value) for value in np.flatnonzero(facts.pixels)]
        rgb = facts.palette
        white = facts.white if rgb is None else 1 if rgb[3:6] == b"\xff\xff\xff" else IGNORED
        things = tuple(value for value in used if value)
        if things:
            kinds: dict[tuple[int, ...], str] = {(1,): "bit" if white == 1 else "one", (IGNORED,): "white"}
            self.binary.setdefault(kinds.get(things, "other"), file)
        if rgb is None or rgb == rgb[:3] * (len(rgb) // 3):
            return
        named = {value: _colour(rgb, value) for value in used if lut[value] != IGNORED and 3 * value + 2 < len(rgb)}
        if all(colour == (value, value, value) for value, colour in named.items()):
            return  # no palette was chosen: ids are shown as grey levels
        for value, colour in named.items():
            if list(named.values()).count(colour) == 1 and len(self.ids) < MOST_COLOURS:
                _keep(self.colours.setdefault(value, {}), colour, file)
                _keep(self.ids.setdefault(colour, {}), value, file)

    def joined(self, other: Storage) -> Storage:
        """This and another part of a set together."""
        result = Storage()
        for part in (self, other):
            for value, colours in part.colours.items():
                for colour, file in colours.items():
                    _keep(result.colours.setdefault(value, {}), colour, file)
            for colour, values in part.ids.items():
                for value, file in values.items():
                    _keep(result.ids.setdefault(colour, {}), value, file)
            result.binary = part.binary | result.binary
        return result

    @property
    def two_whites(self) -> bool:
        """Whether one object is written in two ways: as 1 in some masks, as 255 in others, and no other id is used."""
        return {"white"} < self.binary.keys() and "other" not in self.binary

    def problems(self, lut: np.ndarray) -> Iterator[Problem]:
        """Ids that mean different things in different files. `lut` as in `add`."""
        yield from self.palette_problems()
        if self.two_whites and lut[IGNORED] == IGNORED and lut[1] != IGNORED:
            one, found = ("bit", "white is id 1") if "bit" in self.binary else ("one", "all ids but 0 are 1")
            yield Problem(
                "error" if one == "bit" else "warning",
                f"{self.binary[one]}: {found}; in {self.binary['white']} it is 255, which is ignored\n"
                "expected the same id for the same class in all masks\n"
                "if both are one class: set data.raw_to_train={0: 0, 1: 1, 255: 1}",
                "two ids for one class",
            )

    def palette_problems(self) -> Iterator[Problem]:
        """The first id with two colours and the first colour with two ids."""
        for value, colours in sorted(self.colours.items()):
            if len(colours) > 1:
                (one, first), (two, second) = list(colours.items())[:2]
                yield _conflict(f"{first}: id {value} is {hexed(one)} in its palette", f"{hexed(two)} in {second}")
                break
        for colour, values in self.ids.items():
            if len(values) > 1:
                (low, first), (high, second) = list(values.items())[:2]
                yield _conflict(f"{first}: {hexed(colour)} is id {low} in its palette", f"id {high} in {second}")
                break


def _conflict(one: str, other: str) -> Problem:
    return Problem(
        "error",
        f"{one}, {other}\nexpected palettes that number colours in the same way in all masks\n"
        "`ssaseg data prepare colours` numbers them by colour; if the ids are right, save the masks as 8-bit grey",
        "palettes that differ",
    )


def _keep(known: dict, key: object, file: Path) -> None:
    """Two are enough to show a conflict."""
    if len(known) < 2:
        known.setdefault(key, file)


def _colour(rgb: bytes, value: int) -> Colour:
    red, green, blue = rgb[3 * value : 3 * value + 3]
    return red, green, blue


# ---- counts of all masks -----------------------------------------------------------------------------------------
def is_soft(pixels: np.ndarray) -> bool:
    """Whether levels of grey, of which `pixels` int64 (256,) have each, are those of black and white with soft edges or
    the noise of lossy compression: few pixels have levels between 0 and 255, and these are many levels, which reach as
    near to 255 as to 0. Class ids do not, as they are counted from 0.
    """
    total = max(int(pixels.sum()), 1)
    between = np.flatnonzero(pixels[1:IGNORED]) + 1
    if not pixels[:DARK].any() or not pixels[BRIGHT:].any() or not len(between):
        return False
    low, high = int(between[0]), int(between[-1])
    if not low < THRESHOLD <= high or abs(low - (IGNORED - high)) > REACH:
        return False
    if pixels[DARK:BRIGHT].any() and (len(between) < MANY or pixels[DARK:BRIGHT].sum() > MOST_BETWEEN * total):
        return False
    dark, bright = pixels[1:DARK], pixels[BRIGHT:IGNORED]
    noise = (dark.sum() + bright.sum()) / total
    return bool(noise <= LARGE or (np.count_nonzero(dark) >= 3 and np.count_nonzero(bright) >= 3))


def is_object(pixels: np.ndarray) -> bool:
    """Whether 255 has more pixels than all ids but 0, which are rare: then it is more likely a class than ignored."""
    rest = pixels[1:IGNORED]
    return bool(pixels[0] and pixels[IGNORED] > rest.max() and rest.sum() <= RARE * pixels.sum())


def about_255(pixels: np.ndarray, lut: np.ndarray) -> Iterator[Problem]:
    """Doubts about id 255 where it is ignored, but looks like the object of binary masks. They are no errors: the user
    has said what the ids mean.
    """
    if lut[IGNORED] != IGNORED or lut[0] == IGNORED:
        return
    share = pixels[IGNORED] / max(pixels.sum(), 1)
    others = int(np.count_nonzero(pixels[1:IGNORED]))
    if is_soft(pixels):
        yield Problem("warning", soft_text(pixels), "soft edges")
    elif is_object(pixels):
        yield Problem(
            "warning",
            f"255 is ignored, and has {share:.1%} of the pixels; "
            + (f"the {others} ids between 0 and 255 have fewer" if others else "the only other id is 0")
            + "\nif 255 is the object: set data.raw_to_train={0: 0, 255: 1}, with two classes",
            "255 is ignored",
        )


def soft_text(pixels: np.ndarray) -> str:
    """The error for binary masks with soft edges."""
    others, rest = int(np.count_nonzero(pixels[1:IGNORED])), pixels[1:IGNORED].sum() / pixels.sum()
    return (
        f"binary masks with soft edges: 0 and 255, and {others} other values with {rest:.1%} of the pixels\n"
        f"expected class ids; 255 is ignored, and it is probably the object\n{PREPARE}"
    )
