"""A process that reads images when a signal comes."""

import signal
import time
from pathlib import Path

from ssaseg.datasets.loader import train_loader
from ssaseg.datasets.synthetic import SyntheticScenes
from ssaseg.datasets.transforms import TrainTransform


def read_on(number: int, ready: Path, saved: Path) -> None:
    """Reads with two workers, makes `ready`, catches the signal, still reads ten batches, and makes `saved`."""
    caught: list[int] = []
    signal.signal(number, lambda *_: caught.append(1))
    scenes = SyntheticScenes(10, 64, 64, 0, "train")
    stream = train_loader(scenes, TrainTransform((48, 32), (0.5, 2.0), (24, 32)), 0, 4, 2)
    next(stream), next(stream)  # one from each worker: both have started
    ready.touch()
    while not caught:
        time.sleep(0.01)
    for _ in range(10):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    saved.touch()
