"""The stream of training batches and of evaluation images, read by worker processes.

The stream has no state: sample number p (0, 1, 2, …) of a run depends only on the run's seed and p. Epoch e = p //
len(dataset) is a permutation seeded by (seed, e), and the augmentation of sample p is drawn from a generator seeded by
(seed, p). Therefore a run can start at any p, and the number of workers changes no pixel.
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

# Batches or images that a worker prepares ahead of their use: this limits the memory.
PREFETCH = 2
# First number of the seeds, so that epochs and samples get different random numbers.
EPOCH, SAMPLE = 0, 1
SIGNALS = {signal.SIGINT, signal.SIGTERM}


class WorkerError(RuntimeError):
    """A process that reads images crashed or was killed. Three lines: how and where, the likely cause, the fix."""


class Batch(NamedTuple):
    """Training samples on the CPU; `colour.prepare_batch` moves them to the device."""

    images: Tensor  # uint8 (N,h,w,3) BGR of the crop's size, padding 0
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


class Work(ABC):
    """The work of a worker process. A worker notes which image it reads; the main process can read this note even
    after the worker ended.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.notes = torch.empty(0)
        self.row = np.full(2, -1)

    @abstractmethod
    def __getitem__(self, key: Any) -> Any:
        """The item for one key. DataError and OSError that it raises reach the main process unchanged."""

    def make_notes(self, workers: int) -> None:
        """Before workers start: a row in shared memory for each of them: its process id and an image's index, or -1."""
        self.notes = torch.full((max(workers, 1), 2), -1)
        if workers:
            _to_shared_memory(self.notes)

    def take_row(self, worker: int) -> None:
        """In a worker: use this row for its notes from now on."""
        self.row = self.notes[worker].numpy()  # writing to a tensor would take 70 us
        self.row[0] = os.getpid()

    def note(self, index: int) -> None:
        """Note the image that is read from now on; -1: none."""
        self.row[1] = index

    def image_at(self, process: int) -> str | None:
        """Name of the image that the worker with this process id was reading; None: it was not reading an image."""
        for pid, index in self.notes.tolist():
            if pid == process and index >= 0:
                return self.dataset.name(index)
        return None


class TrainWork(Work):
    """Makes a whole batch in one worker. Pixels are written once, into the memory that the main process receives."""

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
        arrays = [*scaled_inputs(image, self.scale, self.multiple, self.ratios), label]
        # Arrays of a cache are read-only; tensors cannot be.
        *inputs, labels = (torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays)
        self.note(-1)
        return inputs, labels, self.dataset.name(index)


class _Caught(torch.utils.data.Dataset[Any]):
    """Returns errors in the data instead of raising them: DataLoader would hide them in the text of a traceback."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __getitem__(self, key: Any) -> Any:
        try:
            item = self.work[key]
            if torch.utils.data.get_worker_info() is not None:
                # Here a lack of shared memory can be reported. In PyTorch's own thread it would only print a
                # traceback, and the command would wait forever.
                _to_shared_memory(item)
            return item
        except (DataError, OSError, WorkerError) as error:
            return error


def _pixels(*shape: int) -> Tensor:
    """Uninitialised uint8; in a worker in shared memory, so that the main process receives it without a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    size = math.prod(shape)
    try:
        storage = torch.UntypedStorage._new_shared(size)
    except RuntimeError:
        raise _no_room(size) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _to_shared_memory(item: Any) -> None:
    """Move the tensors in nested sequences to shared memory, except those that are already in it."""
    if isinstance(item, Tensor):
        try:
            item.share_memory_()
        except RuntimeError:
            raise _no_room(item.nbytes) from None
    elif isinstance(item, list | tuple):
        for each in item:
            _to_shared_memory(each)


def _no_room(size: int) -> WorkerError:
    return WorkerError(
        f"the shared memory (/dev/shm) is full: no space for {size / 2**20:.1f} MiB of pixels\n"
        f"expected space for {PREFETCH} batches for each worker and two more\n"
        "give the container more shared memory (docker: --shm-size), or use fewer train.workers, or train.workers=0"
    )


def read_ahead(work: Work, keys: Iterable[Any], workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """`work[key]` for each key, in order, computed ahead by `workers` processes, which end with the iterator."""
    work.make_notes(workers)
    others = active_children()
    with warnings.catch_warnings():
        # A warning about more workers than cores: a published recipe sets a number for all machines.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        iterator = _start(_loader(work, keys, workers, pin_memory))
    processes = [child for child in active_children() if child not in others]
    try:
        while (item := _take(iterator, processes, work)) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        # This is the only reference: the workers end here, even if the traceback of an error keeps this frame alive.
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
        # Forked workers use the same memory for the cache of a data set. On other systems forking is not safe.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # Otherwise it would draw from the global generator, and the dropout of a resumed run would differ.
        generator=torch.Generator(),
    )


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator; the handling of signals in this process stays unchanged."""
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    # Signals are blocked until each worker has decided which of them to ignore: see `_start_worker`.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if handler is not None and threading.current_thread() is threading.main_thread():
        # PyTorch's handler raises at any place, even in the middle of a step or while a file is saved. Without it, a
        # worker that ended is noticed when its next item is missing, at most five seconds later.
        signal.signal(signal.SIGCHLD, handler)
    return iterator


def _take(iterator: Iterator[Any], processes: Sequence[BaseProcess], work: Work) -> Any:
    """The next item, None after the last. Raises WorkerError where a worker ended before it made the item."""
    try:
        return next(iterator, None)
    except (RuntimeError, OSError, EOFError):
        # The connection breaks a moment before the process has ended.
        ended = wait([process.sentinel for process in processes], timeout=2) if processes else []
        for process in processes:
            if process.sentinel in ended:
                process.join()
        gone = next((process for process in processes if process.exitcode), None)
        if gone is None:
            raise
        raise WorkerError(_describe_killed(gone.exitcode or 0, work.image_at(gone.pid or 0))) from None


def _describe_killed(exitcode: int, image: str | None) -> str:
    """Three lines about a worker that ended with `exitcode` (negative: a signal's number) while it read `image`."""
    names = {-number: number.name for number in signal.Signals}
    how = names.get(exitcode, f"exit code {exitcode}")
    causes = {
        "SIGKILL": "killed from outside: most often by the system, because the memory was used up",
        "SIGBUS": "most often because the shared memory (/dev/shm) was used up",
        "SIGSEGV": "its decoder crashed: most often because of a damaged file",
    }
    where, look = (f"while it read image {image}", ", or check that image") if image else ("between two images", "")
    return (
        f"a process that reads images ended with {how} {where}\n"
        f"{causes.get(how, 'it was killed from outside, or it crashed')}\n"
        f"use fewer train.workers, a smaller train.micro_batch or data.cache=false{look}"
    )


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(worker: int) -> None:
    """A worker has one thread, and ignores signals that are meant for the command: the main process ends it."""
    info = torch.utils.data.get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, _Caught)
    info.dataset.work.take_row(worker)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        # Ctrl-C, or a SIGTERM to the whole process group, would end the workers while the command still saves.
        os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
