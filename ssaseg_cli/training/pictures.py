"""The pictures of a run: an augmented batch, predictions of the same images, curves, bars per class; and its card."""

import contextlib
import json
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ssaseg.cli.drawing import bars, panels
from ssaseg.cli.drawing.curves import draw_curves
from ssaseg.cli.drawing.panels import Panel
from ssaseg.cli.evaluation import confused
from ssaseg.cli.model_card import Card, card_text
from ssaseg.cli.printing import echo
from ssaseg.cli.training.environment import environment, resumptions
from ssaseg.cli.training.log import hours_of, read_metrics
from ssaseg.datasets import IGNORED
from ssaseg.files.writing import write_atomic

if TYPE_CHECKING:
    from ssaseg.cli.scoring.metrics import Confusion
    from ssaseg.cli.training.job import Job


IMAGES = 4  # validation images, the same each time


def write_batch(job: "Job", images: int = 8) -> None:
    """`batch.png`: the first augmented training images, in the colours that the network gets, next to their labels."""
    from ssaseg.datasets.bands.reading import shown
    from ssaseg.datasets.colour import from_planes, prepare_batch
    from ssaseg.datasets.loader import train_loader
    from ssaseg.datasets.transforms import TrainTransform

    recipe = job.recipe
    transform = TrainTransform(**recipe.augment.model_dump(), channels=recipe.data.channels, distort_here=True)
    batch = next(train_loader(job.train_set, transform, recipe.train.seed, min(images, recipe.train.batch), 0))
    prepared, _ = prepare_batch(batch, recipe.data.mean, recipe.data.std, torch.device("cpu"))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    row: list[Panel] = []
    for image, labels, name in zip(prepared, batch.labels.numpy(), batch.names, strict=True):
        pixels = shown(from_planes((image * std + mean).round().clamp(0, 255).byte()))
        row += [Panel(name, pixels), Panel("label", panels.coloured(pixels, labels, job.train_set.palette))]
    legend = panels.legend_of(batch.labels.numpy(), job.train_set.classes, job.train_set.palette)
    rows = [row[start : start + 4] for start in range(0, len(row), 4)]
    with drawing("batch.png"):
        write_atomic(
            job.folder / "batch.png", panels.encode(panels.grid(rows, legend), ".png"), sync=False, root=job.folder
        )
        if job.log is not None:
            job.log.picture("batch", job.folder / "batch.png", job.progress.step)


def after_evaluation(job: "Job", confusion: "Confusion") -> None:
    """Draws all pictures again: curves.png, iou.png, confused.png (with .json), predictions. Prints the most confused
    pairs of classes.

    Called after the evaluation is logged, while `job.model` has the weights that were evaluated. For a picture that
    cannot be drawn a warning is printed; training continues.
    """
    folder, step, classes = job.folder, job.progress.step, job.val_set.classes
    matrix, scores = confusion.matrix, confusion.scores()
    pairs = confused.confused_pairs(matrix, classes)
    echo(confused.most_confused(pairs), err=True)
    title = f"{job.recipe.name}, step {step}: mIoU {scores['mIoU']:.2f} %"
    # Each one separately: if one fails, the others are still written.
    with drawing("confused.json"):
        content = json.dumps({"step": step, "pairs": pairs}, indent=1).encode()
        write_atomic(folder / "confused.json", content, sync=False, root=folder)
    with drawing("curves.png"):
        draw_log(folder, job.recipe.name)
    with drawing("iou.png"):
        palette = job.val_set.palette
        bars.draw_ious(scores["IoU"], matrix.sum(axis=1), classes, palette, title, folder / "iou.png")
    with drawing("confused.png"):
        bars.draw_pairs(pairs, title, folder / "confused.png")
    with drawing("predictions"):
        write_predictions(job)
    if job.log is not None:
        drawn = {
            "iou": folder / "iou.png",
            "confused": folder / "confused.png",
            "predictions": folder / "predictions" / f"step-{step:06d}.jpg",
        }
        for name, path in drawn.items():
            if path.exists():
                job.log.picture(name, path, step)


def draw_log(folder: Path, title: str = "") -> None:
    """RUN/curves.png, from the run's log."""
    draw_curves(read_metrics(folder / "metrics.jsonl"), resumptions(folder), title, folder / "curves.png")


def write_card(job: "Job", confusion: "Confusion") -> None:
    """`best.md`, the card of the weights that were just kept. If it cannot be written, a warning is printed."""
    with drawing("best.md"):
        scores = confusion.scores()
        card = Card(
            step=job.progress.step,
            classes=job.val_set.classes,
            ious=scores["IoU"].tolist(),
            pixels=confusion.matrix.sum(axis=1).tolist(),
            means={"mIoU": scores["mIoU"], "aAcc": scores["aAcc"], "mAcc": scores["mAcc"]},
            interval=confusion.interval(),
            statement=job.progress.scores["statement"],
            data=job.fingerprints,
            environment=environment(job),
            time=datetime.now(timezone.utc).date().isoformat(),
            hours=hours_of(read_metrics(job.folder / "metrics.jsonl"), job.recipe.train.batch),
        )
        text = card_text(job.recipe, card).encode(errors="replace")
        write_atomic(job.folder / "best.md", text, sync=False, root=job.folder)


@contextlib.contextmanager
def drawing(what: str) -> Iterator[None]:
    """Turns any error inside this context into a warning on stderr: what is made for people does not end a training."""
    try:
        yield
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        echo(f"warning: {what} could not be written ({text})", err=True)


def write_predictions(job: "Job", images: int = IMAGES) -> None:
    """predictions/step-000500.jpg, and the same picture as `predictions.png`. For each image: the image, its label, the
    coarse labels, the adapted labels, and what adaptation has changed. The validation images are the same each time. A
    plain classifier has only one prediction.
    """
    from ssaseg.cli.scoring.inference import predict_labels
    from ssaseg.datasets.bands.reading import shown

    recipe, data, palette = job.recipe, job.val_set, job.val_set.palette
    training = job.model.training
    job.model.eval()
    rows, maps = [], []
    try:
        # Spread over the split: images next to each other are often frames of one video.
        for index in np.unique(np.linspace(0, len(data) - 1, images).round().astype(int)).tolist():
            image, labels = data.load(index)
            protocol, mean, std = recipe.test.model_dump(), recipe.data.mean, recipe.data.std
            final, coarse = predict_labels(job.model, image, protocol, mean, std, job.device)[:2]
            image = shown(image)
            row = [Panel(data.name(index), image), Panel("label", panels.coloured(image, labels, palette))]
            maps += [labels, final]
            if coarse is not None:
                maps.append(coarse)
                row.append(Panel(f"coarse: {right(coarse, labels)}", panels.coloured(image, coarse, palette)))
            title = "predicted" if coarse is None else "adapted"
            row.append(Panel(f"{title}: {right(final, labels)}", panels.coloured(image, final, palette)))
            if coarse is not None:
                row.append(panels.changes(image, labels, coarse, final))
            rows.append(row)
    finally:
        job.model.train(training)
    legend = panels.legend_of(maps, data.classes, palette)
    picture = panels.grid(rows, legend, panels.CHANGES if len(rows[0]) == 5 else ())
    kept = job.folder / "predictions" / f"step-{job.progress.step:06d}.jpg"
    write_atomic(kept, panels.encode(picture, ".jpg"), sync=False, root=job.folder)
    write_atomic(job.folder / "predictions.png", panels.encode(picture, ".png"), sync=False, root=job.folder)


def right(prediction: np.ndarray, labels: np.ndarray) -> str:
    """The share of the labelled pixels that are predicted correctly, as text."""
    known = labels != IGNORED
    return f"{(prediction == labels)[known].mean() * 100:.1f} % correct" if known.any() else "nothing labelled"
