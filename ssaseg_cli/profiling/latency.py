"""How long a pass takes. What is compared takes turns, so that the load of the machine is the same for all."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssaseg.cli.scoring.engines import Engine
from ssaseg.models.labelling import label_map

WARM_UP = 3  # passes before the first timed one


def measure_latency(engines: Sequence[Engine], pixels: Tensor, runs: int) -> list[dict[str, Any]]:
    """p50 and p90 [ms] of network and post-processing, per engine. The engines take turns.

    Post-processing: both bilinear steps and the arg-max; the labels stay on the device. The pixels (1,C,H,W) are
    already on the device.
    """
    size = tuple(pixels.shape[-2:])
    times: list[dict[str, list[float]]] = [{"network_ms": [], "post_ms": []} for _ in engines]
    with torch.inference_mode():
        for run in rounds(runs):
            for engine, spent in zip(engines, times, strict=True):
                started = now(pixels.device)
                logits = engine.logits(pixels).final
                between = now(pixels.device)
                label_map(logits, size, size)
                ended = now(pixels.device)
                if run >= 0:
                    spent["network_ms"].append(1e3 * (between - started))
                    spent["post_ms"].append(1e3 * (ended - between))
    return [quantiles(spent) for spent in times]


def quantiles(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """p50 and p90 of several lists of numbers, by key."""
    return {
        key: {f"p{quantile}": float(np.percentile(values, quantile)) for quantile in (50, 90)}
        for key, values in times.items()
    }


def rounds(runs: int) -> range:
    """Numbers of the passes; those of the warm-up are negative."""
    return range(-WARM_UP, runs)


def now(device: torch.device) -> float:
    """The time [s], after waiting until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
