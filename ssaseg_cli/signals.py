"""SIGINT and SIGTERM: an exception if a command can end immediately, a request if it must first finish something."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from ssaseg.cli.printing import echo


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[list[int]]:
    """Inside this context SIGTERM raises SystemExit(143), so that open files are closed and temporary files removed.
    A command that must first finish something replaces the handler for that time (`StopSignal`). Yields a list that
    then holds the exit code: a library that is interrupted in C++ may raise an error of its own instead.

    Does nothing in one of several ranks: it may be waiting in C++ for the others, where no exception reaches it.
    """
    codes: list[int] = []
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield codes
        return
    own = os.getpid()

    def end(number: int, _: Any) -> None:
        if os.getpid() != own:  # a process forked from this one: it ends as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signal.signal(number, signal.SIG_IGN)  # the process ends now: a second one would interrupt the cleaning up
        codes.append(128 + number)
        echo("stopped", err=True)
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield codes
    finally:
        if signal.getsignal(signal.SIGTERM) is end:  # otherwise it stays ignored: the process ends
            signal.signal(signal.SIGTERM, before)


GRACE = 2.0  # seconds


class Interrupted(Exception):
    """A step, an evaluation or a wait for data ended early because of a request to stop."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a request to stop, which the loop reads between steps.

    A second Ctrl-C raises KeyboardInterrupt immediately, unless `saved` is true: then the process ends soon anyway.
    With `hasty`, a second SIGTERM raises SystemExit(143) in the same way; otherwise it changes nothing.
    """

    def __init__(self, hasty: bool = False) -> None:
        self.number: int | None = None
        self.saved = self.waiting = False
        self.hasty = hasty

    @contextlib.contextmanager
    def ending_waits(self) -> Iterator[None]:
        """Around a wait for data. If it has not ended `GRACE` seconds after a request to stop, Interrupted ends it: a
        disk on a network that does not answer would otherwise keep the process for ever.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(*_: Any) -> None:
            raise Interrupted

        before = signal.signal(signal.SIGALRM, end)
        self.waiting = True
        try:
            if self.requested:
                signal.setitimer(signal.ITIMER_REAL, GRACE)
            yield
        finally:
            self.waiting = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self.number or 0)

    def __enter__(self) -> "StopSignal":
        self.before = {each: signal.signal(each, self._handle) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def ignore_signals(self) -> None:
        """Lets the end of this context ignore both signals, instead of restoring the earlier handlers.

        For a process that is about to end: a signal would only interrupt it in some destructor, with a traceback.
        """
        self.before = dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN)

    def _handle(self, number: int, _: Any) -> None:
        if self.number is not None and not self.saved and (number == signal.SIGINT or self.hasty):
            self.saved = True  # a third Ctrl-C must not interrupt what the second one raises
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.number = number
        if self.waiting:
            signal.setitimer(signal.ITIMER_REAL, GRACE)
