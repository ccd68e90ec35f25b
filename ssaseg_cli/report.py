"""What a training run writes down as it goes: `metrics.jsonl`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssaseg.models.checkpoint import write_atomic

if TYPE_CHECKING:
    from ssaseg.cli.tracking import Tracker


class MetricsLog:
    """`metrics.jsonl`: a line per log interval (mean losses) and per evaluation (`mIoU` in percent).

    `trackers` are told what is written here; the file has it whatever becomes of them.
    """

    def __init__(self, path: Path, step: int, evaluated: int, trackers: "Sequence[Tracker]" = ()) -> None:
        """Goes on after `step`, last evaluated at `evaluated`: what a killed run wrote beyond its state is dropped."""
        self.path, self.trackers = path, trackers
        before = read_metrics(path) if path.exists() else []
        # An evaluation counts once the state after it is on the disk; until then it is done again, and written again.
        kept = [record for record in before if record["step"] <= (evaluated if "mIoU" in record else step)]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        for tracker in trackers:
            tracker.start(step)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for tracker in self.trackers:
            tracker.log(record)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Hands a picture that was written for `step` to the trackers."""
        for tracker in self.trackers:
            tracker.picture(name, path, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a line cut short by a crash, and any that is no record, is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
