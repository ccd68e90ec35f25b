"""Work on several images at the same time: threads that read, label and write."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import cv2
import torch

from ssaseg.cli.device import count_cores
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.limit import free_memory
from ssaseg.cli.signals import StopSignal

THREAD_NAME = "predict"  # the names of all threads start with it
# Most images that are labelled side by side: more networks would wait for Python's lock.
MOST_LANES = 8
# Images for each lane below which all cores work on one image: the last images would leave lanes without work.
FEWEST = 8
# Bytes that one image takes for each pixel of the network's input, at most (SegNeXt-T with SSA: 700), and the share of
# the free memory that all lanes may take.
BYTES, SHARE = 1500, 0.5
# Pixels of a network's input above which evaluation computes an image alone, by all cores: more than 1920×1080.
LARGE = 2_200_000

Item = TypeVar("Item")
Made = TypeVar("Made")


def count_lanes(images: int, pixels: int) -> int:
    """How many images to label side by side on a CPU, each with its share of the cores; 1: one after the other.

    One image on two cores takes more than half as long as on one core, so that lanes are faster. images: that are to be
    labelled; pixels: of a network's input.
    """
    lanes = min(count_cores(), MOST_LANES)
    free = free_memory()
    if free is not None:
        lanes = min(lanes, int(SHARE * free / (BYTES * max(pixels, 1))))
    return lanes if lanes > 1 and images >= FEWEST * lanes else 1


@contextmanager
def shared_cores(lanes: int) -> Iterator[Callable[[], None]]:
    """Divides the cores among `lanes` threads; yields what each of these threads must call first."""
    before, decoder = torch.get_num_threads(), cv2.getNumThreads()
    share = max(before // lanes, 1)
    cv2.setNumThreads(share)
    try:
        # PyTorch keeps the number for each thread.
        yield lambda: torch.set_num_threads(share)
    finally:
        cv2.setNumThreads(decoder)
        torch.set_num_threads(before)


class Room:
    """The cores and the memory for threads that compute one image each.

    How many cores compute an image depends on its size alone: other numbers of threads round in other ways, and a score
    must depend neither on the number of images nor on the free memory. Images of more than `LARGE` pixels are computed
    alone, by all cores. Smaller ones are computed side by side, each by `share` cores, at most `lanes` of them, and as
    many as `SHARE` of the free memory holds. lanes: so many at most, each by as large a share of the cores as there is.
    """

    def __init__(self, lanes: int | None = None) -> None:
        self.threads = torch.get_num_threads()
        self.share = -(-self.threads // MOST_LANES) if lanes is None else max(self.threads // lanes, 1)
        self.lanes = self.threads // self.share
        free = free_memory()
        self.pixels = self.lanes * LARGE
        if free is not None:
            self.pixels = max(min(self.pixels, int(SHARE * free / BYTES)), 1)
        self.left = self.pixels
        self.changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Inside this context an image whose network input has so many pixels is in work; waits for the room.

        The calling thread then has the cores for it.
        """
        needed = min(pixels, self.pixels) if pixels <= LARGE else self.pixels
        with self.changed:
            self.changed.wait_for(lambda: self.left >= needed)
            self.left -= needed
        try:
            torch.set_num_threads(self.share if pixels <= LARGE else self.threads)  # PyTorch keeps it for each thread
            yield
        finally:
            with self.changed:
                self.left += needed
                self.changed.notify_all()


def in_order(
    function: Callable[[Item], Made],
    items: Iterable[Item],
    threads: int,
    stop: StopSignal | None = None,
    first: Callable[[], None] | None = None,
    ahead: int | None = None,
) -> Generator[Made, None, None]:
    """`function` of each item, in the items' order. `threads` threads compute at most `ahead` items ahead; by default
    as many as there are threads. One thread computes the items in their order too.

    An exception of `function` is raised when its item is due. To stop early, close the generator: it waits for the
    items that are being computed, except after a second signal to `stop`. first: called once in each thread.
    """
    pool = ThreadPoolExecutor(threads, THREAD_NAME, first)
    pending: deque[Future[Made]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > (threads if ahead is None else ahead):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        running = [future for future in pending if not future.cancel()]
        pool.shutdown(wait=False)
        if stop is None or not stop.saved:
            wait(running)  # unlike shutdown, a signal interrupts it


def leave_if_busy(stop: StopSignal) -> None:
    """Ends the process after a second signal if a thread does not end: at its exit Python would wait for the thread."""
    limit = time.monotonic() + 1
    busy = [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]
    for thread in busy:
        thread.join(max(0, limit - time.monotonic()))
    alive = any(thread.is_alive() for thread in busy)
    if stop.saved and (alive or stop.number == signal.SIGTERM):  # of Ctrl-C the command's end prints it
        echo("stopped", err=True)
    if stop.saved and alive:
        os._exit(stop.exit_code)
