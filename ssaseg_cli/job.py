"""A training run's parts: built, checked and described before its first step."""

import contextlib
import copy
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from ssaseg.cli.averaging import Average
from ssaseg.cli.console import CommandError
from ssaseg.cli.distributed import Ranks, images_per_rank
from ssaseg.cli.freezing import freeze
from ssaseg.cli.guard import Guard
from ssaseg.cli.prefetch import Preparer
from ssaseg.cli.records import fingerprints, require_same_data
from ssaseg.cli.report import MetricsLog
from ssaseg.cli.schedule import param_groups
from ssaseg.cli.state import Progress
from ssaseg.cli.watch import StopSignal
from ssaseg.models import Segmenter
from ssaseg.models.checkpoint import load_strict
from ssaseg.recipes import Recipe

# What `train.compile` compiles with.
COMPILER = "inductor"


@dataclass
class Job:
    """Everything that a run is made of, built and on its device."""

    recipe: Recipe  # train.micro_batch: the number that was found, where the recipe said auto
    folder: Path
    ranks: Ranks
    model: Segmenter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_set: Any
    val_set: Any
    progress: Progress
    network: nn.Module  # the model, or what averages its gradients over ranks
    guard: Guard
    prepare: Preparer
    average: Average | None
    micro_batch: int  # images at once on one rank
    batches: Iterator[Any]  # micro-batches, from where the progress is
    fingerprints: dict[str, Any] = field(default_factory=dict)
    saved: int = 0  # the step of the newest state on the disk; 0: none
    log: MetricsLog | None = None  # on rank 0
    stop: StopSignal = field(default_factory=StopSignal)
    deadline: float | None = None  # of `time.monotonic()` [s], for --max-hours

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.ranks.device

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimiser step on one rank."""
        return self.recipe.train.batch // self.ranks.size // self.micro_batch

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has the weights that are scored and kept as best: their average, where there is one."""
        return self.average.in_place() if self.average else contextlib.nullcontext()


def build_job(
    recipe: Recipe, out: Path, ranks: Ranks, stored: dict[str, Any] | None = None, check: str = "sample"
) -> Job:
    """Data, model, optimiser and loader, with the stored state in them; labels are checked first: `check_labels`."""
    device, train = ranks.device, recipe.train
    train_set, val_set = load_data(recipe)
    prints = fingerprints(train_set, val_set)
    if stored is not None:
        require_same_data(stored.get("extra", {}).get("data"), prints, out)
    if recipe.model.pretrained and stored is None:
        require_start(Path(recipe.model.pretrained))
    if ranks.main:  # an error on it ends the others
        check_labels({"training": train_set, "validation": val_set}, check)
    ranks.barrier()
    torch.manual_seed(train.seed)
    model = build_network(recipe, train_set.classes)
    share = images_per_rank(train.batch, recipe.distill.group if model.classifier.adapts else 1, ranks.size)
    if recipe.model.pretrained and stored is None:
        load_start(model, recipe.model.pretrained, train_set.classes, ranks.main)
    freeze(model, recipe.optim.freeze)
    model.to(device)
    require_trainable(model, recipe, share, device)
    groups = param_groups(model, recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.rules)
    optimizer = torch.optim.AdamW(groups, betas=recipe.optim.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=train.amp == "fp16")
    progress = Progress()
    if stored is not None:
        load_strict(model, stored["model"], f"{out}: the state")
        optimizer.load_state_dict(stored["optimizer"])
        scaler.load_state_dict(stored["scaler"])
        progress = Progress(**stored["progress"])
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not train.deterministic
    prepare = Preparer(recipe.data.mean, recipe.data.std, device, train.prefetch)
    limit = 0 if train.nonfinite == "stop" else train.max_skipped
    guard = Guard(model, scaler, ranks, limit, progress.skipped)
    average = Average(model, recipe.optim.ema) if recipe.optim.ema else None
    if average is not None and stored is not None:
        average.load_state_dict(stored["extra"]["ema"])
    job = Job(
        recipe, out, ranks, model, optimizer, scaler, train_set, val_set, progress, model, guard, prepare, average,
        micro_batch=share, batches=iter(()), fingerprints=prints, saved=progress.step,
    )  # fmt: skip
    choose_micro_batch(job, share)
    assemble(job)
    job.batches = open_loader(job, progress.step, train.workers, ranks.rank)
    return job


def load_data(recipe: Recipe) -> tuple[Any, Any]:
    """The training and the validation split."""
    from ssaseg.datasets import build_dataset

    options, root = recipe.data.model_dump(), Path(recipe.data.root)
    train_set, val_set = (build_dataset(recipe.data.dataset, s, root=root, options=options) for s in ("train", "val"))
    require_same_classes(train_set.classes, val_set.classes)
    return train_set, val_set


def build_network(recipe: Recipe, classes: Sequence[str]) -> Segmenter:
    """The recipe's network for `classes`, with fresh weights. Raises CommandError for names that are not known."""
    from ssaseg.models import Distillation, LossOptions, build_model

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
        class_weights=tuple(weights.get(name, 1.0) for name in classes) if weights else None,
        label_smoothing=loss.label_smoothing,
    )
    if loss.ohem is not None:
        options = replace(options, ohem_threshold=loss.ohem.threshold, ohem_min_kept=loss.ohem.min_kept)
    try:
        return build_model(
            recipe.model.name,
            len(classes),
            recipe.model.classifier,
            drop_path=recipe.model.drop_path,
            dropout=recipe.model.dropout,
            distillation=Distillation(recipe.distill.group, recipe.distill.weights.model_dump()),
            loss=options,
        )
    except ValueError as error:
        raise CommandError(f"recipe {recipe.name}, model: {error}") from None


def choose_micro_batch(job: Job, share: int) -> None:
    """Sets `job.micro_batch`, of the rank's `share` of the batch; what `auto` finds goes into the run's recipe."""
    wished = job.recipe.train.micro_batch
    if wished == "auto":
        from ssaseg.cli.memory import fit_micro_batch

        wished = fit_micro_batch(job)
        train = job.recipe.train.model_copy(update={"micro_batch": wished})
        job.recipe = job.recipe.model_copy(update={"train": train})
    job.micro_batch = min(wished or share, share)
    if share % job.micro_batch:
        raise CommandError(
            f"train.micro_batch: {job.micro_batch} images at once do not add up to a rank's {share} of train.batch\n"
            f"expected a divisor of {share}; use train.micro_batch=auto, or null for all at once"
        )


def assemble(job: Job) -> None:
    """Sets `job.network`: the model compiled if the recipe wants it, and made one of several ranks."""
    if job.recipe.train.compile:
        # In place, so that names in checkpoints stay. The classifier's losses, loops over bands, stay as they are.
        for part in (job.model.backbone, job.model.decoder):
            part.compile(backend=COMPILER, dynamic=False)
    weights = job.recipe.distill.weights.model_dump().values()
    job.network = job.ranks.wrap(job.model, unused=job.model.classifier.adapts and not all(weights))


def open_loader(job: Job, step: int, workers: int, rank: int) -> Iterator[Any]:
    """A rank's micro-batches from the position in the data that `step` finished steps have reached."""
    from ssaseg.datasets.loader import train_loader
    from ssaseg.datasets.transforms import TrainTransform

    recipe = job.recipe
    return train_loader(
        job.train_set,
        TrainTransform(**recipe.augment.model_dump()),
        recipe.train.seed,
        job.micro_batch,
        workers,
        step * recipe.train.batch,
        pin_memory=job.device.type == "cuda",
        rank=rank,
        ranks=job.ranks.size,
        batch=recipe.train.batch,
    )


def require_start(path: Path) -> None:
    """Raises CommandError where `model.pretrained` is no file: before the labels are looked at, which may take long."""
    if not path.is_file():
        raise CommandError(
            f"model.pretrained={path}: no such checkpoint\n"
            "put it there (`ssaseg recipes show` says where it is from) or name it: model.pretrained=FILE\n"
            "model.pretrained=null starts from random weights instead, and ends with a lower mIoU"
        )


def load_start(model: Segmenter, path: str, classes: Sequence[str], tell: bool) -> None:
    """Loads `model.pretrained`, prints the matched share and holds it to at least 95 % of the backbone."""
    from ssaseg.cli.convert import load_pretrained

    matched = load_pretrained(model, Path(path), classes=classes)
    if tell:
        click.echo(str(matched), err=True)


def require_trainable(model: Segmenter, recipe: Recipe, share: int, device: torch.device) -> None:
    """Raises CommandError where a norm would have one value of each channel, which has no variance: an image alone,
    of which a feature map is a single pixel. Tried on a copy, as networks differ in how far they go down.
    """
    wished = recipe.train.micro_batch
    if (share if wished in (None, "auto") else int(wished)) > 1:
        return
    size = recipe.augment.crop
    trial = copy.deepcopy(model).train()
    try:
        with torch.no_grad():
            trial(torch.zeros(1, 3, *size, device=device), torch.zeros(1, *size, dtype=torch.uint8, device=device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        key = "train.batch" if wished in (None, "auto", recipe.train.batch) else "train.micro_batch"
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
    recipe, train, ranks = job.recipe, job.recipe.train, job.ranks.size
    size = sum(parameter.numel() for parameter in job.model.parameters()) / 1e6
    where = f"{ranks} ranks on {job.device.type}" if ranks > 1 else str(job.device)
    click.echo(
        f"{recipe.name}: {recipe.model.name} {recipe.model.classifier}, {size:.2f} M parameters, {where}, "
        f"amp {train.amp}; {len(job.train_set)} training and {len(job.val_set)} validation images; "
        f"step {job.progress.step} of {train.steps}, run folder {job.folder}",
        err=True,
    )
    if train.compile and ranks > 1 and job.device.type == "cuda":
        click.echo(
            "note: train.compile on several GPUs was never measured; SyncBatchNorm breaks the compiled graphs at each "
            "norm, which is likely slower than train.compile=false",
            err=True,
        )
    if recipe.optim.freeze:
        trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad) / 1e6
        click.echo(f"frozen: {', '.join(recipe.optim.freeze)}; {trained:.2f} M parameters are trained", err=True)
    if job.average is not None:
        click.echo(f"averaged weights (decay {job.average.decay:g}) are scored, and kept as best", err=True)
    if job.micro_batches > 1:
        click.echo(
            f"batch {train.batch} in {job.micro_batches} micro-batches"
            + (f" on each of {ranks} ranks" if ranks > 1 else "")
            + f": BatchNorm sees {job.micro_batch} images",
            err=True,
        )


@contextlib.contextmanager
def deterministic(wished: bool) -> Iterator[None]:
    """`train.deterministic`: inside, PyTorch refuses algorithms whose result depends on the order of threads."""
    if not wished:
        yield
        return
    # Read when cuBLAS first starts, so before anything is computed on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # PyTorch would also fill new memory with NaN: for finding bugs, and it costs time.
    filling: Any = torch.utils.deterministic
    before, filling.fill_uninitialized_memory = filling.fill_uninitialized_memory, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        filling.fill_uninitialized_memory = before
