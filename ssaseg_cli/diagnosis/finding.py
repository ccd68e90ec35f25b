"""What `ssaseg doctor` finds wrong. This file imports no other file of the room, so that each of them can use it."""

import contextlib
import getpass
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

LONGEST = 300  # characters of an error


class Finding(NamedTuple):
    """A line of the verdict."""

    what: str
    fix: str
    broken: bool = True  # False: a note, with which everything works


Report = Callable[[Finding], object]  # adds a finding


def one_line(error: BaseException) -> str:
    """An error on one line, for the verdict."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]


def without_names(value: Any, names: Iterable[tuple[str, str]] | None = None) -> Any:
    """JSON values in which the user's folder, and the user's name as a part of a path, have become "~"."""
    names = private_names() if names is None else names
    if isinstance(value, str):
        for pattern, replacement in names:
            value = re.sub(pattern, replacement, value)
        return value
    if isinstance(value, dict):
        return {key: without_names(each, names) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_names(each, names) for each in value]
    return value


def private_names() -> list[tuple[str, str]]:
    """Patterns of text that says who uses the machine, and what takes its place."""
    home = os.path.expanduser("~")
    homes = {each for each in (home, os.path.realpath(home)) if len(Path(each).parts) > 1}
    end = r"(?![\w.-])"
    found = [(re.escape(each) + end, "~") for each in sorted(homes, key=len, reverse=True)]
    with contextlib.suppress(KeyError, OSError, ImportError):  # this user has no name
        found.append((rf"(?<=/){re.escape(getpass.getuser())}{end}", "~"))
    return found
