"""Runs a model on the images of a data set and counts its predictions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any

import torch

from ssaseg.cli.ranks.ranks import Ranks
from ssaseg.cli.scoring.boundary import Boundaries
from ssaseg.cli.scoring.engines import Engine, TorchEngine
from ssaseg.cli.scoring.inference import Inference, require_size, state_views
from ssaseg.cli.scoring.metrics import Confusion
from ssaseg.cli.signals import Interrupted, StopSignal
from ssaseg.datasets import Dataset
from ssaseg.datasets.loader import eval_loader
from ssaseg.models import Segmenter
from ssaseg.recipes import Test, parse_protocol

WORKERS = 2  # processes that decode images ahead


# ---- many images -------------------------------------------------------------------------------------------------
def evaluate_model(
    model: Segmenter | Engine,
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
    """Counts the predictions of a model or an engine on the first `limit` images (None: all) of `dataset`.

    A model is put in evaluation mode, and then back. `protocol`: like a recipe's `test` section. `workers`: processes
    that decode and resize images ahead; 0: none. `progress` is called with 1 after each image. `boundaries`, if given,
    is updated, too. Memory depends on the largest image, and on what `Confusion` keeps of each image. Raises what the
    data set raises, DataError for an image that is too small, and FloatingPointError for logits that are not finite.

    `stop`: read between two images; if one rank has a request to stop, all ranks raise Interrupted. `ranks`: each of R
    ranks counts every R-th image; each returns the counts of all images.
    """
    ranks = ranks or Ranks(device)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    confusion = Confusion(model.num_classes, device)
    test = parse_protocol(protocol, "test-time protocol")
    engine = TorchEngine(model, device) if isinstance(model, Segmenter) else model
    inference = Inference(engine, test, mean, std)

    was_training = isinstance(model, Segmenter) and model.training
    if isinstance(model, Segmenter):
        model.eval()
    # Each image belongs to one rank. If all ranks had the same number of images, some would have to be counted twice.
    indices = range(ranks.rank, count, ranks.size)
    loader: Any = eval_loader(dataset, test.scale, test.multiple, workers, test.ratios, indices)
    try:
        with closing(loader):  # ends the processes, also after an error
            for inputs, label, name in read(loader, stop):
                require_size(inputs, name)
                label = label.to(device, non_blocking=True)
                labels = inference.labels(inputs, label.shape, name)
                confusion.update(labels, label)
                if boundaries is not None:
                    boundaries.update(labels, label)
                if progress is not None:
                    progress(1)
                if stop is not None and stop.requested:
                    break
            inference.require_finite()
    finally:
        if isinstance(model, Segmenter):
            model.train(was_training)
    if stop is not None and ranks.agree(stop):
        raise Interrupted
    if ranks.size > 1:
        confusion.merge(ranks.gather(confusion.snapshot()))
        if boundaries is not None:
            boundaries.counts = ranks.total(boundaries.counts)
    return confusion


def read(loader: Iterator[Any], stop: StopSignal | None) -> Iterator[Any]:
    """The items of `loader`, up to a wait that a request to stop has ended."""
    while True:
        try:
            with nullcontext() if stop is None else stop.ending_waits():
                item = next(loader, None)
        except Interrupted:
            return
        if item is None:
            return
        yield item


def state_protocol(protocol: Test, split: str, count: int, total: int, scores: bool = False) -> str:
    """One line that says how a score was measured. Scores are comparable only if this line is the same.

    `scores`: as in `state_views`.
    """
    images = f"{count} images" if count == total else f"the first {count} of {total} images"
    return (
        f"{split} split, {images}, {state_views(protocol, scores)}; two bilinear steps: "
        f"{'scores' if scores else 'logits'} to the size of the network's input, then to the size of the image; mIoU: "
        "mean over classes of total intersection / total union; not counted: pixels with label 255, and classes that "
        "are neither labelled nor predicted"
    )
