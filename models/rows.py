"""Key rows: what a tensor of ours is called in somebody else's file, and how its value is laid out there.

A row is true by itself: exactly one row fits each key of a model, so the order of rows means nothing. Its two sides are
keys, or the first parts of keys; what follows is the same on both. `{}` stands for a number, the same on both sides;
`{+1}`, on their side, for that number plus 1: files count blocks from 1 where lists count from 0.

>>> Row("mobile.{}.{}.conv", "smb{+1}.layer{}.c").name_of("mobile.0.2.conv.weight")
'smb1.layer2.c.weight'
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

Names = str | tuple[str, ...]
Values = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Row:
    """One rule. Either side may be several keys; `to_ours` and `to_theirs` say how their values become one another.

    `to_ours` takes a tensor for each of their keys and returns one for each of ours; `to_theirs` is its inverse, bit
    for bit. Without them values are the same on both sides.
    """

    ours: Names
    theirs: Names
    to_ours: Values | None = None
    to_theirs: Values | None = None

    @cached_property
    def _patterns(self) -> tuple[tuple[str, re.Pattern[str]], ...]:
        """What a key begins with, which is quick to see, and the whole pattern."""
        return tuple(
            (side.partition("{")[0], re.compile(r"(\d+)".join(map(re.escape, side.split("{}"))) + r"(?=\.|$)"))
            for side in several(self.ours)
        )

    def names_of(self, key: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """Our keys and theirs of the tensors that `key`, one of ours, belongs to; None where the row does not fit."""
        for start, pattern in self._patterns:
            found = pattern.match(key) if key.startswith(start) else None
            if found:
                numbers, rest = [int(number) for number in found.groups()], key[found.end() :]
                ours, theirs = ((_fill(s, numbers) + rest for s in several(side)) for side in (self.ours, self.theirs))
                return tuple(ours), tuple(theirs)
        return None

    def name_of(self, key: str) -> str | None:
        """The first of `names_of`'s keys of theirs."""
        names = self.names_of(key)
        return None if names is None else names[1][0]

    def below(self, ours: str, theirs: str) -> "Row":
        """The same row with a prefix on either side."""
        return Row(
            tuple(f"{ours}.{name}" for name in several(self.ours)),
            tuple(f"{theirs}.{name}" for name in several(self.theirs)),
            self.to_ours,
            self.to_theirs,
        )


class Entry(NamedTuple):
    """Tensors of one model and what they are in a file: by one row, the numbers filled in."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    row: Row

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors by key, from those of a file, which has all of `theirs`."""
        values = tuple(tensors[name] for name in self.theirs)
        if self.row.to_ours is not None:
            values = self.row.to_ours(*values)
        return dict(zip(self.ours, values, strict=True))

    def give(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors by name, from a state dict of ours."""
        values = tuple(state[key] for key in self.ours)
        if self.row.to_theirs is not None:
            values = self.row.to_theirs(*values)
        return dict(zip(self.theirs, values, strict=True))


def entries(rows: Sequence[Row], keys: Iterable[str]) -> list[Entry]:
    """The keys of a model by the rows that fit them, in the keys' order.

    Raises ValueError for a key that no row fits, or several.
    """
    found: dict[tuple[str, ...], Entry] = {}
    for key in keys:
        fitting = [(row, names) for row in rows if (names := row.names_of(key)) is not None]
        if len(fitting) != 1:
            raise ValueError(f"{key}: {len(fitting)} rows fit it, expected one: {[row.ours for row, _ in fitting]}")
        row, (ours, theirs) = fitting[0]
        found.setdefault(ours, Entry(ours, theirs, row))
    return list(found.values())


def several(names: Names) -> tuple[str, ...]:
    """One name or several, as several."""
    return (names,) if isinstance(names, str) else names


def _fill(pattern: str, numbers: Sequence[int]) -> str:
    """A pattern with its `{}` and `{+1}` filled, in their order."""
    left = iter(numbers)
    return re.sub(r"\{(\+1)?\}", lambda slot: str(next(left) + bool(slot[1])), pattern)


# ---- rows that many networks have ------------------------------------------------------------------------------------


def conv_norm(ours: str, theirs: str, conv: str = "conv", norm: str = "bn") -> tuple[Row, Row]:
    """The two layers of a `ConvNorm`; `conv` and `norm`: what they are called in the other file."""
    return Row(f"{ours}.conv", f"{theirs}.{conv}"), Row(f"{ours}.norm", f"{theirs}.{norm}")


def rows_of(ours: str, theirs: str, names: Mapping[str, str]) -> list[Row]:
    """A row for each of `names`, our name → theirs, below two prefixes."""
    return [Row(f"{ours}.{own}", f"{theirs}.{other}") for own, other in names.items()]
