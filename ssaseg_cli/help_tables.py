"""What help pages and `ssaseg recipes keys` list, from a file: to import what has it takes seconds.

`make docs` writes the file, see `recipe_keys.collect`; a test compares it with what it was made of.
"""

from functools import cache
from pathlib import Path
from typing import Any

from ssaseg.files.structured import read_json

TABLES = Path(__file__).with_name("help_tables.json")


@cache
def help_tables() -> dict[str, Any]:
    """The content of the file, see `recipe_keys.collect`."""
    tables: dict[str, Any] = read_json(TABLES)
    return tables
