"""GPU memory: how many images at once fit, found by trying."""

import copy
import gc
import traceback
from typing import TYPE_CHECKING

import click
import torch

from ssaseg.cli.errors import CommandError
from ssaseg.datasets.prefetch import AHEAD

if TYPE_CHECKING:
    from ssaseg.cli.training.job import Job


# Share of a GPU's memory that a micro-batch which was tried must leave free: a run also evaluates, and in days its
# memory falls into pieces.
SPARE = 0.05


def fit_micro_batch(job: "Job") -> int:
    """For train.micro_batch=auto: the largest part of a rank's share of the batch that all ranks have the memory for.

    Tries a step of each size from the largest down; leaves no trace, see `fits`. Raises CommandError where not even the
    smallest part fits.
    """
    for images in parts(job):
        if not job.ranks.any(not fits(job, images)):
            if job.ranks.main:
                click.echo(f"train.micro_batch=auto: {images} images at once fit, of {share(job)}", err=True)
            return images
    raise _nothing_fits(job)


def explain(job: "Job", error: torch.OutOfMemoryError) -> CommandError:
    """The message for a step that took more memory than there is: which micro-batch fits, tried, or that none does.

    The run is at its end: gradients of the broken step and what the error's traceback holds are let go.
    """
    traceback.clear_frames(error.__traceback__)  # else the broken step's activations stay, and nothing fits
    job.optimizer.zero_grad(set_to_none=True)
    job.model.memories = []
    used = job.recipe.train.micro_batch
    now = used if isinstance(used, int) else share(job)
    found = next((images for images in parts(job) if images < now and fits(job, images)), None)
    if found is None:
        return _nothing_fits(job)
    return CommandError(
        f"{job.device}: its memory is used up by {now} images at once at augment.crop={_crop(job)}\n"
        f"expected at most {found}, which fitted when tried; a step's batch stays {job.recipe.train.batch}\n"
        f"use train.micro_batch={found}"
    )


def _nothing_fits(job: "Job") -> CommandError:
    least = parts(job)[-1]
    return CommandError(
        f"{job.device}: not even {least} image{'s' * (least > 1)} at once fit into its memory, and can be trained, at "
        f"augment.crop={_crop(job)}\nexpected room for one training step of them; BatchNorm needs 2 values a channel\n"
        "use a smaller augment.crop, train.amp=bf16, a smaller distill.group, or end what else runs on this GPU"
    )


def share(job: "Job") -> int:
    """Images of a step that one rank computes."""
    return job.recipe.train.batch // job.ranks.size


def parts(job: "Job") -> list[int]:
    """The micro-batches that a rank's share can be cut into, the largest first."""
    whole = share(job)
    # A class mean over half a group would make the loss depend on how the step was cut.
    group = job.model.classifier.group
    return [size for size in range(whole, 0, -1) if whole % size == 0 and (size % group == 0 or size == whole)]


def fits(job: "Job", images: int) -> bool:
    """Whether a forward and backward of so many random images at the crop's size finds the memory it needs, and
    BatchNorm the values: an image alone has no variance where a feature map is one pixel.

    Done on a copy: the run's weights, buffers, gradients and memories are not touched, its generators are put back.
    """
    devices = [job.device] if job.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            _trial(job, images)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
            fitted = False
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            fitted = False
        else:
            fitted = True
    if devices:
        gc.collect()
        torch.cuda.empty_cache()
    return fitted


def _trial(job: "Job", images: int) -> None:
    from ssaseg.cli.training.step import autocast

    device, size = job.device, job.recipe.augment.crop
    model = copy.deepcopy(job.model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.SyncBatchNorm):
            module.eval()  # each rank tries by itself: its statistics would wait for the others
    held = []  # what a real step finds in memory beside its own
    if not job.optimizer.state:  # two moments a parameter come with the first update
        held += [torch.empty_like(weight) for weight in model.parameters() if weight.requires_grad for _ in range(2)]
    pixels = torch.randn(images, 3, *size, device=device)
    labels = torch.randint(model.num_classes, (images, *size), device=device)
    if device.type == "cuda":
        spare = int(SPARE * torch.cuda.get_device_properties(device).total_memory)
        held.append(torch.empty(spare, dtype=torch.uint8, device=device))
        if job.recipe.train.prefetch:  # the next batches wait on the device
            held += [torch.empty_like(each) for each in (pixels, labels) for _ in range(AHEAD)]
    totals = model.classifier.step_totals(labels) if model.classifier.needs_totals else None
    with autocast(device, job.recipe.train.amp):
        losses = model(pixels, labels, totals)
    torch.stack(list(losses.values())).sum().backward()
    del held


def _crop(job: "Job") -> list[int]:
    return list(job.recipe.augment.crop)
