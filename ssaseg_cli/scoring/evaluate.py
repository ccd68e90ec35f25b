"""Counting what a model predicts on the images of a data set."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from ssaseg.cli.ranks.ranks import Ranks
from ssaseg.cli.scoring.boundary import Boundaries
from ssaseg.cli.scoring.inference import Inference, require_size, state_views
from ssaseg.cli.scoring.metrics import Confusion
from ssaseg.cli.signals import Interrupted, StopSignal
from ssaseg.datasets import Dataset
from ssaseg.datasets.loader import eval_loader
from ssaseg.models import Segmenter
from ssaseg.recipes import Test, parse_protocol

WORKERS = 2  # processes that decode ahead


# ---- many images -------------------------------------------------------------------------------------------------
def evaluate_model(
    model: Segmenter,
    dataset: Dataset,
    protocol: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    workers: int = 0,
    limit: int | None = None,
    progress: Callable[[int], object] | None = None,
    boundaries: Boundaries | None = None,
    stop: StopSignal | None = None,
    ranks: Ranks | None = None,
) -> Confusion:
    """Counts of `model` on the first `limit` images (None: all) of `dataset`; the model's mode is as before afterwards.

    `protocol`: as a recipe's `test` section. `workers` processes decode and resize ahead; 0: none. `progress` is called
    with 1 after each image. `boundaries`, where given, counts along. Memory depends on the largest image; their number
    adds what `Confusion` keeps of each. Raises what the data set raises, DataError for an image that is too small.

    `stop`: looked at between two images; raises Interrupted on all ranks where it is requested on one. `ranks`: each
    counts every R-th image, and returns the counts of all.
    """
    ranks = ranks or Ranks(device)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    confusion = Confusion(model.num_classes, device)
    test = parse_protocol(protocol, "test-time protocol")
    inference = Inference(model, test, mean, std, device)

    was_training = model.training
    model.eval()
    # Each image has one rank: shares of one size would need images that are counted twice.
    indices = range(ranks.rank, count, ranks.size)
    loader: Any = eval_loader(dataset, test.scale, test.multiple, workers, test.ratios, indices)
    try:
        with closing(loader):  # ends the processes also where an error stops early
            for inputs, label, name in loader:
                require_size(inputs, name)
                label = label.to(device, non_blocking=True)
                labels = inference.labels(inputs, label.shape)
                confusion.update(labels, label)
                if boundaries is not None:
                    boundaries.update(labels, label)
                if progress is not None:
                    progress(1)
                if stop is not None and stop.requested:
                    break
    finally:
        model.train(was_training)
    if stop is not None and ranks.agree(stop):
        raise Interrupted
    if ranks.size > 1:
        confusion.merge(ranks.gather(confusion.part()))
        if boundaries is not None:
            boundaries.counts = ranks.total(boundaries.counts)
    return confusion


def state_protocol(protocol: Test, split: str, count: int, total: int) -> str:
    """One line that says what a score was measured with, so that another can be compared to it."""
    part = f"{count} images" if count == total else f"the first {count} of {total} images"
    return (
        f"{split} split, {part}, {state_views(protocol)}; two bilinear steps: logits to the network's input, then to "
        "the image; mIoU: mean over classes of total intersection / total union, 255 ignored, classes neither labelled "
        "nor predicted left out"
    )
