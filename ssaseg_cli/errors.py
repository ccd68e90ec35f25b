"""How a command ends: what it returns or raises becomes an exit code, and an error at most three lines."""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from ssaseg.cli.console import CommandError

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
                code = report(error)
        ranks = sys.modules.get("ssaseg.cli.distributed")  # imported by what needs it alone: it imports torch
        if ranks is not None and ranks.met:
            ranks.leave(code or 0)
        sys.exit(code)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is an exception, SystemExit(143), so that what was begun is closed and cleared away. Commands
    that first finish something take the signal over meanwhile.

    Not for one of several ranks: it may be waiting in C++ for the others, where no exception reaches it.
    """
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def end(number: int, _: Any) -> None:
        if os.getpid() != own:  # a process forked from this one: it ends as it always did
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        click.echo("stopped", err=True)
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:  # else nobody is to heed it any more: `StopSignal.settle`
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def muted(quiet: bool) -> Iterator[None]:
    """Where `quiet`, nothing that is said on stderr inside is heard."""
    if not quiet:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def report(error: Exception) -> int:
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
