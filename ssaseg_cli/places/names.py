"""Names of images in lists, archives and stores: what becomes of them below OUT, and which are refused."""

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

from ssaseg.cli.places.addresses import WEB, is_address, without_secrets
from ssaseg.datasets.base import DataError

TARS = (".tar", ".tar.gz", ".tgz")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST = 100_000  # names that one pattern may stand for


def is_tar(name: str) -> bool:
    """Whether a path or an address has the name of a tar."""
    path = urlsplit(name).path if name.startswith(WEB) else name
    return path.lower().endswith(TARS)


def stem_of(tar: str) -> str:
    """The name of a tar without its suffix: the folder in which its images stand."""
    path = unquote(urlsplit(tar).path) if tar.startswith(WEB) else tar
    name = path.rpartition("/")[2]
    return name[: -next(len(suffix) for suffix in TARS if name.lower().endswith(suffix))] or "tar"


def below_root(name: str) -> str | None:
    """A path that stays below any folder that it is put into, without empty parts; None for one that would not."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if name.startswith("/") or ".." in parts or "\0" in name or not parts else "/".join(parts)


def is_hidden(name: str) -> bool:
    """Whether a name or a folder above it begins with a dot, as `._a.jpg` in archives of macOS."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def key_of_sample(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file's name; of a name that begins with a dot, all."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0] or base}"


def expand_braces(pattern: str) -> Iterator[str]:
    """The names that `photos-{000..003}.tar` or `{a,b}.tar` stands for; the pattern itself, if it has no braces.

    Numbers keep the width of the first. Raises DataError for more than `MOST` names.
    """
    found = next((each for each in BRACES.finditer(pattern) if RANGE.fullmatch(each[1]) or "," in each[1]), None)
    if found is None:
        yield pattern
        return
    numbers = RANGE.fullmatch(found[1])
    if numbers is None:
        names = found[1].split(",")
    else:
        first, last = int(numbers[1]), int(numbers[2])
        if abs(last - first) >= MOST:
            shown = without_secrets(pattern)
            raise DataError(f"{shown}: {found[0]} stands for more than {MOST:,} names\nexpected fewer")
        step = 1 if last >= first else -1
        names = [f"{number:0{len(numbers[1])}d}" for number in range(first, last + step, step)]
    for name in names:
        yield from expand_braces(pattern[: found.start()] + name + pattern[found.end() :])


def name_as_given(line: str) -> str | None:
    """The path below OUT of a file in a list: below the current folder the path from there, else the whole path; of an
    address, what follows `://`. None for a name that cannot be one.
    """
    if is_address(line):
        rest = without_secrets(line).partition("::")[0].partition("://")[2]
        return below_root((unquote(rest) if line.startswith(WEB) else rest).lstrip("/"))
    path, here = os.path.abspath(line), os.path.join(os.getcwd(), "")
    return below_root(path.removeprefix(here).lstrip("/"))
