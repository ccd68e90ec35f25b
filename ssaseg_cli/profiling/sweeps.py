"""Throughput for several batch sizes and numbers of threads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
import torch
from torch import Tensor

from ssaseg.cli.prediction.skipping import lacks_memory
from ssaseg.cli.profiling.latency import now, quantiles, rounds
from ssaseg.cli.profiling.memory import peak_memory
from ssaseg.cli.scoring.engines import Engine
from ssaseg.models.labelling import label_map


def measure_sweep(
    make: Callable[[], Engine], pixels: Tensor, batches: Sequence[int], threads: Sequence[int], runs: int
) -> list[dict[str, Any]]:
    """A row for each number of threads and each batch of copies of `pixels` (1,C,H,W): network and labels.

    Keys: `threads`, `batch`, `batch_ms`, `images_per_s`, `peak_mib` (None if another runtime computes); of a batch that
    does not fit into memory, `failed` instead. After it, larger batches are not tried.
    """
    rows = []
    for count in threads:
        with using_threads(count):  # other runtimes make their threads when the engine is made
            engine = make()
        full = False
        for batch in sorted(batches):
            row: dict[str, Any] = {"threads": count, "batch": batch}
            try:
                if full:
                    raise MemoryError
                with using_threads(count):
                    rows.append(row | _measure(engine, pixels.expand(batch, -1, -1, -1).contiguous(), runs))
            except (MemoryError, RuntimeError) as error:
                if not lacks_memory(error):
                    raise
                full = True
                rows.append(row | {"failed": "not enough memory"})
    return rows


@torch.inference_mode()
def _measure(engine: Engine, pixels: Tensor, runs: int) -> dict[str, Any]:
    times, size = [], tuple(pixels.shape[-2:])
    for run in rounds(runs):
        started = now(pixels.device)
        logits = engine.logits(pixels).final
        for image in range(len(logits)):
            label_map(logits[image : image + 1], size, size)
        ended = now(pixels.device)
        if run >= 0:
            times.append(1e3 * (ended - started))
    found = quantiles({"batch_ms": times})
    peak = peak_memory(engine, pixels)
    return {
        **found,
        "images_per_s": 1e3 * len(pixels) / found["batch_ms"]["p50"],
        "peak_mib": None if peak is None else peak / 2**20,
    }


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Inside this context PyTorch and OpenCV compute with `count` threads."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(count)
    cv2.setNumThreads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
