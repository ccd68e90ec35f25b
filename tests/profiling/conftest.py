"""A small network and its picture, built once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ssaseg.cli.engine.opening import Opened
from ssaseg.cli.profiling import latency
from ssaseg.cli.profiling.scene import Picture, picture_of
from ssaseg.cli.profiling.targets import open_targets
from ssaseg.models import build_model, save_model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No warm-up, and one thread: two wait for each other where other tests run beside these."""
    monkeypatch.setattr(latency, "WARM_UP", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def network() -> Opened:
    (opened,) = open_targets("seaformer_t", ["ssa"], 5)
    return opened


@pytest.fixture
def picture(network: Opened) -> Iterator[Picture]:
    with picture_of(network, None, (64, 96)) as made:
        yield made


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    torch.manual_seed(0)
    model = build_model("seaformer_t", 5, "linear", memory=False)
    save_model(path, model, {"scores": {"mIoU": 61.5, "statement": "val split"}, "protocol": {"scale": [64, 64]}})
    return path
