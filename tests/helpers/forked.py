"""Functions in processes of their own that need no seconds to import PyTorch: forked from one that has it."""

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from ssaseg.cli import main
from ssaseg.cli.drawing import bars, curves, panels
from ssaseg.cli.scoring import evaluate
from ssaseg.cli.training import build, loop
from ssaseg.datasets import loader

PATIENCE = 600  # seconds, for what never comes: a busy machine may take long

# Also what optimisers and pictures import when they are first used. Nothing of it starts a thread.
CONTEXT = multiprocessing.get_context("forkserver")
READY = (torch, torch._dynamo, main, build, loop, evaluate, bars, curves, panels, loader)
CONTEXT.set_forkserver_preload([module.__name__ for module in READY])


class Descriptor:
    """A file descriptor of this process, to be had in another one."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getstate__(self) -> Any:
        return reduction.DupFd(self.number)

    def __setstate__(self, sent: Any) -> None:
        self.number = sent.detach()


def begin(function: Callable[..., object], given: tuple[Any, ...], env: dict[str, str], out: list[Descriptor]) -> None:
    gc.freeze()  # a collection would write to all objects that were there, and so copy their memory
    multiprocessing.current_process().daemon = False  # it may have workers
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background have it ignored
    for number, descriptor in enumerate(out, start=1):
        os.dup2(descriptor.number, number)
        os.close(descriptor.number)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    function(*given)


class Forked:
    """`function(*given)` in a session of its own, with those methods of `subprocess.Popen` that are asked for.

    What it says on stderr is added to the file `errors`, and stdout is dropped; without one, both are this process's.
    The function is one that can be imported: a helper's.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *given: Any,
        errors: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.errors = errors
        out = [1, 2]
        if errors is not None:
            out = [os.open(os.devnull, os.O_WRONLY), os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)]
        descriptors = [Descriptor(number) for number in out]
        words = (function, given, dict(os.environ if env is None else env), descriptors)
        self.process = CONTEXT.Process(target=begin, args=words, daemon=True)
        self.process.start()
        if errors is not None:
            for number in out:
                os.close(number)
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = PATIENCE) -> int:
        self.process.join(timeout)
        code = self.poll()
        if code is None:
            self.kill()
        assert code is not None, f"process {self.pid} had not ended after {timeout} seconds"
        return code

    def finish(self) -> tuple[int, str]:
        """Exit code, and what was said on stderr."""
        code = self.wait()
        assert self.errors is not None
        return code, self.errors.read_text()

    def wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < deadline
            assert self.poll() is None, self.errors and self.errors.read_text()
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
