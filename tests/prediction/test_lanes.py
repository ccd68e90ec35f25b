"""Several images side by side: the same results in the same order, and a number of lanes that memory allows."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from calling import call
from predicting import files, picture, save_checkpoint, write

from ssaseg.cli.prediction import labelling, predict
from ssaseg.cli.scoring import lanes
from ssaseg.cli.scoring.inference import predict_labels
from ssaseg.datasets.decoding import read_image, read_mask
from ssaseg.models import load_model

GIB = 1 << 30


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("images", "pixels", "free", "expected"),
    [
        (1000, 480 * 360, 64 * GIB, 8),
        (1000, 480 * 360, None, 8),
        (8 * lanes.FEWEST, 0, None, 8),
        (8 * lanes.FEWEST - 1, 0, None, 1),
        (1000, 4000 * 3000, 64 * GIB, 1),
        (1000, 2000 * 1500, 64 * GIB, 7),
    ],
)
def test_lanes_are_as_many_as_cores_images_and_memory_allow(
    monkeypatch: pytest.MonkeyPatch, images: int, pixels: int, free: int | None, expected: int
) -> None:
    monkeypatch.setattr(lanes, "count_cores", lambda: 16)
    monkeypatch.setattr(lanes, "free_memory", lambda: free)
    assert lanes.count_lanes(images, pixels) == expected


@pytest.mark.usefixtures("four_threads")
def test_side_by_side_is_as_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of several sizes, and a damaged one between them. `--exact` is equal to what evaluation computes."""
    checkpoint = save_checkpoint(tmp_path / "a.safetensors")
    for index in range(9):
        write(tmp_path / f"in/{index}.png", picture(40 + 8 * (index % 3), 56, index))
    (tmp_path / "in/4.png").write_bytes(b"no image")
    begun = []
    monkeypatch.setattr(labelling, "count_lanes", lambda images, pixels: begun.append((images, pixels)) or 3)
    results = {}
    for out, words in (("fast", ()), ("exact", ("--exact",))):
        result = call("predict", checkpoint, tmp_path / "in", "--out", tmp_path / out, *words)
        assert result.exit_code == 1
        assert "labelled 8 of 9 images" in result.stdout
        assert "4.png" in result.stderr
        results[out] = files(tmp_path / out)
    assert results["fast"] == results["exact"] == [f"index/{index}.png" for index in range(9) if index != 4]
    assert begun == [(9, 40 * 56)], "with --exact all cores work on one image"
    model, metadata = load_model(checkpoint)
    for name in results["fast"]:
        fast, exact = (read_mask(tmp_path / out / name).ids for out in ("fast", "exact"))
        assert (fast == exact).mean() > 0.99
        image = read_image(tmp_path / "in" / Path(name).name)
        given = (metadata["protocol"], metadata["mean"], metadata["std"], torch.device("cpu"))
        assert np.array_equal(exact, predict_labels(model.eval(), image, *given).labels)
    assert cv2.getNumThreads() > 0


@pytest.mark.usefixtures("four_threads")
def test_a_stopped_run_keeps_what_its_lanes_have_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_checkpoint(tmp_path / "a.safetensors")
    for index in range(12):
        write(tmp_path / f"in/{index:02}.png", picture(seed=index))
    monkeypatch.setattr(labelling, "count_lanes", lambda images, pixels: 2)
    begun, real = [], predict.Inference.predict_batch

    def stopping(*given: Any) -> Any:
        begun.append(given)
        if len(begun) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(predict.Inference, "predict_batch", stopping)
    result = call("predict", checkpoint, tmp_path / "in", "--out", tmp_path / "out")
    assert result.exit_code == 143
    assert 4 <= len(begun) < 12
    assert files(tmp_path / "out") == [f"index/{index:02}.png" for index in range(len(begun))]
