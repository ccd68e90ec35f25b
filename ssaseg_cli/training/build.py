"""Builds and checks everything that a training run needs, before its first step."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.ranks.ranks import Ranks, images_per_rank
from ssaseg.cli.training.average import Average
from ssaseg.cli.training.environment import fingerprints, require_same_data
from ssaseg.cli.training.guard import Guard
from ssaseg.cli.training.job import Job, Progress
from ssaseg.cli.training.optimiser import freeze, make_optimiser
from ssaseg.cli.training.preflight import check_labels, find_start, require_memory, require_trainable
from ssaseg.cli.training.stored import require_fit
from ssaseg.datasets.check import require_same_classes
from ssaseg.datasets.prefetch import Preparer
from ssaseg.models import Segmenter
from ssaseg.models.checkpoint import load_strict
from ssaseg.recipes import Recipe

# What `train.compile` compiles with.
COMPILER = "inductor"


def build_job(
    recipe: Recipe,
    out: Path,
    ranks: Ranks,
    stored: dict[str, Any] | None = None,
    check: str = "sample",
    dry_run: bool = False,
) -> Job:
    """Data, model, optimiser and loader, with the stored state loaded. Checks labels first, see `check_labels`.

    dry_run: nothing is downloaded.
    """
    device = ranks.device
    train_set, val_set = load_data(recipe)
    recipe = count_steps(recipe, len(train_set), ranks)
    train = recipe.train
    prints = fingerprints(train_set, val_set)
    if stored is not None:
        require_same_data(stored.get("extra", {}).get("data"), prints, out)
    start = None
    if recipe.model.pretrained and stored is None:
        start = find_start(recipe.model.pretrained, recipe.model.name, dry_run, ranks.main)
    if ranks.main:  # an error on this rank ends the others
        check_labels({"training": train_set, "validation": val_set}, check, recipe)
    ranks.barrier()
    require_memory(recipe, len(train_set.classes), device)
    torch.manual_seed(train.seed)
    model = build_network(recipe, train_set.classes)
    rank_batch = images_per_rank(train.batch, model.classifier.group, ranks.size)
    if start:
        load_start(model, start, train_set.classes, ranks.main)
    freeze(model, recipe.optim.freeze)
    model.to(device)
    require_trainable(model, recipe, rank_batch, device)
    optimizer = make_optimiser(model, recipe.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=train.amp == "fp16")
    average = Average(model, recipe.optim.ema) if recipe.optim.ema else None
    progress = Progress()
    if stored is not None:
        progress = load_stored(stored, out, model, optimizer, scaler, average)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not train.deterministic
    prepare = Preparer(recipe.data.mean, recipe.data.std, device, train.prefetch)
    limit = 0 if train.nonfinite == "stop" else train.max_skipped
    guard = Guard(model, scaler, ranks, limit, progress.skipped)
    job = Job(
        recipe, out, ranks, model, optimizer, scaler, train_set, val_set, progress, model, guard, prepare, average,
        micro_batch=rank_batch, batches=iter(()), fingerprints=prints, saved=progress.step,
    )  # fmt: skip
    choose_micro_batch(job, rank_batch)
    assemble(job)
    job.batches = open_loader(job, progress.step, train.workers, ranks.rank)
    return job


def count_steps(recipe: Recipe, images: int, ranks: Ranks) -> Recipe:
    """The recipe with train.steps in the place of train.epochs, which is printed."""
    counted = recipe.with_steps(images)
    if counted is not recipe and ranks.main:
        length = f"{counted.train.steps} steps of {recipe.train.batch} images"
        echo(f"train.epochs={recipe.train.epochs:g}: {length}, with {images} training images", err=True)
    return counted


def load_stored(
    stored: dict[str, Any],
    out: Path,
    model: Segmenter,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: Average | None,
) -> Progress:
    """Loads the state `stored`, from the run folder `out`, into a new run. Returns the progress in it.

    Raises CommandError or CheckpointError, before anything is loaded, if it does not belong to this run's network.
    """
    try:
        require_fit(stored, model, optimizer, average.names if average is not None else ())
    except ValueError as error:
        last = out / "last.safetensors"
        raise CommandError(
            f"{out}: the state does not belong to this network: {error}\n"
            f"start a new run from the last weights: model.pretrained={last}"
        ) from None
    load_strict(model, stored["model"], f"{out}: the state")
    optimizer.load_state_dict(stored["optimizer"])
    scaler.load_state_dict(stored["scaler"])
    if average is not None:
        average.load_state_dict(stored["extra"]["ema"])
    return Progress(**stored["progress"])


def load_data(recipe: Recipe) -> tuple[Any, Any]:
    """The training and the validation split."""
    from ssaseg.datasets import build_dataset

    options, root = recipe.data.model_dump(), Path(recipe.data.root)
    train_set, val_set = (build_dataset(recipe.data.dataset, s, root=root, options=options) for s in ("train", "val"))
    require_same_classes(train_set.classes, val_set.classes)
    return train_set, val_set


def build_network(recipe: Recipe, classes: Sequence[str]) -> Segmenter:
    """The recipe's network for `classes`, with new weights. Raises CommandError for names that are not known."""
    from ssaseg.models import LossOptions, build_model

    loss, weights = recipe.loss, recipe.loss.class_weights
    for name in weights:
        if name not in classes:
            near = difflib.get_close_matches(name.casefold(), [each.casefold() for each in classes], n=1)
            nearest = next((each for each in classes if near and each.casefold() == near[0]), None)
            raise CommandError(
                f"loss.class_weights.{name}: no such class\nexpected names of {', '.join(classes)[:1000]}\n"
                + (f"did you mean {nearest}?" if nearest else "correct the name, or remove the key")
            )
    options = LossOptions(
        weights=loss.weights,
        class_weights=tuple(weights.get(name, 1.0) for name in classes) if weights else None,
        label_smoothing=loss.label_smoothing,
    )
    if loss.ohem is not None:
        options = replace(options, ohem_threshold=loss.ohem.threshold, ohem_min_kept=loss.ohem.min_kept)
    try:
        model = build_model(
            recipe.model.name,
            len(classes),
            recipe.model.classifier,
            drop_path=recipe.model.drop_path,
            dropout=recipe.model.dropout,
            group=recipe.distill.group,
            loss=options,
            options=recipe.model.options,
            compat=recipe.model.compat,
            channels=recipe.data.channels,
        )
    except ValueError as error:
        raise CommandError(f"recipe {recipe.name}, model: {error}") from None
    if recipe.train.checkpointing:
        turn_on_checkpointing(model)
    return model


def turn_on_checkpointing(model: Segmenter) -> None:
    """Lets the blocks of the network compute activations again. Raises CommandError if it has no such blocks."""
    from ssaseg.models.layers import Checkpointed

    modules = [module for module in model.modules() if isinstance(module, Checkpointed)]
    if not modules:
        raise CommandError(
            f"train.checkpointing: true: not possible with {model.name}\n"
            "expected a SegFormer, a UPerNet with Swin or with ViT-Adapter: their blocks have no BatchNorm\n"
            "use train.checkpointing=false; train.micro_batch and train.amp also save memory"
        )
    for module in modules:
        module.checkpointing = True


def choose_micro_batch(job: Job, rank_batch: int) -> None:
    """Sets `job.micro_batch`; `rank_batch`: images per step on this rank. What `auto` finds goes into the run's recipe.

    Raises CommandError if it does not divide `rank_batch`.
    """
    requested = job.recipe.train.micro_batch
    if requested == "auto":
        from ssaseg.cli.training.memory import fit_micro_batch

        requested = fit_micro_batch(job)
        train = job.recipe.train.model_copy(update={"micro_batch": requested})
        job.recipe = job.recipe.model_copy(update={"train": train})
    job.micro_batch = min(requested or rank_batch, rank_batch)
    if rank_batch % job.micro_batch:
        raise CommandError(
            f"train.micro_batch: {job.micro_batch} does not divide {rank_batch}, each rank's images of train.batch\n"
            f"expected a divisor of {rank_batch}\nuse train.micro_batch=auto, or null for all {rank_batch} in one pass"
        )


def assemble(job: Job) -> None:
    """Sets `job.network`: the model, compiled if the recipe requests it, and connected to the other ranks."""
    if job.recipe.train.compile:
        # In place, so that names in checkpoints stay. The classifier's losses, loops over bands, are not compiled.
        for module in (job.model.backbone, job.model.decoder):
            module.compile(backend=COMPILER, dynamic=False)
    job.network = job.ranks.wrap(job.model)


def open_loader(job: Job, step: int, workers: int, rank: int) -> Iterator[Any]:
    """The micro-batches of a rank, from the position in the data after `step` finished steps."""
    from ssaseg.datasets.loader import train_loader
    from ssaseg.datasets.transforms import TrainTransform

    recipe, on_cpu = job.recipe, job.device.type == "cpu"  # a GPU distorts the colours of whole batches itself
    return train_loader(
        job.train_set,
        TrainTransform(**recipe.augment.model_dump(), channels=recipe.data.channels, distort_here=on_cpu),
        recipe.train.seed,
        job.micro_batch,
        workers,
        step * recipe.train.batch,
        pin_memory=job.device.type == "cuda",
        rank=rank,
        ranks=job.ranks.size,
        batch=recipe.train.batch,
    )


def load_start(model: Segmenter, path: Path, classes: Sequence[str], print_match: bool) -> None:
    """Loads `model.pretrained`; prints what matched if `print_match`. At least 95 % of the backbone must match."""
    from ssaseg.cli.weights.pretrained import load_pretrained

    matched = load_pretrained(model, path, classes=classes)
    if print_match:
        echo(str(matched), err=True)
