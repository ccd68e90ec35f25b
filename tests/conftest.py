"""What must hold before PyTorch is imported by any test."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ssaseg  # noqa: F401 (sets GOMP_SPINCOUNT: threads that spin for long make the suite many times slower)

# pytest-xdist gives its processes a terminal of 80 columns; output to a pipe has none.
os.environ.pop("COLUMNS", None)
# The cores are for processes, of which `make test` runs one a core: networks and images here are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One process runs many tests, some of which measure its memory: freed memory goes back to the system.
os.environ.setdefault("SSASEG_ALLOCATOR", "system")

# Files whose tests take longest, a process each: those that begin last should be short.
FIRST = (
    "test_networks.py",
    "test_train.py",
    "test_export.py",
    "test_fidelity.py",
    "test_ranks.py",
    "test_general.py",
    "test_pretrained_files.py",
    "test_convert_families.py",
    "test_options.py",
    "test_warm_start.py",
    "test_convert.py",
    "test_huggingface.py",
)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody asks
def pytest_xdist_auto_num_workers() -> int:
    """Processes of `pytest -n auto`: a core each, and no more than memory is for."""
    from ssaseg.cli.device import count_cores

    return min(count_cores(), 8)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports make half a million objects, all of which stay: no collection scans them, then or during the tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))
    skipped = {} if os.environ.get("SSASEG_PARITY") else {"slow": "slow: `make parity`"}
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        skipped |= {} if torch.cuda.is_available() else {"gpu": "needs a CUDA GPU: `benchmarks/gpu.sh`"}
    for item in items:
        for marker, reason in skipped.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")  # before the fixtures of a module, whose bits its tests compare with
def one_thread() -> Iterator[None]:
    """For images so small that they only wait for a second thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    """`build_model` knows the networks of `tests/helpers/networks.py`."""
    from networks import tiny_networks

    with tiny_networks():
        yield


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    from fsspec.implementations.memory import MemoryFileSystem

    system = MemoryFileSystem()
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def _undrawn(*_: Any) -> None:
    """Stands for what draws a run's pictures after an evaluation."""


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Runs in this process draw nothing after an evaluation: it takes twenty times as long as a step of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:  # as tests of runs import it
            from ssaseg.cli.training import loop

            patch.setattr(loop, "after_evaluation", _undrawn)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw their pictures."""
    from ssaseg.cli.training import loop
    from ssaseg.cli.training.pictures import after_evaluation

    monkeypatch.setattr(loop, "after_evaluation", after_evaluation)


# As small as a run can be, and all that could make two runs differ: dropout, drop path, augmentation.
TINY_RUN = [
    "data.synthetic.height=64", "data.synthetic.width=64", "data.synthetic.train=8", "data.synthetic.val=2",
    "augment.scale=[64,64]", "augment.crop=[64,64]", "distill.group=2", "train.batch=2", "train.steps=6",
    "train.workers=0", "train.log_every=5", "train.eval_every=100", "train.save_every=100", "optim.warmup=0",
    "model.name=seaformer_z", "model.drop_path=0.1",
]  # fmt: skip


@pytest.fixture(scope="session")
def make_job() -> Callable[..., Any]:
    """A function (folder, overrides …, stored=state) → a `Job` on the CPU with its log, in this process."""
    import torch
    from networks import tiny_networks

    from ssaseg.cli.ranks.ranks import Ranks
    from ssaseg.cli.training.build import build_job
    from ssaseg.cli.training.log import MetricsLog
    from ssaseg.recipes import load_recipe

    def make(out: Path, *overrides: str, stored: dict[str, Any] | None = None) -> Any:
        out.mkdir(parents=True, exist_ok=True)
        with tiny_networks():
            job = build_job(load_recipe("demo", [*TINY_RUN, *overrides]), out, Ranks(torch.device("cpu")), stored)
        job.log = MetricsLog(out / "metrics.jsonl", job.progress.step, job.progress.evaluated)
        return job

    return make
