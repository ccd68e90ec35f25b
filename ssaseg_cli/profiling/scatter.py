"""`ssaseg profile --scatter`: a picture of latency, measured now, against the mIoU that checkpoints have reached.

The score of a checkpoint is that of a report of `ssaseg eval --json`, or the one in its own header: training writes it.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from ssaseg.cli.console import json_target, print_table, write_json
from ssaseg.cli.device import select_device
from ssaseg.cli.drawing.bars import require_picture
from ssaseg.cli.drawing.scatter import Point, draw_scatter
from ssaseg.cli.engine.opening import Opened, device_for, make_engine, open_file
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.profiling.latency import measure_latency
from ssaseg.cli.profiling.profile import conditions
from ssaseg.files.structured import read_json

MARK = {"Software": "ssaseg profile"}  # in the PNG file: only a picture with this mark is overwritten
BEST = "best.safetensors"  # of a run folder
EXPECTED = "expected a run folder, a checkpoint of `ssaseg train`, or a report of `ssaseg eval --json`"


class Scored(NamedTuple):
    """A checkpoint and its score."""

    opened: Opened
    miou: float  # [%]
    interval: tuple[float, float] | None  # of the mIoU, 95 %; None: not known
    statement: str  # how it was scored


def run_scatter(
    sources: Sequence[str], size: tuple[int, int], out: Path, json_out: str | None, device: str, runs: int
) -> int:
    """Measures the checkpoints of all `sources` in turn, prints a table and draws `out`. Returns 0.

    size: height and width of the network's input, the same for all. Raises CommandError for a source without a
    checkpoint or a score, and where `out` is a file that this command did not write.
    """
    chosen = select_device(device)
    json_out = json_target(json_out)
    require_picture(out, MARK["Software"])
    scored = [each for source in sources for each in read_source(Path(source))]
    engines = [make_engine(each.opened, device_for(each.opened, device)) for each in scored]
    spent: list[dict[str, Any]] = [{} for _ in engines]
    kinds = [(engine.device, engine.channels, engine.takes) for engine in engines]
    for kind in dict.fromkeys(kinds):
        which = [index for index, each in enumerate(kinds) if each == kind]
        pixels = random_pixels(*kind, size)
        for index, found in zip(which, measure_latency([engines[i] for i in which], pixels, runs), strict=True):
            spent[index] = found
    points = describe(scored, spent)
    notes = remarks(scored)
    report = {"size": list(size), **conditions(chosen, runs), "points": points, "notes": notes}
    del report["countings"]
    draw(report, out)
    write_json(json_out, report)
    if json_out != "-":
        print_points(report)
    for note in notes:
        echo(f"note: {note}", err=True)
    echo(f"wrote {out}", err=json_out == "-")
    return 0


def random_pixels(device: torch.device, channels: int, takes: str, size: tuple[int, int]) -> Tensor:
    """Pixels (1,channels,H,W) for engines, always the same; takes: see `Engine`."""
    pixels = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0)).to(device)
    return (pixels * 58 + 120).clamp(0, 255).byte() if takes == "rgb" else pixels


# ---- reading -----------------------------------------------------------------------------------------------------
def read_source(source: Path) -> list[Scored]:
    """The scored checkpoints of a run folder, a checkpoint or a report. Raises CommandError if there is no score."""
    if source.suffix == ".json":
        return read_report(source)
    path = source / BEST if source.is_dir() and not (source / "config.json").is_file() else source
    if not path.exists():
        why = f"no {BEST} in it" if source.is_dir() else "no such file or folder"
        raise CommandError(f"{source}: {why}\n{EXPECTED}")
    opened = open_file(path)
    scores = opened.metadata.get("scores") or {}
    if not is_score(scores.get("mIoU")):
        fix = f"score it first: ssaseg eval {path} --json report.json, and give report.json"
        raise CommandError(f"{path}: it has no mIoU in its header\n{fix}")
    statement = scores.get("statement")
    return [Scored(opened, float(scores["mIoU"]), None, statement if isinstance(statement, str) else "")]


def read_report(source: Path) -> list[Scored]:
    """The checkpoints and scores of a report of `ssaseg eval --json`, of one file or of several."""
    try:
        report = read_json(source)
    except ValueError as error:
        raise CommandError(f"{source}: not JSON ({error})\n{EXPECTED}") from None
    several = report.get("models") if isinstance(report, dict) else None
    return [_scored(source, each) for each in (several if isinstance(several, list) and several else [report])]


def _scored(source: Path, report: Any) -> Scored:
    """One file of a report."""
    if (
        not isinstance(report, dict)
        or not isinstance(report.get("checkpoint"), str)
        or not is_score(report.get("mIoU"))
    ):
        raise CommandError(f"{source}: no checkpoint with an mIoU in it\n{EXPECTED}")
    interval, statement = report.get("mIoU_interval"), report.get("statement")
    low, high = (interval.get(key) if isinstance(interval, dict) else None for key in ("low", "high"))
    return Scored(
        open_file(find_checkpoint(source, Path(report["checkpoint"]))),
        float(report["mIoU"]),
        (float(low), float(high)) if is_score(low) and is_score(high) else None,
        statement if isinstance(statement, str) else "",
    )


def find_checkpoint(report: Path, checkpoint: Path) -> Path:
    """The checkpoint of a report: its path from where `eval` ran, or a file of that name beside the report."""
    for path in (checkpoint, report.parent / checkpoint, report.parent / checkpoint.name):
        if path.exists():
            return path
    raise CommandError(
        f"{report}: its checkpoint {checkpoint} does not exist\nrun the command in the folder where `ssaseg eval` ran"
    )


def is_score(value: Any) -> TypeGuard[float]:
    """Whether a value is a percentage."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100


# ---- results -----------------------------------------------------------------------------------------------------
def describe(scored: Sequence[Scored], spent: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of the report, the fastest first. `front`: no other is both faster and better."""
    points: list[dict[str, Any]] = [
        {
            "name": name,
            "checkpoint": str(each.opened.path),
            "model": each.opened.metadata.get("model"),
            "classifier": each.opened.metadata.get("classifier"),
            "mIoU": each.miou,
            "mIoU_interval": each.interval,
            "statement": each.statement,
            **times,
            "latency_ms": times["network_ms"]["p50"] + times["post_ms"]["p50"],
        }
        for name, each, times in zip(names_of([each.opened for each in scored]), scored, spent, strict=True)
    ]
    points.sort(key=lambda point: (point["latency_ms"], -point["mIoU"]))
    best = -1.0
    for point in points:
        point["front"] = point["mIoU"] > best
        best = max(best, point["mIoU"])
    return points


def names_of(opened: Sequence[Opened]) -> list[str]:
    """A short name for each file: its network; where several have the same, also what tells the files apart."""
    plain = [str(each.metadata.get("model") or each.path.stem) for each in opened]
    both = [f"{name}, {each.metadata.get('classifier')}" for name, each in zip(plain, opened, strict=True)]
    times = Counter(both)
    parts = [Path(os.path.realpath(each.path)).parts for each in opened]
    depth = next(n for n in range(1, 99) if len({part[-n:] for part in parts}) == len(set(parts)))
    ends = [os.path.join(*part[-max(depth, 2) :]) for part in parts]
    return [name if times[key] == 1 else f"{name} ({end})" for name, key, end in zip(plain, both, ends, strict=True)]


def remarks(scored: Sequence[Scored]) -> list[str]:
    """Why the scores cannot be compared, where they cannot."""
    notes = []
    if len({tuple(each.opened.metadata["classes"]) for each in scored}) > 1:
        notes.append("the checkpoints have different classes, so their mIoUs cannot be compared")
    elif len({each.statement for each in scored}) > 1:
        notes.append("the mIoUs were measured in different ways (see statement in --json), so they cannot be compared")
    return notes


def draw(report: Mapping[str, Any], out: Path) -> None:
    """Draws the points of a report."""
    height, width = report["size"]
    where = f"{report['device']}, {report['threads']} threads" if report["device"] == "cpu" else report["device"]
    title = f"latency of network and labels at {height}x{width}, float32, {where}"
    if report["notes"]:
        title += f"\n{report['notes'][0]}"
    points = [
        Point(p["latency_ms"], p["mIoU"], p["name"], str(p["classifier"]), p["mIoU_interval"]) for p in report["points"]
    ]
    front = [point for point, row in zip(points, report["points"], strict=True) if row["front"]]
    draw_scatter(points, front, ("latency of one image [ms]", "mIoU [%]"), title, out, MARK)


def print_points(report: Mapping[str, Any]) -> None:
    """Prints the table on stdout."""
    height, width = report["size"]
    rows = [
        (
            point["name"],
            str(point["classifier"]),
            f"{point['latency_ms']:.2f}",
            f"{point['network_ms']['p50']:.2f} / {point['network_ms']['p90']:.2f}",
            f"{point['mIoU']:.2f}",
            "yes" if point["front"] else "",
        )
        for point in report["points"]
    ]
    heads = ("", "classifier", "latency [ms]", "network, p50 / p90 [ms]", "mIoU [%]", "none faster and better")
    print_table(heads, rows, f"latency at {height}x{width} (height x width), {report['device']}")
    echo(f"{report['runs']} timed passes each, in turn; {report['threads']} CPU threads; torch {report['torch']}")
