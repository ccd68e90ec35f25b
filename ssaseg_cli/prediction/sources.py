"""Finds the images to label, and chooses the names of their results."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ssaseg.cli.errors import CommandError
from ssaseg.cli.places.objects import Content
from ssaseg.cli.results.kinds import KINDS
from ssaseg.datasets.checking.images import count_suffixes
from ssaseg.datasets.decoding.images import HEADER
from ssaseg.datasets.pairs import IMAGE_SUFFIXES
from ssaseg.files.listing import real_path, walk_below
from ssaseg.files.text import printable

EXPLANATIONS = ("activation", "summary")  # folders of the results of `ssaseg explain`
EXAMPLES = 3  # files that are named of those left out
RESULTS = (*KINDS, *EXPLANATIONS)  # folders in OUT whose images are results of some command


class Source(NamedTuple):
    """An image to label."""

    file: str
    relative: str  # path below the INPUT that it was found in
    name: str  # name of its results: path below their folder; without suffix, unless it is kept
    content: Content | None = None  # of what is not a local file; `file` is then its address without secrets

    @property
    def path(self) -> Path:
        """The file. Made when it is needed: for many files, objects of pathlib take most of the time of listing."""
        return Path(self.file)

    def read(self) -> bytes | None:
        """The content of what is not a local file; None for a file. Raises as `Content.read`."""
        return None if self.content is None else self.content.read()

    def header(self) -> Path | bytes:
        """What `shown_size` reads the size from."""
        return self.path if self.content is None else self.content.start(HEADER)


Image: TypeAlias = tuple[str, str, Content | None]  # the first two fields of a `Source`, and the last


@dataclass
class LeftOut:
    """Files that folders and patterns hold besides images: how many of each suffix, and the first of them."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(self, files: Sequence[str]) -> None:
        """Adds files that were found together."""
        self.counts.update(_suffix(file).lower() for file in files)
        self.first = [*self.first, *files][:EXAMPLES]

    def __str__(self) -> str:
        names = ", ".join(map(printable, self.first))
        return f"{count_suffixes(self.counts)} ({names}{', …' * (self.counts.total() > len(self.first))})"


def find_sources(
    inputs: Sequence[str], out: Path, others: LeftOut | None = None, keep_suffix: bool = False
) -> list[Source]:
    """The images of all inputs, each file once: in the order of the inputs, and sorted within an input.

    `others`: gets the files that folders and patterns also hold, and that are not taken as images. keep_suffix: results
    are named by the whole names of their images, as in `a.jpg.png`.

    What is in the folders `RESULTS` of `out` is not taken as images. What only has the name of an image, such as a
    device, is found here and refused when it is read. Raises CommandError for an input without images, two images whose
    results would have the same name, and a pattern by which a result would lie outside its folder; OSError for a folder
    that cannot be read.
    """
    found: dict[str, Image] = {}
    search = Search(out, others)
    for given in inputs:
        for path, relative in search.images(given):
            found.setdefault(os.path.abspath(path), (path, relative, None))
    return name_results(found.values(), keep_suffix)


class Search:
    """Looks for local images. out, others: as of `find_sources`; None: results are written elsewhere."""

    def __init__(self, out: Path | None, others: LeftOut | None = None) -> None:
        self.out, self.others = out, others
        folders = [] if out is None else [*(out / folder for folder in RESULTS)]
        self.results = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
        self.whole = () if out is None else (os.path.join(os.path.realpath(out), ""),)
        self.real: dict[str, str] = {}

    def images(self, given: str) -> list[tuple[str, str]]:
        """(file, path below the input) of the images of one file, folder or pattern. Raises as `find_sources`."""
        files = _expand(given)
        named = not os.path.isdir(given) and os.path.lexists(given)
        candidates = [each for each in files if named or is_image(each[0])]
        others_here = [path for path, _ in files if not is_image(path)] if len(candidates) < len(files) else []
        rest = [path for path in others_here if not _is_within(path, self.whole, self.real)]
        if self.others is not None:
            self.others.add(rest)
        images = [each for each in candidates if not _is_within(each[0], self.results, self.real)]
        shown = printable(given)
        if candidates and not images:
            only = f"its only images are results in --out {printable(str(self.out))}, which are skipped"
            raise CommandError(f"{shown}: {only}\nchange --out")
        if not images:
            raise no_image(shown, _where(given), rest)
        return images


def no_image(shown: str, where: str, rest: Sequence[str]) -> CommandError:
    """The error for an input without images. rest: its other files."""
    suffixes = " ".join(suffix.lstrip(".") for suffix in IMAGE_SUFFIXES)
    left_out = LeftOut()
    left_out.add(rest)
    also = f"; {left_out}" if rest else ""
    return CommandError(f"{shown}: no image found{also}\nlooked for {where}; types: {suffixes}")


def _is_within(path: str, folders: tuple[str, ...], real: dict[str, str]) -> bool:
    """Whether a file is below one of the folders. real: of folders that were asked for, the paths without links."""
    return real_path(path, real).startswith(folders)


def _where(given: str) -> str:
    if os.path.isdir(given):
        return "images in this folder and below"
    return "images that match this pattern" if glob.has_magic(given) else "a file or folder of this name"


def _expand(given: str) -> list[tuple[str, str]]:
    """(file, path below the input) of one file, folder or pattern. Of a pattern, paths start at the first wildcard."""
    path = Path(given)
    if not given:  # as of "$FOLDER", a variable that is not set; Path("") is the current folder
        raise CommandError("INPUT is empty\ngive a file, a folder or a pattern; . is the current folder")
    if os.path.isdir(path):
        above = "" if path == Path() else os.path.join(path, "")
        return [(above + below, below) for below in walk_below(path)]
    if os.path.lexists(path):
        return [(str(path), path.name)]
    if not glob.has_magic(given):
        return []
    base = Path(*path.parts[: next(index for index, part in enumerate(path.parts) if glob.has_magic(part))])
    matches = sorted(match for match in _matches(path) if not os.path.isdir(match))
    return [_below(base, match, given) for match in matches]


def _matches(pattern: Path) -> Iterator[Path]:
    """What matches a pattern. `**` stands for any number of folders, and does not go round in circles of links."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))
        return
    at = pattern.parts.index("**")
    rest = pattern.parts[at:]
    if ".." in rest:
        fix = "give the folders themselves, without '..'"
        raise CommandError(f"{printable(str(pattern))}: '..' after '**' in a pattern\n{fix}")
    start = str(Path(*pattern.parts[:at]))
    folders = glob.glob(start) if glob.has_magic(start) else [start]
    for folder in filter(os.path.isdir, folders):
        for below in walk_below(Path(folder)):
            if _agree(below.split("/"), rest):
                yield Path(folder, below)


def _agree(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a path's names match the patterns of names, where `**` stands for any number of names."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_agree(names[skipped:], patterns[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _agree(names[1:], patterns[1:])


def _below(base: Path, match: Path, given: str) -> tuple[str, str]:
    """A match and its path below the folder before the first wildcard. Raises CommandError if it is not below it."""
    if ".." not in match.parts:
        return str(match), match.relative_to(base).as_posix()
    relative = os.path.normpath(match.relative_to(base))
    if relative.startswith(".."):
        raise CommandError(
            f"{printable(given)}: {printable(str(match))} is not below {printable(str(base))}, the part of the pattern "
            "before its first wildcard\nits result would lie outside its folder: write '..' before the first wildcard"
        )
    return os.path.realpath(match), relative  # one path for `a/../x.png` and `b/../x.png`


def _suffix(path: str) -> str:
    """The suffix of a file's name with its dot, as pathlib has it."""
    name = path[path.rfind("/") + 1 :]
    dot = name.rfind(".")
    return name[dot:] if 0 < dot < len(name) - 1 else ""


def is_image(path: str) -> bool:
    return _suffix(path).lower() in IMAGE_SUFFIXES


def name_results(found: Iterable[Image], keep_suffix: bool) -> list[Source]:
    """The sources with names for their results. Raises CommandError if two names are equal.

    A name depends on the relative path alone: what else is in a folder, now or in a later run, changes no name.
    """
    sources: dict[str, Source] = {}
    for path, relative, content in found:
        source = Source(path, relative, relative if keep_suffix else relative.removesuffix(_suffix(relative)), content)
        other = sources.setdefault(source.name, source)
        if other is source:
            continue
        both = f"{printable(other.file)} and {printable(path)}"
        fix = "give the folder that holds both inputs, or run the command once for each, with another --out"
        if other.relative != relative:
            fix = "`predict --keep-suffix` names results by whole file names; or rename one of the two"
        raise CommandError(f"{both}: their results would have the same name, {printable(source.name)}\n{fix}")
    return list(sources.values())


def key_of(kind: str, source: Source, tiled: bool = False) -> str:
    """The file of one result below OUT; of objects in a file of all images, that file and the image's name in it.
    tiled: with --tile.
    """
    suffix = (KINDS[kind].tiled if tiled else None) or KINDS[kind].suffix
    return f"{kind}{suffix}/{source.relative}" if KINDS[kind].encode is None else f"{kind}/{source.name}{suffix}"
