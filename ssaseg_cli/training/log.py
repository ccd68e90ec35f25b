"""The logs of a training run: `metrics.jsonl`, and `train.log`."""

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssaseg.cli.printing import copied, echo
from ssaseg.files.reading import open_file
from ssaseg.files.structured import parse_json
from ssaseg.files.text import KEPT, describe, printable
from ssaseg.files.writing import FolderLock, open_append, write_atomic

if TYPE_CHECKING:
    from ssaseg.cli.training.trackers import Tracker


LAST_STEP = 100_000_000  # the largest train.steps

# Bytes. Twenty million steps with log_every=50 and many losses make 200 MB, a line with 255 classes makes 10 kB.
LARGEST, LONGEST_LINE = 2**30, 2**20


LARGEST_SCORE, LARGEST_VALUE = 100, 1e40  # percent; a loss in float32. NaN and infinity are kept: they are not drawn


class MetricsLog:
    """`metrics.jsonl`: a line per log interval (mean losses) and per evaluation (`mIoU` in percent).

    The first line after a resume is the mean of fewer steps, only those since the state: the losses of earlier steps
    were lost with the process. `trackers` get the same records; if they fail, the file is still complete. If a line
    cannot be written, for example because the disk is full, a warning is printed once and the line is left out. This
    does not stop the run; a state that cannot be saved does.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        evaluated: int,
        trackers: "Sequence[Tracker]" = (),
        lock: FolderLock | None = None,
    ) -> None:
        """Continues after `step`, last evaluated at `evaluated`: drops what a killed run wrote after its last state.
        lock: of the run folder.
        """
        self.path, self.trackers, self.lock = path, trackers, lock
        self.warned = False  # whether it was printed that a line could not be written
        self.cut = False  # whether the file ends with a part of a line
        before, damaged = read_log(path) if path.exists() else ([], 0)
        if damaged:
            _warn(f"{path}: {damaged} line{'s' * (damaged > 1)} cannot be read and will be removed from the file")
        # An evaluation counts as done when the state after it is on the disk. Before that it is done and logged again.
        kept = [record for record in before if record["step"] <= (evaluated if "mIoU" in record else step)]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept).encode(), root=path.parent)
        for tracker in trackers:
            tracker.start(step)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line. Raises OSError if the folder was deleted or made anew by another run."""
        if self.lock is not None:
            self.lock.check()
        try:
            with open_append(self.path) as file:
                file.write("\n" * self.cut + json.dumps(record) + "\n")
            self.cut = False
        except OSError as error:
            self.cut = True
            if not self.warned:
                self.warned = True
                why = error.strerror or error
                _warn(f"{self.path}: {why}; until this is fixed, lines of the log are lost; training continues")
        for tracker in self.trackers:
            tracker.log(record)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Passes a picture that was written for `step` to the trackers."""
        for tracker in self.trackers:
            tracker.picture(name, path, step)


class PrintedLog:
    """`train.log`: what is printed during a run. A run that resumes appends to it.

    What is printed before `start` is kept and then written first: a run that is refused leaves no file. If something
    cannot be written, a warning is printed once; the run continues.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.lock: FolderLock | None = None
        self.kept: list[str] = []
        self.warned = False

    def start(self, path: Path, lock: FolderLock | None) -> None:
        """Writes the time and the command, and what was kept. lock: of the run folder."""
        self.path, self.lock = path, lock
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.write("".join([f"# {time} {printable(shlex.join(['ssaseg', *sys.argv[1:]]))}\n", *self.kept]))

    def write(self, text: str) -> None:
        """Appends text that is printable."""
        if self.path is None:
            self.kept.append(text)
            return
        with contextlib.suppress(OSError):
            if self.lock is not None:
                self.lock.check()  # if the folder was replaced, the run ends with that error when it writes the log
            try:
                with open_append(self.path) as file:
                    file.write(text)
            except OSError as error:
                if not self.warned:
                    self.warned = True
                    _warn(f"{self.path}: {error.strerror or error}; what is printed is lost to it; training continues")


@contextlib.contextmanager
def keep_printed() -> Iterator[PrintedLog]:
    """Inside this context a `PrintedLog` gets all that is printed; and the error that ends the context, which the
    command prints later.
    """
    log = PrintedLog()
    with copied(log.write):
        try:
            yield log
        except Exception as error:
            log.write(f"error: {printable(describe(error), KEPT)}\n")
            raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`. Leaves out lines that are not a record, such as one cut short by a crash."""
    return read_log(path)[0]


def hours_of(records: Sequence[dict[str, Any]], batch: int | None) -> float | None:
    """Time of training and evaluation, from the logged speeds, without starting, saving and lost steps; None: not
    known. batch: images of a step.
    """
    seconds, before = 0.0, 0
    for record in records:
        if "loss" in record:
            speed = record.get("images_per_s")
            if not speed or not batch:
                return None
            seconds += (record["step"] - before) * batch / speed
            before = record["step"]
        else:
            seconds += record.get("eval_seconds") or 0
    return seconds / 3600 if before and isfinite(seconds) else None


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """`read_metrics`, and how many lines are damaged. A last line without its end does not count as damaged: a run is
    writing it now, or was killed while it wrote it.
    """
    records: list[dict[str, Any]] = []
    damaged = 0
    with open_file(path, LARGEST) as file:
        while line := file.readline(LONGEST_LINE):
            record = _record(line) if len(line) < LONGEST_LINE else None
            if record is not None:
                records.append(record)
            elif line.strip() and line.endswith(b"\n"):
                damaged += 1
    return records, damaged


def _record(line: bytes) -> dict[str, Any] | None:
    """A line's record: a whole number as `step`, otherwise numbers and None, and `IoU`, an object of percentages. None
    for everything else.
    """
    try:
        record = parse_json(line.decode(errors="replace"))
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] <= LAST_STEP:
        return None
    ious = record.get("IoU", {})
    if not isinstance(ious, dict):
        return None
    figures = [(LARGEST_VALUE, value) for key, value in record.items() if key not in ("IoU", "mIoU")]
    figures += [(LARGEST_SCORE, value) for value in (record.get("mIoU"), *ious.values())]
    valid = all(v is None or (type(v) in (int, float) and not most < abs(v) < inf) for most, v in figures)
    return record if valid else None


def _warn(text: str) -> None:
    """A line on stderr, above a progress bar."""
    echo(f"warning: {text}", err=True)
