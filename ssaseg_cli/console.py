"""What the commands share: errors for the user, the device, tables, and `--json`."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where they are used: `--help` must not pay for them
    import torch
    from rich.console import Console


class CommandError(Exception):
    """Something the user can mend; the command prints the message (at most three lines) and exits.

    Args:
        message: what was got, what was expected, the mend.
        exit_code: 2 the user's or the input's fault, 3 a numerical failure.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def select_device(name: str) -> "torch.device":
    """The device for "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        CommandError: "cuda" was asked for and PyTorch finds none; "auto" with `--gpus` where there is none.
    """
    import torch

    from ssaseg.cli.launch import LAUNCHED

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and LAUNCHED in os.environ:
            raise CommandError("--gpus: PyTorch finds no GPU\nuse --device cpu for that many processes on the CPU")
    if name == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        raise CommandError(f"--device cuda: {why}\nuse --device cpu, or --device auto to take what there is")
    # TF32, cuDNN's default, has ten bits of mantissa: scores would depend on the GPU, and float32 would not be float32.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def count_cores() -> int:
    """Cores that this process may use, of those that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_console() -> "Console":
    """A rich console; into a file or pipe it writes plain lines, wide enough not to break a table's rows."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=160)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table on stdout: the first column reads as names, the others as numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # as Text: "[void]" in a class name is no markup
    make_console().print(table)


def json_target(json_out: str | None) -> str | None:
    """`--json` as given, once it is sure, before any work is done, that it can be written; `/dev/stdout` becomes "-".

    Raises CommandError for an empty name, a folder, and a file whose folder is missing or cannot be written.
    """
    if json_out in (None, "-", "/dev/stdout"):
        return json_out and "-"
    path = Path(str(json_out)).resolve()  # a link's folder is the one that is written
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
        raise CommandError(f"--json {wrong}\ngive a file in a folder that can be written, or - for stdout")
    return json_out


def write_json(json_out: str | None, report: Mapping[str, Any]) -> None:
    """`--json`: nowhere, to stdout ("-"), or to a file."""
    from ssaseg.models.checkpoint import write_atomic

    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    if json_out == "-":
        sys.stdout.write(text)
    elif json_out is not None:
        write_atomic(Path(json_out), text.encode())
