"""SIGINT and SIGTERM: an exception where a command can end at once, a request where it first finishes something."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click


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
        if signal.getsignal(signal.SIGTERM) is end:  # else nobody is to heed it any more: `StopSignal.ignore_signals`
            signal.signal(signal.SIGTERM, before)


class Interrupted(Exception):
    """A step or an evaluation was broken off by a wish to stop."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a wish that the loop reads between steps; a second Ctrl-C stops at once, unless
    `saved` says that nothing would be lost by waiting for the end.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.saved = False

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self.number or 0)

    def __enter__(self) -> "StopSignal":
        self.before = {each: signal.signal(each, self._take) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def ignore_signals(self) -> None:
        """For a process that is about to end: signals are not heeded any more, also beyond the context. They would only
        break off its leaving, in the middle of some destructor, with a traceback.
        """
        self.before = dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN)

    def _take(self, number: int, _: Any) -> None:
        if self.number is not None and number == signal.SIGINT and not self.saved:
            self.saved = True  # a third one must not break off what the second one raises
            raise KeyboardInterrupt
        self.number = number
