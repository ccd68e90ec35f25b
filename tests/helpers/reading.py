"""python reading.py SIGNAL: reads with two workers, catches the signal, still reads ten batches, and ends."""

import signal
import sys
import time

from ssaseg.datasets.loader import train_loader
from ssaseg.datasets.synthetic import SyntheticScenes
from ssaseg.datasets.transforms import TrainTransform

if __name__ == "__main__":
    caught: list[int] = []
    signal.signal(int(sys.argv[1]), lambda *_: caught.append(1))
    scenes = SyntheticScenes(10, 64, 64, 0, "train")
    stream = train_loader(scenes, TrainTransform((48, 32), (0.5, 2.0), (24, 32)), 0, 4, 2)
    next(stream), next(stream)  # one from each worker: both have started
    print("ready", flush=True)
    while not caught:
        time.sleep(0.01)
    for _ in range(10):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    print("saved", flush=True)
