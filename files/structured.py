"""JSON from outside. What Python's parser accepts may still end a program later: deep nesting, endless numbers."""

import json
import os
from typing import Any

from ssaseg.files.reading import LARGEST_TEXT, read_file

DEEPEST = 32  # nested lists and objects
DIGITS = 18  # of a whole number: with these it fits into 64 bits


def read_json(path: str | os.PathLike[str], limit: int = LARGEST_TEXT) -> Any:
    """The content of a JSON file. Raises OSError as `read_file` does, and ValueError as `parse_json` does."""
    return parse_json(read_file(path, limit))


def parse_json(text: str | bytes) -> Any:
    """A JSON value. Raises ValueError for what is not JSON, is nested too deeply, or has a whole number that is too
    long. NaN and infinity, which JSON does not know but Python writes, become floats.
    """
    try:
        value = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    require_shallow(value)
    return value


def require_shallow(value: Any, left: int = DEEPEST) -> None:
    """Raises ValueError for lists and mappings that are nested deeper than `left` levels."""
    if isinstance(value, list | dict):
        if left == 0:
            raise ValueError("lists or objects are nested too deeply")
        for inner in value.values() if isinstance(value, dict) else value:
            if isinstance(inner, list | dict):
                require_shallow(inner, left - 1)


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)
