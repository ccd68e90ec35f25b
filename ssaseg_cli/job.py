"""A training run's parts: built, checked and described before its first step."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from ssaseg.cli import report
from ssaseg.cli.console import CommandError
from ssaseg.cli.schedule import param_groups
from ssaseg.cli.state import Progress, load_state, refuse_changes
from ssaseg.cli.watch import StopSignal
from ssaseg.datasets.colour import prepare_batch
from ssaseg.models import Segmenter
from ssaseg.models.checkpoint import write_atomic
from ssaseg.recipes import Recipe, dump_recipe, parse_recipe


@dataclass
class Job:
    """Everything that a run is made of, built and on its device."""

    recipe: Recipe
    folder: Path
    device: torch.device
    model: Segmenter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_set: Any
    val_set: Any
    batches: Iterator[Any]
    progress: Progress
    log: report.MetricsLog | None = None
    stop: StopSignal = field(default_factory=StopSignal)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimiser step."""
        return self.recipe.train.batch // (self.recipe.train.micro_batch or self.recipe.train.batch)


def metadata(job: Job) -> dict[str, Any]:
    """The header of the run's checkpoints."""
    data = job.recipe.data
    evaluated = job.progress.evaluated == job.progress.step
    return {
        "classes": list(job.val_set.classes),
        "palette": [list(colour) for colour in job.val_set.palette],
        "mean": list(data.mean),
        "std": list(data.std),
        "protocol": job.recipe.test.model_dump(mode="json"),
        "recipe": job.recipe.model_dump(mode="json"),
        "step": job.progress.step,
        "scores": job.progress.scores if evaluated else {},  # never those of other weights
    }


def open_folder(out: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """The state to go on from, None for a run from the start. Raises CommandError where `out` does not fit the wish."""
    if not resume:
        if out.is_dir() and any(out.iterdir()):
            raise CommandError(
                f"{out}: the run folder is not empty\ngo on in it with --resume, or choose another --out"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / ".writable").touch()
            (out / ".writable").unlink()
        except OSError as error:
            reason = f"the run folder cannot be written ({error.strerror})"
            raise CommandError(f"{out}: {reason}\nchoose another with --out") from None
        return None
    if not (out / "config.yaml").exists():
        raise CommandError(f"{out}: no run to resume here (no config.yaml)\nstart one without --resume")
    stored = load_state(out)
    if stored is None and (out / "last.safetensors").exists():
        raise CommandError(
            f"{out}: state.pt is missing beside last.safetensors, so the run cannot go on\n"
            f"start a new one with --out and model.pretrained={out / 'last.safetensors'}"
        )
    if stored is not None:
        # Parsed, so that keys which came after the run was begun have the default that it went by.
        before = parse_recipe(stored["recipe"], str(out)).model_dump(mode="json")
        refuse_changes(before, recipe.model_dump(mode="json"), out)
    return stored


def build_job(
    recipe: Recipe, out: Path, device: torch.device, stored: dict[str, Any] | None, check: str = "sample"
) -> Job:
    """Data, model, optimiser and loader, with the stored state in them; labels are checked first: `check_labels`."""
    from ssaseg.datasets import build_dataset
    from ssaseg.models import Distillation, build_model

    options = recipe.data.model_dump()
    root = Path(recipe.data.root)
    train_set, val_set = (build_dataset(recipe.data.dataset, s, root=root, options=options) for s in ("train", "val"))
    require_same_classes(train_set.classes, val_set.classes)
    check_labels({"training": train_set, "validation": val_set}, check)
    torch.manual_seed(recipe.train.seed)
    weights = recipe.distill.weights.model_dump()
    try:
        model = build_model(
            recipe.model.name,
            len(train_set.classes),
            recipe.model.classifier,
            drop_path=recipe.model.drop_path,
            dropout=recipe.model.dropout,
            distillation=Distillation(recipe.distill.group, weights),
        )
    except ValueError as error:
        raise CommandError(f"recipe {recipe.name}, model: {error}") from None
    if recipe.model.pretrained and stored is None:
        load_start(model, recipe.model.pretrained)
    model.to(device)
    require_trainable(model, recipe, device)
    groups = param_groups(model, recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.rules)
    optimizer = torch.optim.AdamW(groups, betas=recipe.optim.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.train.amp == "fp16")
    progress = Progress()
    if stored is not None:
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        scaler.load_state_dict(stored["scaler"])
        progress = Progress(**stored["progress"])
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    batches = open_loader(recipe, train_set, progress.step, device, recipe.train.workers)
    return Job(recipe, out, device, model, optimizer, scaler, train_set, val_set, batches, progress)


def open_loader(recipe: Recipe, dataset: Any, step: int, device: torch.device, workers: int) -> Iterator[Any]:
    """Micro-batches from the position in the data that `step` finished steps have reached."""
    from ssaseg.datasets.loader import train_loader
    from ssaseg.datasets.transforms import TrainTransform

    transform = TrainTransform(**recipe.augment.model_dump())
    micro_batch = recipe.train.micro_batch or recipe.train.batch
    start = step * recipe.train.batch
    return train_loader(
        dataset,
        transform,
        recipe.train.seed,
        micro_batch,
        workers,
        start,
        pin_memory=device.type == "cuda",
    )


def load_start(model: Segmenter, path: str) -> None:
    """Loads `model.pretrained`, prints the matched share and holds it to at least 95 % of the backbone."""
    from ssaseg.cli.convert import load_pretrained

    try:
        click.echo(str(load_pretrained(model, Path(path))), err=True)
    except FileNotFoundError as error:
        raise CommandError(
            f"{error}\nput it there (`ssaseg recipes show` says where it is from) or name it: model.pretrained=FILE\n"
            "model.pretrained=null starts from random weights instead, and ends with a lower mIoU"
        ) from None


def require_trainable(model: Segmenter, recipe: Recipe, device: torch.device) -> None:
    """Raises CommandError where a norm would have one value of each channel, which has no variance: an image alone,
    of which a feature map is a single pixel. Tried on a copy, as networks differ in how far they go down.
    """
    if (recipe.train.micro_batch or recipe.train.batch) > 1:
        return
    size = recipe.augment.crop
    trial = copy.deepcopy(model).train()
    try:
        with torch.no_grad():
            trial(torch.zeros(1, 3, *size, device=device), torch.zeros(1, *size, dtype=torch.uint8, device=device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        key = "train.batch" if recipe.train.micro_batch in (None, recipe.train.batch) else "train.micro_batch"
        raise CommandError(
            f"{key}: 1 image at once, with augment.crop={list(size)}, leaves BatchNorm one value a channel\n"
            f"expected 2 images or more, or a larger crop\nuse {key}=2, or larger sides in augment.crop"
        ) from None


def require_same_classes(train: Sequence[str], val: Sequence[str]) -> None:
    """Raises CommandError where the splits' classes differ: annotation files each bring their own."""
    if tuple(train) != tuple(val):
        differ = [name for name in (*train, *val) if (name in train) != (name in val)]
        found = f"only one of them has {', '.join(differ[:3])}" if differ else "their order differs"
        raise CommandError(
            f"training and validation split have other classes: {len(train)} and {len(val)}; {found}\n"
            "state data.classes: the names that count, in the order of the train ids"
        )


def check_labels(splits: dict[str, Any], check: str = "sample") -> None:
    """Looks through each split before the first step: at up to 512 pairs of it ("sample"; the loader checks the others
    as it reads them), or at every pixel of all ("all").

    Raises CommandError for the first error; prints warnings where there is none.
    """
    from ssaseg.cli.starting import watch
    from ssaseg.datasets.check import Problem, check_dataset

    problems: list[tuple[str, Problem]] = []
    for name, split in splits.items():
        found = check_dataset(split, 512) if check == "sample" else watch(split, f"checked {name}").problems
        problems += [(name, problem) for problem in found]
    errors = [problem.text for _, problem in problems if problem.severity == "error"]
    if errors:
        several = " (the first of several problems: `ssaseg data check` tells all)" if len(errors) > 1 else ""
        raise CommandError(errors[0] + several)
    for name, problem in problems:
        click.echo(f"warning, {name} split: {problem.text}", err=True)


def describe(job: Job) -> None:
    """Says what is about to be trained."""
    recipe, train = job.recipe, job.recipe.train
    size = sum(parameter.numel() for parameter in job.model.parameters()) / 1e6
    click.echo(
        f"{recipe.name}: {recipe.model.name} {recipe.model.classifier}, {size:.2f} M parameters, {job.device}, "
        f"amp {train.amp}; {len(job.train_set)} training and {len(job.val_set)} validation images; "
        f"step {job.progress.step} of {train.steps}, run folder {job.folder}",
        err=True,
    )
    if job.micro_batches > 1:
        click.echo(
            f"batch {train.batch} in {job.micro_batches} micro-batches: BatchNorm sees {train.micro_batch} images",
            err=True,
        )


def write_start(job: Job) -> None:
    """The run folder's first files: recipe, environment, log, and a picture of the first batch with its labels."""
    folder = job.folder
    write_atomic(folder / "config.yaml", dump_recipe(job.recipe).encode())
    images = {"training_images": len(job.train_set), "validation_images": len(job.val_set)}
    extra = {"seed": job.recipe.train.seed, **images}
    report.write_environment(folder / "env.json", str(job.device), report.command_line(), extra)
    job.log = report.MetricsLog(folder / "metrics.jsonl", job.progress.step, job.progress.evaluated)
    if not (folder / "batch.png").exists():
        write_batch(job)


def write_batch(job: Job, images: int = 8) -> None:
    """`batch.png`: augmented training images, colours as the network gets them, beside their labels."""
    batch = next(open_loader(job.recipe, job.train_set, 0, job.device, workers=0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (job.recipe.data.mean, job.recipe.data.std))
    rows = []
    prepared, _ = prepare_batch(batch, job.recipe.data.mean, job.recipe.data.std, job.device)
    for image, labels in zip(prepared[:images].cpu(), batch.labels, strict=False):
        pixels = (image * std + mean).round().clamp(0, 255).byte().flip(0).permute(1, 2, 0).numpy()
        rows.append([pixels, report.overlay(pixels, labels.numpy(), job.train_set.palette)])
    report.write_grid(job.folder / "batch.png", rows)
