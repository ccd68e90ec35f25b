"""Where the time of a run goes: `predict --timings`, and `video --timings`."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ssaseg.cli.console import print_table
from ssaseg.cli.device import count_cores
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.engines import Engine, Logits

STAGES = {
    "reading": "decoding and resizing",
    "network": "backbone, decoder, classifier",
    "labels": "normalising, upsampling, arg-max",
    "encoding": "PNG and the other results",
    "writing": "files and records",
}
VIDEO_STAGES = {
    "decoding": "frames from the video",
    "network": STAGES["network"],
    "labels": STAGES["labels"],
    "drawing": "smoothing, flicker, colours",
    "encoding": "frames into the video",
}
COMPUTING = ("network", "labels")  # where PyTorch's threads work


class Timings:
    """Adds up the time of each stage over all threads.

    On a CPU it is processor time: that of the calling thread, times the threads that PyTorch computes with, so that all
    stages and what is left sum up to the time of all cores. On a GPU, the times of network and labels are those that
    the calling thread waits for them.
    """

    def __init__(self, device: torch.device, on: bool, stages: Mapping[str, str] = STAGES) -> None:
        self.on, self.gpu, self.stages = on, device.type == "cuda", stages
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._inner = threading.local()  # seconds of stages inside the present one

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside this context the thread works on this stage; what stages within take is not counted twice."""
        if not self.on:
            yield
            return
        clock = time.perf_counter if self.gpu and name in COMPUTING else time.thread_time
        threads = 1 if self.gpu or name not in COMPUTING else torch.get_num_threads()
        outer, self._inner.seconds = getattr(self._inner, "seconds", 0.0), 0.0
        start = clock()
        try:
            yield
        finally:
            spent = threads * (clock() - start)
            with self._lock:
                self.seconds[name] += spent - self._inner.seconds
            self._inner.seconds = outer + spent

    def engine(self, engine: Engine) -> Engine:
        """The engine, whose time is then counted as that of the network."""
        return TimedEngine(engine, self) if self.on else engine

    def show(self, images: int, seconds: float) -> None:
        """Prints a table: `images` took `seconds` of wall-clock time."""
        if not self.on or not images:
            return
        cores = count_cores()
        total = cores * seconds
        rest = max(total - sum(self.seconds.values()), 0.0)
        rows = [(name, what, self.seconds[name]) for name, what in self.stages.items()]
        rows.append(("waiting", "idle cores, start and end of the run, other programs", rest))
        print_table(
            ("stage", "", "ms an image", f"% of {cores} cores" if cores > 1 else "%"),
            [(name, what, f"{1e3 * spent / images:.2f}", f"{100 * spent / total:.1f}") for name, what, spent in rows],
        )
        name, _, most = max(rows, key=lambda row: row[2])
        echo(f"bound by: {name}, {100 * most / total:.0f} % of {seconds:.1f} s on {cores} cores")


class TimedEngine:
    """An engine whose time is counted as that of the network."""

    def __init__(self, inner: Engine, timings: Timings) -> None:
        self.inner, self.timings = inner, timings
        self.what, self.device, self.channels = inner.what, inner.device, inner.channels
        self.num_classes, self.has_coarse, self.gives_scores = inner.num_classes, inner.has_coarse, inner.gives_scores
        self.takes = inner.takes

    def logits(self, pixels: Tensor, coarse: bool = False) -> Logits:
        """See `Engine.logits`."""
        with self.timings.stage("network"):
            logits = self.inner.logits(pixels, coarse)
            if self.timings.gpu:
                torch.cuda.synchronize(pixels.device)
            return logits
