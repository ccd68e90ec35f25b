"""How a command ends: what it returns or raises becomes an exit code. An error is printed in at most three lines."""

import contextlib
import difflib
import errno
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import click

from ssaseg.cli.printing import echo, lenient_streams
from ssaseg.cli.signals import ended_by_sigterm
from ssaseg.files.text import describe


class CommandError(Exception):
    """An error that the user can fix. The command prints the message (at most three lines) and exits.

    Args:
        message: what was got, what was expected, the fix.
        exit_code: 2: the call or the input is wrong; 3: a numerical failure.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


own_errors = False  # whether this process, though it is a rank, works by itself and prints its errors


def report_own_errors() -> None:
    """From now on this process prints its errors whatever its rank: torchrun has started it, but it works alone."""
    global own_errors
    own_errors = True


# Errors that the user can fix. Recognised by name: to import them would import torch and pydantic for every command.
USER_ERRORS = {"RecipeError", "DataError", "CheckpointError", "WorkerError"}


class CommandGroup(click.Group):
    """Turns what a command returns or raises into an exit code, and prints an error in at most three lines."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        words = (args[0] if args else extra.get("args")) or sys.argv[1:]
        codes: list[int] = []
        try:
            try:
                with ended_by_sigterm() as codes, lenient_streams():
                    code = super().main(*args, **extra)
            except Exception as error:
                if codes:
                    sys.exit(codes[0])
                if os.environ.get("SSASEG_DEBUG") == "1":
                    raise
                # Before the ranks have connected, each rank has the same error: only the first of a machine prints it.
                with muted(os.environ.get("LOCAL_RANK", "0") != "0" and not own_errors):
                    code = print_error(with_hint(error, words))
        except KeyboardInterrupt:  # a second Ctrl-C, while the first one was reported
            code = 130
        ranks = sys.modules.get("ssaseg.cli.ranks.ranks")  # None unless the command uses ranks: it imports torch
        if ranks is not None and ranks.met:
            ranks.leave(code or 0)
        sys.exit(code)


@contextlib.contextmanager
def muted(quiet: bool) -> Iterator[None]:
    """If `quiet`, discards what is written to stderr inside this context."""
    if not quiet:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


# What other programs call our commands.
ELSEWHERE = {
    **dict.fromkeys(("test", "val", "validate", "evaluate", "score"), "eval"),
    **dict.fromkeys(("infer", "inference", "segment", "label", "run"), "predict"),
    **dict.fromkeys(("benchmark", "bench", "flops"), "profile"),
}


def with_hint(error: Exception, words: Sequence[str]) -> Exception:
    """The error of a command line, with what was probably meant: a command, a key of the recipe, an example. `words`:
    the command line.
    """
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None or not isinstance(error, click.UsageError):
        return error
    if isinstance(error, click.MissingParameter):
        example = re.search(r"Example:\s+(.+)", context.command.help or "")
        return click.UsageError(f"{error.format_message()}\nfor example: {example[1]}", context) if example else error
    if isinstance(error, click.NoSuchOption):
        return _with_key(error, context, words)
    if isinstance(context.command, click.Group) and (found := re.match("No such command '(.*)'", error.message)):
        return click.UsageError(f"No such command '{found[1]}'; {_likely_command(found[1], context)}", context)
    return error


def _likely_command(name: str, context: click.Context) -> str:
    group = context.command
    assert isinstance(group, click.Group)
    own = group.list_commands(context)
    below: dict[str, str] = {}  # the commands of groups in this group
    for each in own:
        inner = group.get_command(context, each)
        below |= {key: f"{each} {key}" for key in (inner.commands if isinstance(inner, click.Group) else ())}
    meant = ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, [*own, *below], n=1)), None)
    if meant is None or (meant not in own and meant not in below):
        return f"expected one of: {', '.join(own)}"
    return f"did you mean `{context.command_path} {below.get(meant, meant)}`?"


def _with_key(error: click.NoSuchOption, context: click.Context, words: Sequence[str]) -> Exception:
    """For an option that is a key of a recipe, such as `--lr`, an error that says how keys are written."""
    if all(parameter.name != "overrides" for parameter in context.command.params):
        return error
    from ssaseg.recipes.messages import likely_keys

    section, _, name = error.option_name.lstrip("-").replace("-", "_").rpartition(".")
    if not (keys := likely_keys(name, section)):
        return error
    at = next((at for at, word in enumerate(words) if word.partition("=")[0] == error.option_name), len(words))
    rest = words[at].partition("=")[2] if "=" in "".join(words[at : at + 1]) else "".join(words[at + 1 : at + 2])
    value = "VALUE" if not rest or rest.startswith("--") else rest
    written = " or ".join(f"{key}={shlex.quote(value)}" for key in keys)
    what = f"No such option '{error.option_name}'; keys of the recipe have no dashes: {written}"
    return click.UsageError(what, context)


def print_error(error: Exception) -> int:
    """Print an error that the user can fix and return its exit code. Any other error is a bug: it is raised again."""
    if isinstance(error, click.Abort):  # click's name for Ctrl-C
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends now: a second one would be a traceback
        echo("stopped", err=True)
        return 130
    if isinstance(error, click.UsageError) and error.ctx is not None:
        if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2 and later
            echo(error.format_message(), err=True)
            return error.exit_code
        lines = f"{error.format_message()}\n`{error.ctx.command_path} --help` shows how to call it"
        code = error.exit_code
    elif isinstance(error, click.ClickException):
        lines, code = error.format_message(), error.exit_code
    elif isinstance(error, OSError):
        lines, code = describe(error), 2
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            lines += "\nfree some space on that disk, then run the command again"
    elif isinstance(error, CommandError):
        lines, code = str(error), error.exit_code
    elif isinstance(error, FloatingPointError):
        lines, code = str(error), 3
    elif any(kind.__name__ in USER_ERRORS for kind in type(error).__mro__):
        lines, code = str(error), 2
    elif isinstance(error, MemoryError):
        lines, code = "not enough memory\nuse a smaller train.micro_batch, crop or image, or free some memory", 2
    elif type(error).__name__ == "OutOfMemoryError":  # torch's
        lines, code = f"{error}".partition(". ")[0] + "\nuse a smaller train.micro_batch, crop or image", 2
    else:
        raise error
    echo("\n".join(lines.split("\n")[:3]), err=True, label="error:", colour="red")
    return code
