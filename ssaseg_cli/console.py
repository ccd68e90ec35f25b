"""Output that several commands have in common: tables, `--json` and progress bars."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.files.text import printable

if TYPE_CHECKING:
    from rich.console import Console


def make_console() -> "Console":
    """A rich console. To a file or a pipe it writes plain lines, 160 characters wide, so that table rows stay whole."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=160)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table on stdout: the first column holds names (left-aligned), the others numbers (right-aligned)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title and Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(Text(printable(column)), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # as Text: "[void]" in a class name is not markup
    make_console().print(table)


def json_target(json_out: str | None) -> str | None:
    """The value of `--json`, checked before any work is done; `/dev/stdout` becomes "-".

    Raises CommandError for an empty name, a folder, and a file whose folder is missing or cannot be written.
    """
    if json_out in (None, "-", "/dev/stdout"):
        return json_out and "-"
    path = Path(os.path.realpath(str(json_out)))  # of a link, the folder of its target is written to
    if not json_out:
        wrong = "is empty"
    elif path.is_dir():
        wrong = f"{json_out}: is a folder"
    elif path.exists() and not path.is_file():  # a device or pipe is opened, not replaced
        wrong = "" if os.access(path, os.W_OK) else f"{json_out}: cannot be written"
    elif not path.parent.is_dir():
        wrong = f"{json_out}: no such folder"
    else:
        wrong = "" if os.access(path.parent, os.W_OK | os.X_OK) else f"{json_out}: its folder cannot be written"
    if wrong:
        raise CommandError(f"--json {wrong}\ngive a file in a writable folder, or - for stdout")
    return json_out


def write_json(json_out: str | None, report: Mapping[str, Any]) -> None:
    """Writes the report of `--json` to a file, to stdout ("-"), or nowhere (None)."""
    from ssaseg.files.writing import write_atomic

    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    if json_out == "-":
        sys.stdout.write(text)
    elif json_out is not None:
        write_atomic(Path(json_out), text.encode())


@contextmanager
def progress_bar(total: int, verb: str) -> Iterator[Callable[[int], object]]:
    """Yields a function to call with the number of images just done.

    It updates a bar on a terminal. Without a terminal it prints a line, at most every ten seconds.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=verb, unit="img", file=sys.stderr) as bar:
            yield bar.update
        return
    finished, printed = 0, time.perf_counter()

    def advance(done: int) -> None:
        nonlocal finished, printed
        finished += done
        if time.perf_counter() - printed >= 10:
            printed = time.perf_counter()
            echo(f"{verb} {finished}/{total} images", err=True)

    yield advance


def about(seconds: float) -> str:
    """A time, rounded to what an estimate is good for: "about 2 hours"."""
    units = (("second", 1, 100), ("minute", 60, 100), ("hour", 3600, 72), ("day", 86400, math.inf))
    unit, count = next((unit, seconds / length) for unit, length, most in units if seconds < most * length)
    step = 1 if count < 20 else 5
    rounded = max(round(count / step) * step, 1)
    return f"about {rounded} {unit}{'s' * (rounded > 1)}"
