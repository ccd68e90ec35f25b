"""An image for which there is no memory is skipped, instead of the system ending the command."""

import resource
import sys
from pathlib import Path

import numpy as np
import pytest
from calling import call
from PIL import Image

from ssaseg.cli.scoring import limit
from ssaseg.cli.scoring.limit import free_memory, memory_limit
from ssaseg.models import build_model, save_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this limit")


def test_what_is_not_there_is_a_memory_error() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_limit(free=2**28):
        np.ones(2**26, np.uint8)
        with pytest.raises(MemoryError):
            np.ones(2**29, np.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    np.ones(2**29, np.uint8)


def test_free_memory_is_that_of_the_system() -> None:
    free = free_memory()
    assert free is not None
    assert 2**20 < free < 2**50


def test_the_limit_of_a_container_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("5000000\n")
    (tmp_path / "used").write_text("2000000\n")
    monkeypatch.setattr(limit, "GROUPS", [(str(tmp_path / "max"), str(tmp_path / "used"))])
    assert free_memory() == 3_000_000
    (tmp_path / "max").write_text("max\n")
    free = free_memory()
    assert free is not None
    assert free > 3_000_000


def test_one_image_too_large_for_memory_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "ck.safetensors", build_model("seaformer_t", 3), {})
    (tmp_path / "in").mkdir()
    for name, side in (("a", 64), ("m", 3000), ("z", 64)):
        Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / f"in/{name}.png")
    monkeypatch.setattr(limit, "free_memory", lambda: 300 * 2**20)
    result = call("predict", tmp_path / "ck.safetensors", tmp_path / "in", "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 1
    assert "m.png: not enough memory for this image" in result.stderr
    assert sorted(path.name for path in (tmp_path / "out/index").iterdir()) == ["a.png", "z.png"]
