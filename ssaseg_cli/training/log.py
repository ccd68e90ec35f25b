"""What a training run writes down as it goes: `metrics.jsonl`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ssaseg.models.checkpoint import write_atomic

if TYPE_CHECKING:
    from ssaseg.cli.training.trackers import Tracker


class MetricsLog:
    """`metrics.jsonl`: a line per log interval (mean losses) and per evaluation (`mIoU` in percent).

    The first line after a resume is the mean of fewer steps: those since the state, as the ones before it went with the
    process. `trackers` are told what is written here; the file has it whatever becomes of them. A line that cannot be
    written, as on a full disk, is told once and left out: whether the run goes on is for its state to decide.
    """

    def __init__(self, path: Path, step: int, evaluated: int, trackers: "Sequence[Tracker]" = ()) -> None:
        """Goes on after `step`, last evaluated at `evaluated`: what a killed run wrote beyond its state is dropped."""
        self.path, self.trackers = path, trackers
        self.told = self.cut = False  # of what could not be written: whether it was said; whether a part is in the file
        before, damaged = read_log(path) if path.exists() else ([], 0)
        if damaged:
            _warn(f"{path}: {damaged} line{'s' * (damaged > 1)} in it cannot be read and will be missing")
        # An evaluation counts once the state after it is on the disk; until then it is done again, and written again.
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
            if not self.told:
                self.told = True
                why = error.strerror or error
                _warn(f"{self.path}: {why}; lines of the log are left out while that lasts, training goes on")
        for tracker in self.trackers:
            tracker.log(record)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Hands a picture that was written for `step` to the trackers."""
        for tracker in self.trackers:
            tracker.picture(name, path, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a line cut short by a crash, and any that is no record, is left out."""
    return read_log(path)[0]


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """`read_metrics`, and how many lines are damaged. A last one without its end is not: it is only being written, or
    was when the run was killed.
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
