"""The stream of training batches and of evaluation images, read by worker processes.

The stream has no state: sample number p (0, 1, 2, …) of a run depends only on the run's seed and p. Epoch e = p //
len(dataset) is a permutation seeded by (seed, e), and the augmentation of sample p is drawn from a generator seeded by
(seed, p). Therefore a run can start at any p, and the number of workers changes no pixel.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from ssaseg.datasets.base import Dataset
from ssaseg.datasets.transforms import DRAWS, TrainTransform, scaled_inputs
from ssaseg.datasets.workers import Work, read_ahead, shared_pixels

# First number of the seeds, so that epochs and samples get different random numbers.
EPOCH, SAMPLE = 0, 1


class Batch(NamedTuple):
    """Training samples on the CPU; `colour.prepare_batch` moves them to the device."""

    images: Tensor  # uint8 (N,h,w,3) BGR of the crop's size, padding 0; of other channels as many as the data has
    labels: Tensor  # uint8 (N,h,w) train ids, ignored and padding 255
    draws: Tensor  # float32 (N,5), see transforms.draw_distortion
    sizes: Tensor  # int64 (N,2), (h, w) of the image without padding
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
    rank: int = 0,
    ranks: int = 1,
    batch: int | None = None,
) -> Iterator[Batch]:
    """Endless batches of `micro_batch` samples, starting with sample number `start` of the stream.

    Closing the iterator ends the workers. A batch may cross the end of an epoch: no sample is dropped. workers: number
    of processes; 0: this process reads. pin_memory: for asynchronous copies to a CUDA device. rank, ranks: each `batch`
    samples are divided into `ranks` equal, consecutive blocks, and only the block of `rank` is read; its length is a
    multiple of `micro_batch`.

    Raises the data set's DataError or OSError for a sample that cannot be used, WorkerError where a worker ended.
    """
    rank_batch = micro_batch if batch is None else batch // ranks
    places = _places(micro_batch, rank_batch, rank_batch * ranks, start + rank * rank_batch)
    work = TrainWork(dataset, transform, seed)
    yield from read_ahead(work, _batches(len(dataset), seed, places), workers, pin_memory)


def eval_loader(
    dataset: Dataset,
    scale: Sequence[int] | None,
    multiple: int | None,
    workers: int,
    ratios: Sequence[float] = (1.0,),
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[list[Tensor], Tensor, str]]:
    """Every image in order, or those of `indices`: network inputs uint8 (h,w,3) BGR, one for each ratio; train ids
    uint8 (H,W) at the original size; name.

    scale, multiple, ratios: see `transforms.scaled_inputs`. Raises the same errors as `train_loader`.
    """
    indices = range(len(dataset)) if indices is None else indices
    yield from read_ahead(_EvalWork(dataset, scale, multiple, ratios), indices, workers)


def _permutation(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.random.RandomState([EPOCH, seed, epoch]).permutation(count)


def _places(size: int, block: int, step: int, first: int) -> Iterator[range]:
    """Endless positions of batches of `size`, from blocks of `block` samples starting at `first`, `first + step`, …"""
    for start in itertools.count(first, step):
        for position in range(start, start + block, size):
            yield range(position, position + size)


def _batches(count: int, seed: int, places: Iterable[range]) -> Iterator[list[tuple[int, int]]]:
    """For each range of positions a list of (position, index of the image)."""
    order, epoch = np.empty(0, np.int64), -1
    for positions in places:
        batch = []
        for position in positions:
            if position // count != epoch:
                epoch = position // count
                order = _permutation(epoch, count, seed)
            batch.append((position, int(order[position % count])))
        yield batch


class TrainWork(Work):
    """Makes a whole batch in one worker. Pixels are written once, into the memory that the main process receives."""

    def __init__(self, dataset: Dataset, transform: TrainTransform, seed: int) -> None:
        super().__init__(dataset)
        self.transform, self.seed = transform, seed
        self.bad_raw = (~dataset.valid_raw).astype(np.uint8)
        self.checked = bytearray(len(dataset))
        self.rng = np.random.RandomState(0)

    def __getitem__(self, samples: list[tuple[int, int]]) -> Batch:
        count, (height, width) = len(samples), self.transform.crop
        images = shared_pixels(count, height, width, self.transform.channels)
        labels = shared_pixels(count, height, width)
        arrays = list(zip(images.numpy(), labels.numpy(), strict=True))
        draws = np.empty((len(samples), DRAWS), np.float32)
        sizes = np.empty((len(samples), 2), np.int64)
        for row, (position, index) in enumerate(samples):
            # Seeded again for every sample, so that samples do not depend on others; a new generator would be slower.
            self.rng.seed([SAMPLE, self.seed, position])
            self.note(index)
            image, raw = self._load(index)
            sample = self.transform(image, raw, self.rng, self.dataset.label_lut, out=arrays[row])
            draws[row], sizes[row] = sample.draws, sample.size
        self.note(-1)
        return Batch(
            images,
            labels,
            torch.from_numpy(draws),
            torch.from_numpy(sizes),
            [self.dataset.name(index) for _, index in samples],
            [position for position, _ in samples],
        )

    def _load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and raw label. The ids are checked only when a worker reads the file for the first time."""
        image, raw = self.dataset.load_raw(index)
        if not self.checked[index]:
            if cv2.LUT(raw, self.bad_raw).any():
                raise self.dataset.label_error(index)
            self.checked[index] = True
        return image, raw


class _EvalWork(Work):
    """Reads one evaluation image."""

    def __init__(
        self, dataset: Dataset, scale: Sequence[int] | None, multiple: int | None, ratios: Sequence[float]
    ) -> None:
        super().__init__(dataset)
        self.scale, self.multiple, self.ratios = scale, multiple, ratios

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor, str]:
        self.note(index)
        image, label = self.dataset.load(index)
        name = self.dataset.name(index)
        arrays = [*scaled_inputs(image, self.scale, self.multiple, self.ratios, name), label]
        # Arrays of a cache are read-only; tensors cannot be.
        *inputs, labels = (torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays)
        self.note(-1)
        return inputs, labels, name
