"""Scoring a model on labelled images: `ssaseg eval`, and what training evaluates with."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ssaseg.cli.console import json_target, print_table, progress_bar, write_json
from ssaseg.cli.device import select_device
from ssaseg.cli.errors import CommandError
from ssaseg.cli.ranks.ranks import Ranks, connect
from ssaseg.cli.scoring.boundary import STATEMENT, Boundaries
from ssaseg.cli.scoring.confused import confused_pairs, most_confused
from ssaseg.cli.scoring.evaluate import WORKERS, evaluate_model, state_protocol
from ssaseg.cli.scoring.metrics import Confusion, Interval, nan_mean
from ssaseg.cli.signals import Interrupted, StopSignal
from ssaseg.datasets import Dataset, build_dataset
from ssaseg.models import Segmenter, load_model
from ssaseg.recipes import Recipe, Test, load_recipe, parse_protocol, parse_recipe

MEANS = ("mIoU", "mBoundaryIoU", "fwIoU", "aAcc", "mAcc")  # printed; the report has all


# ---- the command -------------------------------------------------------------------------------------------------
def run_eval(
    checkpoint: Path,
    data: str | None,
    root: Path | None,
    split: str,
    json_out: str | None,
    device: str,
    limit: int | None = None,
    changes: Mapping[str, Any] | None = None,
    boundary: bool = False,
) -> int:
    """Scores `checkpoint` on a split, prints a table, and returns exit code 0.

    data: a recipe's name or file instead of the recipe inside the checkpoint; its `test` section is then the protocol.
    changes: keys of the protocol to change. boundary: boundary IoU as well.
    root: instead of the recipe's `data.root`. json_out: a file for the figures, "-" for stdout without the table.
    Raises CommandError where data and checkpoint do not fit or no pixel is labelled, and what loading either raises;
    SystemExit after Ctrl-C (130) and SIGTERM (143). Several ranks share the images; one prints and writes.
    """
    json_out = json_target(json_out)
    with connect(select_device(device)) as ranks:
        report = _score(ranks, checkpoint, data, root, split, limit, changes, boundary)
        if ranks.main and json_out != "-":
            print_report(report)
        if ranks.main:
            write_json(json_out, report)
    return 0


def _score(
    ranks: Ranks,
    checkpoint: Path,
    data: str | None,
    root: Path | None,
    split: str,
    limit: int | None,
    changes: Mapping[str, Any] | None,
    boundary: bool,
) -> dict[str, Any]:
    """The report of `run_eval`."""
    model, metadata = load_model(checkpoint)
    recipe = _recipe(checkpoint, metadata, data)
    before = recipe.test if data else parse_protocol(metadata["protocol"], f"{checkpoint}: protocol")
    protocol = parse_protocol(before.model_dump() | dict(changes or {}), "protocol") if changes else before
    dataset = _dataset(recipe, split, root)
    _require_same_classes(checkpoint, metadata["classes"], recipe.name, dataset.classes)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    started = time.perf_counter()
    boundaries = Boundaries(model.num_classes, ranks.device) if boundary else None
    confusion = _count(model.to(ranks.device), dataset, protocol, metadata, ranks, count, boundaries)
    _require_labels(confusion, f"{split} split of recipe {recipe.name} ({count} images)")  # waits for the device
    return {
        "checkpoint": str(checkpoint),
        # Weights of other people, which `convert` brings, count from 0 and know no recipe.
        "step": metadata["step"] if metadata["step"] or metadata["recipe"] else None,
        "model": model.name,
        "classifier": model.classifier_name,
        "recipe": recipe.name,
        "split": split,
        "images": count,
        "of_images": len(dataset),
        "images_per_s": count / (time.perf_counter() - started),
        "protocol": protocol.model_dump(mode="json"),
        "statement": state_protocol(protocol, split, count, len(dataset)) + (f"; {STATEMENT}" if boundary else ""),
        **_figures(confusion, dataset.classes, boundaries),
        "confused": confused_pairs(confusion.matrix, dataset.classes),
        "confusion": confusion.matrix.tolist(),
    }


def _count(
    model: Segmenter,
    dataset: Dataset,
    protocol: Test,
    metadata: Mapping[str, Any],
    ranks: Ranks,
    count: int,
    boundaries: Boundaries | None,
) -> Confusion:
    """`evaluate_model` on `count` images, with progress on stderr.

    Ctrl-C and SIGTERM take effect between two images: in the middle of taking one over, the worker that hands it over
    would tell of a broken connection.
    """
    done = 0
    bar = progress_bar(count, "evaluated") if ranks.main else nullcontext(lambda images: None)
    with StopSignal() as stop:
        try:
            with bar as advance:

                def progress(images: int) -> None:
                    nonlocal done
                    images = min(images * ranks.size, count - done)  # the others are about as far
                    done += images
                    advance(images)

                mean, std, values = metadata["mean"], metadata["std"], protocol.model_dump()
                return evaluate_model(
                    model, dataset, values, mean, std, ranks.device, WORKERS, count, progress, boundaries, stop, ranks
                )
        except (Interrupted, KeyboardInterrupt, RuntimeError):  # RuntimeError: a worker was only starting
            if not stop.requested:
                raise
            if ranks.main:
                print(f"stopped after {done} of {count} images", file=sys.stderr)
            sys.exit(stop.exit_code)


def _recipe(checkpoint: Path, metadata: Mapping[str, Any], data: str | None) -> Recipe:
    if data is not None:
        return load_recipe(data)
    if metadata["recipe"] is None:
        raise CommandError(f"{checkpoint}: the checkpoint holds no recipe that would name its data\ngive --data RECIPE")
    return parse_recipe(metadata["recipe"], str(checkpoint))


def _dataset(recipe: Recipe, split: str, root: Path | None) -> Dataset:
    if root is not None and recipe.data.dataset == "synthetic":
        raise CommandError(f"--root {root}: recipe {recipe.name} has built-in scenes, which have no root\nleave it out")
    root = Path(recipe.data.root) if root is None else root
    # Each image is read once: a cache would hold them all, and fill before the first is scored.
    options = recipe.data.model_dump() | {"cache": False}
    return build_dataset(recipe.data.dataset, split, root=root, options=options)


def _require_labels(confusion: Confusion, images: str) -> None:
    if not confusion.matrix.any():
        raise CommandError(
            f"no labelled pixel in the {images}: every one is ignored\n"
            "check its data.ignore_index, data.reduce_zero_label and data.raw_to_train"
        )


def _require_same_classes(checkpoint: Path, model: Sequence[str], recipe: str, data: Sequence[str]) -> None:
    """Scores of class k mean nothing where it is a car to the model and a tree to the labels."""
    mend = "give --data a recipe with the checkpoint's classes in their order"
    if len(model) != len(data):
        raise CommandError(f"{checkpoint}: {len(model)} classes; recipe {recipe}: {len(data)} classes\n{mend}")
    for index, (ours, theirs) in enumerate(zip(model, data, strict=True)):
        if ours != theirs:
            raise CommandError(f"{checkpoint}: class {index} is {ours!r}; recipe {recipe}: {theirs!r}\n{mend}")


def _figures(confusion: Confusion, classes: Sequence[str], boundaries: Boundaries | None = None) -> dict[str, Any]:
    """The scores [%] of a report, NaN as None."""
    scores = confusion.scores()
    labelled = confusion.matrix.sum(axis=1)
    shares = labelled / max(labelled.sum(), 1) * 100
    per_class = {key: value for key, value in scores.items() if isinstance(value, np.ndarray)}
    means = {key: _number(value) for key, value in scores.items() if key not in per_class}
    if boundaries is not None:
        per_class["BoundaryIoU"] = boundaries.scores()
        means["mBoundaryIoU"] = _number(nan_mean(per_class["BoundaryIoU"]))
    interval = confusion.interval()
    rows = [
        {
            "name": name,
            **{key: _number(values[index]) for key, values in per_class.items()},
            "pixels": int(labelled[index]),
            "pixel_share": float(shares[index]),
            "remark": _remark(int(labelled[index]), float(scores["IoU"][index])),
        }
        for index, name in enumerate(classes)
    ]
    return {
        **means,
        "mIoU_interval": None if interval is None else interval._asdict(),
        "majority_miou": _number(confusion.majority_miou()),
        "classes": rows,
    }


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _remark(labelled: int, iou: float) -> str:
    """What a class without labelled pixels does to the mean."""
    if labelled:
        return ""
    return "no ground truth" if np.isnan(iou) else "predicted but absent"


def print_report(report: Mapping[str, Any]) -> None:
    """The table per class, the means, how sure they are, the speed and the protocol, on stdout."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    shown = {"IoU": "IoU [%]", "BoundaryIoU": "boundary [%]", "Acc": "Acc [%]", "Dice": "Dice [%]"}
    shown = {key: head for key, head in shown.items() if key in report["classes"][0]} | {"pixel_share": "pixels [%]"}
    rows = [(row["name"], *(cell(row[key]) for key in shown), row["remark"]) for row in report["classes"]]
    step = "" if report["step"] is None else f", step {report['step']}"
    title = f"{report['checkpoint']}: {report['model']} {report['classifier']}{step}"
    print_table(("class", *shown.values(), ""), rows, title)
    means = "   ".join(f"{key} {cell(report[key])} %" for key in MEANS if key in report)
    print(f"{means}   (always the commonest class: mIoU {cell(report['majority_miou'])} %)")
    if report["mIoU_interval"] is not None:
        interval = Interval(**report["mIoU_interval"])
        how = f"percentile bootstrap over {report['images']} images, {interval.resamples} resamples"
        print(f"mIoU {interval.level:g} % interval {interval.low:.2f} to {interval.high:.2f} % ({how})")
    print(most_confused(report["confused"], 5))
    print(f"{report['images_per_s']:.1f} images/s, reading and scoring included")
    print(f"protocol: {report['statement']}")
