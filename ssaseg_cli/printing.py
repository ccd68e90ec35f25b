"""The only way to print: text of class names, files and recipes cannot change a terminal, and never fails to print."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from io import TextIOWrapper

import click

from ssaseg.files.text import KEPT, printable

# Each gets all that is printed, see `copied`.
COPIES: list[Callable[[str], object]] = []


def echo(text: str = "", *, err: bool = False, nl: bool = True, label: str = "", colour: str | None = None) -> None:
    r"""Prints `text` on stdout, or on stderr above a progress bar that may be there. Flushes.

    Control characters are shown as `\x1b`, except line ends and tabs. `label`: printed before the text, in `colour`,
    with a space between. `nl`: whether a line end follows.
    """
    label, clean = printable(label, KEPT), printable(text, KEPT)
    plain = f"{label} {clean}" if label else clean
    for write in COPIES:
        write(plain + "\n" * nl)
    if label:
        plain_label = colour is None or os.environ.get("NO_COLOR")  # https://no-color.org
        clean = f"{label if plain_label else click.style(label, fg=colour)} {clean}"
    bars = sys.modules.get("tqdm") if err else None  # None: there is no bar
    if bars is None:
        click.echo(clean, err=err, nl=nl)
        return
    with bars.tqdm.external_write_mode(file=sys.stderr, nolock=False):
        click.echo(clean, err=err, nl=nl)


@contextlib.contextmanager
def copied(write: Callable[[str], object]) -> Iterator[None]:
    """Inside this context `write` also gets all that is printed, with its line ends and without colours."""
    COPIES.append(write)
    try:
        yield
    finally:
        COPIES.remove(write)


@contextlib.contextmanager
def lenient_streams() -> Iterator[None]:
    """Inside this context, letters that stdout or stderr cannot hold are printed as `\\u2013` instead of raising."""
    streams = [each for each in (sys.stdout, sys.stderr) if isinstance(each, TextIOWrapper)]
    before = [each.errors for each in streams]
    for each in streams:
        each.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for each, errors in zip(streams, before, strict=True):
            if not each.closed:
                each.reconfigure(errors=errors)
