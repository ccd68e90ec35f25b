"""Runs networks on the images of a data set and counts their predictions.

On a CPU several images are computed side by side, each in a thread with its share of the cores; a large image is
computed alone, by all cores. On a GPU neighbouring images of equal size are computed in one pass. In both cases the
images are counted in order, as integers, so that scores and intervals do not depend on how many are in work.

Axes: K classes, H×W pixels of an image, h×w pixels of a network's input.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssaseg.cli.ranks.ranks import Ranks
from ssaseg.cli.scoring.boundary import Boundaries
from ssaseg.cli.scoring.calibration import Calibration
from ssaseg.cli.scoring.engines import Engine, TorchEngine
from ssaseg.cli.scoring.gallery import Gallery, Scene
from ssaseg.cli.scoring.inference import Inference, Maps, require_size, state_views
from ssaseg.cli.scoring.lanes import Room, in_order
from ssaseg.cli.scoring.metrics import Confusion
from ssaseg.cli.signals import Interrupted, StopSignal
from ssaseg.datasets import Dataset
from ssaseg.datasets.loader import eval_loader
from ssaseg.models import Segmenter
from ssaseg.recipes import Test, parse_protocol

WORKERS = 2  # processes that decode images ahead
# Pixels of the network inputs that a GPU computes in one pass, as long as they are of several images: those of 8 images
# of 512×512, so that the memory is that of one image of 2048×1024.
BATCH = 2**21

Item = tuple[list[Tensor], Tensor, str]  # what `eval_loader` gives


class Counts(NamedTuple):
    """What is counted of one image and one network."""

    pairs: Tensor  # see `Confusion.count`
    boundary: Tensor | None  # see `Boundaries.count`
    equal: Tensor  # int64 (): pixels whose label is that of the first network
    coarse: Tensor | None  # as `pairs`, of the labels before adaptation
    calibration: Tensor | None  # see `Calibration.count`
    scene: Scene | None


@dataclass
class Sums:
    """What is counted of a network's predictions, and makes its scores."""

    confusion: Confusion
    boundaries: Boundaries | None = None
    equal: Tensor | int = 0  # pixels whose label is that of the first network, of all `pixels`
    pixels: int = 0
    calibration: Calibration | None = None

    def snapshot(self) -> dict[str, Any]:
        """What `merged` needs, on the CPU: numbers and arrays."""
        counts, rows = self.confusion.snapshot()
        kept = {"boundary": self.boundaries, "calibration": self.calibration}
        return {
            "counts": counts,
            "rows": rows,
            "equal": int(self.equal),
            "pixels": self.pixels,
            **{key: None if each is None else each.counts.cpu() for key, each in kept.items()},
        }

    @classmethod
    def merged(cls, snapshots: Sequence[Mapping[str, Any]], places: Sequence[Sequence[int]], classes: int) -> "Sums":
        """The sums of snapshots of `classes` classes, each of the images whose numbers are in `places`. They are whole
        numbers, so that they do not depend on how the images were divided.
        """
        both = [(torch.as_tensor(each["counts"]), np.asarray(each["rows"])) for each in snapshots]
        found = cls(Confusion(classes), equal=sum(each["equal"] for each in snapshots))
        found.confusion.merge(both, places)
        found.pixels = sum(each["pixels"] for each in snapshots)
        found.boundaries = Boundaries(classes) if snapshots[0]["boundary"] is not None else None
        found.calibration = Calibration(classes) if snapshots[0]["calibration"] is not None else None
        for key, kept in (("boundary", found.boundaries), ("calibration", found.calibration)):
            if kept is not None:
                kept.counts = torch.stack([each[key] for each in snapshots]).sum(dim=0)
        return found


@dataclass
class Tally(Sums):
    """A network, and what is counted of its predictions."""

    inference: Inference = field(kw_only=True)
    coarse: Confusion | None = None  # of the labels before adaptation
    gallery: Gallery | None = None

    @classmethod
    def of(
        cls, inference: Inference, boundary: bool = False, calibration: bool = False, report: bool = False
    ) -> "Tally":
        """Without images. boundary, calibration: whether these are counted, too. report: whether the labels before
        adaptation are counted, if there are any, and the best and worst images are kept.
        """
        engine = inference.engine
        classes, device = engine.num_classes, inference.device
        return cls(
            Confusion(classes, device),
            Boundaries(classes, device) if boundary else None,
            inference=inference,
            coarse=Confusion(classes, device) if report and engine.has_coarse else None,
            calibration=Calibration(classes, device) if calibration else None,
            gallery=Gallery() if report else None,
        )

    def count(self, maps: Maps, label: Tensor, first: Tensor, image: Tensor) -> Counts:
        """What `add` takes of one image: the network's results, the image's label, the first network's labels (H,W),
        and the network's input (h,w,3).
        """
        labels, coarse, confidence = maps.labels, None, None
        if self.coarse is not None:
            assert maps.coarse is not None
            coarse = self.coarse.count(maps.coarse, label)
        if self.calibration is not None:
            assert maps.confidence is not None
            confidence = self.calibration.count(labels, maps.confidence, label)
        return Counts(
            self.confusion.count(labels, label),
            None if self.boundaries is None else self.boundaries.count(labels, label),
            (labels == first).sum(),
            coarse,
            confidence,
            None if self.gallery is None else Scene.of(image, label, labels),
        )

    def add(self, counts: Counts, pixels: int, number: int) -> None:
        """Adds an image of so many pixels, with its number in the data set."""
        self.confusion.add(counts.pairs)
        for kept, found in ((self.boundaries, counts.boundary), (self.calibration, counts.calibration)):
            if kept is not None:
                assert found is not None
                kept.counts += found
        if self.coarse is not None:
            assert counts.coarse is not None
            self.coarse.add(counts.coarse)
        if self.gallery is not None:
            assert counts.scene is not None
            self.gallery.add(number, self.confusion.last_row, counts.scene)
        self.equal = self.equal + counts.equal
        self.pixels += pixels

    def gather(self, ranks: Ranks) -> None:
        """Replaces the counts by those of all ranks."""
        if ranks.size == 1:
            return
        for each in (self.confusion, self.coarse):
            if each is not None:
                each.merge(ranks.gather(each.snapshot()))
        for kept in (self.boundaries, self.calibration):
            if kept is not None:
                kept.counts = ranks.total(kept.counts)
        if self.gallery is not None:
            self.gallery.merge(ranks.gather(self.gallery.snapshot()))
        sums = ranks.gather([int(self.equal), self.pixels])
        self.equal, self.pixels = (sum(each) for each in zip(*sums, strict=True))


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
    stop: StopSignal | None = None,
    ranks: Ranks | None = None,
) -> Confusion:
    """Counts the predictions of a model or an engine, see `count_predictions`; a model is evaluated as it is.

    A model is put in evaluation mode, and then back. `protocol`: like a recipe's `test` section. mean, std: RGB, on
    the scale 0..255.
    """
    engine = TorchEngine(model, device) if isinstance(model, Segmenter) else model
    tally = Tally.of(Inference(engine, parse_protocol(protocol, "test-time protocol"), mean, std))
    was_training = isinstance(model, Segmenter) and model.training
    if isinstance(model, Segmenter):
        model.eval()
    try:
        count_predictions([tally], dataset, workers, limit, progress, stop, ranks)
    finally:
        if isinstance(model, Segmenter):
            model.train(was_training)
    return tally.confusion


def count_predictions(
    tallies: Sequence[Tally],
    dataset: Dataset,
    workers: int = 0,
    limit: int | None = None,
    progress: Callable[[int], object] | None = None,
    stop: StopSignal | None = None,
    ranks: Ranks | None = None,
    chosen: Sequence[int] | None = None,
) -> None:
    """Counts the predictions of several networks on the first `limit` images (None: all) of `dataset`, or on those
    with the numbers `chosen`.

    Each image is read once; the networks, which have one protocol, label it in turn. `workers`: processes that decode
    and resize images ahead; 0: this process does. `progress` is called with 1 after each image. Raises what the data
    set raises, DataError for an image that is too small, and FloatingPointError for logits that are not finite.

    Memory depends on the largest image, on the number of images in work (see `Room` and `BATCH`), and on what
    `Confusion` keeps of each image.

    `stop`: read between two images; if one rank has a request to stop, all ranks raise Interrupted. `ranks`: each of R
    ranks counts every R-th image; each gets the counts of all images.
    """
    first = tallies[0].inference
    ranks = ranks or Ranks(first.device)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    # Each image belongs to one rank. If all ranks had the same number of images, some would have to be counted twice.
    indices = (range(count) if chosen is None else chosen)[ranks.rank :: ranks.size]
    test = first.protocol
    loader: Any = eval_loader(dataset, test.scale, test.multiple, workers, test.ratios, indices)
    items = read(loader, stop)
    scored = (side_by_side if can_share(tallies) else in_turn)(tallies, items)
    with closing(loader), closing(scored):  # ends processes and threads, also after an error
        for (pixels, counts), number in zip(scored, indices, strict=False):
            for tally, each in zip(tallies, counts, strict=True):
                tally.add(each, pixels, number)
            if progress is not None:
                progress(1)
            if stop is not None and stop.requested:
                break
    for tally in tallies:
        tally.inference.require_finite()
    if stop is not None and ranks.agree(stop):
        raise Interrupted
    for tally in tallies:
        tally.gather(ranks)


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


# ---- images in work ----------------------------------------------------------------------------------------------

Scored = tuple[int, list[Counts]]  # of one image: its number of pixels, and the counts of each network


def score(tallies: Sequence[Tally], inferences: Sequence[Inference], items: Sequence[Item]) -> list[Scored]:
    """Labels and counts images; several of them only with one view and inputs of equal size."""
    device = inferences[0].device
    for inputs, _, name in items:
        require_size(inputs, name)
    given, _, names = zip(*items, strict=True)
    truths = [label.to(device, non_blocking=True) for _, label, _ in items]
    sizes = [label.shape for label in truths]
    made: list[list[Counts]] = [[] for _ in items]
    base: list[Tensor] = []
    for tally, inference in zip(tallies, inferences, strict=True):
        wanted = {"coarse": tally.coarse is not None, "confidence": tally.calibration is not None}
        maps = inference.maps(given, sizes, names, **wanted)
        base = base or [each.labels for each in maps]
        for counts, each, truth, first, inputs in zip(made, maps, truths, base, given, strict=True):
            counts.append(tally.count(each, truth, first, max(inputs, key=Tensor.numel)))
    return [(label.numel(), counts) for label, counts in zip(truths, made, strict=True)]


def in_turn(tallies: Sequence[Tally], items: Iterable[Item]) -> Generator[Scored, None, None]:
    """The counts of each image; on a GPU in batches."""
    inferences = [tally.inference for tally in tallies]
    batch = BATCH if inferences[0].device.type == "cuda" and inferences[0].views == 1 else 0
    for together in batches(items, batch):
        yield from score(tallies, inferences, together)


def batches(items: Iterable[Item], most: int) -> Iterator[list[Item]]:
    """Neighbours whose network inputs have equal sizes, together at most `most` pixels; larger images alone."""
    batch: list[Item] = []
    for item in items:
        shape = item[0][0].shape
        if batch and batch[0][0][0].shape != shape:
            yield batch
            batch = []
        batch.append(item)
        if (len(batch) + 1) * shape[0] * shape[1] > most:  # before the next item is read
            yield batch
            batch = []
    if batch:
        yield batch


def can_share(tallies: Sequence[Tally]) -> bool:
    """Whether the images are computed side by side, on several cores of a CPU; exact networks compute one at a time.

    The arithmetic of `exact` is that of all cores on one image.
    """
    engines = [tally.inference.engine for tally in tallies]
    exact = any(isinstance(engine, TorchEngine) and engine.exact for engine in engines)
    return not exact and engines[0].device.type == "cpu" and torch.get_num_threads() > 1


def side_by_side(tallies: Sequence[Tally], items: Iterable[Item]) -> Generator[Scored, None, None]:
    """The counts of each image, in order, from threads that share cores and memory, see `Room`."""
    room = Room()

    def one(item: Item) -> Scored:
        inputs, label, _ = item
        with room.taken(max(each.shape[0] * each.shape[1] for each in (*inputs, label))):
            return score(tallies, [tally.inference.apart() for tally in tallies], [item])[0]

    try:
        with closing(in_order(one, items, room.lanes)) as made:
            yield from made
    finally:
        torch.set_num_threads(room.threads)  # libraries may keep the number for the process


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
