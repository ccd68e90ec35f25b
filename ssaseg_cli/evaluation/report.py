"""`ssaseg eval`: scores a checkpoint on labelled images, and prints and writes the report."""

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
from ssaseg.cli.evaluation.confused import confused_pairs, most_confused
from ssaseg.cli.printing import echo
from ssaseg.cli.ranks.ranks import Ranks, connect
from ssaseg.cli.scoring.boundary import STATEMENT, Boundaries
from ssaseg.cli.scoring.evaluate import WORKERS, evaluate_model, state_protocol
from ssaseg.cli.scoring.metrics import Confusion, Interval, nan_mean
from ssaseg.cli.signals import Interrupted, StopSignal
from ssaseg.datasets import Dataset, build_dataset
from ssaseg.models import Segmenter, load_model
from ssaseg.recipes import Recipe, Test, load_recipe, parse_protocol, parse_recipe

MEANS = ("mIoU", "mBoundaryIoU", "fwIoU", "aAcc", "mAcc")  # those that are printed; the report has more


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

    data: name or file of a recipe that replaces the recipe in the checkpoint; its `test` section is then the protocol.
    changes: keys of the protocol to change. boundary: also compute the boundary IoU. root: replaces the recipe's
    `data.root`. json_out: a file for the report; "-": stdout, without the table. Several ranks divide the images among
    them; rank 0 prints and writes. Raises CommandError if the classes of data and checkpoint differ or no pixel is
    labelled, and what loading either raises; SystemExit after Ctrl-C (130) and SIGTERM (143).
    """
    json_out = json_target(json_out)
    with connect(select_device(device)) as ranks:
        report = _score(ranks, checkpoint, data, root, split, limit, changes, boundary)
        if ranks.main:
            write_json(json_out, report)  # before printing, which may fail: an evaluation can take hours
        if ranks.main and json_out != "-":
            print_report(report)
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
    recipe = recipe_of(checkpoint, metadata, data)
    before = recipe.test if data else parse_protocol(metadata["protocol"], f"{checkpoint}: protocol")
    protocol = parse_protocol(before.model_dump() | dict(changes or {}), "protocol") if changes else before
    require_channels(checkpoint, metadata, recipe)
    dataset = open_dataset(recipe, split, root)
    require_data_classes(checkpoint, metadata["classes"], recipe.name, dataset.classes)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    started = time.perf_counter()
    boundaries = Boundaries(model.num_classes, ranks.device) if boundary else None
    confusion = _count(model.to(ranks.device), dataset, protocol, metadata, ranks, count, boundaries)
    require_labels(confusion.matrix, f"{split} split of recipe {recipe.name} ({count} images)")  # waits for the device
    return {
        "checkpoint": str(checkpoint),
        # Official weights that `convert` has converted have step 0 and no recipe: their number of steps is unknown.
        "step": metadata["step"] if metadata["step"] or metadata["recipe"] else None,
        "model": model.name,
        "classifier": model.classifier_name,
        "recipe": recipe.name,
        "split": split,
        "images": count,
        "of_images": len(dataset),
        "images_per_s": count / (time.perf_counter() - started),
        "protocol": protocol.model_dump(mode="json"),
        "statement": state_protocol(protocol, split, count, len(dataset), model.classifier.gives_scores)
        + (f"; {STATEMENT}" if boundary else ""),
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

    Ctrl-C and SIGTERM take effect between two images: while an image is being received from a worker, the worker would
    report a broken connection.
    """
    done = 0
    bar = progress_bar(count, "evaluated") if ranks.main else nullcontext(lambda images: None)
    with StopSignal() as stop:
        try:
            with bar as advance:

                def progress(images: int) -> None:
                    nonlocal done
                    images = min(images * ranks.size, count - done)  # the other ranks have done about as many
                    done += images
                    advance(images)

                mean, std, values = metadata["mean"], metadata["std"], protocol.model_dump()
                return evaluate_model(
                    model, dataset, values, mean, std, ranks.device, WORKERS, count, progress, boundaries, stop, ranks
                )
        except (Interrupted, KeyboardInterrupt, RuntimeError):  # RuntimeError: a worker was still starting
            if not stop.requested:
                raise
            if ranks.main:
                echo(f"stopped after {done} of {count} images", err=True)
            sys.exit(stop.exit_code)


def recipe_of(checkpoint: Path, metadata: Mapping[str, Any], data: str | None) -> Recipe:
    """The recipe that `data` names, or else the checkpoint's. Raises CommandError if there is neither."""
    if data is not None:
        return load_recipe(data)
    if metadata["recipe"] is None:
        raise CommandError(f"{checkpoint}: the checkpoint has no recipe, so its data are unknown\ngive --data RECIPE")
    return parse_recipe(metadata["recipe"], str(checkpoint))


def open_dataset(recipe: Recipe, split: str, root: Path | None) -> Dataset:
    """A split of the recipe's data; `root` replaces its `data.root`. Raises CommandError for a root of drawn scenes."""
    if root is not None and recipe.data.dataset == "synthetic":
        raise CommandError(f"--root {root}: recipe {recipe.name} uses built-in scenes, not files\nleave out --root")
    root = Path(recipe.data.root) if root is None else root
    # No cache: each image is read only once, and a cache would read all images before the first is scored.
    options = recipe.data.model_dump() | {"cache": False}
    return build_dataset(recipe.data.dataset, split, root=root, options=options)


def require_labels(confusion: np.ndarray, images: str) -> None:
    """Raises CommandError if a confusion matrix (K,K) has no pixel: all are ignored. `images`: whose they are."""
    if not confusion.any():
        raise CommandError(
            f"no labelled pixel in the {images}: all pixels are ignored\n"
            "check data.ignore_index, data.reduce_zero_label and data.raw_to_train in the recipe"
        )


def require_channels(checkpoint: Path, metadata: Mapping[str, Any], recipe: Recipe) -> None:
    """Raises CommandError if the recipe's images have other channels than the checkpoint's network reads."""
    own = metadata.get("channels", 3)
    if recipe.data.channels != own:
        raise CommandError(
            f"{checkpoint}: a network for images of {own} channels; recipe {recipe.name}: {recipe.data.channels}\n"
            f"give --data a recipe with data.channels: {own}, whose images have as many bands"
        )


def require_data_classes(checkpoint: Path, model: Sequence[str], recipe: str, data: Sequence[str]) -> None:
    """Raises CommandError if class k of the model is another class in the labels: its score would mean nothing."""
    fix = "give --data a recipe that has the checkpoint's classes, in the same order"
    if len(model) != len(data):
        raise CommandError(f"{checkpoint}: {len(model)} classes; recipe {recipe}: {len(data)} classes\n{fix}")
    for index, (ours, theirs) in enumerate(zip(model, data, strict=True)):
        if ours != theirs:
            raise CommandError(f"{checkpoint}: class {index} is {ours!r}; recipe {recipe}: {theirs!r}\n{fix}")


def _figures(confusion: Confusion, classes: Sequence[str], boundaries: Boundaries | None = None) -> dict[str, Any]:
    """The scores [%] of a report; NaN becomes None."""
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
    """For a class without labelled pixels: whether it counts in the mean (predicted) or not."""
    if labelled:
        return ""
    return "no ground truth" if np.isnan(iou) else "predicted but absent"


def print_report(report: Mapping[str, Any]) -> None:
    """Prints the table per class, the means, the interval of the mIoU, the speed and the protocol on stdout."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    shown = {"IoU": "IoU [%]", "BoundaryIoU": "boundary [%]", "Acc": "Acc [%]", "Dice": "Dice [%]"}
    shown = {key: head for key, head in shown.items() if key in report["classes"][0]} | {"pixel_share": "pixels [%]"}
    rows = [(row["name"], *(cell(row[key]) for key in shown), row["remark"]) for row in report["classes"]]
    step = "" if report["step"] is None else f", step {report['step']}"
    title = f"{report['checkpoint']}: {report['model']} {report['classifier']}{step}"
    print_table(("class", *shown.values(), ""), rows, title)
    means = "   ".join(f"{key} {cell(report[key])} %" for key in MEANS if key in report)
    echo(f"{means}   (always the most common class: mIoU {cell(report['majority_miou'])} %)")
    if report["mIoU_interval"] is not None:
        interval = Interval(**report["mIoU_interval"])
        how = f"percentile bootstrap over {report['images']} images, {interval.resamples} resamples"
        echo(f"mIoU {interval.level:g} % interval {interval.low:.2f} to {interval.high:.2f} % ({how})")
    echo(most_confused(report["confused"], 5))
    echo(f"{report['images_per_s']:.1f} images/s, including reading and scoring")
    echo(f"protocol: {report['statement']}")
