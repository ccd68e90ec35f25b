"""Rows of key names: what one of our tensors is called in an official file, and how its value is stored there.

Exactly one row fits each key of a model, so the order of the rows does not matter. The two sides of a row are keys, or
beginnings of keys; the rest of a key is the same on both sides. `{}` stands for a number, equal on both sides. `{+1}`,
on their side, stands for that number plus 1, and `{+2}` plus 2: some files count from there.

>>> Row("mobile.{}.{}.conv", "smb{+1}.layer{}.c").name_of("mobile.0.2.conv.weight")
'smb1.layer2.c.weight'
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Names = str | tuple[str, ...]
Values = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Row:
    """One rule. Each side is one key or several; `to_ours` and `to_theirs` convert the values.

    `to_ours` takes one tensor for each of their keys and returns one for each of ours. `to_theirs` is its inverse, bit
    for bit. Without these functions the values are the same on both sides.
    """

    ours: Names
    theirs: Names
    to_ours: Values | None = None
    to_theirs: Values | None = None

    @cached_property
    def _patterns(self) -> tuple[tuple[str, re.Pattern[str]], ...]:
        """For each of our names: its fixed beginning, for a quick check, and the whole pattern."""
        return tuple(
            (side.partition("{")[0], re.compile(r"(\d+)".join(map(re.escape, side.split("{}"))) + r"(?=\.|$)"))
            for side in several(self.ours)
        )

    def names_of(self, key: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """Our keys and their keys of the entry that `key`, one of ours, belongs to; None if the row does not fit."""
        for start, pattern in self._patterns:
            found = pattern.match(key) if key.startswith(start) else None
            if found:
                numbers, rest = [int(number) for number in found.groups()], key[found.end() :]
                ours, theirs = ((_fill(s, numbers) + rest for s in several(side)) for side in (self.ours, self.theirs))
                return tuple(ours), tuple(theirs)
        return None

    def name_of(self, key: str) -> str | None:
        """The first of their keys in `names_of`."""
        names = self.names_of(key)
        return None if names is None else names[1][0]

    def below(self, ours: str, theirs: str) -> "Row":
        """The same row with a prefix on each side."""
        return Row(
            tuple(f"{ours}.{name}" for name in several(self.ours)),
            tuple(f"{theirs}.{name}" for name in several(self.theirs)),
            self.to_ours,
            self.to_theirs,
        )


class Entry(NamedTuple):
    """A row with the numbers filled in: keys of tensors of one model, and their names in a file."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    row: Row

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors by key, from the tensors of a file, which must have all of `theirs`."""
        values = tuple(tensors[name] for name in self.theirs)
        if self.row.to_ours is not None:
            values = self.row.to_ours(*values)
        return dict(zip(self.ours, values, strict=True))

    def give(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors by name, from our state dict."""
        values = tuple(state[key] for key in self.ours)
        if self.row.to_theirs is not None:
            values = self.row.to_theirs(*values)
        return dict(zip(self.theirs, values, strict=True))


def entries(rows: Iterable[Row], keys: Iterable[str], partial: bool = False) -> list[Entry]:
    """The entries for the keys of a model, in the order of the keys. `partial`: leaves out keys that fit no row.

    Raises ValueError for a key that fits no row, unless `partial`, or more than one.
    """
    return list(_entries(tuple(rows), tuple(keys), partial))


@lru_cache(maxsize=32)  # a conversion asks for those of one model several times: over 1,000 keys by over 100 rows
def _entries(rows: tuple[Row, ...], keys: tuple[str, ...], partial: bool) -> tuple[Entry, ...]:
    found: dict[tuple[str, ...], Entry] = {}
    for key in keys:
        fitting = [(row, names) for row in rows if (names := row.names_of(key)) is not None]
        if partial and not fitting:
            continue
        if len(fitting) != 1:
            raise ValueError(f"{key}: {len(fitting)} rows fit this key, expected 1: {[row.ours for row, _ in fitting]}")
        row, (ours, theirs) = fitting[0]
        found.setdefault(ours, Entry(ours, theirs, row))
    return tuple(found.values())


def several(names: Names) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (names,) if isinstance(names, str) else names


def _fill(pattern: str, numbers: Sequence[int]) -> str:
    """A pattern with its `{}`, `{+1}` and `{+2}` filled, in their order."""
    left = iter(numbers)
    return re.sub(r"\{(\+[12])?\}", lambda slot: str(next(left) + int(slot[1] or 0)), pattern)


# ---- rows that many networks use -------------------------------------------------------------------------------------


def conv_norm(ours: str, theirs: str, conv: str = "conv", norm: str = "bn") -> tuple[Row, Row]:
    """The two layers of a `ConvNorm`; `conv` and `norm`: their names in the official file."""
    return Row(f"{ours}.conv", f"{theirs}.{conv}"), Row(f"{ours}.norm", f"{theirs}.{norm}")


def rows_of(ours: str, theirs: str, names: Mapping[str, str]) -> list[Row]:
    """One row for each of `names` (our name → theirs), below the two prefixes."""
    return [Row(f"{ours}.{own}", f"{theirs}.{other}") for own, other in names.items()]


def query_key_value(ours: str, theirs: str) -> Row:
    """One tensor (3C,...) of ours that is three (C,...) in the files of `transformers`; `*` stands for their names."""
    names = tuple(theirs.replace("*", name) for name in ("query", "key", "value"))
    return Row(
        ours,
        names,
        lambda *parts: (torch.cat(parts),),
        lambda whole: tuple(part.clone() for part in whole.chunk(3)),
    )
