"""A training run's parts. This file imports nothing of the training, so that every part of it can name a `Job`."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssaseg.cli.ranks.ranks import Ranks
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets.prefetch import Preparer
from ssaseg.models import Segmenter
from ssaseg.recipes import Recipe


@dataclass
class Progress:
    """Where a run stands. `step` counts finished optimiser steps; positions in the data follow from it."""

    step: int = 0
    evaluated: int = 0
    best_miou: float = -1.0
    scores: dict[str, Any] = field(default_factory=dict)
    stale: int = 0  # evaluations since the best one
    skipped: int = 0  # updates left out because something was not finite


class StepRecord(NamedTuple):
    """A step as the log needs it; tensors on the device, unread."""

    number: int  # counted from 1
    images: list[str]
    losses: Tensor  # (T,), one a term
    norm: Tensor  # () norm of the gradient, before clipping
    bad: Tensor  # () 1 where something was not finite, else 0
    totals: Tensor | None  # what `Classifier.training_step` was given of the whole step


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
    guard: Any  # `training.guard.Guard`
    prepare: Preparer
    average: Any  # `training.average.Average`, or None
    micro_batch: int  # images at once on one rank
    batches: Iterator[Any]  # micro-batches, from where the progress is
    fingerprints: dict[str, Any] = field(default_factory=dict)
    saved: int = 0  # the step of the newest state on the disk; 0: none
    log: Any = None  # `training.log.MetricsLog`, on rank 0
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
