"""Finds the images to label, and chooses the names of their results."""

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
    relative: str  # path below the INPUT that it was found in
    name: str  # name of its results: path below their folder, without suffix


def find_sources(inputs: Sequence[str], out: Path) -> list[Source]:
    """The images of all inputs, each file once: in the order of the inputs, and sorted within an input.

    Results in `out` are not taken as images. Raises CommandError for an input without images, and for two images whose
    results would have the same name.
    """
    results = {(out / kind).resolve() for kind in KINDS}
    found: dict[str, tuple[Path, str]] = {}
    for given in inputs:
        candidates = _expand(given)
        images = [(path, relative) for path, relative in candidates if results.isdisjoint(path.resolve().parents)]
        if candidates and not images:
            raise CommandError(f"{given}: its only images are results in --out {out}, which are skipped\nchange --out")
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
    """(file, path below the input) of one file, folder or pattern. Of a pattern, paths start at the first wildcard."""
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
    """The sources with names for their results: the relative path without suffix, or with it if two would be equal."""
    names = [relative.removesuffix(Path(relative).suffix) for _, relative in found]
    while True:
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            groups.setdefault(name, []).append(index)
        equal = [index for group in groups.values() if len(group) > 1 for index in group]
        # Repeated, since a name with its suffix may be equal to another name.
        short = [index for index in equal if names[index] != found[index][1]]
        if not short:
            break
        for index in short:
            names[index] = found[index][1]
    if equal:
        first, second = (found[index][0] for index in equal[:2])
        raise CommandError(
            f"{first} and {second}: their results would have the same name, {names[equal[0]]}\n"
            "give the folder that holds both inputs, or run the command once for each, with another --out"
        )
    return [Source(path, relative, name) for (path, relative), name in zip(found, names, strict=True)]
