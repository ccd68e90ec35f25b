"""What is checked and printed before the first step."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ssaseg.cli.errors import CommandError
from ssaseg.cli.options import note_checkpoint, run_checkpoint
from ssaseg.cli.printing import echo
from ssaseg.cli.training.job import Job
from ssaseg.cli.training.optimiser import learning_rate
from ssaseg.cli.weights import fetching
from ssaseg.cli.weights.known import KNOWN, starts_of
from ssaseg.models import CLASSIFIERS, Segmenter
from ssaseg.models.build import build_outline
from ssaseg.recipes import Recipe

FEW = 2  # classes: with so few, SSA's authors see little gain
ADAPTIVE = ("ssa", "cac")


def find_start(value: str, network: str, dry_run: bool = False, say: bool = True) -> Path | None:
    """The file or folder of `model.pretrained`. Called before the slower check of the labels.

    A name of `ssaseg weights list` is fetched if it is not here; every rank calls this, and waits for the one that
    downloads. None: a dry run, for which nothing is downloaded. say: whether to print what is done. Raises CommandError
    if there is no such file, it cannot be fetched, or the weights of this name cannot start `network`.
    """
    path = run_checkpoint(Path(value))
    if path.is_file() or path.is_dir():
        if say:
            note_checkpoint(path, value)
        if value in KNOWN and say:
            echo(f"note: model.pretrained={value}: the file with this name is used, no download", err=True)
        return path
    names = starts_of(network)
    if value not in KNOWN:
        raise CommandError(
            f"model.pretrained={path}: no such checkpoint\n"
            "download it to this path (`ssaseg recipes show` prints the source), or use a name of `ssaseg weights list`"
            f"{f', such as {names[0]}' if names else ''}\n"
            "model.pretrained=null starts from random weights instead; the final mIoU is then lower"
        )
    if network not in KNOWN[value].networks:
        raise CommandError(
            f"model.pretrained={value}: starts {' or '.join(KNOWN[value].networks)}, model.name is {network}\n"
            f"expected one of: {', '.join(names) or f'none starts {network}'}"
        )
    if dry_run and fetching.here(value) is None:
        if say:
            echo(f"note: model.pretrained={value} is not here, so this dry run starts from random weights", err=True)
        return None
    return fetching.fetch(value, say)


def require_memory(recipe: Recipe, classes: int, device: torch.device) -> None:
    """Raises CommandError if the classifier's memory of pixels is larger than what the host or the GPU has free."""
    from ssaseg.cli.scoring.limit import free_memory

    name, kind, options = recipe.model.name, recipe.model.classifier, recipe.model.options
    if kind not in CLASSIFIERS or not CLASSIFIERS[kind].MEMORY:
        return
    try:
        head = build_outline(name, classes, kind, options=options, memory=False).classifier
    except ValueError:
        return  # `build_network` prints it
    needed = head.bank_bytes(head.channels, classes, **options)
    found = {"this machine": free_memory()}
    if device.type == "cuda":
        found["the GPU"] = torch.cuda.mem_get_info(device)[0]
    for place, free in found.items():
        if free is not None and needed > free:
            raise CommandError(
                f"model.options.memory: the pixels that {kind} keeps need {needed / 1e9:.1f} GB\n"
                f"{place} has {free / 1e9:.1f} GB free\nchoose a smaller number"
            )


def require_trainable(model: Segmenter, recipe: Recipe, rank_batch: int, device: torch.device) -> None:
    """Raises CommandError if a norm would get only one value per channel, which has no variance. This happens for a
    single image if a feature map is one pixel. Tried on a copy of the network, because networks have different strides.

    `rank_batch`: images of a step that one rank computes.
    """
    requested = recipe.train.micro_batch
    if (rank_batch if requested in (None, "auto") else int(requested)) > 1:
        return
    size = recipe.augment.crop
    trial = model.copied().train()
    try:
        with torch.no_grad():
            image = torch.zeros(1, model.channels, *size, device=device)
            trial(image, torch.zeros(1, *size, dtype=torch.uint8, device=device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        key = "train.batch" if requested in (None, "auto", recipe.train.batch) else "train.micro_batch"
        raise CommandError(
            f"{key}: 1 image in one pass, with augment.crop={list(size)}, gives BatchNorm only one value per channel\n"
            f"expected 2 images or more, or a larger crop\nuse {key}=2, or larger sides in augment.crop"
        ) from None


def check_labels(splits: dict[str, Any], check: str = "sample", recipe: Recipe | None = None) -> None:
    """Checks each split before the first step: up to 512 pairs ("sample"; the loader checks the others when it reads
    them), or every pixel of all pairs ("all"). Then, of both splits together, whether masks mean the same, whether
    images are in both, and whether validation images are large enough for the test section of `recipe`.

    Raises CommandError for the first error. If there is no error, prints the warnings.
    """
    from ssaseg.cli.data.reading import read_through, small_images
    from ssaseg.datasets.check import Findings, check_dataset, compare_images, compare_masks

    problems: list[tuple[str, str, str]] = []  # split, severity, text
    found: list[Findings] = []
    for name, split in splits.items():
        found.append(check_dataset(split, 512) if check == "sample" else read_through(split, f"checked {name}"))
        kinds = ("error", "warning", "note")
        problems += [(name, severity, text) for severity in kinds for text in found[-1].messages(severity)]
    (first, train), *_, (last, val) = splits.items() if len(splits) > 1 else [*splits.items()] * 2
    more = [(first, problem) for problem in compare_masks(list(splits.values()), found)]
    if train is not val:
        more += [(last, problem) for problem in compare_images(train, val)]
    if recipe is not None:
        more += [(last, problem) for problem in small_images(val, found[-1], recipe.test)]
    problems += [(name, problem.severity, problem.text) for name, problem in more]
    errors = [text for _, severity, text in problems if severity == "error"]
    if errors:
        several = " (the first of several problems: `ssaseg data check` prints all)" if len(errors) > 1 else ""
        raise CommandError(errors[0] + several)
    for name, severity, text in problems:
        echo(f"{severity}, {name} split: {text}", err=True)


def describe(job: Job) -> None:
    """Prints what will be trained."""
    recipe, train, ranks = job.recipe, job.recipe.train, job.ranks.size
    size = sum(parameter.numel() for parameter in job.model.parameters()) / 1e6
    where = f"{ranks} ranks on {job.device.type}" if ranks > 1 else str(job.device)
    echo(
        f"{recipe.name}: {recipe.model.name} {recipe.model.classifier}, {size:.2f} M parameters, {where}, "
        f"amp {train.amp}\n{len(job.train_set)} training and {len(job.val_set)} validation images; "
        f"step {job.progress.step} of {job.steps}, run folder {job.folder}",
        err=True,
    )
    warn_of_warmup(job)
    describe_classifier(job)
    if train.compile and ranks > 1 and job.device.type == "cuda":
        echo(
            "note: train.compile was never measured on several GPUs; SyncBatchNorm splits the compiled graph at each "
            "norm, so it is probably slower than train.compile=false",
            err=True,
        )
    if recipe.optim.freeze:
        trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad) / 1e6
        echo(f"frozen: {', '.join(recipe.optim.freeze)}; {trained:.2f} M parameters are trained", err=True)
    if job.average is not None:
        echo(f"averaged weights (decay {job.average.decay:g}) are scored, and kept as best", err=True)
    if job.micro_batches > 1:
        echo(
            f"batch {train.batch} in {job.micro_batches} micro-batches"
            + (f" on each of {ranks} ranks" if ranks > 1 else "")
            + f": BatchNorm sees {job.micro_batch} images",
            err=True,
        )


def warn_of_warmup(job: Job) -> None:
    """Prints a warning if the run ends before its warm-up does: the learning rate then stays far too low."""
    optim, steps = job.recipe.optim, job.steps
    if optim.warmup < steps:
        return
    tried = range(0, steps, max(steps // 1000, 1))
    highest = max(learning_rate(optim.lr, step, steps, optim) for step in tried)
    echo(
        f"warning: the run ends inside its warm-up: {steps} steps, optim.warmup is {optim.warmup}\n"
        f"the learning rate reaches {highest:.1e}, not optim.lr={optim.lr:g}; use optim.warmup={steps // 10}",
        err=True,
    )


def describe_classifier(job: Job) -> None:
    """Prints what its memory costs, and what to expect with few classes."""
    name, head = job.recipe.model.classifier, job.model.classifier
    if head.NOTE:
        echo(f"{name}: {head.NOTE}", err=True)
    if memory := head.bank_bytes(head.channels, head.num_classes, **job.recipe.model.options):
        echo(
            f"memory of pixels (model.options.memory): {memory / 1e6:,.0f} MB on each device, and in each state file",
            err=True,
        )
    if head.num_classes == 1:
        echo(
            "note: with 1 class every pixel gets it, with any classifier; label the background as a second class",
            err=True,
        )
    elif head.num_classes <= FEW and name in ADAPTIVE:
        echo(
            f"note: with {head.num_classes} classes there is little to confuse: model.classifier={name} gains little "
            "over linear",
            err=True,
        )


@contextlib.contextmanager
def deterministic(requested: bool) -> Iterator[None]:
    """`train.deterministic`: inside this context PyTorch refuses algorithms whose result depends on the order of
    threads.
    """
    if not requested:
        yield
        return
    # cuBLAS reads this when it first starts, so it must be set before anything is computed on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # PyTorch would also fill new memory with NaN. That helps to find bugs, but costs time.
    filling: Any = torch.utils.deterministic
    before, filling.fill_uninitialized_memory = filling.fill_uninitialized_memory, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        filling.fill_uninitialized_memory = before
