"""Scoring a model on labelled images, and the way from an image to its labels that `eval`, `predict` and `train` share.

Protocol: mmsegmentation's test pipeline with whole-image inference at one scale. Its two bilinear steps matter: logits
go to the network input's size first and to the image's own size second; a single step gives other labels.

Axes: K classes, H×W pixels of the image as it was read, h×w of the network's input.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssaseg.cli.console import CommandError, json_target, print_table, select_device, write_json
from ssaseg.cli.metrics import Confusion
from ssaseg.cli.watch import StopSignal
from ssaseg.datasets import Dataset, build_dataset
from ssaseg.datasets.colour import normalize
from ssaseg.datasets.loader import eval_loader
from ssaseg.datasets.transforms import test_image
from ssaseg.models import Segmenter, load_model
from ssaseg.models.labelling import label_map, resize_twice
from ssaseg.recipes import Recipe, load_recipe, parse_recipe

WORKERS = 2  # processes that decode ahead


# ---- one image ---------------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What a model says about one image, at the image's own size, on the CPU."""

    labels: np.ndarray  # uint8 (H,W), 0..K-1
    coarse: np.ndarray | None  # the labels before the classifier adapts them; None unless asked for and adapted
    probabilities: np.ndarray | None  # float16 (K,H,W); None unless asked for


class Logits(NamedTuple):
    """One image's logits (1,K,·,·) float32 on the device, and coarse ones where the classifier makes them."""

    final: Tensor
    coarse: Tensor | None


def predict_labels(
    model: Segmenter,
    image: np.ndarray,
    protocol: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    coarse: bool = True,
    probabilities: bool = False,
) -> Prediction:
    """Labels of one image, BGR uint8 (H,W,3). The model is in evaluation mode on `device`.

    `protocol`: `scale` [width, height] or None, `multiple` or None. mean and std are RGB on the scale 0..255. With
    `probabilities` K·H·W float32 numbers are held; without, one class's H·W at a time.
    """
    resized = test_image(image, protocol["scale"], protocol["multiple"])
    logits = infer(model, torch.tensor(resized), mean, std, device)  # copied: a cached image is read-only
    return at_full_size(logits, resized.shape[:2], image.shape[:2], coarse, probabilities)


@torch.inference_mode()
def infer(
    model: Segmenter, resized: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Logits:
    """Logits of a network input, BGR uint8 (h,w,3)."""
    pixels = normalize(resized.unsqueeze(0).to(device, non_blocking=True), mean, std)
    final, coarse = model.classifier.stages(model.feature(pixels))
    return Logits(final.float(), None if coarse is None else coarse.float())


@torch.inference_mode()
def at_full_size(
    logits: Logits, middle: tuple[int, ...], size: tuple[int, ...], coarse: bool = True, probabilities: bool = False
) -> Prediction:
    """Both bilinear steps and the arg-max. `middle`: size of the network's input, `size`: of the image (height, width).

    mmsegmentation takes the arg-max of the softmax; here it is the logits', which rounding cannot tie.
    """
    labels = label_map(logits.final, middle, size).cpu().numpy()
    before, shares = None, None
    if coarse and logits.coarse is not None:
        before = label_map(logits.coarse, middle, size).cpu().numpy()
    if probabilities:
        shares = resize_twice(logits.final, middle, size)[0].softmax(dim=0).half().cpu().numpy()
    return Prediction(labels, before, shares)


# ---- many images -------------------------------------------------------------------------------------------------


def evaluate_model(
    model: Segmenter,
    dataset: Dataset,
    protocol: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    workers: int = 0,
    limit: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Confusion:
    """Counts of `model` on the first `limit` images (None: all) of `dataset`; the model's mode is as before afterwards.

    `workers` processes decode and resize ahead; 0: none. `progress` is called with 1 after each
    image. Memory depends on the largest image, not on their number. Raises what the data set raises.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    confusion = Confusion(model.num_classes, device)

    was_training = model.training
    model.eval()
    loader: Any = eval_loader(dataset, protocol["scale"], protocol["multiple"], workers)
    try:
        with closing(loader):  # ends the processes also where `limit` or an error stops early
            for resized, label, _ in islice(loader, count):
                logits = infer(model, resized, mean, std, device)
                confusion.update(label_map(logits.final, resized.shape[:2], label.shape), label)
                if progress is not None:
                    progress(1)
    finally:
        model.train(was_training)
    return confusion


@contextmanager
def progress_bar(total: int, verb: str) -> Iterator[Callable[[int], object]]:
    """Yields a function that takes the number of images just done: a bar on a terminal, else a line in ten seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=verb, unit="img", file=sys.stderr) as bar:
            yield bar.update
        return
    finished, told = 0, time.perf_counter()

    def advance(done: int) -> None:
        nonlocal finished, told
        finished += done
        if time.perf_counter() - told >= 10:
            told = time.perf_counter()
            print(f"{verb} {finished}/{total} images", file=sys.stderr, flush=True)

    yield advance


# ---- the command -------------------------------------------------------------------------------------------------


def run_eval(
    checkpoint: Path,
    data: str | None,
    root: Path | None,
    split: str,
    json_out: str | None,
    device: str,
    limit: int | None = None,
) -> int:
    """Scores `checkpoint` on a split, prints a table, and returns exit code 0.

    data: a recipe's name or file instead of the recipe inside the checkpoint; its `test` section then decides resizing.
    root: instead of the recipe's `data.root`. json_out: a file for the figures, "-" for stdout without the table.
    Raises CommandError where data and checkpoint do not fit or no pixel is labelled, and what loading either raises;
    SystemExit after Ctrl-C (130) and SIGTERM (143).
    """
    chosen = select_device(device)
    json_out = json_target(json_out)
    model, metadata = load_model(checkpoint)
    recipe = _recipe(checkpoint, metadata, data)
    protocol = recipe.test.model_dump() if data else metadata["protocol"]
    dataset = _dataset(recipe, split, root)
    _require_same_classes(checkpoint, metadata["classes"], recipe.name, dataset.classes)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    started = time.perf_counter()
    confusion = _count(model.to(chosen), dataset, protocol, metadata, chosen, count)
    _require_labels(confusion, f"{split} split of recipe {recipe.name} ({count} images)")  # waits for the device
    report = {
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
        "protocol": dict(protocol),
        "statement": state_protocol(protocol, split, count, len(dataset)),
        **_figures(confusion, dataset.classes),
        "confusion": confusion.matrix.tolist(),
    }
    if json_out != "-":
        print_report(report)
    write_json(json_out, report)
    return 0


def _count(
    model: Segmenter,
    dataset: Dataset,
    protocol: Mapping[str, Any],
    metadata: Mapping[str, Any],
    device: torch.device,
    count: int,
) -> Confusion:
    """`evaluate_model` on `count` images, with progress on stderr.

    Ctrl-C and SIGTERM take effect between two images: in the middle of taking one over, the worker that hands it over
    would tell of a broken connection.
    """
    done = 0
    with StopSignal() as stop:
        try:
            with progress_bar(count, "evaluated") as advance:

                def progress(images: int) -> None:
                    nonlocal done
                    done += images
                    advance(images)
                    if stop.requested:
                        raise KeyboardInterrupt

                mean, std = metadata["mean"], metadata["std"]
                return evaluate_model(model, dataset, protocol, mean, std, device, WORKERS, count, progress)
        except (KeyboardInterrupt, RuntimeError):  # RuntimeError: the signal met a worker that was only starting
            if not stop.requested:
                raise
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


def state_protocol(protocol: Mapping[str, Any], split: str, count: int, total: int) -> str:
    """One line that says what a score was measured with, so that another can be compared to it."""
    scale, multiple = protocol["scale"], protocol["multiple"]
    resize = "not resized" if scale is None else f"resized to fit {scale[0]}x{scale[1]}, aspect kept"
    rounding = f", then to multiples of {multiple}" if multiple else ""
    part = f"{count} images" if count == total else f"the first {count} of {total} images"
    return (
        f"{split} split, {part}, {resize}{rounding}; whole image, single scale, no flip; two bilinear steps: logits to "
        "the network's input, then to the image; mIoU: mean over classes of total intersection / total union, 255 "
        "ignored, classes neither labelled nor predicted left out"
    )


def _figures(confusion: Confusion, classes: Sequence[str]) -> dict[str, Any]:
    """The scores [%] of a report, NaN as None."""
    scores = confusion.scores()
    labelled = confusion.matrix.sum(axis=1)
    shares = labelled / max(labelled.sum(), 1) * 100
    per_class = ("IoU", "Acc", "Dice", "Precision", "Recall")
    rows = [
        {
            "name": name,
            **{key: _number(scores[key][index]) for key in per_class},  # type: ignore[literal-required]
            "pixels": int(labelled[index]),
            "pixel_share": float(shares[index]),
            "remark": _remark(int(labelled[index]), float(scores["IoU"][index])),
        }
        for index, name in enumerate(classes)
    ]
    means = {key: _number(value) for key, value in scores.items() if key not in per_class}
    return {**means, "majority_miou": _number(confusion.majority_miou()), "classes": rows}


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _remark(labelled: int, iou: float) -> str:
    """What a class without labelled pixels does to the mean."""
    if labelled:
        return ""
    return "no ground truth" if np.isnan(iou) else "predicted but absent"


def print_report(report: Mapping[str, Any]) -> None:
    """The table per class, the means, the speed and the protocol, on stdout."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    rows = [
        (row["name"], *(cell(row[key]) for key in ("IoU", "Acc", "Dice", "pixel_share")), row["remark"])
        for row in report["classes"]
    ]
    step = "" if report["step"] is None else f", step {report['step']}"
    title = f"{report['checkpoint']}: {report['model']} {report['classifier']}{step}"
    print_table(("class", "IoU [%]", "Acc [%]", "Dice [%]", "pixels [%]", ""), rows, title)
    means = "   ".join(f"{key} {cell(report[key])} %" for key in ("mIoU", "aAcc", "mAcc"))
    print(f"{means}   (always the commonest class: mIoU {cell(report['majority_miou'])} %)")
    print(f"{report['images_per_s']:.1f} images/s, reading and scoring included")
    print(f"protocol: {report['statement']}")
