"""Which images to label, and what their results are called."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.kinds import KINDS
from ssaseg.datasets.pairs import IMAGE_SUFFIXES, walk


class Source(NamedTuple):
    """An image to label."""

    path: Path
    relative: str  # below the input it was found in
    name: str  # of its results, below their folder and without suffix


# ---- what to read and where to write -----------------------------------------------------------------------------
def find_sources(inputs: Sequence[str], out: Path) -> list[Source]:
    """Images of all inputs, each file once, in the order given and sorted within an input; results in `out` are none.

    Raises CommandError for an input that gives no image, and for two images whose results would be the same file.
    """
    results = {(out / kind).resolve() for kind in KINDS}
    found: dict[str, tuple[Path, str]] = {}
    for given in inputs:
        there = _expand(given)
        images = [(path, relative) for path, relative in there if results.isdisjoint(path.resolve().parents)]
        if there and not images:
            raise CommandError(f"{given}: no image but results below --out {out}, which are left out\nchange --out")
        if not images:
            suffixes = " ".join(suffix.lstrip(".") for suffix in IMAGE_SUFFIXES)
            raise CommandError(f"{given}: no image found\nlooked for {_where(given)}; types: {suffixes}")
        for path, relative in images:
            found.setdefault(os.path.abspath(path), (path, relative))
    return _name(list(found.values()))


def _where(given: str) -> str:
    if Path(given).is_dir():
        return "images in this folder and below"
    return "images that match this pattern" if glob.has_magic(given) else "a file or folder of this name"


def _expand(given: str) -> list[tuple[Path, str]]:
    """(file, path below the input) of one file, folder or glob. A glob's structure starts at its first wildcard."""
    path = Path(given)
    if path.is_file():
        return [(path, path.name)]
    if path.is_dir():
        return [(each, each.relative_to(path).as_posix()) for each in walk(path) if _is_image(each)]
    if not glob.has_magic(given):
        return []
    fixed = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    base = Path(*fixed)
    matches = sorted(Path(match) for match in glob.glob(given, recursive=True))
    return [(match, match.relative_to(base).as_posix()) for match in matches if _is_image(match) and match.is_file()]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _name(found: Sequence[tuple[Path, str]]) -> list[Source]:
    """Names for results: the relative path without suffix, with it where two would be one."""
    names = [relative.removesuffix(Path(relative).suffix) for _, relative in found]
    while True:
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            groups.setdefault(name, []).append(index)
        shared = [index for group in groups.values() if len(group) > 1 for index in group]
        # A name that just took its suffix back may meet another one: hence the loop.
        short = [index for index in shared if names[index] != found[index][1]]
        if not short:
            break
        for index in short:
            names[index] = found[index][1]
    if shared:
        first, second = (found[index][0] for index in shared[:2])
        raise CommandError(
            f"{first} and {second}: their results would both be called {names[shared[0]]}\n"
            "give the folder that holds both inputs, or run the command once for each with another --out"
        )
    return [Source(path, relative, name) for (path, relative), name in zip(found, names, strict=True)]
