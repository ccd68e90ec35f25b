"""One optimiser step: forward and backward passes over its micro-batches, the verdict, the update."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ssaseg.cli.ranks import ranks as distributed
from ssaseg.cli.ranks.peers import RankPeers
from ssaseg.cli.training.job import Job, StepRecord
from ssaseg.cli.training.optimiser import learning_rate, set_mode

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train_step(job: Job, batches: list[Any]) -> tuple[StepRecord, list[str]]:
    """One optimiser step over its micro-batches. Returns what the log needs, on the device, and the losses' names.

    Every random number of step i comes from (seed, i). So a resumed run draws the same numbers as one that never
    stopped.
    """
    recipe, model, optimizer, scaler, guard = job.recipe, job.model, job.optimizer, job.scaler, job.guard
    torch.manual_seed(step_seed(recipe.train.seed, job.progress.step, job.ranks.rank))
    set_mode(model, recipe.optim.freeze)
    guard.start()
    totals = step_totals(job, batches)
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, 1):
        images, labels = job.prepare(batch)
        with distributed.averaging(job.network, last=number == len(batches)):
            with autocast(job.device, recipe.train.amp):
                losses = job.network(images, labels, totals)
            scaler.scale(torch.stack(list(losses.values())).sum() / len(batches)).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach() / len(batches)
    scaler.unscale_(optimizer)
    norm = gradient_norm(model, recipe.optim.grad_clip)
    terms = torch.stack(list(sums.values()))
    bad = guard.judge(terms, norm, optimizer)
    guard.updated = True
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    model.update(RankPeers(job.ranks), guard.held)
    guard.finish()
    if job.average is not None:
        job.average.update(job.progress.step + 1, guard.held)
    images_of_step = [name for batch in batches for name in batch.names]
    return StepRecord(job.progress.step + 1, images_of_step, terms, norm, bad, totals), list(sums)


def step_totals(job: Job, batches: list[Any]) -> Tensor | None:
    """What a loss must know about the whole step before its first micro-batch: the mean of the classifier's
    `step_totals` over micro-batches and ranks. None if the only micro-batch is the whole step, or if the classifier has
    no such loss.
    """
    if not job.model.classifier.needs_totals or (len(batches) == 1 and job.ranks.size == 1):
        return None
    labels = (batch.labels.to(job.device, non_blocking=True) for batch in batches)
    totals = torch.stack([job.model.classifier.step_totals(label) for label in labels]).mean()
    return job.ranks.total(totals) / job.ranks.size


def gradient_norm(model: nn.Module, clip: float | None = None) -> Tensor:
    """Norm of all gradients together, () on the device. If `clip` is given, scales them down to at most that norm."""
    if clip:
        return nn.utils.clip_grad_norm_(model.parameters(), clip)
    return nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for each step of each seed and rank: 64 mixed bits, so that the seeds of adjacent steps are unrelated."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step + 1 + rank * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 27)) & 0x7FFFFFFFFFFFFFFF


def set_learning_rate(job: Job, step: int) -> float:
    """Sets the learning rate of every group for `step`; returns the rate of a group with factor 1, for the log."""
    optim, steps = job.recipe.optim, job.steps
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate(group["base_lr"], step, steps, optim)
    return learning_rate(optim.lr, step, steps, optim)


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager[Any]:
    """The mixed precision that a recipe's `train.amp` requests, on `device`."""
    return torch.autocast(device.type, dtype=AMP_TYPES.get(amp, torch.bfloat16), enabled=amp != "off")
