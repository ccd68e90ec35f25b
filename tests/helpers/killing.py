"""Shards of `ssaseg predict` that are killed at random moments, also inside of what they write, and then resumed."""

import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from changes import command
from forked import Forked
from networks import tiny_networks

from ssaseg.cli.prediction.shards import ShardJournal

SHARDS = 4
KEPT = ExitStack()  # what is changed in the process of a shard, until its end
LATE = 0.3  # share of the kills that come from outside, after a random time
LONGEST = 1.5  # seconds of that time
FURTHEST = 12  # the event that kills from inside is one of the first so many; an image has three


class Fate:
    """Kills this process at the `number`-th event, with a `part` of what was to be written: 0 nothing, 1 all of it."""

    def __init__(self, number: int, part: float) -> None:
        self.left, self.part, self.replace = number, part, os.replace

    def due(self) -> bool:
        self.left -= 1
        return self.left < 0

    def moved(self, temporary: str | Path, path: str | Path) -> None:
        """`os.replace`: of the temporary file a part is there, or the file has its name already."""
        if self.due():
            if self.part < 1:
                os.truncate(temporary, int(self.part * os.stat(temporary).st_size))
            else:
                self.replace(temporary, path)
            os.kill(os.getpid(), signal.SIGKILL)
        self.replace(temporary, path)


class Cut:
    """The file of a manifest, to which a part of a line may be written."""

    def __init__(self, file: Any, fate: Fate) -> None:
        self.file, self.fate = file, fate

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: bytes) -> None:
        if self.fate.due():
            self.file.write(content[: int(self.fate.part * len(content))])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.file.write(content)


def prepare(number: int | None, part: float) -> None:
    """In the process of a shard: the tiny networks, and the event that kills it; None: none does."""
    KEPT.enter_context(tiny_networks())
    if number is None:
        return
    fate, begin = Fate(number, part), ShardJournal.begin
    os.replace = fate.moved  # type: ignore[assignment]

    def begun(journal: ShardJournal, *given: Any) -> None:
        begin(journal, *given)
        journal.file = Cut(journal.file, fate)  # type: ignore[assignment]

    ShardJournal.begin = begun  # type: ignore[method-assign]


def kill_shards(words: list[str], kills: int, seed: int, log: Path) -> Counter[str]:
    """Runs all shards of a command at the same time, again and again, until so many of them were killed; then without
    kills, until all are done. Returns how often shards were killed from inside and from outside, and how often they
    ended before.
    """
    dice, counts = random.Random(seed), Counter[str]()
    while counts.total() - counts["ended"] < kills:
        running: list[tuple[Forked, float | None]] = []
        for shard in range(SHARDS):
            given = [*words, "--shard", f"{shard}/{SHARDS}", "--resume"]
            late = dice.uniform(0, LONGEST) if dice.random() < LATE else None
            plan = (None if late else dice.randrange(FURTHEST), dice.choice((0.0, dice.random(), 1.0)))
            running.append((Forked(command, given, partial(prepare, *plan), errors=log), late))
        started = time.monotonic()
        for process, late in sorted(running, key=lambda each: each[1] or 2 * LONGEST):
            if late:
                time.sleep(max(0.0, started + late - time.monotonic()))
                process.kill()
            how = "outside" if late else "inside"
            code = process.wait()
            assert code in (0, -signal.SIGKILL), log.read_text()[-1000:]
            counts[how if code else "ended"] += 1
    for shard in range(SHARDS):
        given = [*words, "--shard", f"{shard}/{SHARDS}", "--resume"]
        code = Forked(command, given, partial(prepare, None, 0.0), errors=log).wait()
        assert code == 0, log.read_text()[-1000:]
    return counts


def images_of(manifest: Path) -> Counter[str]:
    """How often each image is in the manifest of a shard."""
    return Counter(json.loads(line)["file"] for line in manifest.read_bytes().splitlines()[1:])
