"""Watching a run: the wish to stop, and the steps since the last line of the log."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from ssaseg.cli.job import Job


def mend(folder: Path) -> str:
    """What to do after a number that is not finite: a run's recipe is fixed, and going on would end the same way."""
    weights = folder / "last.safetensors"
    start = f"model.pretrained={weights}, " if weights.exists() else ""
    return f"start a new run with {start}a lower optim.lr, optim.grad_clip=1 or train.amp=off"


class StopSignal:
    """Turns SIGINT and SIGTERM into a wish that the loop reads between steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self.number or 0)

    def __enter__(self) -> "StopSignal":
        self.before = {each: signal.signal(each, self._take) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def _take(self, number: int, _: Any) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


class Window:
    """The steps since the last log line: their losses, still on the device, and the images they came from."""

    def __init__(self, job: "Job", bar: bool = True) -> None:
        self.job = job
        self.steps: list[tuple[int, list[str], Tensor]] = []
        self.checked = 0
        self.names: list[str] = []
        self.waited = 0.0
        self.started = time.perf_counter()
        total, done = job.recipe.train.steps, job.progress.step
        self.bar = tqdm(
            total=total, initial=done, disable=not (bar and sys.stderr.isatty()), unit="step", dynamic_ncols=True
        )

    def start_waiting(self) -> None:
        """Before asking the loader for data."""
        self.wait_started = time.perf_counter()

    def stop_waiting(self) -> None:
        """After the loader has given it."""
        self.waited += time.perf_counter() - self.wait_started

    def add(self, step: int, batches: list[Any], losses: dict[str, Tensor]) -> None:
        """Keeps a step's losses without reading them."""
        self.names = list(losses)
        images = [name for batch in batches for name in batch.names]
        self.steps.append((step, images, torch.stack(list(losses.values()))))
        self.bar.update()

    def check(self) -> None:
        """Raises FloatingPointError naming the first step whose loss is not finite, its terms and its images."""
        fresh = self.steps[self.checked :]
        if not fresh:
            return
        finite = torch.stack([losses for _, _, losses in fresh]).isfinite().all(dim=1).tolist()
        self.checked = len(self.steps)
        for good, (step, images, losses) in zip(finite, fresh, strict=True):
            if not good:
                values = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, losses.tolist(), strict=True))
                raise FloatingPointError(
                    f"step {step}: a loss is not finite ({values})\nimages: {', '.join(images)}\n"
                    + mend(self.job.folder)
                )

    def write(self, rate: float) -> None:
        """One line for people, one for machines: the means since the last one."""
        job, count = self.job, len(self.steps)
        step = self.steps[-1][0]
        means = torch.stack([losses for _, _, losses in self.steps]).mean(dim=0).tolist()
        seconds = time.perf_counter() - self.started
        speed, waiting = count * job.recipe.train.batch / seconds, self.waited / seconds
        left = (job.recipe.train.steps - step) * seconds / count
        losses = dict(zip(self.names, means, strict=True))
        loss = sum(means)
        assert job.log is not None
        record = {"step": step, "lr": rate, "loss": loss, **losses}
        job.log.write({**record, "images_per_s": round(speed, 2), "data_wait": round(waiting, 4)})
        terms = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        line = f"loss {loss:.3f} ({terms}) lr {rate:.2e} {speed:.1f} images/s, data wait {waiting:.0%}"
        clock = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
        tqdm.write(f"step {step}/{job.recipe.train.steps} {line}, ETA {clock}", file=sys.stderr)  # above a bar
        self.bar.set_postfix_str(f"loss {loss:.3f}")
        self.steps, self.checked, self.waited, self.started = [], 0, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside does not count as training time."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def close(self) -> None:
        """Ends the progress bar."""
        self.bar.close()
