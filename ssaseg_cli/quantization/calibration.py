"""Calibration: training images chosen by their labels, as the network sees them.

Axes: N images, K classes, C channels, h×w pixels of a network's input.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssaseg.cli.scoring.engines import Logits
from ssaseg.cli.scoring.inference import Inference
from ssaseg.datasets import IGNORED, Dataset
from ssaseg.datasets.base import evenly
from ssaseg.recipes import Test

CPU = torch.device("cpu")

LOOKED_AT = 512  # training images whose labels are read at most


class Chosen(NamedTuple):
    """Training images to calibrate on, and the classes that none of them contains, by name."""

    indices: list[int]
    missing: list[str]


def choose_images(dataset: Dataset, count: int, advance: Callable[[int], object] = id) -> Chosen:
    """At most `count` images of `dataset` that together contain its classes, each class in as many as possible.

    The labels of at most LOOKED_AT images, evenly spaced, are read; `advance` is called with 1 after each. The order
    is that of the choice: the first images contain most classes. Raises what loading raises.
    """
    looked = evenly(len(dataset), LOOKED_AT)
    present = np.zeros((len(looked), len(dataset.classes)), bool)
    for row, index in enumerate(looked):
        ids = np.unique(dataset.load(index)[1])
        present[row, ids[ids != IGNORED]] = True
        advance(1)
    rows = cover(present, count)
    missing = [name for k, name in enumerate(dataset.classes) if not present[rows, k].any()]
    return Chosen([looked[row] for row in rows], missing)


def cover(present: np.ndarray, count: int) -> list[int]:
    """At most `count` rows of a table bool (N,K), chosen one by one: first those with most columns that are not covered
    yet; then those with most columns that few chosen rows have. Of equal rows the first.
    """
    times = np.zeros(present.shape[1])
    free = np.ones(len(present), bool)
    rows: list[int] = []
    while len(rows) < min(count, len(present)):
        fresh = present @ (times == 0)
        gain = fresh + present @ (1 / (1 + times)) / (present.shape[1] + 1)  # the second summand is below 1
        rows.append(int(np.where(free, gain, -1).argmax()))
        free[rows[-1]] = False
        times += present[rows[-1]]
    return rows


@dataclass(frozen=True)
class Recorder:
    """An engine that keeps what a network would get, and returns zeros."""

    channels: int
    num_classes: int
    what: str = "recorder"
    takes: str = "normalized"
    device: torch.device = CPU
    has_coarse: bool = False
    gives_scores: bool = False
    seen: list[np.ndarray] = field(default_factory=list)

    def logits(self, pixels: Tensor, coarse: bool = False) -> Logits:
        """Zeros (N,K,8,8)."""
        self.seen.append(pixels.numpy().copy())
        return Logits(torch.zeros(len(pixels), self.num_classes, 8, 8), None)


def network_inputs(
    dataset: Dataset, indices: Sequence[int], protocol: Test, metadata: dict[str, Any]
) -> Iterator[list[np.ndarray]]:
    """For each image, what the network gets by the protocol: normalised pixels float32 (1,C,h,w), one of each window.

    Only the protocol's first scale, not mirrored: the other views have almost the same ranges.
    """
    single = protocol.model_copy(update={"ratios": protocol.ratios[:1], "flip": False})
    recorder = Recorder(len(metadata["mean"]), len(metadata["classes"]))
    inference = Inference(recorder, single, metadata["mean"], metadata["std"])
    for index in indices:
        image, name = dataset.load_image(index), dataset.name(index)
        inference.labels([torch.tensor(each) for each in inference.inputs(image, name)], image.shape[:2], name)
        yield list(recorder.seen)
        recorder.seen.clear()
