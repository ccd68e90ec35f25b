"""How a command ends: what it returns or raises becomes an exit code, and an error at most three lines."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from ssaseg.cli.signals import ended_by_sigterm


class CommandError(Exception):
    """Something the user can mend; the command prints the message (at most three lines) and exits.

    Args:
        message: what was got, what was expected, the mend.
        exit_code: 2 the user's or the input's fault, 3 a numerical failure.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# Told by name: importing them would import torch and pydantic, also where nothing went wrong.
USERS_FAULT = {"RecipeError", "DataError", "CheckpointError", "WorkerError"}


class CommandGroup(click.Group):
    """Turns what a command returns or raises into an exit code, and an error into at most three lines."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        try:
            with ended_by_sigterm():
                code = super().main(*args, **extra)
        except Exception as error:
            if os.environ.get("SSASEG_DEBUG") == "1":
                raise
            # What goes wrong before the ranks of a machine have met goes wrong in each: the first of them tells it.
            with muted(os.environ.get("LOCAL_RANK", "0") != "0"):
                code = print_error(error)
        ranks = sys.modules.get("ssaseg.cli.ranks.ranks")  # imported by what needs it alone: it imports torch
        if ranks is not None and ranks.met:
            ranks.leave(code or 0)
        sys.exit(code)


@contextlib.contextmanager
def muted(quiet: bool) -> Iterator[None]:
    """Where `quiet`, nothing that is said on stderr inside is heard."""
    if not quiet:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def print_error(error: Exception) -> int:
    """Print an error that the user can mend and return the exit code; any other is a bug and goes on as it is."""
    if isinstance(error, click.Abort):  # click's name for Ctrl-C
        click.echo("stopped", err=True)
        return 130
    if isinstance(error, click.UsageError) and error.ctx is not None:
        if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2 and later
            click.echo(error.format_message(), err=True)
            return error.exit_code
        lines = f"{error.format_message()}\n`{error.ctx.command_path} --help` shows how to call it"
        code = error.exit_code
    elif isinstance(error, click.ClickException):
        lines, code = error.format_message(), error.exit_code
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        lines, code = f"{where}{error.strerror or error}", 2
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            lines += "\nmake room on that disk, then call the command again"
    elif isinstance(error, CommandError):
        lines, code = str(error), error.exit_code
    elif isinstance(error, FloatingPointError):
        lines, code = str(error), 3
    elif any(kind.__name__ in USERS_FAULT for kind in type(error).__mro__):
        lines, code = str(error), 2
    elif type(error).__name__ == "OutOfMemoryError":  # torch's
        lines, code = f"{error}".partition(". ")[0] + "\nuse a smaller train.micro_batch, crop or image", 2
    else:
        raise error
    click.echo(click.style("error: ", fg="red") + "\n".join(lines.splitlines()[:3]), err=True)
    return code
