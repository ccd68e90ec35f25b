"""Groups images that are not independent, such as the frames of a video, to blocks: by their names, or in rows."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ssaseg.cli.errors import CommandError
from ssaseg.files.text import cut, printable

SEQUENCE = "sequence"
EXPECTED = "expected --blocks sequence, --blocks N (neighbouring images), or a regular expression"
FEW = 6  # with fewer blocks, no way to swap them is rarer than 5 %
FRAME = re.compile(r"\d{2,}(?![A-Za-z0-9])")  # a number that all names may have; not that of `1080p`
NUMBERED = re.compile(r"^(.*?)\d+$", re.DOTALL)


def blocks_of(names: Sequence[str], rule: str) -> np.ndarray:
    """The block of each image, int (N), numbered in the order in which they first occur.

    names: of the images, in order. rule: "sequence": images whose names are equal up to the number at the end; a whole
    number: so many neighbours of one sequence; otherwise a regular expression, whose first group, or whole match, is
    the name of the block. Raises CommandError for a rule that does not fit the names, and for fewer than two blocks.
    """
    keys: Sequence[object]
    if rule == SEQUENCE:
        keys = _sequences(names)
        fix = "give --blocks N: blocks of N neighbouring images"
    elif re.fullmatch(r"\d+", rule):
        keys = _rows(_sequences(names), int(rule[:9]))
        fix = f"give a number up to {max(len(names) // FEW, 1)}"
    else:
        keys = _matches(names, rule)
        fix = "give an expression that matches other text in other sequences"
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    if len(numbers) < 2:
        raise CommandError(f"--blocks {printable(rule)}: one block of all {len(names)} images; nothing varies\n{fix}")
    return np.array([numbers[key] for key in keys])


def sequences_in(names: Sequence[str]) -> dict[str, int]:
    """Sequences that the names look like, with their numbers of images; empty where some name has no number."""
    try:
        found = Counter(_sequences(names))
    except CommandError:
        return {}
    return {name: count for name, count in found.items() if count > 1}


def _sequences(names: Sequence[str]) -> list[str]:
    """Each name without the number at its end; a part at the end that all names have is left out first.

    Of `frankfurt_000000_000294_leftImg8bit`, in a set where all end so, this is `frankfurt_000000_`.
    """
    # All letters that all names end with; the first and the last of the sorted reversed names differ most.
    low, high = min(ends := [name[::-1] for name in names]), max(ends)
    shared = next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    tail = low[:shared][::-1].lstrip("0123456789")
    end = len(FRAME.split(tail)[-1])
    found = []
    for name in names:
        match = NUMBERED.match(name[: len(name) - end])
        if match is None:
            shown = cut(printable(name))
            raise CommandError(
                f"--blocks: the name {shown!r} does not end with a number, so its sequence is not known\n"
                "give a regular expression: its first group is the name of the sequence"
            )
        found.append(match[1])
    return found


def _rows(sequences: Sequence[str], length: int) -> list[tuple[str, int]]:
    """Blocks of `length` images that follow one another in a sequence."""
    if length < 1:
        raise CommandError(f"--blocks {length}: not a number of images\n{EXPECTED}")
    seen: Counter[str] = Counter()
    keys = []
    for sequence in sequences:
        keys.append((sequence, seen[sequence] // length))
        seen[sequence] += 1
    return keys


def _matches(names: Sequence[str], rule: str) -> list[str]:
    try:
        pattern = re.compile(rule)
    except (re.error, OverflowError, RecursionError) as error:
        raise CommandError(f"--blocks {printable(rule)}: not a regular expression ({error})\n{EXPECTED}") from None
    keys = []
    for name in names:
        match = pattern.search(name)
        if match is None:
            shown = cut(printable(name))
            raise CommandError(f"--blocks {printable(rule)}: does not match the image {shown!r}\n{EXPECTED}")
        keys.append(next((group for group in match.groups() if group is not None), match[0]))
    return keys
