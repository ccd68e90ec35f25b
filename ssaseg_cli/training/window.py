"""The steps since the last line of the log: their losses, their speed, and the time spent waiting for data."""

import contextlib
import sys
import time
from collections.abc import Iterator
from math import isfinite
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ssaseg.cli.device import count_cores
from ssaseg.cli.printing import echo
from ssaseg.cli.training.job import StepRecord
from ssaseg.cli.training.nonfinite import low_scale

if TYPE_CHECKING:
    from ssaseg.cli.training.job import Job
    from ssaseg.recipes import Recipe


WIDTH = 80  # characters of a line of the log

# A warning is printed if training waits for data for more than this share of the time, over at least this many steps.
BOUND, STEPS = 0.2, 20


class Window:
    """The steps since the last log line: their losses, still on the device, and the names of their images."""

    def __init__(self, job: "Job", bar: bool = True, verbose: bool = False) -> None:
        """verbose: whether to print the terms of the loss."""
        self.job, self.verbose = job, verbose
        self.steps: list[StepRecord] = []
        self.bad: list[bool] = []  # whether each step was bad; only for the steps whose verdict was read
        self.names: list[str] = []
        self.waited = 0.0
        self.warm = self.warned = self.warned_scale = False
        self.block = [0.0, 0.0, 0.0]  # since waiting was last checked: time waited [s], total time [s], steps
        self.started = time.perf_counter()
        total, done = job.steps, job.progress.step
        shown = bar and job.ranks.main and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, disable=not shown, unit="step", dynamic_ncols=True)

    def start_waiting(self) -> None:
        """Called before the loader is asked for data."""
        self.wait_started = time.perf_counter()

    def stop_waiting(self) -> None:
        """Called when the loader has returned it."""
        self.waited += time.perf_counter() - self.wait_started

    def add(self, record: StepRecord, names: list[str]) -> None:
        """Adds a step; `names` are the names of its losses. Does not wait for the device."""
        self.names = names
        self.steps.append(record)
        self.bar.update()

    def check(self) -> StepRecord | None:
        """Reads the verdicts on the steps since the last call; waits for the device. Returns the step that ends the
        run, or None if the run continues.
        """
        fresh = self.steps[len(self.bad) :]
        if not fresh:
            return None
        verdicts = torch.stack([record.bad for record in fresh]).tolist()
        for verdict, record in zip(verdicts, fresh, strict=True):
            if verdict and self.job.progress.skipped >= self.job.guard.limit:
                return record
            self.bad.append(bool(verdict))
            self.job.progress.skipped += bool(verdict)
        return None

    def write(self, rate: float) -> None:
        """Prints and logs the means since the last log line. Every rank calls it, after `check`."""
        job, count = self.job, len(self.steps)
        step = self.steps[-1].number
        kept = [record for record, bad in zip(self.steps, self.bad, strict=True) if not bad]
        if kept:
            means = torch.stack([record.losses for record in kept]).mean(dim=0)
            losses = dict(zip(self.names, (job.ranks.total(means) / job.ranks.size).tolist(), strict=True))
        norms = torch.stack([record.norm for record in self.steps]).tolist()
        scale = low_scale(job)
        seconds = time.perf_counter() - self.started
        waiting = self.waited / seconds
        if job.ranks.main and kept:
            self._print_losses(step, rate, losses, [norm for norm in norms if isfinite(norm)], count / seconds, waiting)
        if job.ranks.main:
            self._print_faults(scale)
            self._print_waiting(seconds)
        self.steps, self.bad, self.waited, self.started = [], [], 0.0, time.perf_counter()

    def _print_losses(
        self, step: int, rate: float, losses: dict[str, float], norms: list[float], pace: float, waiting: float
    ) -> None:
        """Prints a line and logs it. `pace`: steps per second; `waiting`: share of the time spent waiting for data."""
        job, speed = self.job, pace * self.job.recipe.train.batch
        loss, norm = sum(losses.values()), sum(norms) / max(len(norms), 1)
        record = {"step": step, "lr": rate, "loss": loss, **losses}
        assert job.log is not None
        more = {"grad_norm": norm, "images_per_s": round(speed, 2), "data_wait": round(waiting, 4)}
        job.log.write(record | more)
        line = log_line(step, job.steps, loss, rate, speed, waiting, (job.steps - step) / pace)
        echo("\n".join([line, *terms_table(losses if self.verbose else {})]), err=True)  # above a bar
        self.bar.set_postfix_str(f"loss {loss:.3f}")

    def _print_faults(self, scale: float | None) -> None:
        """Prints what is wrong although training continues: skipped updates, a loss scale of fp16 that is too low."""
        job = self.job
        skipped = [record for record, bad in zip(self.steps, self.bad, strict=True) if bad]
        for record in skipped:
            values = zip(self.names, record.losses.tolist(), strict=True)
            terms = ", ".join(f"{name} {value:g}" for name, value in values)
            images = ", ".join(record.images)
            echo(f"step {record.number}: not finite, update skipped ({terms}); images: {images}", err=True)
        if skipped:
            count = f"{job.progress.skipped} updates skipped, of at most {job.guard.limit} (train.max_skipped)"
            echo(f"warning: {count}", err=True)
        if scale is not None and not self.warned_scale:
            self.warned_scale = True
            text = f"warning: fp16's loss scale has fallen to {scale:g}: gradients overflow; use train.amp=bf16"
            echo(text, err=True)

    def _print_waiting(self, seconds: float) -> None:
        """Warns once if training waits for its data. The first window does not count: the workers start in it."""
        if self.warm:
            self.block = [sum(pair) for pair in zip(self.block, (self.waited, seconds, len(self.steps)), strict=True)]
        self.warm = True
        waited, total, steps = self.block
        if steps >= STEPS:
            self.block = [0.0, 0.0, 0.0]
            if waited / total > BOUND and not self.warned:
                self.warned = True
                echo(waiting_warning(self.job.recipe, waited / total), err=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside this context does not count as training time."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def close(self) -> None:
        """Ends the progress bar."""
        self.bar.close()


def log_line(step: int, steps: int, loss: float, rate: float, speed: float, waiting: float, left: float) -> str:
    """A line of the log, of at most `WIDTH` characters in all usual cases.

    speed: images per second; waiting: share of the time spent waiting for data; left: time to the last step [s].
    """
    clock = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
    pace = f"{speed:.1f}" if speed < 100 else f"{speed:.0f}"
    return f"step {step}/{steps} loss {loss:.3f} lr {rate:.1e} {pace} images/s wait {waiting:.0%} ETA {clock}"


def terms_table(losses: dict[str, float]) -> Iterator[str]:
    """The terms of the loss in columns, on lines of at most `WIDTH` characters."""
    terms = [f"{name} {value:.3f}" for name, value in losses.items()]
    room = max(map(len, terms), default=0) + 2
    columns = max(WIDTH // room, 1)
    for start in range(0, len(terms), columns):
        yield "".join(term.rjust(room) for term in terms[start : start + columns])


def waiting_warning(recipe: "Recipe", waiting: float) -> str:
    """The warning that training waits for its data for `waiting` (a share) of the time, with the fix."""
    cores = count_cores()
    workers = recipe.train.workers
    fixes = [f"train.workers={min(2 * workers or 1, cores)}"] if workers < cores else []
    if not recipe.data.cache and recipe.data.dataset != "synthetic":
        fixes.append("data.cache=true if there is enough memory")
    fixes = fixes or ["smaller images on the disk, or more cores"]
    return (
        f"warning: training waits for data {waiting:.0%} of the time ({workers} workers, {cores} cores); "
        f"use {' and '.join(fixes)}"
    )
