"""What a training run is made of. This file imports no other file of `training`, so that each of them can use `Job`."""

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
from ssaseg.files.writing import FolderLock
from ssaseg.models import Segmenter
from ssaseg.recipes import Recipe


@dataclass
class Progress:
    """How far a run is. `step` counts finished optimiser steps; the position in the data follows from it."""

    step: int = 0
    evaluated: int = 0
    best_miou: float = -1.0
    scores: dict[str, Any] = field(default_factory=dict)
    stale: int = 0  # evaluations since the best one
    skipped: int = 0  # updates that were skipped because something was not finite


class StepRecord(NamedTuple):
    """What the log needs of a step. The tensors are on the device."""

    number: int  # counted from 1
    images: list[str]
    losses: Tensor  # (T,), one per term
    norm: Tensor  # () norm of the gradient, before clipping
    bad: Tensor  # () 1 if something was not finite, else 0
    totals: Tensor | None  # what `Classifier.training_step` got about the whole step


@dataclass
class Job:
    """Everything that a run is made of, on its device."""

    recipe: Recipe  # with the numbers that train.micro_batch=auto and train.epochs became
    folder: Path
    ranks: Ranks
    model: Segmenter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_set: Any
    val_set: Any
    progress: Progress
    network: nn.Module  # the model, or the wrapper that averages its gradients over ranks
    guard: Any  # `training.guard.Guard`
    prepare: Preparer
    average: Any  # `training.average.Average`, or None
    micro_batch: int  # images in one pass on one rank
    batches: Iterator[Any]  # micro-batches, from the position that the progress has reached
    fingerprints: dict[str, Any] = field(default_factory=dict)
    saved: int = 0  # the step of the newest state on the disk; 0: no state
    log: Any = None  # `training.log.MetricsLog`, on rank 0
    stop: StopSignal = field(default_factory=StopSignal)
    deadline: float | None = None  # of `time.monotonic()` [s], for --max-hours
    lock: FolderLock | None = None  # of the folder, on rank 0

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.ranks.device

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        assert self.recipe.train.steps is not None, "Recipe.with_steps was not called"
        return self.recipe.train.steps

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimiser step on one rank."""
        return self.recipe.train.batch // self.ranks.size // self.micro_batch

    def require_folder(self) -> None:
        """Before something is written: raises OSError if the run folder was deleted, or made anew by another run."""
        if self.lock is not None:
            self.lock.check()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside this context the model has the weights that are scored and kept: the average, if there is one."""
        return self.average.in_place() if self.average else contextlib.nullcontext()
