"""The stream of training batches and of evaluation images, read by worker processes.

The stream has no state: sample number p (0, 1, 2, …) of a run is decided by the run's seed and p alone. Epoch e = p //
len(dataset) is a permutation seeded by (seed, e), and the augmentation of sample p is drawn from a generator seeded by
(seed, p). A run can therefore start at any p, and the number of workers changes no pixel.
"""

import itertools
import math
import os
import signal
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ssaseg.datasets.base import DataError, Dataset
from ssaseg.datasets.transforms import DRAWS, TrainTransform, scaled_inputs

# Batches or images that a worker prepares ahead of their use: a bound on memory.
PREFETCH = 2
# First word of the seeds, so that epochs and samples do not share random numbers.
EPOCH, SAMPLE = 0, 1
SIGNALS = {signal.SIGINT, signal.SIGTERM}


class WorkerError(RuntimeError):
    """A process that reads images was ended from outside, or crashed. Three lines: what and where, why, the mend."""


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
    rank: int = 0,
    ranks: int = 1,
    batch: int | None = None,
) -> Iterator[Batch]:
    """Endless batches of `micro_batch` samples, beginning with number `start` of the stream.

    Closing the iterator ends the workers. Batches run on over the ends of epochs: no sample is dropped. workers:
    processes; 0 reads in this one. pin_memory: for copies to a CUDA device that do not wait. Raises the data set's own
    DataError or OSError for a sample that cannot be used, WorkerError where a worker is gone.
    rank, ranks: of each `batch` samples, those that the rank computes: its part of `ranks` equal, consecutive ones,
    which is a multiple of `micro_batch`.
    """
    share = micro_batch if batch is None else batch // ranks
    places = _places(micro_batch, share, share * ranks, start + rank * share)
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
    """Every image in order, or those of `indices`: network inputs uint8 (h,w,3) BGR, one a ratio; train ids uint8 (H,W)
    at the original size; name.

    scale, multiple, ratios: see `transforms.scaled_inputs`. Raises as `train_loader`.
    """
    indices = range(len(dataset)) if indices is None else indices
    yield from read_ahead(_EvalWork(dataset, scale, multiple, ratios), indices, workers)


def sample_index(position: int, count: int, seed: int) -> int:
    """Which of `count` images sample number `position` of the stream shows."""
    return int(_permutation(position // count, count, seed)[position % count])


def _permutation(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.random.RandomState([EPOCH, seed, epoch]).permutation(count)


def _places(size: int, share: int, step: int, first: int) -> Iterator[range]:
    """Endless positions of batches of `size`: of every `step` samples the `share` ones from the `first` on."""
    for begin in itertools.count(first, step):
        for position in range(begin, begin + share, size):
            yield range(position, position + size)


def _batches(count: int, seed: int, places: Iterable[range]) -> Iterator[list[tuple[int, int]]]:
    """For each range of positions its pairs (position, index)."""
    order, epoch = np.empty(0, np.int64), -1
    for positions in places:
        batch = []
        for position in positions:
            if position // count != epoch:
                epoch = position // count
                order = _permutation(epoch, count, seed)
            batch.append((position, int(order[position % count])))
        yield batch


class Work(ABC):
    """What a worker does, and a note of where it is, which the main process can read when the worker is gone."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.notes = torch.empty(0)
        self.own = np.full(2, -1)

    @abstractmethod
    def __getitem__(self, key: Any) -> Any:
        """What is made for one key. Raises DataError or OSError, which reach the main process as they are."""

    def share_notes(self, workers: int) -> None:
        """Before workers start: one row each in shared memory, of its process's number and the image's index, or -1."""
        self.notes = torch.full((max(workers, 1), 2), -1)
        if workers:
            _share(self.notes)

    def take_row(self, worker: int) -> None:
        """In a worker: the row is its own from now on."""
        self.own = self.notes[worker].numpy()  # to write to a tensor takes 70 us
        self.own[0] = os.getpid()

    def note(self, index: int) -> None:
        """The image read from now on; -1: none."""
        self.own[1] = index

    def image_at(self, process: int) -> str | None:
        """Name of the image that a worker, by its process's number, was reading; None: it was between two."""
        for pid, index in self.notes.tolist():
            if pid == process and index >= 0:
                return self.dataset.name(index)
        return None


class TrainWork(Work):
    """Makes a whole batch in one worker: the pixels are written once, into the memory that is handed over."""

    def __init__(self, dataset: Dataset, transform: TrainTransform, seed: int) -> None:
        super().__init__(dataset)
        self.transform, self.seed = transform, seed
        self.bad_raw = (~dataset.valid_raw).astype(np.uint8)
        self.checked = bytearray(len(dataset))
        self.rng = np.random.RandomState(0)

    def __getitem__(self, samples: list[tuple[int, int]]) -> Batch:
        height, width = self.transform.crop
        images, labels = _pixels(len(samples), height, width, 3), _pixels(len(samples), height, width)
        arrays = list(zip(images.numpy(), labels.numpy(), strict=True))
        draws = np.empty((len(samples), DRAWS), np.float32)
        sizes = np.empty((len(samples), 2), np.int64)
        for row, (position, index) in enumerate(samples):
            # Seeded anew for every sample, so that nothing is carried over; a new generator would take longer.
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
        """Image and raw label, whose ids are checked when a worker first reads the file, and not again."""
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
        arrays = [*scaled_inputs(image, self.scale, self.multiple, self.ratios), label]
        # Arrays of a cache are read-only, which tensors can't be.
        *inputs, labels = (torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays)
        self.note(-1)
        return inputs, labels, self.dataset.name(index)


class _Caught(torch.utils.data.Dataset[Any]):
    """Returns errors in the data instead of raising them: DataLoader would bury them in the text of a traceback."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __getitem__(self, key: Any) -> Any:
        try:
            item = self.work[key]
            if torch.utils.data.get_worker_info() is not None:
                # Here, where its lack can be told: PyTorch's thread would print a traceback, and the command wait.
                _share(item)
            return item
        except (DataError, OSError, WorkerError) as error:
            return error


def _pixels(*shape: int) -> Tensor:
    """Uninitialised uint8; in a worker in shared memory, so that nothing is copied on handing it over."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    size = math.prod(shape)
    try:
        storage = torch.UntypedStorage._new_shared(size)
    except RuntimeError:
        raise _no_room(size) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _share(item: Any) -> None:
    """Move the tensors in nested sequences to shared memory, where they are not there already."""
    if isinstance(item, Tensor):
        try:
            item.share_memory_()
        except RuntimeError:
            raise _no_room(item.nbytes) from None
    elif isinstance(item, list | tuple):
        for part in item:
            _share(part)


def _no_room(size: int) -> WorkerError:
    return WorkerError(
        f"the shared memory (/dev/shm) is full: no room for {size / 2**20:.1f} MiB of pixels\n"
        f"expected room for {PREFETCH} batches a worker and two more\n"
        "give the container more, as docker's --shm-size does, or use fewer train.workers, or train.workers=0"
    )


def read_ahead(work: Work, keys: Iterable[Any], workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """`work[key]` for each key, in order, computed ahead by `workers` processes, which live as long as the iterator."""
    work.share_notes(workers)
    others = active_children()
    with warnings.catch_warnings():
        # More workers than cores: the recipe says how many, and a published one cannot know the machine.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        iterator = _start(_loader(work, keys, workers, pin_memory))
    processes = [child for child in active_children() if child not in others]
    try:
        while (item := _take(iterator, processes, work)) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        # The only reference: the workers end here, even if an error's traceback keeps this frame alive.
        del iterator


def _loader(work: Work, keys: Iterable[Any], workers: int, pin_memory: bool) -> DataLoader[Any]:
    return DataLoader(
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


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, with this process's handling of signals as it was."""
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    # Held back until each worker has said that signals are not for it: see `_start_worker`.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if handler is not None and threading.current_thread() is threading.main_thread():
        # PyTorch's handler raises wherever the command happens to be, in the middle of a step or of saving. Without it
        # a worker that is gone shows when its work is missed, at most five seconds later.
        signal.signal(signal.SIGCHLD, handler)
    return iterator


def _take(iterator: Iterator[Any], processes: Sequence[BaseProcess], work: Work) -> Any:
    """The next item, None after the last. Raises WorkerError where it cannot come because a worker is gone."""
    try:
        return next(iterator, None)
    except (RuntimeError, OSError, EOFError):
        # A broken connection shows a moment before its process has ended.
        ended = wait([process.sentinel for process in processes], timeout=2) if processes else []
        for process in processes:
            if process.sentinel in ended:
                process.join()
        gone = next((process for process in processes if process.exitcode), None)
        if gone is None:
            raise
        raise WorkerError(_obituary(gone.exitcode or 0, work.image_at(gone.pid or 0))) from None


def _obituary(exitcode: int, image: str | None) -> str:
    """Three lines on a worker that ended with `exitcode` (negative: a signal's number) while it read `image`."""
    names = {-number: number.name for number in signal.Signals}
    how = names.get(exitcode, f"exit code {exitcode}")
    causes = {
        "SIGKILL": "killed from outside: most often the system, because the memory was used up",
        "SIGBUS": "most often the shared memory (/dev/shm) was used up",
        "SIGSEGV": "its decoder crashed: most often on a damaged file",
    }
    where, look = (f"while it read image {image}", ", or look at that image") if image else ("between two images", "")
    return (
        f"a process that reads images ended with {how} {where}\n"
        f"{causes.get(how, 'ended from outside, or by a crash')}\n"
        f"use fewer train.workers, a smaller train.micro_batch or data.cache=false{look}"
    )


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(worker: int) -> None:
    """A worker has one thread, and signals meant for the command do not reach it: the main process says when to end."""
    info = torch.utils.data.get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, _Caught)
    info.dataset.work.take_row(worker)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        # Ctrl-C, and a SIGTERM to the whole process group, would end workers while the command still saves.
        os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
