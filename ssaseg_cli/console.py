"""Output that several commands have in common: tables, `--json` and progress bars."""

import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.files.text import printable


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is, or that COLUMNS in the environment says; None: a file or a pipe."""
    known = os.environ.get("COLUMNS", "").isdecimal()
    return shutil.get_terminal_size().columns if known or sys.stdout.isatty() else None


def fit_lines(text: str, width: int | None) -> str:
    """Breaks lines of more than `width` columns at spaces. The rest of a line stands below its last column, that of a
    command after a backslash. None: nothing is broken.
    """
    if width is None:
        return text
    return "".join(f"{part}\n" for line in text.splitlines() for part in _fit_line(line, max(width, 40)))


def _fit_line(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = len(line) - len(line.lstrip())
    columns = [found.end() for found in re.finditer(r"(?<=\S) {2,}", line)]
    if len(columns) >= 3:  # two lists side by side
        return [*_fit_line(line[: columns[1]].rstrip(), width), *_fit_line(" " * indent + line[columns[1] :], width)]
    command = line.startswith("ssaseg ", indent)
    if columns and columns[-1] > 0.6 * width:  # too little is left for the last column: it stands below the others
        return [line[: columns[-1]].rstrip(), *_fit_line(" " * (indent + 4) + line[columns[-1] :], width)]
    hang = columns[-1] if columns else indent + 2 + 2 * command
    whole = {"break_long_words": False, "break_on_hyphens": False}
    parts = textwrap.wrap(line, width - 2 * command, subsequent_indent=" " * hang, **whole)  # type: ignore[arg-type]
    return [f"{part} \\" for part in parts[:-1]] + parts[-1:] if command else parts


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table on stdout: the first column holds names (left-aligned), the others numbers (right-aligned).

    Nothing is cut. Where the terminal is too narrow, headers are broken at spaces, then the columns are divided into
    several tables with the same names.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heads = [printable(column) for column in columns]
    cells = [[printable(cell) for cell in row] for row in rows]
    widest = [max((cell_len(row[at]) for row in cells), default=0) for at in range(len(heads))]
    width = terminal_width() or sys.maxsize
    roomy = sum(max(size, cell_len(head)) + 3 for head, size in zip(heads, widest, strict=True)) + 1 <= width
    if not roomy:
        heads = [_broken_head(head, size) for head, size in zip(heads, widest, strict=True)]
    sizes = [max(size, *map(cell_len, head.split("\n"))) for head, size in zip(heads, widest, strict=True)]
    if title:
        echo(title)
    for block in [range(len(heads))] if roomy else _blocks(sizes, width):
        table = Table(box=box.SIMPLE_HEAD)
        if not roomy:
            table.padding, table.pad_edge, table.show_edge = (0, 1, 0, 0), False, False
        for at in block:
            table.add_column(Text(heads[at]), justify="right" if at else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(row[at]) for at in block))  # as Text: "[void]" in a class name is not markup
        needed = sum(sizes[at] + 3 for at in block) + 1
        Console(highlight=False, width=min(width, max(needed, 160))).print(table)
        if block[-1] < len(heads) - 1:
            echo()


def _broken_head(head: str, size: int) -> str:
    """A header on several lines, as narrow as its longest word, or as the cells below it."""
    return "\n".join(textwrap.wrap(head, max(size, *map(len, head.split(" "))), break_on_hyphens=False)) or head


def _blocks(sizes: Sequence[int], width: int) -> Iterator[list[int]]:
    """Columns in groups that fit into a width, each with the first column at its start."""
    block = [0]
    for at in range(1, len(sizes)):
        if len(block) > 1 and sum(sizes[each] + 2 for each in (*block, at)) - 2 > width:
            yield block
            block = [0]
        block.append(at)
    yield block


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
def progress_bar(total: int | None, verb: str, what: str = "images") -> Iterator[Callable[[int], object]]:
    """Yields a function to call with the number of images, or of `what`, just done. total: None: nobody knows it.

    It updates a bar on a terminal. Without a terminal it prints a line, at most every ten seconds.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=verb, unit="img" if what == "images" else what, file=sys.stderr) as bar:
            yield bar.update
        return
    finished, printed = 0, time.perf_counter()

    def advance(done: int) -> None:
        nonlocal finished, printed
        finished += done
        if time.perf_counter() - printed >= 10:
            printed = time.perf_counter()
            echo(f"{verb} {finished}{'' if total is None else f'/{total}'} {what}", err=True)

    yield advance


def about(seconds: float) -> str:
    """A time, rounded to what an estimate is good for: "about 2 hours"."""
    units = (("second", 1, 100), ("minute", 60, 100), ("hour", 3600, 72), ("day", 86400, math.inf))
    unit, count = next((unit, seconds / length) for unit, length, most in units if seconds < most * length)
    step = 1 if count < 20 else 5
    rounded = max(round(count / step) * step, 1)
    return f"about {rounded} {unit}{'s' * (rounded > 1)}"
