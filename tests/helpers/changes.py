"""What commands meet in tests: changes of the process they run in, each a function that is called before them."""

import dataclasses
import itertools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssaseg.cli.main import cli
from ssaseg.cli.training import build, loop
from ssaseg.cli.training.folder import open_run
from ssaseg.datasets import DataError, workers
from ssaseg.datasets.conventions.downloads import DOWNLOADS
from ssaseg.datasets.loader import TrainWork
from ssaseg.datasets.synthetic import SyntheticScenes
from ssaseg.recipes import load_recipe

Change = Callable[[], None]


def hold_run(out: Path, held: Path) -> None:
    """A run that goes on and on; makes the file `held` once it has the folder."""
    with open_run(out, load_recipe("demo"), False):
        held.touch()
        time.sleep(60)


def command(words: list[str], *changes: Change) -> None:
    """`ssaseg` with these words, after the changes: what a process is forked for. Only `as_it_is` draws pictures."""
    if as_it_is not in changes:
        loop.after_evaluation = lambda *_: None
    for change in changes:
        change()
    cli(words)


def before_each_step(action: Callable[[int], None]) -> None:
    """`action` gets the number of the optimiser's step, from 1."""
    step, calls = torch.optim.AdamW.step, itertools.count(1)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        action(next(calls))
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = changed  # type: ignore[method-assign]


def as_it_is() -> None:
    pass


def slow_steps(seconds: float) -> None:
    before_each_step(lambda _: time.sleep(seconds))


def killed_in_step(number: int) -> None:
    before_each_step(lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == number else None)


def rank_1_killed_in_step_4() -> None:
    """At the first start alone."""
    if (os.environ["RANK"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == ("1", "0"):
        killed_in_step(4)


def file_damaged_in_steps(file: Path) -> None:
    """When the check at the start is long past."""
    before_each_step(lambda _: os.truncate(file, file.stat().st_size // 2))


def interrupted_in_step_2_and_on_and_on() -> None:
    """Ctrl-C in the second step, and while the process leaves."""
    before_each_step(lambda step: signal.raise_signal(signal.SIGINT) if step == 2 else None)
    say = loop.say

    def again() -> None:
        while True:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.002)

    def go_on(job: Any, text: str) -> None:
        say(job, text)
        if text.startswith("stopped"):
            threading.Thread(target=again, daemon=True).start()

    loop.say = go_on


def waiting_for_labels(began: Path) -> None:
    """The check of labels takes long, as on a large data set; makes the file `began`."""

    def wait(*_: Any) -> None:
        began.touch()
        time.sleep(60)

    build.check_labels = wait  # type: ignore[assignment]


def impatient_with_workers() -> None:
    """It is looked every two seconds whether workers live."""
    workers.LOOK = 0.2  # type: ignore[assignment]


def worker_killed_at(position: int) -> None:
    """That which reads the batch that begins with this position."""
    make = TrainWork.__getitem__

    def deadly(self: Any, samples: Any) -> Any:
        if samples[0][0] == position:
            self.note(samples[0][1])
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, samples)

    TrainWork.__getitem__ = deadly  # type: ignore[method-assign]


def waiting_at(position: int, began: Path) -> None:
    """As on a disk that does not answer: the batch that begins with this position never comes. Makes `began`."""
    load = TrainWork.__getitem__

    def waiting(self: Any, samples: Any) -> Any:
        if samples[0][0] == position:
            began.touch()
            time.sleep(1000)
        return load(self, samples)

    TrainWork.__getitem__ = waiting  # type: ignore[method-assign]


def unreadable_at(position: int) -> None:
    load = TrainWork.__getitem__

    def failing(self: Any, samples: Any) -> Any:
        if any(each == position for each, _ in samples):
            raise DataError("image7.png: cannot be decoded\nexpected PNG")
        return load(self, samples)

    TrainWork.__getitem__ = failing  # type: ignore[method-assign]


def slow_masks(dataset: str, seconds: float) -> None:
    """`data prepare` takes its time with each."""
    download = DOWNLOADS[dataset]

    def read(file: Any) -> Any:
        time.sleep(seconds)
        return download.read(file)

    DOWNLOADS[dataset] = dataclasses.replace(download, read=read)


def killed_at(fault: str, times: int) -> None:
    """Where `fault` comes by for the `times`th time."""
    seen: list[int] = []

    def before(owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if when(*args):
                seen.append(1)
                if len(seen) == times:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, wrapped)

    def half(file: int) -> bool:
        # A state is a zip file; temporary names do not say what will be in a file.
        found = os.readlink(f"/proc/self/fd/{file}").endswith(".partial") and os.pread(file, 2, 0) == b"PK"
        if found and len(seen) == times - 1:
            os.ftruncate(file, os.fstat(file).st_size // 2)
        return found

    places: dict[str, Callable[[], None]] = {
        "in mid step": lambda: before(torch.optim.AdamW, "step"),
        "state half written": lambda: before(os, "fsync", half),
        "state not yet renamed": lambda: before(os, "replace", lambda _, to: "/state-" in str(to)),
        "state without its last": lambda: before(os, "replace", lambda _, to: str(to).endswith("last.safetensors")),
        "old state not yet dropped": lambda: before(os, "unlink", lambda path, **_: "/state-" in str(path)),
        "while evaluating": lambda: before(SyntheticScenes, "load", lambda s, i: s.split == "val" and i == 1),
        "evaluated, not yet saved": lambda: before(loop, "after_evaluation"),
    }
    places[fault]()


SCRIPTS: dict[str, Change] = {
    each.__name__: each for each in (rank_1_killed_in_step_4, interrupted_in_step_2_and_on_and_on)
}

if __name__ == "__main__":  # python changes.py CHANGE WORDS: a process like a user's
    command(sys.argv[2:], SCRIPTS[sys.argv[1]])


def few_files(more: int) -> None:
    """The process may open as many files as it has open, and `more`."""
    limit = len(os.listdir("/proc/self/fd")) + more
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
