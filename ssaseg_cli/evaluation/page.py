"""`ssaseg eval --report`: one page with all scores, in one file that needs no network and runs no script.

Names of classes and files come from outside: the template engine escapes what is HTML, and `printable` control
characters. The page forbids the browser to load anything.

Axes: K classes, N images, h×w pixels of a scene.
"""

import base64
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ssaseg.cli.drawing.panels import WORSENED, coloured, encode, legend_of, marked
from ssaseg.cli.errors import CommandError
from ssaseg.cli.scoring.evaluate import Tally
from ssaseg.cli.scoring.gallery import SIDE, Entry
from ssaseg.cli.scoring.metrics import class_intervals, difference_interval, image_scores, percent
from ssaseg.datasets import IGNORED, Dataset
from ssaseg.datasets.base import hexed
from ssaseg.files.download import hash_file
from ssaseg.files.text import cut, printable
from ssaseg.files.writing import make_temporary, write_atomic

PAGE, DATA = "report.html", "report.json"  # files in the folder
MOST = 30  # classes in the confusion matrix
LONGEST = 32  # most letters of a class name
COLUMNS = {"IoU": "IoU", "BoundaryIoU": "boundary IoU", "Acc": "accuracy", "Precision": "precision", "Dice": "Dice"}
COLUMNS |= {"pixel_share": "pixels"}

Report = Mapping[str, Any]


# ---- the folder --------------------------------------------------------------------------------------------------
def make_folder(folder: Path) -> None:
    """Makes the folder of `--report`, before any work is done. Raises CommandError if it holds anything, is not a
    folder, or cannot be written to: a report is evidence, which no other command should replace.
    """
    fix = "give a new or an empty folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(entry.name for entry in os.scandir(folder))
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise CommandError(f"--report {folder}: already exists and holds {printable(found[0])}{more}\n{fix}")
        probe, descriptor = make_temporary(folder)
        os.close(descriptor)
        probe.unlink()
    except FileExistsError:
        raise CommandError(f"--report {folder}: already exists and is not a folder\n{fix}") from None
    except OSError as error:
        raise CommandError(f"--report {folder}: cannot be written to ({error.strerror})\n{fix}") from None


def write_report(folder: Path, report: Report, tally: Tally, dataset: Dataset) -> None:
    """Writes `report.json` and the page of one file's report."""
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    write_atomic(folder / DATA, text.encode(), sync=False, root=folder)
    assert tally.gallery is not None
    scenes = [tally.gallery.worst, tally.gallery.best]
    write_atomic(folder / PAGE, render(report, scenes, dataset.palette).encode(), sync=False, root=folder)


# ---- figures that only the report has ----------------------------------------------------------------------------
def extend(report: dict[str, Any], tally: Tally, dataset: Dataset) -> None:
    """Adds to the report of one file what the page shows besides: intervals of classes, scores of each image, scores
    before adaptation, and what the report was made of. NaN becomes None.
    """
    rows = tally.confusion.rows
    for row, bounds in zip(report["classes"], class_intervals(rows), strict=True):
        row["IoU_interval"] = None if np.isnan(bounds).any() else bounds.tolist()
    if tally.coarse is not None:
        before = tally.coarse.scores()
        interval = difference_interval(tally.coarse, tally.confusion)
        report["coarse"] = {
            "mIoU": before["mIoU"],
            "difference": report["mIoU"] - before["mIoU"],
            "difference_interval": None if interval is None else interval._asdict(),
        }
        for row, iou in zip(report["classes"], before["IoU"], strict=True):
            row["coarse_IoU"] = None if np.isnan(iou) else float(iou)
    scores = image_scores(rows)
    report["per_image"] = [
        {
            "name": dataset.name(index),
            **{key: None if np.isnan(each[index]) else float(each[index]) for key, each in scores.items()},
        }
        for index in range(len(rows))
    ]
    path = Path(report["checkpoint"])
    report["sha256"] = hash_file(path) if path.is_file() else None
    report["versions"] = {name: version(name) for name in ("ssaseg", "torch")}
    report["time"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


# ---- the page ----------------------------------------------------------------------------------------------------
def render(report: Report, scenes: Sequence[Sequence[Entry]], palette: Sequence[Sequence[int]]) -> str:
    """The page, HTML. scenes: the worst and the best images; palette: K colours RGB."""
    colours = [hexed((red, green, blue)) for red, green, blue in palette]
    classes = [row | {"colour": colour} for row, colour in zip(report["classes"], colours, strict=True)]
    names = [row["name"] for row in classes]
    worst, best = scenes
    best = [entry for entry in best if entry.number not in {each.number for each in worst}]
    legend = legend_of((each for entry in (*worst, *best) for each in entry.scene[1:]), names, palette)
    adaptation = compare_coarse(report, classes)
    sections = {"scores": "Scores", "classes": "Classes", "confusion": "Confusion"}
    sections |= {"adaptation": "Coarse against adapted"} if adaptation else {}
    sections |= {"calibration": "Calibration"} if "calibration" in report else {}
    sections |= {"images": "Images", "made": "How this was made"}
    return template().render(
        report=with_gaps(report),
        title=f"{report['model']} {report['classifier']}",
        file=Path(report["checkpoint"]).name,
        sections=sections.items(),
        tiles=tiles(report),
        classes=sorted(classes, key=lambda row: -1 if row["IoU"] is None else row["IoU"], reverse=True),
        columns={key: name for key, name in COLUMNS.items() if key in classes[0]},
        intervals=report["mIoU_interval"] is not None,
        matrix=matrix_table(np.asarray(report["confusion"]), names),
        adaptation=adaptation,
        colours=colours,
        legend=[(name, hexed((colour[0], colour[1], colour[2])) if colour else "") for name, colour in legend],
        worst=[scene(entry, report, palette) for entry in worst],
        best=[scene(entry, report, palette) for entry in best],
        side=SIDE,
        versions=report["versions"],
        facts=facts(report),
    )


def template() -> Any:
    """The page's template, which escapes all that it is given."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("ssaseg.cli.evaluation", ".")
    environment = Environment(autoescape=True, finalize=safe, loader=loader, undefined=StrictUndefined)
    environment.filters |= {"number": number, "signed": signed, "brief": brief, "thousands": "{:,}".format}
    return environment.get_template("page.html")


def safe(value: Any) -> Any:
    """What the template writes for a value: text without control characters; what is HTML already stays."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def brief(name: str) -> str:
    """A name of a class that leaves space for the numbers."""
    return cut(printable(name), LONGEST)


def number(value: float | None, digits: int = 2) -> str:
    """A number of a table."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference of a table."""
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def sign(value: float | None) -> str:
    """How a difference is shown: class of the style sheet."""
    return "" if not value else "up" if value > 0 else "down"


def tiles(report: Report) -> list[dict[str, Any]]:
    """The scores on top: name, value [%] and a remark."""
    interval = report["mIoU_interval"]
    remarks = {
        "mIoU": ""
        if interval is None
        else f"{interval['level']:g} % interval {interval['low']:.2f} to {interval['high']:.2f}",
        "mBoundaryIoU": "near the edges of regions",
        "fwIoU": "weighted by pixels",
        "aAcc": "of all pixels",
        "mAcc": "mean over classes",
        "mDice": "mean over classes",
    }
    found = [{"name": key, "value": report[key], "note": note} for key, note in remarks.items() if key in report]
    if "calibration" in report:
        note = "expected calibration error"
        found.append({"name": "ECE", "value": report["calibration"]["ECE"], "note": note})
    note = "mIoU of the most common class everywhere"
    return [*found, {"name": "baseline", "value": report["majority_miou"], "note": note}]


def with_gaps(report: Report) -> Report:
    """The report, whose calibration also has the gaps between confidence and accuracy [points]."""
    if "calibration" not in report:
        return {**report, "calibration": None}
    found = report["calibration"]

    def filled(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "gap": row["confidence"] - row["accuracy"] if row["pixels"] else None} for row in rows]

    return {**report, "calibration": {**found, **{key: filled(found[key]) for key in ("bins", "classes")}}}


def compare_coarse(report: Report, classes: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The classes before and after adaptation, the largest gain first; None without a classifier that adapts."""
    if "coarse" not in report:
        return None
    rows = []
    for row in classes:
        known = row["IoU"] is not None and row["coarse_IoU"] is not None
        difference = row["IoU"] - row["coarse_IoU"] if known else None
        rows.append({**row, "difference": difference, "sign": sign(difference)})
    coarse = report["coarse"]
    return {
        "coarse": coarse["mIoU"],
        "difference": coarse["difference"],
        "sign": sign(coarse["difference"]),
        "interval": coarse["difference_interval"],
        "classes": sorted(rows, key=lambda row: math.inf if row["difference"] is None else -row["difference"]),
    }


def matrix_table(matrix: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix, int (K,K), as a table: all classes, or those with most wrong pixels and all others as one.

    names: of columns; left_out: number of the other classes; rows: each with its cells: text, and how it is coloured.
    """
    wrong = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal()
    left_out = len(names) - MOST if len(names) > MOST + 1 else 0
    kept = np.sort(np.argsort(-wrong, kind="stable")[: len(names) - left_out])
    group = np.full(len(names), len(kept))
    group[kept] = np.arange(len(kept))
    small = np.zeros((len(kept) + bool(left_out),) * 2, np.int64)
    np.add.at(small, (group[:, None], group), matrix)
    shown = [names[index] for index in kept] + ([f"{left_out} others"] if left_out else [])
    shares = np.nan_to_num(percent(small, small.sum(axis=1, keepdims=True)))

    def cell(row: int, column: int) -> dict[str, Any]:
        share = shares[row, column]
        if row == column:
            level = 0 if row == len(kept) else math.ceil(share / 10)  # of other classes, it has confused ones, too
        else:
            level = math.ceil(10 * math.sqrt(share / 100))  # so that small shares are seen
        text = "" if not share else f"{share:.1f}" if share >= 0.05 else "<0.1"
        return {"text": text, "kind": "r" if row == column else "w", "level": min(level, 10)}

    rows = [{"name": name, "cells": [cell(row, k) for k in range(len(shown))]} for row, name in enumerate(shown)]
    return {"names": shown, "left_out": left_out, "rows": rows}


def facts(report: Report) -> list[tuple[str, str]]:
    """What the report was made of."""
    found = {
        "file": report["checkpoint"],
        "SHA-256": report["sha256"],
        "computed by": f"{report['engine']}; {report['images_per_s']:.1f} images/s, including reading and scoring",
        "data": f"recipe {report['recipe']}, {report['split']} split",
        "versions": ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        "time": report["time"],
        "figures": f"{DATA}, beside this page, has all of them",
    }
    return [(name, value) for name, value in found.items() if value]


# ---- images ------------------------------------------------------------------------------------------------------
def scene(entry: Entry, report: Report, palette: Sequence[Sequence[int]]) -> dict[str, Any]:
    """An image of the page: its name, scores and four pictures with their descriptions."""
    image, label, labels = entry.scene
    names = [row["name"] for row in report["classes"]]
    found = report["per_image"][entry.number]
    known = label != IGNORED
    wrong = known & (label != labels)
    errors = marked(image, wrong, WORSENED)
    errors[~known] = 40
    share = 100 * wrong.sum() / max(known.sum(), 1)
    pictures = [
        ("image", image, f"image {found['name']}"),
        ("label", coloured(image, label, palette), f"label: {main_classes(label, names)}"),
        ("prediction", coloured(image, labels, palette), f"prediction: {main_classes(labels, names)}"),
        (f"errors: {share:.1f} %", errors, f"errors, red, {share:.1f} % of the labelled pixels; dark: not labelled"),
    ]
    return {
        "name": found["name"],
        "miou": found["mIoU"],
        "aacc": found["aAcc"],
        "width": image.shape[1],
        "height": image.shape[0],
        "panels": [{"caption": name, "source": data_uri(each), "alt": text} for name, each, text in pictures],
    }


def main_classes(labels: np.ndarray, names: Sequence[str], most: int = 4) -> str:
    """The classes with most pixels of a map uint8 (h,w), as text for those who cannot see it."""
    pixels = np.bincount(labels.ravel(), minlength=256)[: len(names)]
    order = [int(index) for index in np.argsort(-pixels, kind="stable")[:most] if pixels[index]]
    return ", ".join(f"{names[index]} {100 * pixels[index] / labels.size:.0f} %" for index in order) or "no class"


def data_uri(image: np.ndarray) -> str:
    """A BGR image as JPEG inside an address."""
    return f"data:image/jpeg;base64,{base64.b64encode(encode(image, '.jpg')).decode()}"
