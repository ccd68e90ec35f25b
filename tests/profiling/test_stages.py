"""Stages from file to file: none is missing, and what is slow or large is seen where it is."""

import time
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from ssaseg.cli.engine.opening import Opened, make_engine
from ssaseg.cli.errors import CommandError
from ssaseg.cli.profiling import stages
from ssaseg.cli.profiling.latency import quantiles
from ssaseg.cli.profiling.memory import Peaks
from ssaseg.cli.profiling.scene import Picture, drawn, picture_of
from ssaseg.cli.profiling.stages import Pass, measure_stages, network_steps
from ssaseg.cli.scoring.engines import Logits, TorchEngine
from ssaseg.datasets import DataError
from ssaseg.models.header import DEFAULTS

CPU = torch.device("cpu")
TORCH = ["reading", "preprocessing", "backbone", "decoder", "classifier"]
LAST = ["upsampling and arg-max", "encoding", "writing"]


class Other:
    """An engine of another runtime: class 1 where the image is bright."""

    what, device, channels, num_classes, has_coarse, gives_scores = "other", CPU, 3, 2, False, False
    takes = "normalized"

    def logits(self, pixels: Tensor, coarse: bool = False) -> Logits:
        mean = pixels.mean(dim=1, keepdim=True)
        return Logits(torch.cat([-mean, mean], dim=1), None)


@pytest.fixture
def one(network: Opened, picture: Picture) -> Pass:
    return Pass(make_engine(network, CPU), network.metadata, picture)


def test_the_stages_make_the_labels_of_predict(one: Pass) -> None:
    """The steps one by one, and `predict`'s own code, write the same bytes: no stage is missing, none differs."""
    written: list[bytes] = []
    one.write = written.append  # type: ignore[method-assign]
    seen: list[str] = []
    one.staged(seen.append)
    one.whole()
    assert seen == TORCH + LAST
    assert written[0] == written[1]
    labels = cv2.imdecode(np.frombuffer(written[0], np.uint8), cv2.IMREAD_COLOR)
    assert labels.shape == (64, 96, 3)


def test_a_slow_stage_is_seen_in_its_row_and_in_the_whole(one: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = stages.encode_indices

    def slow(*given: Any) -> bytes:
        time.sleep(0.05)
        return encode(*given)

    monkeypatch.setattr(stages, "encode_indices", slow)
    (found,) = measure_stages([one], 1)
    spent = {row["stage"]: row["ms"] for row in found["rows"]}
    assert spent["encoding"] >= 50
    assert found["whole_ms"] >= 50
    assert found["sum_ms"] == pytest.approx(sum(spent.values()))
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)


def test_work_that_belongs_to_no_stage_shows_as_a_difference(one: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = stages.Inference.predict

    def slow(*given: Any, **named: Any) -> Any:
        time.sleep(0.2)
        return predict(*given, **named)

    monkeypatch.setattr(stages.Inference, "predict", slow)
    (found,) = measure_stages([one], 1)
    assert found["whole_ms"] - found["sum_ms"] > 100


def test_memory_of_stages(network: Opened, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor and an array are counted in the stage that makes them, and not after they are freed."""
    one = Pass(make_engine(network, CPU), network.metadata, picture)
    step, size = dict(one.steps)["decoder"], 64 * 2**20

    def large(maps: Any) -> Any:
        kept = torch.zeros(size, dtype=torch.uint8)
        return step(maps) if len(kept) else maps

    one.steps = [(name, large if name == "decoder" else each) for name, each in one.steps]
    encode = stages.encode_indices
    monkeypatch.setattr(
        stages, "encode_indices", lambda *given: encode(*given) if len(np.zeros(2 * size, np.uint8)) else b""
    )
    mib = {name: count / 2**20 for name, count in stages.stage_peaks(one).items()}
    assert 64 < mib["decoder"] < 100
    assert 128 < mib["encoding"] < 160
    assert all(0 < mib[name] < 30 for name in mib if name not in ("decoder", "encoding"))


def test_peaks_count_nothing_that_was_held_before() -> None:
    weight = torch.zeros(2**20)
    with Peaks(CPU, [weight]).running() as peaks:
        kept = weight + 1
        assert 4 * 2**20 <= peaks.take() < 5 * 2**20
        del kept
        peaks.take()
        assert peaks.take() < 2**20


def test_another_runtime_has_one_stage_for_its_network(picture: Picture) -> None:
    metadata = {**DEFAULTS, "classes": ["dark", "bright"]}
    (found,) = measure_stages([Pass(Other(), metadata, picture)], 1)
    assert [row["stage"] for row in found["rows"]] == ["reading", "preprocessing", "network", *LAST]


def test_half_precision_is_that_of_the_engine(network: Opened, picture: Picture) -> None:
    assert network.model is not None
    engine = TorchEngine.of(network.model, CPU, torch.bfloat16)
    pixels = picture.prepare(picture.image, network.metadata, CPU)
    value: Any = pixels
    with torch.inference_mode(), stages.precision_of(engine):
        for _, step in network_steps(engine):
            value = step(value)
    with torch.inference_mode():
        torch.testing.assert_close(value, engine.logits(pixels).final, rtol=0, atol=0)


def test_scenes_of_all_channels_and_sizes(network: Opened) -> None:
    for channels, suffix in ((1, ".png"), (3, ".jpg"), (4, ".png"), (2, None), (6, None)):
        metadata = {**network.metadata, "mean": [100.0] * channels, "std": [50.0] * channels}
        with picture_of(network._replace(metadata=metadata), None, (33, 70)) as picture:
            assert picture.image.shape == (33, 70, channels)
            assert (picture.path and picture.path.suffix) == suffix
            assert picture.read().shape == (33, 70, channels)
            assert picture.prepare(picture.image, metadata, CPU).shape == (1, channels, 33, 70)
            assert ("--image a file" in picture.what) == (suffix is None)
    np.testing.assert_array_equal(drawn((64, 64), 3), drawn((64, 64), 3))


def test_a_users_image_is_prepared_by_the_protocol(network: Opened, tmp_path: Any) -> None:
    file = tmp_path / "photo.png"
    cv2.imwrite(str(file), drawn((100, 200), 3))
    protocol = {"scale": [128, 64], "multiple": 32, "flip": True}
    opened = network._replace(metadata={**network.metadata, "protocol": protocol})
    with picture_of(opened, file, (512, 512)) as picture:
        assert picture.prepare(picture.image, opened.metadata, CPU).shape == (1, 3, 64, 128)
        assert "one pass over the whole image" in picture.what
    cv2.imwrite(str(file), drawn((64, 64), 3)[:20])
    with picture_of(network, file, (512, 512)) as picture, pytest.raises(DataError, match="too small"):
        picture.prepare(picture.image, network.metadata, CPU)


def test_a_scene_beyond_memory_is_an_error_that_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("ssaseg.cli.profiling.scene.render", full)
    with pytest.raises(CommandError, match="--size 90000 90000"):
        drawn((90000, 90000), 3)


def test_quantiles() -> None:
    assert quantiles({"a": [1.0, 2.0, 3.0]}) == {"a": {"p50": 2.0, "p90": pytest.approx(2.8)}}
