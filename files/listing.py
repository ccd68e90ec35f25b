"""Lists folders, and keeps the names of files, as text: for many files, objects of pathlib take more time than the
listing itself.
"""

import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

# To list a folder so often is no data set: a few dozen links into one another make billions of ways to a file.
MOST_WAYS = 100


class FileList(Sequence[Path]):
    """Files as a list of paths. They are kept as text, `texts`; each becomes a `Path` when it is asked for."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = list(texts)

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> "FileList": ...
    def __getitem__(self, index: int | slice) -> "Path | FileList":
        return FileList(self.texts[index]) if isinstance(index, slice) else Path(self.texts[index])

    def __iter__(self) -> Iterator[Path]:
        return map(Path, self.texts)


def texts_of(files: Iterable[Path]) -> list[str]:
    """The paths of files as text."""
    return files.texts if isinstance(files, FileList) else [str(file) for file in files]


def prefix_of(folder: Path) -> str:
    """What makes the path of a file below `folder` if it is put before its relative path, as pathlib joins them."""
    return "" if folder == Path() else os.path.join(folder, "")


def real_path(file: str, folders: dict[str, str]) -> str:
    """`os.path.realpath` of a file. `folders` keeps that of its folder, so that a file costs one call of the system."""
    if os.path.islink(file):
        return os.path.realpath(file)
    start = file.rfind("/") + 1
    folder = file[:start]
    if folder not in folders:
        # realpath: unlike Path.resolve, it raises nothing for a link to itself.
        folders[folder] = os.path.join(os.path.realpath(folder), "")
    return folders[folder] + file[start:]


def walk(folder: Path) -> Iterator[Path]:
    """The files of `walk_below`, as paths."""
    return (folder / below for below in walk_below(folder))


def walk_below(folder: Path) -> Iterator[str]:
    """Visible files below `folder`, their paths below it, with /: those of `walk_folders`."""
    for here, files in walk_folders(folder):
        yield from (here + file for file in files) if here else files


def walk_folders(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Visible files below `folder`: for it and each folder below it the path below it, which ends with / if it is not
    empty, and the names of its files, sorted. A folder comes before its subfolders, and these are sorted too.

    What is not a folder is a file here, even a device. Links are followed, except links to a folder that the walk is
    inside of, or to one above it: a circle ends. Raises OSError for a folder that cannot be read, none is skipped, and
    for one that links lead to more than `MOST_WAYS` times.
    """
    ways: Counter[str] = Counter()
    # To list: path, the same without links, whether it is a link, and the folders that a link must not lead to again.
    pending = [("", os.path.realpath(folder), True, frozenset[str]())]
    while pending:
        here, real, through_link, closed = pending.pop()
        if real in closed:
            continue
        ways[real] += 1
        if ways[real] > MOST_WAYS:
            text = f"links lead to this folder in more than {MOST_WAYS} ways"
            raise OSError(errno.ELOOP, text, str(folder / here))
        files, folders = _listed(folder / here)
        yield here, files
        closed = closed.union([real], map(str, Path(real).parents) if through_link else ())
        for name, is_link in folders:
            path = f"{real}/{name}"
            pending.append((f"{here}{name}/", os.path.realpath(path) if is_link else path, is_link, closed))


def _listed(folder: Path) -> tuple[list[str], list[tuple[str, bool]]]:
    """Names of the visible files, sorted; and those of the folders, each with whether it is a link, the last first."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            try:
                is_folder = entry.is_dir()  # of most entries known from the listing of the folder
            except OSError:
                if not entry.is_symlink():
                    raise
                is_folder = False  # a link to itself, or to where this user may not look
            if is_folder:
                folders.append((name, entry.is_symlink()))
            else:
                files.append(name)
    return sorted(files), sorted(folders, reverse=True)
