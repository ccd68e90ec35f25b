"""`ssaseg data suspects`: goes through labelled images once, ranks them, and draws the first ones.

Memory is that of one image, and a few bytes for each image.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssaseg.cli.console import json_target, print_table, progress_bar, write_json
from ssaseg.cli.curation.contradictions import Suspect, Suspicion, contradictions, largest_region
from ssaseg.cli.drawing import panels
from ssaseg.cli.drawing.panels import Panel
from ssaseg.cli.engine.opening import device_for, make_engine, open_file, own_inference
from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.report import (
    open_dataset,
    recipe_of,
    require_channels,
    require_data_classes,
    require_labels,
)
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.inference import Inference, Prediction
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets import Dataset
from ssaseg.datasets.bands.reading import shown
from ssaseg.files.text import printable
from ssaseg.files.writing import write_atomic

LISTED = 10  # images in the printed table
BOX = (230, 50, 50)  # RGB


def run_suspects(
    checkpoint: Path,
    data: str | None,
    root: Path | None,
    split: str,
    out: Path,
    count: int,
    json_out: str | None,
    device: str,
) -> int:
    """Ranks the images of a split. Writes OUT/suspects.csv and OUT/suspects.png with the first `count` images.

    Returns 0, or 130 or 143 after Ctrl-C or SIGTERM, when only the images so far are ranked. Raises CommandError where
    classes or channels differ, no pixel is labelled, or OUT has results already; and what loading either raises.
    """
    target = json_target(json_out)
    require_new(out)
    opened = open_file(checkpoint)
    metadata = opened.metadata
    recipe = recipe_of(checkpoint, metadata, data)
    require_channels(checkpoint, metadata, recipe)
    dataset = open_dataset(recipe, split, root)
    require_data_classes(checkpoint, metadata["classes"], recipe.name, dataset.classes)
    inference = own_inference(opened, make_engine(opened, device_for(opened, device)))
    suspicion = Suspicion(len(dataset.classes))
    with StopSignal() as stop, progress_bar(len(dataset), "looked at") as advance:
        for index in range(len(dataset)):
            image, labels = dataset.load(index)
            seen = look(inference, image, dataset.name(index))
            assert seen.probabilities is not None
            suspicion.add(contradictions(seen.probabilities, labels))
            advance(1)
            if stop.requested:
                break
    images = len(suspicion.images)
    counted = suspicion.pixels.reshape(len(dataset.classes), -1)
    require_labels(counted, f"{split} split of recipe {recipe.name} ({images} images)")
    ranking = suspicion.rank()
    rows, picture = describe(ranking[:count], inference, dataset)
    facts = {"checkpoint": str(checkpoint), "recipe": recipe.name, "split": split, "images": images}
    rest = [brief(each, dataset) for each in ranking[count:]]
    report = facts | {"suspects": rows + rest}
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "suspects.csv", as_csv(rows + rest), root=out)
    if picture is not None:
        write_atomic(out / "suspects.png", picture, root=out)
    write_json(target, report)
    if target != "-":
        print_ranking(rows, images, out)
    return stop.exit_code if stop.requested else 0


def require_new(out: Path) -> None:
    """Raises CommandError if OUT has the results of an earlier command, or is not a folder."""
    if out.exists() and not out.is_dir():
        raise CommandError(f"--out {printable(str(out))}: not a folder\ngive a folder that is new or empty")
    if (out / "suspects.csv").exists():
        raise CommandError(f"--out {printable(str(out))}: has suspects.csv already\ngive another folder, or remove it")


def look(inference: Inference, image: np.ndarray, name: str) -> Prediction:
    """Labels and probabilities of one image, BGR uint8 (H,W,3)."""
    inputs = [torch.tensor(each) for each in inference.inputs(image, name)]
    return inference.predict(inputs, image.shape[:2], coarse=False, probabilities=True, name=name)


def brief(suspect: Suspect, dataset: Dataset) -> dict[str, Any]:
    """A suspect as a row of the report."""
    return {
        "image": dataset.name(suspect.image),
        "score": round(suspect.score, 6),
        "label": dataset.classes[suspect.label],
        "predicted": dataset.classes[suspect.predicted],
        "share": round(suspect.share, 6),
        **dict.fromkeys(("x", "y", "width", "height", "pixels")),
    }


def describe(
    suspects: Sequence[Suspect], inference: Inference, dataset: Dataset
) -> tuple[list[dict[str, Any]], bytes | None]:
    """Rows of the report with the largest region of each, and a picture of all: image, label and prediction."""
    rows: list[dict[str, Any]] = []
    lines, maps = [], []
    for suspect in suspects:
        image, labels = dataset.load(suspect.image)
        prediction = look(inference, image, dataset.name(suspect.image)).labels
        row = brief(suspect, dataset)
        region = largest_region(prediction, labels, suspect.label, suspect.predicted)
        pixels, where = shown(image), np.zeros(labels.shape, bool)
        if region is not None:
            x, y, width, height = region.box
            row |= dict(zip(("x", "y", "width", "height", "pixels"), (*region.box, region.pixels), strict=True))
            where[y : y + height, x : x + width] = True
        boxed = [
            Panel(caption, panels.outlined(picture, where, BOX))
            for caption, picture in (
                (f"{len(rows) + 1}: {row['image']}", pixels),
                (f"label: {row['label']}", panels.coloured(pixels, labels, dataset.palette)),
                (f"predicted: {row['predicted']}", panels.coloured(pixels, prediction, dataset.palette)),
            )
        ]
        rows.append(row)
        lines.append(boxed)
        maps += [labels, prediction]
    if not lines:
        return rows, None
    legend = panels.legend_of(maps, dataset.classes, dataset.palette)
    return rows, panels.encode(panels.grid(lines, legend), ".png")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV with a header; a number that is not known is empty."""
    text = io.StringIO(newline="")
    columns = ("rank", "image", "score", "label", "predicted", "share", "x", "y", "width", "height", "pixels")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({"rank": rank, **row} for rank, row in enumerate(rows, 1))
    return text.getvalue().encode("utf-8", "surrogateescape")


def print_ranking(rows: Sequence[Mapping[str, Any]], images: int, out: Path) -> None:
    """The first images of the ranking, and where the rest is."""
    if not rows:
        echo(f"no label of the {images} images is contradicted")
        return
    shown_rows = [
        (row["image"], f"{row['score']:.3f}", row["label"], row["predicted"], f"{100 * row['share']:.1f}")
        for row in rows[:LISTED]
    ]
    print_table(("image", "score", "label", "predicted", "share [%]"), shown_rows)
    echo("a high score is a reason to look at a label, not a proof: the network may be wrong")
    echo(f"wrote {printable(str(out))}: suspects.csv (all {images} images), suspects.png (the first {len(rows)})")
