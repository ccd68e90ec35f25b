"""The stream of training batches and of evaluation images, read by worker processes.

The stream has no state: sample number p (0, 1, 2, …) of a run is decided by the run's seed and p alone. Epoch e = p //
len(dataset) is a permutation seeded by (seed, e), and the augmentation of sample p is drawn from a generator seeded by
(seed, p). A run can therefore start at any p, and the number of workers changes no pixel.
"""

import itertools
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ssaseg.datasets import DataError, Dataset
from ssaseg.datasets.transforms import DRAWS, TrainTransform, test_image

# Batches or images that a worker prepares ahead of their use: a bound on memory.
PREFETCH = 2
# First word of the seeds, so that epochs and samples do not share random numbers.
EPOCH, SAMPLE = 0, 1
SIGNALS = {signal.SIGINT, signal.SIGTERM}


class Batch(NamedTuple):
    """Training samples on the CPU; `colour.prepare_batch` takes them to the device."""

    images: Tensor  # uint8 (N,h,w,3) BGR of the crop's size, padding 0
    labels: Tensor  # uint8 (N,h,w) train ids, ignored and padding 255
    draws: Tensor  # float32 (N,5), see transforms.draw_distortion
    sizes: Tensor  # int64 (N,2), (h, w) of the image proper
    names: list[str]
    positions: list[int]  # in the stream


def train_loader(
    dataset: Dataset,
    transform: TrainTransform,
    seed: int,
    micro_batch: int,
    workers: int,
    start: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Endless batches of `micro_batch` samples, beginning with number `start` of the stream.

    Closing the iterator ends the workers. Batches run on over the ends of epochs: no sample is dropped. workers:
    processes; 0 reads in this one. pin_memory: for copies to a CUDA device that do not wait. Raises the data set's own
    DataError or OSError for a sample that cannot be used.
    """
    work = TrainWork(dataset, transform, seed)
    yield from _run(work, _batches(len(dataset), seed, micro_batch, start), workers, pin_memory)


def eval_loader(
    dataset: Dataset, scale: Sequence[int] | None, multiple: int | None, workers: int
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Every image in order: network input uint8 (h,w,3) BGR, train ids uint8 (H,W) at the original size, name.

    scale, multiple: see `transforms.test_image`. Raises the data set's own DataError or OSError.
    """
    yield from _run(_EvalWork(dataset, scale, multiple), range(len(dataset)), workers)


def sample_index(position: int, count: int, seed: int) -> int:
    """Which of `count` images sample number `position` of the stream shows."""
    return int(_permutation(position // count, count, seed)[position % count])


def _permutation(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.random.RandomState([EPOCH, seed, epoch]).permutation(count)


def _batches(count: int, seed: int, size: int, start: int) -> Iterator[list[tuple[int, int]]]:
    """Endless lists of `size` pairs (position, index)."""
    order, epoch = np.empty(0, np.int64), -1
    for first in itertools.count(start, size):
        batch = []
        for position in range(first, first + size):
            if position // count != epoch:
                epoch = position // count
                order = _permutation(epoch, count, seed)
            batch.append((position, int(order[position % count])))
        yield batch


class TrainWork:
    """Makes a whole batch in one worker: the pixels are written once, into the arrays that are handed over."""

    def __init__(self, dataset: Dataset, transform: TrainTransform, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.bad_raw = (~dataset.valid_raw).astype(np.uint8)
        self.checked = bytearray(len(dataset))
        self.rng = np.random.RandomState(0)

    def __getitem__(self, samples: list[tuple[int, int]]) -> Batch:
        images, labels = self.transform.empty((len(samples),))
        draws = np.empty((len(samples), DRAWS), np.float32)
        sizes = np.empty((len(samples), 2), np.int64)
        for row, (position, index) in enumerate(samples):
            # Seeded anew for every sample, so that nothing is carried over; a new generator would take longer.
            self.rng.seed([SAMPLE, self.seed, position])
            image, raw = self._load(index)
            sample = self.transform(image, raw, self.rng, self.dataset.label_lut, out=(images[row], labels[row]))
            draws[row], sizes[row] = sample.draws, sample.size
        return Batch(
            torch.from_numpy(images),
            torch.from_numpy(labels),
            torch.from_numpy(draws),
            torch.from_numpy(sizes),
            [self.dataset.name(index) for _, index in samples],
            [position for position, _ in samples],
        )

    def _load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and raw label, whose ids are checked when a worker first reads the file, and not again."""
        image, raw = self.dataset.load_raw(index)
        if not self.checked[index]:
            if cv2.LUT(raw, self.bad_raw).any():
                raise self.dataset.label_error(index)
            self.checked[index] = True
        return image, raw


class _EvalWork:
    """Reads one evaluation image."""

    def __init__(self, dataset: Dataset, scale: Sequence[int] | None, multiple: int | None) -> None:
        self.dataset, self.scale, self.multiple = dataset, scale, multiple

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        image, label = self.dataset.load(index)
        image = test_image(image, self.scale, self.multiple)
        # Arrays of a cache are read-only, which tensors can't be.
        image, label = (np.require(array, requirements=["C", "W"]) for array in (image, label))
        return torch.from_numpy(image), torch.from_numpy(label), self.dataset.name(index)


class _Caught(torch.utils.data.Dataset[Any]):
    """Returns errors in the data instead of raising them: DataLoader would bury them in the text of a traceback."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.work[key]
        except (DataError, OSError) as error:
            return error


def _run(work: Any, keys: Iterable[Any], workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """`work[key]` for each key, in order, computed ahead by `workers` processes."""
    loader = DataLoader(
        _Caught(work),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_start_worker,
        # Forked workers share the pages of a data set's cache; elsewhere forking is unsafe.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # Otherwise it draws from the global generator, and a resumed run's dropout would differ.
        generator=torch.Generator(),
    )
    # Held back until each worker has said that signals are not for it: see `_start_worker`.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        while (item := next(iterator, None)) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        # The only reference: the workers end here, even if an error's traceback keeps this frame alive.
        del iterator


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_worker: int) -> None:
    """A worker has one thread, and signals meant for the command do not reach it: the main process says when to end."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        # Ctrl-C, and a SIGTERM to the whole process group, would end workers while the command still saves.
        os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
