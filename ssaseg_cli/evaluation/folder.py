"""`ssaseg eval --predictions`: scores a folder of label PNGs under the protocols of several tools."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssaseg.cli.console import json_target, print_table, progress_bar, write_json
from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.confused import confused_pairs, most_confused
from ssaseg.cli.evaluation.predictions import (
    Predictions,
    Reading,
    count_predicted,
    find_predictions,
    require_same_names,
)
from ssaseg.cli.evaluation.protocols import Scored, protocol_scores
from ssaseg.cli.evaluation.report import open_dataset, require_labels
from ssaseg.cli.evaluation.tables import print_interval
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.metrics import middle, percent, resampled_miou
from ssaseg.datasets import Dataset
from ssaseg.files.text import printable
from ssaseg.recipes import Recipe, load_recipe

LEVEL, RESAMPLES, SEED = 95.0, 1000, 0  # of the interval, as of networks


def run_predictions(
    folder: Path, data: str | None, root: Path | None, split: str, limit: int | None, reading: Reading,
    json_out: str | None,
) -> int:  # fmt: skip
    """Scores the files in `folder` on a split of the recipe `data`, prints tables, and returns exit code 0.

    root: replaces the recipe's `data.root`. limit: only so many images. json_out: as of `run_eval`. Raises CommandError
    for missing predictions and other classes, and without `data`; DataError for a file that cannot be used.
    """
    json_out = json_target(json_out)
    if data is None:
        raise CommandError("--predictions: label files do not say which images they are of\ngive --data RECIPE")
    recipe = load_recipe(data)
    dataset = open_dataset(recipe, split, root)
    found, scored = count_folder(folder, recipe, dataset, split, limit, reading)
    report = make_report(found, scored, recipe, dataset, split)
    write_json(json_out, report)
    if json_out != "-":
        print_folder(report)
    return 0


def count_folder(
    folder: Path, recipe: Recipe, dataset: Dataset, split: str, limit: int | None, reading: Reading
) -> tuple[Predictions, Scored]:
    """The files of a folder and their counts; says on stderr how many of its files are not used."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    require_same_names(folder, dataset.classes)
    found = find_predictions(folder, dataset, count, reading.suffix)
    if found.others:
        first = ", ".join(found.others[:3]) + (", …" if len(found.others) > 3 else "")
        echo(f"{folder}: {len(found.others)} files belong to no image of this split, not scored: {first}", err=True)
    with progress_bar(count, "scored") as advance:
        scored = count_predicted(found, dataset, reading, advance)
    require_labels(scored.matrix, f"{split} split of recipe {recipe.name} ({count} images)")
    return found, scored


def make_report(found: Predictions, scored: Scored, recipe: Recipe, dataset: Dataset, split: str) -> dict[str, Any]:
    """The report, as JSON values."""
    images, share = len(found.files), percent(scored.labelled, scored.labelled.sum())
    interval = None
    if images > 1:
        resampled = resampled_miou(scored.rows, RESAMPLES, np.random.default_rng(SEED))
        interval = middle(resampled, LEVEL, RESAMPLES, SEED)
    protocols = protocol_scores(scored)
    own = scored.matrix[:, :-1]
    return {
        "predictions": str(found.folder),
        "recipe": recipe.name,
        "split": split,
        "images": images,
        "of_images": len(dataset),
        "mIoU": protocols[0]["mIoU"],
        "mIoU_interval": None if interval is None else interval._asdict(),
        "protocols": protocols,
        "classes": [
            {
                "name": name,
                "IoU": None if np.isnan(scored.iou[k]) else float(scored.iou[k]),
                "Acc": None if np.isnan(scored.accuracies[k]) else float(scored.accuracies[k]),
                "pixels": int(scored.labelled[k]),
                "pixel_share": float(share[k]),
            }
            for k, name in enumerate(dataset.classes)
        ],
        "confused": confused_pairs(own, dataset.classes),
        "confusion": own.tolist(),
        "predicted_as_no_class": int(scored.matrix[:, -1].sum()),
        **found.hashes(),
    }


def print_folder(report: Mapping[str, Any]) -> None:
    """Prints the classes and the protocols on stdout."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    rows = [(row["name"], *(cell(row[key]) for key in ("IoU", "Acc", "pixel_share"))) for row in report["classes"]]
    print_table(("class", "IoU [%]", "Acc [%]", "pixels [%]"), rows, f"{report['predictions']}: labels of files")
    rows = [
        (each["name"], *(cell(each[key]) for key in ("mIoU", "mAcc", "aAcc")), str(each["counted"]))
        for each in report["protocols"]
    ]
    print_table(("protocol", "mIoU [%]", "mAcc [%]", "aAcc [%]", "mean of"), rows, "the same labels, by protocol")
    for each in report["protocols"]:
        echo(f"{each['name']}: {each['what']}")
    print_interval(report, "ssaseg's; ")
    echo(most_confused(report["confused"], 5))
    of = "all" if report["images"] == report["of_images"] else f"the first {report['images']} of"
    data = f"{of} {report['of_images']} images of the {report['split']} split of recipe {printable(report['recipe'])}"
    echo(f"{data}; not counted: pixels with label 255")
    echo(f"SHA-256 of the {report['images']} files: {report['sha256']}")
