"""Evaluation of several images at the same time: the same counts, in the same order, and the same errors."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from parts import Unchanged
from torch import nn

from ssaseg.cli.scoring import lanes
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.cli.scoring.evaluate import Tally, batches, can_share, count_predictions
from ssaseg.cli.scoring.inference import Inference
from ssaseg.cli.scoring.lanes import Room
from ssaseg.cli.signals import Interrupted, StopSignal
from ssaseg.datasets import DataError
from ssaseg.models import Segmenter, build_model
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.recipes import parse_protocol

CPU = torch.device("cpu")
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


class Pairs:
    """Random images and labels of several sizes; image `damaged` cannot be read."""

    def __init__(self, count: int = 7, damaged: int = -1) -> None:
        rng = np.random.default_rng(0)
        sizes = [(37 + 8 * (k % 3), 50) for k in range(count)]
        self.images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        self.labels = [rng.integers(0, 5, size, dtype=np.uint8) for size in sizes]
        self.damaged = damaged

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image{index}"

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == self.damaged:
            raise DataError(f"image{index}.png: cannot be decoded")
        return self.images[index], self.labels[index]


@pytest.fixture(scope="module")
def model() -> Segmenter:
    torch.manual_seed(0)
    return build_model("seaformer_t", 5, "ssa").eval()


def tally(model: Segmenter, exact: bool = False, boundary: bool = False, **protocol: Any) -> Tally:
    test = parse_protocol({"scale": None, "multiple": None, **protocol}, "test")
    return Tally.of(Inference(TorchEngine.of(model, CPU, exact=exact), test, MEAN, STD), boundary)


def require_ended() -> None:
    """The threads that compute end soon."""
    for thread in threading.enumerate():
        if thread.name.startswith(lanes.THREAD_NAME):
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize("protocol", [{}, {"flip": True}])
def test_any_number_of_lanes_gives_the_same_counts(
    model: Segmenter, monkeypatch: pytest.MonkeyPatch, protocol: dict[str, Any]
) -> None:
    found, real = [], Room.__init__
    for count in (1, 3):
        monkeypatch.setattr(Room, "__init__", lambda self, count=count: real(self) or setattr(self, "lanes", count))
        found.append(tally(model, boundary=True, **protocol))
        assert can_share(found[-1:])
        count_predictions([found[-1]], Pairs(4))
    torch.set_num_threads(1)
    found.append(tally(model, boundary=True, **protocol))
    assert not can_share(found[-1:]), "one core has nothing to share"
    count_predictions([found[-1]], Pairs(4))
    torch.set_num_threads(3)
    one = found[0]
    assert one.confusion.matrix.sum() == one.pixels == sum(label.size for label in Pairs(4).labels)
    for more in found[1:]:
        np.testing.assert_array_equal(more.confusion.matrix, one.confusion.matrix)
        np.testing.assert_array_equal(more.confusion.rows, one.confusion.rows)
        assert one.boundaries is not None
        assert more.boundaries is not None
        assert torch.equal(more.boundaries.counts, one.boundaries.counts)


def test_folded_labels_are_those_of_the_network_as_it_was_trained(model: Segmenter) -> None:
    both = [tally(model, exact=True), tally(model)]
    count_predictions(both, Pairs())
    assert not can_share(both), "the arithmetic of `exact` depends on the number of threads"
    assert both[0].equal == both[0].pixels == both[1].pixels
    assert both[1].equal / both[1].pixels > 0.998


def test_an_image_that_cannot_be_read_is_due_in_its_turn(model: Segmenter) -> None:
    done: list[int] = []
    with pytest.raises(DataError, match=r"image5\.png: cannot be decoded"):
        count_predictions([tally(model)], Pairs(damaged=5), progress=done.append)
    assert len(done) <= 5
    require_ended()


def test_an_output_that_is_not_finite_names_its_image() -> None:
    class Divided(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels / (pixels.shape[2] != 45)

    network = Segmenter(Divided(), Unchanged(3, stride=1), LinearClassifier(3, 5, 0.0)).eval()
    with pytest.raises(FloatingPointError, match=r"^image1: the network's output is not finite"):
        count_predictions([tally(network)], Pairs())


def test_a_request_to_stop_ends_all_threads(model: Segmenter) -> None:
    done = []
    with StopSignal() as stop:

        def progress(images: int) -> None:
            done.append(images)
            if len(done) == 2:
                stop.number = 15

        with pytest.raises(Interrupted):
            count_predictions([tally(model)], Pairs(20), progress=progress, stop=stop)
    assert len(done) == 2
    require_ended()


def test_a_large_image_waits_until_it_is_alone_and_gets_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LARGE", 100)
    room, seen = Room(), {}
    inside, leave = threading.Event(), threading.Event()

    def small() -> None:
        with room.taken(100):
            seen["small"] = torch.get_num_threads()
            inside.set()
            leave.wait(10)

    def large() -> None:
        with room.taken(101):
            seen["large"] = torch.get_num_threads()

    first, second = threading.Thread(target=small), threading.Thread(target=large)
    first.start()
    inside.wait(10)
    second.start()
    second.join(0.05)
    assert seen == {"small": 1}
    with room.taken(50):  # a small one still has room
        torch.set_num_threads(3)
    leave.set()
    first.join(10)
    second.join(10)
    assert seen == {"small": 1, "large": 3}


@pytest.mark.parametrize(("free", "pixels"), [(None, 300), (10**9, 300), (6 * lanes.BYTES * 30, 90), (0, 1)])
def test_images_in_work_take_half_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, free: int | None, pixels: int
) -> None:
    monkeypatch.setattr(lanes, "LARGE", 100)
    monkeypatch.setattr(lanes, "free_memory", lambda: free)
    room = Room()
    assert room.pixels == pixels
    with room.taken(1000):
        assert room.left == 0
    assert room.left == pixels


def test_neighbours_of_equal_size_are_a_batch() -> None:
    items = [([torch.empty(8, side, 3)], torch.empty(0), "") for side in (4, 4, 4, 4, 5, 4, 40, 40)]
    assert [[each[0][0].shape[1] for each in batch] for batch in batches(items, 3 * 8 * 4)] == [
        [4, 4, 4], [4], [5], [4], [40], [40]
    ]  # fmt: skip
    assert [len(batch) for batch in batches(items, 0)] == [1] * 8


def test_a_batch_gives_the_labels_of_its_images_alone(model: Segmenter) -> None:
    inference = tally(model).inference
    images = [torch.from_numpy(image) for image in Pairs().images[::3]]
    assert len({image.shape for image in images}) == 1
    sizes, names = [(37, 50), (50, 60), (37, 50)], ["a", "b", "c"]
    together = inference.maps([[image] for image in images], sizes, names)
    for image, size, (labels, *_) in zip(images, sizes, together, strict=True):
        assert labels.shape == size
        assert (labels == inference.labels([image], size)).float().mean() > 0.998


@pytest.mark.parametrize(("threads", "lanes_and_share"), [(2, (2, 1)), (8, (8, 1)), (9, (4, 2)), (64, (8, 8))])
def test_cores_are_shared_by_size_alone(
    monkeypatch: pytest.MonkeyPatch, threads: int, lanes_and_share: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    room = Room()
    monkeypatch.undo()
    assert (room.lanes, room.share) == lanes_and_share
