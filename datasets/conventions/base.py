"""What every convention of annotation tools offers: how it is recognised, and how its labels become class ids.

Training reads masks of class ids and COCO-format files. All other conventions are converted once, by `ssaseg data
prepare`, as decoding them in each epoch would cost several times as much.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ssaseg.datasets.base import Colour, DataError
from ssaseg.files.listing import walk_below

TABLE, REST = frozenset({"table"}), frozenset({"background"})  # what conventions take of `Options`


@dataclass(frozen=True)
class Tree:
    """All visible files below a folder, listed once for all conventions."""

    root: Path

    @cached_property
    def files(self) -> tuple[PurePosixPath, ...]:
        """Paths below `root`, sorted."""
        return tuple(PurePosixPath(below) for below in walk_below(self.root))

    @cached_property
    def by_suffix(self) -> Mapping[str, list[PurePosixPath]]:
        """The same by suffix, in lower case and with its dot."""
        groups: dict[str, list[PurePosixPath]] = {}
        for file in self.files:
            groups.setdefault(file.suffix.lower(), []).append(file)
        return groups

    def named(self, *names: str) -> Iterator[PurePosixPath]:
        """Files with one of these names (lower case), in any folder; those nearest to the root come first."""
        found = (file for file in self.files if file.name.lower() in names)
        return iter(sorted(found, key=lambda file: (len(file.parts), file)))


@dataclass(frozen=True)
class Options:
    """What the user says where files do not: arguments of `ssaseg data prepare`."""

    table: Path | None = None  # file of class names, with colours where masks have colours
    background: str | None = None  # class of the pixels that no annotation covers; None: the convention's own rule


@dataclass(frozen=True)
class Item:
    """One image and its annotation."""

    split: str  # "train", "val"; "all" where the source has no splits
    name: str  # of the files that are written: with / and without suffix
    image: Path
    label: Any  # what `Source.read` needs; it is sent to worker processes


@dataclass
class Source:
    """A folder in some convention, ready to be converted."""

    items: list[Item]
    classes: list[str]  # in the order of the train ids
    read: Callable[[Item], np.ndarray]  # train ids uint8 (H, W), 255 = ignored; raises DataError, OSError; picklable
    palette: list[Colour] | None = None
    notes: list[str] = field(default_factory=list)  # what was found, and which rules are used


@dataclass(frozen=True)
class Convention:
    """One way in which annotation tools write labels."""

    kind: str  # the argument of `ssaseg data prepare`
    what: str  # what its folder holds, on one line, for the help
    recognise: Callable[[Tree], str | None]  # what shows that a folder has it, in words; None: it has not
    open_source: Callable[[Tree, Options], Source]  # raises DataError where the folder cannot be used
    takes: frozenset[str] = frozenset()  # names of the fields of `Options` that it uses
    # Whether `open_source` itself says why a folder is not of this kind; of other kinds `recognise` is asked first.
    explains: bool = False

    def require(self, tree: Tree, options: Options) -> None:
        """Raises DataError for an option that it would ignore, and for a folder that is not of this kind."""
        given = [name for name, value in vars(options).items() if value is not None and name not in self.takes]
        if given:
            usable = ", ".join(f"--{name}" for name in sorted(self.takes)) or "neither --table nor --background"
            raise DataError(
                f"--{given[0]}: not for {self.kind}, whose files say this themselves\nexpected {usable}\n"
                f"remove --{given[0]}"
            )
        if not self.explains and self.recognise(tree) is None:
            raise self.not_found(tree.root)

    def not_found(self, root: Path) -> DataError:
        """The error for a folder that is not of this kind."""
        return DataError(
            f"{root}: no labels of {self.kind}\nexpected {self.what}\n"
            f"`ssaseg data init {shlex.quote(str(root))}` says what the folder holds"
        )


def prepare_command(kind: str, source: Path, *options: str) -> str:
    """The command that prepares a user's folder, quoted for a shell."""
    return shlex.join(["ssaseg", "data", "prepare", kind, "--source", str(source), "--root", beside(source), *options])


def beside(source: Path) -> str:
    """A folder to propose for `--root`: in the current folder, or beside the source if that is among the data."""
    real = Path(os.path.realpath(source))
    name = f"{real.name.lstrip('.') or 'data'}-prepared"
    return str(real.with_name(name)) if Path.cwd().is_relative_to(real) else name
