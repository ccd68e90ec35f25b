"""Workers that are killed, and files that are damaged, in the middle of training: told by name, and nothing is lost."""

import errno
import itertools
import os
import signal
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import torch
from changes import (
    Change,
    command,
    few_files,
    file_damaged_in_steps,
    impatient_with_workers,
    waiting_at,
    worker_killed_at,
)
from forked import Forked
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ssaseg.cli import signals
from ssaseg.cli.data.reading import read_through
from ssaseg.cli.scoring.evaluate import read
from ssaseg.datasets import workers
from ssaseg.datasets.loader import eval_loader, train_loader
from ssaseg.datasets.synthetic import SyntheticScenes
from ssaseg.datasets.transforms import TrainTransform
from ssaseg.datasets.workers import WorkerError

TINY = [
    "augment.scale=[64,64]", "augment.crop=[64,64]", "distill.group=2", "train.batch=4", "train.micro_batch=2",
    "train.steps=6", "train.workers=2", "train.log_every=2", "train.eval_every=1000", "train.save_every=1000",
]  # fmt: skip
SCENES = ["data.synthetic.height=64", "data.synthetic.width=64", "data.synthetic.train=12", "data.synthetic.val=2"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOOK", 0.2)


class Deadly(SyntheticScenes):
    """Whoever reads image `last` gets a signal."""

    def __init__(self, number: signal.Signals, last: int) -> None:
        super().__init__(12, 64, 64, 0, "train")
        self.number, self.last = number, last

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == self.last:
            os.kill(os.getpid(), self.number)
            time.sleep(10)
        return super().load(index)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("number", "cause"),
    [(signal.SIGKILL, "memory was used up"), (signal.SIGBUS, "/dev/shm"), (signal.SIGSEGV, "damaged file")],
)
def test_a_crash_names_signal_image_and_cause(number: signal.Signals, cause: str) -> None:
    dataset = Deadly(number, last=5)
    seen = []
    with pytest.raises(WorkerError) as caught:
        seen.extend(name for _, _, name in eval_loader(dataset, None, None, workers=2))
    assert seen == [dataset.name(i) for i in range(len(seen))]
    assert len(seen) <= 5
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert f"{number.name} while it read image {dataset.name(5)}" in lines[0]
    assert cause in lines[1]
    assert "train.workers" in lines[2]


@pytest.mark.usefixtures("impatient")
def test_a_worker_killed_between_batches_interrupts_nothing() -> None:
    """The death shows in `next`, not in what the command does meanwhile, which may be a step or a save."""
    children = set(psutil.Process().children())
    transform = TrainTransform((64, 48), (0.5, 2.0), (32, 32))
    stream = train_loader(SyntheticScenes(12, 64, 64, 0, "train"), transform, 0, 2, workers=2)
    next(stream)
    worker, other = set(psutil.Process().children()) - children
    worker.kill()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        sum(range(1000))  # a signal handler would raise here
    with pytest.raises(WorkerError, match=r"SIGKILL (between|while).*\nkilled from outside"):
        list(itertools.islice(stream, 20))
    assert psutil.wait_procs([other], timeout=5)[1] == []


def train(out: Path, *arguments: str, change: Change | None = None) -> Forked:
    """`ssaseg train demo` in a process of its own, after the change."""
    changes = [impatient_with_workers, *([change] if change else [])]
    words = ["train", "demo", *TINY, "--device", "cpu", "--out", str(out), *arguments]
    return Forked(command, words, *changes, errors=out.with_suffix(".errors"))


def stopped_step(out: Path, errors: str) -> int:
    """The step of the saved state, which the message must name. The error has no traceback and at most three lines."""
    state = max(out.glob("state-*.pt"), key=lambda path: int(path.stem.removeprefix("state-")))
    step = torch.load(state, weights_only=True)["progress"]["step"]
    assert f"stopped after step {step}; state saved" in errors
    assert "Traceback" not in errors
    assert len(errors[errors.index("error: ") :].splitlines()) <= 3
    return step


def test_training_goes_on_after_a_killed_worker_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """No state is saved on schedule before the end, so that all of the first steps would be lost."""
    undisturbed = train(tmp_path / "undisturbed", *SCENES)
    code, errors = train(tmp_path / "run", *SCENES, change=partial(worker_killed_at, 12)).finish()
    assert undisturbed.wait() == 0, undisturbed.finish()[1]
    assert code == 2, errors
    # Batches that the worker had read before, but not yet sent, are lost with it.
    assert stopped_step(tmp_path / "run", errors) in (1, 2, 3)
    assert "SIGKILL while it read image" in errors
    code, errors = train(tmp_path / "run", *SCENES, "--resume").finish()
    assert code == 0, errors
    ours, theirs = (load_file(tmp_path / run / "last.safetensors") for run in ("run", "undisturbed"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_file_damaged_after_the_check_is_named(tmp_path: Path) -> None:
    scenes = SyntheticScenes(12, 64, 64, 0, "train")
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(12 if split == "train" else 2):
            for kind, pixels in zip(("images", "masks"), scenes.load(i), strict=True):
                cv2.imwrite(str(tmp_path / kind / split / f"{i}.png"), pixels)
    folders = [f"data.{split}={{images: images/{split}, masks: masks/{split}}}" for split in ("train", "val")]
    classes = f"data.classes=[{', '.join(scenes.classes)}]"
    data = ["data.dataset=folder", f"data.root={tmp_path}", "data.palette=null", classes, *folders]
    file = tmp_path / "masks" / "train" / "7.png"
    whole = file.read_bytes()
    code, errors = train(tmp_path / "run", *data, change=partial(file_damaged_in_steps, file)).finish()
    assert code == 2, errors
    assert f"error: {file}: damaged mask" in errors
    assert 1 <= stopped_step(tmp_path / "run", errors) <= 6
    file.write_bytes(whole)
    code, errors = train(tmp_path / "run", *data, "--resume").finish()
    assert code == 0, errors


def test_shared_memory_that_is_full_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with docker's 64 MiB, where PyTorch prints a traceback and waits for ever."""

    def full(size: int) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    transform = TrainTransform((64, 64), (0.5, 2.0), (512, 512))
    stream = train_loader(SyntheticScenes(12, 64, 64, 0, "train"), transform, 0, 4, workers=1)
    with pytest.raises(WorkerError, match=r"/dev/shm\) is full: no space for 3\.0 MiB of pixels\n.*\n.*--shm-size"):
        next(stream)


# ---- waits that never end, and files that cannot be opened ---------------------------------------------------------
class Endless(SyntheticScenes):
    """Image `last` never comes: in a quarter of an hour."""

    def __init__(self, last: int) -> None:
        super().__init__(12, 64, 64, 0, "train")
        self.last = last

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == self.last:
            time.sleep(1000)
        return super().load(index)


@pytest.mark.usefixtures("impatient")
def test_a_wait_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LONGEST_WAIT", 3)
    children = set(psutil.Process().children())
    dataset = Endless(last=3)
    with pytest.raises(WorkerError) as caught:
        list(eval_loader(dataset, None, None, workers=2))
    assert len(str(caught.value).splitlines()) == 3
    assert f"while it reads image {dataset.name(3)}" in str(caught.value)
    left = set(psutil.Process().children()) - children
    assert all(worker.status() == psutil.STATUS_ZOMBIE for worker in left)


class Unsendable:
    """What a worker cannot send: the error comes in PyTorch's own thread."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> str:
        raise self.error


class Sending(workers.Work):
    def __init__(self, error: Exception) -> None:
        super().__init__(SyntheticScenes(2, 64, 64, 0, "train"))
        self.error = error

    def __getitem__(self, key: int) -> object:
        return Unsendable(self.error) if key else key


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("error", "part"),
    [(OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
     (RuntimeError("unable to open shared memory: Too many open files (24)"), "ulimit -n"),
     (RuntimeError("other"), "ended with exit code 75")],
)  # fmt: skip
def test_what_cannot_be_sent_is_reported(error: Exception, part: str) -> None:
    stream = workers.read_ahead(Sending(error), range(2), 1)
    assert next(stream) == 0
    with pytest.raises(WorkerError) as caught:
        next(stream)
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def no_files(*_: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_files_that_cannot_be_opened_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = SyntheticScenes(2, 64, 64, 0, "train")
    monkeypatch.setattr(scenes, "load", no_files)
    with pytest.raises(WorkerError, match="ulimit -n"):  # while an image is read
        next(eval_loader(scenes, None, None, workers=0))
    monkeypatch.setattr(workers, "_start", no_files)
    with pytest.raises(WorkerError, match="ulimit -n"):  # while workers start
        next(eval_loader(scenes, None, None, workers=1))
    monkeypatch.setattr(Tensor, "share_memory_", no_files)
    with pytest.raises(WorkerError, match="ulimit -n"):
        next(eval_loader(scenes, None, None, workers=1))


def test_a_long_name_of_the_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets in it would have too long a name: a thread prints a traceback, and the items do not come."""
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 80 * "d")
    stream = eval_loader(SyntheticScenes(2, 64, 64, 0, "train"), None, None, workers=1)
    with pytest.raises(WorkerError, match="TMPDIR"):
        next(iter(stream))


@pytest.mark.parametrize("more", [8, 14])
def test_a_command_without_files_ends(tmp_path: Path, more: int) -> None:
    code, errors = train(tmp_path / "run", *SCENES, "train.workers=1", change=partial(few_files, more)).finish()
    assert code == 2, errors
    assert "Traceback" not in errors
    assert "oo many open files" in errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("count", [0, 1])
def test_a_signal_ends_a_wait_and_what_is_done_is_saved(tmp_path: Path, number: int, code: int, count: int) -> None:
    began = tmp_path / "began"
    run = train(tmp_path / "run", *SCENES, f"train.workers={count}", change=partial(waiting_at, 8, began))
    log = tmp_path / "run" / "metrics.jsonl"
    # A worker prepares the batch ahead: what came before it has to be done, too.
    run.wait_until(lambda: began.exists() and log.exists() and '"step": 2' in log.read_text())
    run.send_signal(number)
    ended, errors = run.finish()
    assert ended == code, errors
    assert stopped_step(tmp_path / "run", errors + "error: ") == 2


def test_a_signal_ends_the_wait_of_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE", 0.2)
    with signals.StopSignal() as stop:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert len(list(read(eval_loader(Endless(last=2), None, None, workers=0), stop))) == 2
        assert stop.requested
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(SystemExit) as caught:  # `data check` and `data init`
            read_through(Endless(last=2), "read")
        assert caught.value.code == 143
        # The signal came before the wait.
        with pytest.raises(signals.Interrupted), stop.ending_waits():
            time.sleep(5)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_second_ctrl_c_while_workers_end_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    end = _MultiProcessingDataLoaderIter._shutdown_workers

    def interrupted(iterator: Any) -> None:
        monkeypatch.undo()
        end(iterator)
        raise KeyboardInterrupt

    stream = eval_loader(SyntheticScenes(4, 64, 64), None, None, workers=1)
    next(stream)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.close()  # type: ignore[attr-defined]
