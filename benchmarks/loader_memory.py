"""Resident memory of the loader's processes and of an evaluation: part of `loader.py`."""

import contextlib
from typing import Any

BATCH = 8


def slope(at: list[int], kib: list[float]) -> float:
    """KiB per sample, by least squares over the last half of the values."""
    import numpy as np

    half = len(at) // 2
    return float(np.polyfit(at[half:], kib[half:], 1)[0])


def loader_slopes(work: Any, samples: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Slopes, and three sizes, of the main process and of two workers, which read `samples` in batches."""
    import psutil

    from ssaseg.datasets.loader import train_loader

    main = psutil.Process()
    before = set(main.children())
    stream = train_loader(work.dataset, work.transform, 0, BATCH, workers=2)
    at: list[int] = []
    kib: dict[str, list[float]] = {}
    with contextlib.closing(stream):  # type: ignore[type-var]
        next(stream)
        workers = sorted(set(main.children()) - before, key=lambda child: child.pid)
        processes = {"main": main} | {f"worker {i}": worker for i, worker in enumerate(workers)}
        kib = {name: [] for name in processes}
        for batch in range(1, samples // BATCH):
            next(stream)
            at.append(batch * BATCH)
            for name, process in processes.items():
                kib[name].append(process.memory_info().rss / 1024)
        assert {child for child in main.children() if child not in before} == set(workers), "a worker was replaced"
    marks = [len(at) // 10, len(at) // 2, len(at) - 1]
    return (
        {name: slope(at, values) for name, values in kib.items()},
        {name: [values[mark] / 1024 for mark in marks] for name, values in kib.items()},
    )


def evaluation_slope(images: int) -> float:
    """Slope of the main process over the evaluation of `images` small scenes, by a small network with 150 classes."""
    import psutil
    import torch

    from ssaseg.cli.scoring.evaluate import evaluate_model
    from ssaseg.datasets.synthetic import SyntheticScenes
    from ssaseg.models import build_model

    process, kib = psutil.Process(), []

    def measure(_: int) -> None:
        kib.append(process.memory_info().rss / 1024)

    scenes = SyntheticScenes(images, 96, 128)
    protocol = {"scale": None, "multiple": 32}
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    model = build_model("seaformer_b", 150).eval()
    evaluate_model(model, scenes, protocol, mean, std, torch.device("cpu"), workers=1, progress=measure)
    return slope(list(range(len(kib))), kib)
