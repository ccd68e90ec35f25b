"""GPU memory: how many images fit in one pass, found by trying."""

import gc
import traceback
from typing import TYPE_CHECKING

import torch

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.datasets.prefetch import AHEAD

if TYPE_CHECKING:
    from ssaseg.cli.training.job import Job


# Share of a GPU's memory that must stay free when a micro-batch is tried: a run also evaluates, and over days its
# memory gets fragmented.
SPARE = 0.05


def fit_micro_batch(job: "Job") -> int:
    """For train.micro_batch=auto: the largest micro-batch that fits into the memory of all ranks.

    Tries a step of each size, the largest first, and changes nothing, see `fits`. Raises CommandError if not even the
    smallest fits.
    """
    for images in micro_batch_sizes(job):
        if not job.ranks.any(not fits(job, images)):
            if job.ranks.main:
                echo(
                    f"train.micro_batch=auto: {images} images fit in one pass; a rank has {rank_batch(job)} per step",
                    err=True,
                )
            return images
    raise _nothing_fits(job)


def explain(job: "Job", error: torch.OutOfMemoryError) -> CommandError:
    """The error for a step that ran out of memory: says which micro-batch fits, found by trying, or that none does.

    Ends the run: frees the gradients of the failed step and what the error's traceback holds.
    """
    traceback.clear_frames(error.__traceback__)  # otherwise the failed step's activations stay, and nothing fits
    job.optimizer.zero_grad(set_to_none=True)
    job.model.memories = []
    used = job.recipe.train.micro_batch
    now = used if isinstance(used, int) else rank_batch(job)
    found = next((images for images in micro_batch_sizes(job) if images < now and fits(job, images)), None)
    if found is None:
        return _nothing_fits(job)
    return CommandError(
        f"{job.device}: out of memory with {now} images in one pass at augment.crop={_crop(job)}\n"
        f"expected at most {found} (these fit in a trial); a step still has all {job.recipe.train.batch} images\n"
        f"use train.micro_batch={found}"
    )


def _nothing_fits(job: "Job") -> CommandError:
    least = micro_batch_sizes(job)[-1]
    return CommandError(
        f"{job.device}: cannot train on {least} image{'s' * (least > 1)} in one pass at augment.crop={_crop(job)}: "
        "out of memory, or too few values for BatchNorm\n"
        "expected memory for one training step, and 2 values per channel for BatchNorm\n"
        "use a smaller augment.crop, train.amp=bf16 or a smaller distill.group, or end other programs on this GPU"
    )


def rank_batch(job: "Job") -> int:
    """Images of a step that one rank computes."""
    return job.recipe.train.batch // job.ranks.size


def micro_batch_sizes(job: "Job") -> list[int]:
    """The possible micro-batches: divisors of a rank's images of a step, in whole groups; the largest first."""
    whole = rank_batch(job)
    # A class mean over half a group would make the loss depend on the size of the micro-batch.
    group = job.model.classifier.group
    return [size for size in range(whole, 0, -1) if whole % size == 0 and (size % group == 0 or size == whole)]


def fits(job: "Job", images: int) -> bool:
    """Whether a forward and backward pass with `images` random images of the crop's size fits into memory, and gives
    BatchNorm enough values: a single image has no variance if a feature map is one pixel.

    Uses a copy: the run's weights, buffers, gradients and memories do not change. Restores the random generators.
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
    model = job.model.copied().train()
    for module in model.modules():
        if isinstance(module, torch.nn.SyncBatchNorm):
            module.eval()  # each rank tries alone: in training mode the statistics would wait for the other ranks
    held = []  # what is in memory during a real step, in addition to the step's own tensors
    if not job.optimizer.state:  # the first update adds two moments per parameter
        held += [torch.empty_like(weight) for weight in model.parameters() if weight.requires_grad for _ in range(2)]
    pixels = torch.randn(images, model.channels, *size, device=device)
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
