"""Worker processes that read images ahead: their start, the wait for them, and how their failures are reported."""

import errno
import math
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import active_children, queues
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ssaseg.datasets.base import DataError, Dataset

# Batches or images that a worker prepares ahead of their use: this limits the memory.
PREFETCH = 2
SIGNALS = {signal.SIGINT, signal.SIGTERM}
# While an item is missing: every so many seconds it is checked whether its worker still lives. An item that is still
# missing after the second time will probably never come.
LOOK, LONGEST_WAIT = 2, 1800
NO_DESCRIPTORS, NOT_SENT = 74, 75  # exit codes of workers


class WorkerError(RuntimeError):
    """A process that reads images crashed or was killed. Three lines: how and where, the likely cause, the fix."""


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
            return _no_descriptors() if _is_descriptors(error) else error


def shared_pixels(*shape: int) -> Tensor:
    """Uninitialised uint8; in a worker in shared memory, so that the main process receives it without a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    size = math.prod(shape)
    try:
        storage = torch.UntypedStorage._new_shared(size)
    except RuntimeError as error:
        raise (_no_descriptors() if _is_descriptors(error) else _no_room(size)) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _to_shared_memory(item: Any) -> None:
    """Move the tensors in nested sequences to shared memory, except those that are already in it."""
    if isinstance(item, Tensor):
        try:
            item.share_memory_()
        except RuntimeError as error:
            raise (_no_descriptors() if _is_descriptors(error) else _no_room(item.nbytes)) from None
    elif isinstance(item, list | tuple):
        for each in item:
            _to_shared_memory(each)


def _no_room(size: int) -> WorkerError:
    return WorkerError(
        f"the shared memory (/dev/shm) is full: no space for {size / 2**20:.1f} MiB of pixels\n"
        f"expected space for {PREFETCH} batches for each worker and two more\n"
        "give the container more shared memory (docker: --shm-size), or use fewer train.workers, or train.workers=0"
    )


def _is_descriptors(error: BaseException) -> bool:
    """Whether no more files can be opened. PyTorch has only the text of such an error."""
    return getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error)


def _no_descriptors() -> WorkerError:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return WorkerError(
        f"too many open files: a process may have {most} at once\n"
        "expected more: images go from a worker to the command through open files\n"
        "raise the limit, for example with `ulimit -n 4096`, or use fewer train.workers, or train.workers=0"
    )


def read_ahead(work: Work, keys: Iterable[Any], workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """`work[key]` for each key, in order, computed ahead by `workers` processes, which end with the iterator.

    Raises WorkerError where a worker ended, where an item is missing for too long, and where no file can be opened.
    """
    others = active_children()
    if workers:
        _require_short(tempfile.gettempdir())
    try:
        work.make_notes(workers)
        with warnings.catch_warnings():
            # A warning about more workers than cores: a published recipe sets a number for all machines.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            iterator = _start(_loader(work, keys, workers, pin_memory))
    except (OSError, RuntimeError) as error:
        if _is_descriptors(error):
            raise _no_descriptors() from None
        raise
    processes = [child for child in active_children() if child not in others]
    try:
        while (item := _take(iterator, processes, work)) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    except GeneratorExit:
        raise
    except BaseException:
        # A worker that waits for a disk would only end after the time that PyTorch gives it.
        for process in processes:
            process.terminate()
        raise
    finally:
        # The workers end here. PyTorch does it in a destructor, where an exception, as of a second Ctrl-C, would be
        # printed with a traceback and lost.
        end = getattr(iterator, "_shutdown_workers", None)  # an iterator without workers has none
        if end is not None:
            end()


def _require_short(folder: str) -> None:
    """Raises WorkerError where Python's sockets in the folder for temporary files would have names that are too long.

    Their names have 32 characters more, and the system allows about 104.
    """
    if len(os.fsencode(folder)) > 70:
        raise WorkerError(
            f"{folder}: this folder for temporary files has too long a name for the sockets of workers\n"
            "expected at most 70 characters\n"
            "set a shorter one, such as TMPDIR=/tmp, or use train.workers=0"
        )


def _loader(work: Work, keys: Iterable[Any], workers: int, pin_memory: bool) -> DataLoader[Any]:
    return DataLoader(
        _Caught(work),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        timeout=LOOK if workers else 0,
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
    """The next item, None after the last. Raises WorkerError where a worker ended before it made the item, or where
    it is still missing after `LONGEST_WAIT`.
    """
    until = time.monotonic() + LONGEST_WAIT
    while True:
        try:
            return next(iterator, None)
        except (RuntimeError, OSError, EOFError) as error:
            # After `LOOK`, and the iterator is unchanged.
            if str(error).startswith("DataLoader timed out"):
                if time.monotonic() < until:
                    continue
                raise _too_late(processes, work) from None
            if _is_descriptors(error):
                raise _no_descriptors() from None
            # The connection breaks a moment before the process has ended.
            ended = wait([process.sentinel for process in processes], timeout=2) if processes else []
            for process in processes:
                if process.sentinel in ended:
                    process.join()
            gone = next((process for process in processes if process.exitcode), None)
            if gone is None:
                raise
            if gone.exitcode == NO_DESCRIPTORS:
                raise _no_descriptors() from None
            raise WorkerError(_describe_killed(gone.exitcode or 0, work.image_at(gone.pid or 0))) from None


def _too_late(processes: Sequence[BaseProcess], work: Work) -> WorkerError:
    reading = [name for process in processes if (name := work.image_at(process.pid or 0)) is not None]
    where = f", while it reads image {reading[0]}" if reading else ""
    return WorkerError(
        f"nothing came from a process that reads images for {LONGEST_WAIT / 60:g} minutes{where}\n"
        "most often a disk or network that does not answer\n"
        "check the disk that the images are on, or use a smaller train.micro_batch"
    )


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
    # Called in the thread that sends items, where an error is printed, and the command would wait for ever.
    queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]
    sys.excepthook = _uncaught  # of the thread that hands over open files
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        # Ctrl-C, or a SIGTERM to the whole process group, would end the workers while the command still saves.
        os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _end_worker(error: Exception, _: Any) -> None:
    """In a worker, when an item cannot be sent."""
    if _is_descriptors(error):
        os._exit(NO_DESCRIPTORS)
    traceback.print_exception(error)
    os._exit(NOT_SENT)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if _is_descriptors(error):
        os._exit(NO_DESCRIPTORS)
    sys.__excepthook__(kind, error, trace)
