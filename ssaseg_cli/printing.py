"""The only way to print: text of class names, files and recipes cannot change a terminal, and never fails to print."""

import contextlib
import sys
from collections.abc import Iterator
from io import TextIOWrapper

import click

from ssaseg.files.text import KEPT, printable


def echo(text: str = "", *, err: bool = False, nl: bool = True, label: str = "", colour: str | None = None) -> None:
    r"""Prints `text` on stdout, or on stderr above a progress bar that may be there. Flushes.

    Control characters are shown as `\x1b`, except line ends and tabs. `label`: printed before the text, in `colour`,
    with a space between. `nl`: whether a line end follows.
    """
    clean = printable(text, KEPT)
    if label:
        clean = f"{click.style(printable(label, KEPT), fg=colour)} {clean}"
    bars = sys.modules.get("tqdm") if err else None  # None: there is no bar
    if bars is None:
        click.echo(clean, err=err, nl=nl)
        return
    with bars.tqdm.external_write_mode(file=sys.stderr, nolock=False):
        click.echo(clean, err=err, nl=nl)


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
