"""`ssaseg eval`: scores one or several files on labelled images, and prints and writes the report."""

import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ssaseg.cli.console import json_target, progress_bar, write_json
from ssaseg.cli.engine.graphs import KINDS
from ssaseg.cli.engine.opening import Opened, device_for, make_engine, open_file
from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.confused import confused_pairs
from ssaseg.cli.evaluation.page import PAGE, extend, make_folder, write_report
from ssaseg.cli.evaluation.several import (
    differences,
    note_what_differs,
    require_one_set_of_classes,
)
from ssaseg.cli.evaluation.tables import print_any
from ssaseg.cli.printing import echo
from ssaseg.cli.ranks.ranks import Ranks, connect
from ssaseg.cli.scoring import calibration
from ssaseg.cli.scoring.attention import warn_of_attention
from ssaseg.cli.scoring.boundary import STATEMENT, Boundaries
from ssaseg.cli.scoring.evaluate import WORKERS, Sums, Tally, count_predictions, state_protocol
from ssaseg.cli.scoring.inference import Inference
from ssaseg.cli.scoring.metrics import Confusion, nan_mean
from ssaseg.cli.scoring.trained_size import warn_of_size
from ssaseg.cli.sharding import WHOLE, Shard
from ssaseg.cli.signals import Interrupted, StopSignal
from ssaseg.datasets import DataError, Dataset, build_dataset
from ssaseg.files.text import printable
from ssaseg.recipes import Recipe, Test, load_recipe, parse_protocol, parse_recipe

LARGE_INPUTS = "sliding windows (--slide 1024 768) or smaller inputs (--ratios 0.5) are faster, and change the score"


@dataclass(frozen=True)
class Request:
    """What is to be scored, and how.

    data: name or file of a recipe that replaces the recipe in the file; its `test` section is then the protocol. root:
    replaces the recipe's `data.root`. changes: keys of the protocol to change. boundary: also compute the boundary IoU.
    precision: "auto" is float32. backend: what runs checkpoints; "auto" is PyTorch, as in the evaluations during
    training. exact: the network as it was trained, not folded. classes, protocol: what the files do not say themselves.
    calibration: also compute the calibration error. report: a new folder for the page of one file's scores, which has
    the boundary IoU and the calibration error, too. shard: count its images only, see `counts.py`.
    """

    data: str | None = None
    root: Path | None = None
    split: str = "val"
    limit: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    boundary: bool = False
    precision: str = "auto"
    exact: bool = False
    backend: str = "auto"
    classes: str | None = None
    protocol: str | None = None
    calibration: bool = False
    report: Path | None = None
    shard: Shard = WHOLE


# ---- the command -------------------------------------------------------------------------------------------------
def run_eval(files: Sequence[Path], request: Request, json_out: str | None, device: str) -> int:
    """Scores `files` on a split, prints a table, and returns exit code 0.

    Several files are scored on the same pixels in one pass, and compared with the first. json_out: a file for the
    report; "-": stdout, without the table. Several ranks divide the images among them; rank 0 prints and writes.
    Raises CommandError if the classes of files or data differ or no pixel is labelled, and what loading either raises;
    SystemExit after Ctrl-C (130) and SIGTERM (143).
    """
    json_out = json_target(json_out)
    if request.report is not None:
        request = replace(request, boundary=True, calibration=True)
    if request.data is not None:  # before networks are loaded
        open_root(load_recipe(request.data), request.root)
    with connect(device_of(files, device)) as ranks:
        if ranks.main and request.report is not None:
            make_folder(request.report)
        report, counted = _score(ranks, files, request)
        if ranks.main:
            write_json(json_out, report)  # before printing, which may fail: an evaluation can take hours
            if request.report is not None:
                write_report(request.report, report, counted.tallies[0], counted.dataset)
        if ranks.main and json_out != "-":
            print_any(report)
            if request.report is not None:
                echo(f"wrote {printable(str(request.report / PAGE))}")
    return 0


class Counted(NamedTuple):
    """What was counted of the predictions of several files on the same images."""

    opened: list[Opened]  # without their models
    tallies: list[Tally]
    recipe: Recipe
    dataset: Dataset
    images: int  # the first ones of the data set
    numbers: Sequence[int]  # of those that were counted: all, or a shard of them
    seconds: float
    precision: str

    def heads(self, request: Request) -> list[dict[str, Any]]:
        """Of each file: what its report says besides its scores."""
        shared = {
            "recipe": self.recipe.name,
            "split": request.split,
            "images": self.images,
            "of_images": len(self.dataset),
            "images_per_s": len(self.numbers) / max(self.seconds, 1e-9),
            "precision": self.precision,
        }
        return [_head(opened, tally, shared) for opened, tally in zip(self.opened, self.tallies, strict=True)]


def _score(ranks: Ranks, files: Sequence[Path], request: Request) -> tuple[dict[str, Any], Counted]:
    """The report of `run_eval`: of one file, or of several with their differences; what was counted."""
    counted = count_files(ranks, open_files(files, request), request)
    dataset, tallies = counted.dataset, counted.tallies
    report = report_of(counted.heads(request), tallies, dataset.classes)
    if request.report is not None:
        extend(report, tallies[0], dataset)
    return report, counted


def report_of(heads: Sequence[Mapping[str, Any]], sums: Sequence[Sums], classes: Sequence[str]) -> dict[str, Any]:
    """The report of one file, or of several with their differences; heads: what it says besides the scores."""
    reports = [_report(head, each, classes) for head, each in zip(heads, sums, strict=True)]
    if len(reports) == 1:
        return reports[0]
    return {"models": reports, "differences": differences([head["checkpoint"] for head in heads], sums)}


def open_files(files: Sequence[Path], request: Request) -> list[Opened]:
    """Opens files of the same classes; errors as `run_eval`."""
    opened = [open_file(path, request.classes, request.protocol) for path in files]
    require_one_set_of_classes(opened)
    return opened


def count_files(ranks: Ranks, opened: list[Opened], request: Request) -> Counted:
    """Counts the predictions of files of the same classes; errors as `run_eval`."""
    counted = count_images(ranks, prepare(ranks, opened, request))
    # Reading the matrix waits for the device.
    images = f"{request.split} split of recipe {counted.recipe.name} ({counted.images} images)"
    require_labels(counted.tallies[0].confusion.matrix, images)
    return counted


def prepare(ranks: Ranks, opened: list[Opened], request: Request) -> Counted:
    """What `count_images` takes of files of the same classes; errors as `run_eval`."""
    source = next((each for each in opened if each.metadata["recipe"] is not None), opened[0])
    recipe = recipe_of(source.path, source.metadata, request.data)
    protocol = protocol_of(opened[0], recipe, request)
    for each in opened:
        require_channels(each.path, each.metadata, recipe)
    if ranks.main:
        note_what_differs(opened, protocols=not request.data)
    dataset = open_dataset(recipe, request.split, request.root)
    require_data_classes(opened[0].path, opened[0].metadata["classes"], recipe.name, dataset.classes)
    precision = "float32" if request.precision == "auto" else request.precision
    tallies = []
    for each in opened:
        engine = make_engine(each, ranks.device, precision, request.backend, request.exact)
        inference = Inference(engine, protocol, each.metadata["mean"], each.metadata["std"])
        tallies.append(Tally.of(inference, request.boundary, request.calibration, request.report is not None))
    opened = [each._replace(model=None) for each in opened]  # the engines have copies
    if ranks.main:
        for each, tally in zip(opened, tallies, strict=True):
            warn_of_attention(each.metadata["model"], tally.inference, dataset.image_files, LARGE_INPUTS)
            warn_of_size(each.metadata, protocol, dataset.image_files)
    count = len(dataset) if request.limit is None else min(request.limit, len(dataset))
    shard = request.shard
    numbers = [number for number in range(count) if shard.total == 1 or shard.has(dataset.name(number))]
    return Counted(opened, tallies, recipe, dataset, count, numbers, 0.0, precision)


def count_images(ranks: Ranks, counted: Counted) -> Counted:
    """Counts the images that are to be counted; errors as `run_eval`."""
    started = time.perf_counter()
    if counted.numbers:
        _count(counted.tallies, counted.dataset, ranks, counted.numbers)
        _ = counted.tallies[0].confusion.matrix  # waits for the device
    return counted._replace(seconds=time.perf_counter() - started)


def _head(opened: Opened, tally: Tally, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What the report of one file says besides its scores."""
    metadata, inference = opened.metadata, tally.inference
    engine, protocol = inference.engine, inference.protocol
    views = (shared["split"], shared["images"], shared["of_images"], engine.gives_scores)
    statement = state_protocol(protocol, *views) + (f"; {STATEMENT}" if tally.boundaries is not None else "")
    statement += f"; {calibration.STATEMENT}" if tally.calibration is not None else ""
    return {
        "checkpoint": str(opened.path),
        # Official weights that `convert` has converted have step 0 and no recipe: their number of steps is unknown.
        "step": metadata["step"] if metadata["step"] or metadata["recipe"] else None,
        "model": metadata["model"],
        "classifier": metadata["classifier"],
        **shared,
        "engine": engine.what,
        "protocol": protocol.model_dump(mode="json"),
        "statement": f"{statement}; computed by {engine.what}",
    }


def _report(head: Mapping[str, Any], sums: Sums, classes: Sequence[str]) -> dict[str, Any]:
    """The report of one file."""
    sure = {} if sums.calibration is None else {"calibration": sums.calibration.figures(classes)}
    matrix = sums.confusion.matrix
    return {
        **head,
        **_figures(sums.confusion, classes, sums.boundaries),
        **sure,
        "confused": confused_pairs(matrix, classes),
        "confusion": matrix.tolist(),
    }


def device_of(files: Sequence[Path], name: str) -> torch.device:
    """The device of `--device` for all files: the CPU if one of them is a graph that runs only there."""
    kinds = [KINDS.get(path.suffix.lower(), "torch") for path in files]
    devices = [device_for(Opened(path, kind, None, {}), name) for path, kind in zip(files, kinds, strict=True)]
    return next((device for device in devices if device.type == "cpu"), devices[0])


def protocol_of(opened: Opened, recipe: Recipe, request: Request) -> Test:
    """The protocol to score by: the file's, or that of the recipe that `data` names, with the changes."""
    own = recipe.test if request.data else parse_protocol(opened.metadata["protocol"], f"{opened.path}: protocol")
    return parse_protocol(own.model_dump() | dict(request.changes), "protocol") if request.changes else own


def _count(tallies: Sequence[Tally], dataset: Dataset, ranks: Ranks, numbers: Sequence[int]) -> None:
    """`count_predictions` on the images with these numbers, with progress on stderr.

    Ctrl-C and SIGTERM take effect between two images: while an image is being received from a worker, the worker would
    report a broken connection.
    """
    done, count = 0, len(numbers)
    bar = progress_bar(count, "evaluated") if ranks.main else nullcontext(lambda images: None)
    with StopSignal() as stop:
        try:
            with bar as advance:

                def progress(images: int) -> None:
                    nonlocal done
                    images = min(images * ranks.size, count - done)  # the other ranks have done about as many
                    done += images
                    advance(images)

                count_predictions(tallies, dataset, WORKERS, None, progress, stop, ranks, numbers)
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


def open_root(recipe: Recipe, root: Path | None) -> Path:
    """The folder of the data, `root` or the recipe's. Raises CommandError if it does not exist, or for a root of drawn
    scenes.
    """
    if recipe.data.dataset == "synthetic":
        if root is not None:
            raise CommandError(f"--root {root}: recipe {recipe.name} uses built-in scenes, not files\nleave out --root")
        return Path(recipe.data.root)
    found = Path(recipe.data.root) if root is None else root
    if not found.is_dir():
        whose = f"data.root of recipe {recipe.name}" if root is None else "--root"
        what = "a file" if found.exists() else "no such folder"
        fix = "give the folder of the data: --root DIR; other data: --data RECIPE"
        raise CommandError(f"{found}: {what} ({whose})\n{fix}")
    return found


def open_dataset(recipe: Recipe, split: str, root: Path | None) -> Dataset:
    """A split of the recipe's data; `root` replaces its `data.root`. Raises CommandError for a root of drawn scenes."""
    root = open_root(recipe, root)
    # No cache: each image is read only once, and a cache would read all images before the first is scored.
    options = recipe.data.model_dump() | {"cache": False}
    try:
        return build_dataset(recipe.data.dataset, split, root=root, options=options)
    except DataError as error:  # its fixes are keys, which these commands have an option for
        text = re.sub(r"data\.root(?!=)", "--root", str(error).replace("data.root=DIR", "--root DIR"))
        raise DataError(text) from None


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
