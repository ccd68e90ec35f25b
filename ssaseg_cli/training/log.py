"""The log of a training run: `metrics.jsonl`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ssaseg.files.writing import write_atomic

if TYPE_CHECKING:
    from ssaseg.cli.training.trackers import Tracker


class MetricsLog:
    """`metrics.jsonl`: a line per log interval (mean losses) and per evaluation (`mIoU` in percent).

    The first line after a resume is the mean of fewer steps, only those since the state: the losses of earlier steps
    were lost with the process. `trackers` get the same records; if they fail, the file is still complete. If a line
    cannot be written, for example because the disk is full, a warning is printed once and the line is left out. This
    does not stop the run; a state that cannot be saved does.
    """

    def __init__(self, path: Path, step: int, evaluated: int, trackers: "Sequence[Tracker]" = ()) -> None:
        """Continues after `step`, last evaluated at `evaluated`: drops what a killed run wrote after its last state."""
        self.path, self.trackers = path, trackers
        self.warned = False  # whether it was printed that a line could not be written
        self.cut = False  # whether the file ends with a part of a line
        before, damaged = read_log(path) if path.exists() else ([], 0)
        if damaged:
            _warn(f"{path}: {damaged} line{'s' * (damaged > 1)} cannot be read and will be removed from the file")
        # An evaluation counts as done when the state after it is on the disk. Before that it is done and logged again.
        kept = [record for record in before if record["step"] <= (evaluated if "mIoU" in record else step)]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        for tracker in trackers:
            tracker.start(step)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`. Leaves out lines that are not a record, such as one cut short by a crash."""
    return read_log(path)[0]


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """`read_metrics`, and how many lines are damaged. A last line without its end does not count as damaged: a run is
    writing it now, or was killed while it wrote it.
    """
    records: list[dict[str, Any]] = []
    damaged = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif line.strip() and line.endswith("\n"):
            damaged += 1
    return records, damaged


def _warn(text: str) -> None:
    """A line on stderr, above a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)
