"""Reads, labels and writes images. These steps overlap; memory stays constant.

Threads read and write, since OpenCV, Pillow and zlib release Python's lock. On a CPU, as many threads as there are
cores run the network, each on an image of its own, or the main thread with all cores; for a GPU, the main thread
gathers batches. The number of images in work at the same time is limited.

Axes: K classes, H×W pixels of an image.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import tee
from typing import NamedTuple

import numpy as np
import torch

from ssaseg.cli.console import progress_bar
from ssaseg.cli.device import count_cores
from ssaseg.cli.prediction.batches import count_batch, gathered
from ssaseg.cli.prediction.ids import Ids
from ssaseg.cli.prediction.inputs import Stream, first_of, origin_of
from ssaseg.cli.prediction.journal import Journal, Result
from ssaseg.cli.prediction.precision import FEWEST, TRIED, choose
from ssaseg.cli.prediction.rle import rle_lines
from ssaseg.cli.prediction.selection import Selection
from ssaseg.cli.prediction.skipping import Skip, Skips, lacks_memory, skip_reason
from ssaseg.cli.prediction.sources import Source
from ssaseg.cli.prediction.stores import Store
from ssaseg.cli.printing import echo
from ssaseg.cli.results.kinds import KINDS, Style, is_needed
from ssaseg.cli.results.manifest import Entry
from ssaseg.cli.results.objects import LONGEST_LINE
from ssaseg.cli.results.shares import share_lines
from ssaseg.cli.scoring.engines import Engine
from ssaseg.cli.scoring.inference import Inference, Prediction
from ssaseg.cli.scoring.lanes import Room, count_lanes, in_order, shared_cores
from ssaseg.cli.scoring.timings import Timings
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets.bands.reading import read_bands, shown
from ssaseg.datasets.base import Levels
from ssaseg.datasets.decoding.images import shown_size
from ssaseg.files.text import printable

# Number of threads that read; as many write. Each holds an image in memory, so the number is limited.
THREADS = max(2, min(8, count_cores() // 2))


class Decoded(NamedTuple):
    """The original image, and the network's inputs made from it; all BGR uint8 (·,·,3), or of other channels."""

    image: np.ndarray
    inputs: list[np.ndarray]
    origin: str  # see `made_of`
    seconds: float  # of work on it so far


class Labelled(NamedTuple):
    """An image with its results, ready to be written."""

    source: Source
    image: np.ndarray  # BGR uint8 (H,W,3)
    prediction: Prediction
    origin: str
    seconds: float  # of work on it so far


class Written(NamedTuple):
    """What the journal gets of one image: its entry, its results, and by kind its objects for files of all images."""

    entry: Entry
    results: list[Result]
    objects: dict[str, list[bytes]]


@dataclass(frozen=True)
class Labeller:
    """Reads, labels and writes images; holds what is the same for all of them."""

    inference: Inference
    save: Sequence[str]
    style: Style
    journal: Journal | Store
    code: str  # the checkpoint's sum
    max_pixels: int
    times: Timings
    levels: Levels | None = None  # of 16-bit images, see `read_image`
    exact: bool = False
    ids: Ids = field(default_factory=Ids)
    selection: Selection = field(default_factory=Selection)  # counts in the thread that takes the results
    skips: Skips = field(default_factory=Skips)  # filled by the thread that takes the results

    def read(self, source: Source) -> Decoded | Skip:
        """The image and the network's inputs, or the reason to skip the image."""
        started = time.perf_counter()
        try:
            with self.times.stage("reading"):
                origin = origin_of(self.code, source)  # before it is read: if it changes now, it is labelled again
                channels = self.inference.engine.channels
                image = read_bands(source.path, channels, self.max_pixels, self.levels, source.read())
                inputs = self.inference.inputs(image, source.file)
                return Decoded(image, inputs, origin, time.perf_counter() - started)
        except Exception as error:
            return skip_reason(error, source.file)

    def plan(self, sources: Sequence[Source]) -> tuple[int, int]:
        """How many images to label side by side, see `count_lanes`, and how many in one pass, see `count_batch`."""
        if self.exact or not sources:  # other threads and other batches round otherwise
            return 1, 1
        size = shown_size(sources[0].header())
        pixels = 0 if size is None else self.inference.input_pixels(size)
        if self.inference.device.type == "cpu":
            return count_lanes(len(sources), pixels), 1
        one_pass = self.inference.views == 1 and self.inference.protocol.mode == "whole"
        small = not is_needed("probabilities", self.save)  # those of a whole batch would take gigabytes
        return 1, count_batch(self.inference.device, pixels) if one_pass and small else 1

    def with_engine(self, engine: Engine) -> "Labeller":
        """The same with another engine."""
        return replace(self, inference=replace(self.inference, engine=engine))

    def faster(self, make: Callable[[str], Engine], sources: Sequence[Source]) -> "Labeller":
        """The labeller with the engine of `precision.choose`, which is reported in one line on stderr."""
        if len(sources) < FEWEST:
            return self

        def label(engine: Engine, image: tuple[Source, Decoded]) -> np.ndarray:
            return self.with_engine(engine)._labelled([image])[0].prediction.labels

        read = ((source, self.read(source)) for source in sources[:TRIED])
        images = ((source, decoded) for source, decoded in read if isinstance(decoded, Decoded))
        try:
            engine, line = choose(self.inference.engine, make, images, label)
        except FloatingPointError:
            raise
        except Exception as error:
            skip_reason(error, sources[0].file)  # raises what does not concern these images alone
            return self
        if line:
            echo(line, err=True)
        return self.with_engine(engine)

    def predict(
        self, sources: Sequence[Source] | Stream, lanes: int, batch: int, stop: StopSignal
    ) -> Generator[Labelled, None, None]:
        """Results of the images, until a request to stop. Images that are skipped are added to `skips`.

        lanes: 1: threads read ahead, and all cores label one image, or a GPU `batch` images; more: as many threads read
        and label.
        """
        total = None if isinstance(sources, Stream) else len(sources)
        ahead, behind = tee(sources)  # those of a stream come once
        with (
            progress_bar(total, "labelled") as advance,
            nullcontext() if lanes == 1 else shared_cores(lanes) as first,
            closing(
                in_order(self.read, ahead, max(THREADS, batch), stop)
                if lanes == 1
                else in_order(partial(self.read_and_infer, Room(lanes)), until(ahead, stop), lanes, stop, first)
            ) as made,
        ):
            pairs = ((_input_sizes(got), (source, got)) for source, got in zip(behind, made, strict=False))
            for group in gathered(pairs, batch):
                for (source, _), labelled in zip(group, self.infer_all(group), strict=True):
                    if isinstance(labelled, Skip):
                        self.skip(source, labelled)
                    else:
                        yield labelled
                    advance(1)
                if stop.requested and lanes == 1:  # lanes finish what they have begun
                    return

    def read_and_infer(self, room: Room, source: Source) -> Labelled | Skip:
        """Both steps in one thread of several."""
        decoded = self.read(source)
        if isinstance(decoded, Skip):
            return decoded
        with room.taken(self.inference.input_pixels(decoded.image.shape[:2])):
            return self.infer(source, decoded)

    def infer_all(self, group: Sequence[tuple[Source, Decoded | Labelled | Skip]]) -> list[Labelled | Skip]:
        """`infer` of what was only read: of several images, which then have equal input sizes, in one pass."""
        images = [(source, got) for source, got in group if isinstance(got, Decoded)]
        if len(images) > 1:
            with suppress(Exception):  # then one after the other, which finds the image that is the reason
                return [*self._labelled(images)]
            free_gpu(self.inference.device)
        return [self.infer(source, got) if isinstance(got, Decoded) else got for source, got in group]

    def infer(self, source: Source, decoded: Decoded) -> Labelled | Skip:
        """One forward pass per view, whose logits give all requested kinds of results; or the reason to skip."""
        try:
            return self._labelled([(source, decoded)])[0]
        except FloatingPointError:  # of the network, not of this image
            raise
        except Exception as error:
            reason = skip_reason(error, source.file)
            if not lacks_memory(error):
                return reason
        free_gpu(self.inference.device)  # after the error, whose frames hold tensors, is gone
        return reason

    def _labelled(self, images: Sequence[tuple[Source, Decoded]]) -> list[Labelled]:
        wanted = (is_needed(field, self.save) for field in ("coarse", "probabilities", "confidence"))
        inputs = [[torch.from_numpy(each) for each in decoded.inputs] for _, decoded in images]
        sizes = [decoded.image.shape[:2] for _, decoded in images]
        names = [source.file for source, _ in images]
        started = time.perf_counter()
        with self.times.stage("labels"):
            made = self.inference.apart().predict_batch(inputs, sizes, names, *wanted)
        each = (time.perf_counter() - started) / len(images)
        return [
            Labelled(source, shown(decoded.image), prediction, decoded.origin, decoded.seconds + each)
            for (source, decoded), prediction in zip(images, made, strict=True)
        ]

    def write(self, done: Labelled) -> Written | Skip:
        """Writes the files of one image; or the reason why they cannot be written, for this image alone."""
        started, drawn = time.perf_counter(), self.selection.drawn(done.prediction)
        height, width = done.image.shape[:2]
        if not self.selection.holds(done.prediction.labels):
            entry = Entry(done.source.relative, (), (width, height), done.seconds, None)
            return Written(entry, [self.selection.left_out(done.source, done.origin)], {})
        outputs = [self.journal.output_of(kind, done.source) for kind in self.save]
        results: list[Result] = []
        objects: dict[str, list[bytes]] = {}
        for kind in self.save:
            try:
                encode = KINDS[kind].encode
                if encode is None:
                    # Shares are those of all classes.
                    labels = done.prediction.labels if kind == "shares" else drawn.labels
                    lines = objects[kind] = self.objects(kind, done.source, labels)
                    if sum(map(len, lines)) > LONGEST_LINE // 2:
                        return Skip(printable(done.source.file), "its run lengths are too long for rle.json")
                    results.append(self.journal.write_objects(kind, done.source, lines, done.origin))
                    continue
                with self.times.stage("encoding"):
                    content = encode(done.image, drawn, self.style)
                with self.times.stage("writing"):
                    results.append(self.journal.write(kind, done.source, content, done.origin))
            except Exception as error:
                return skip_reason(error, done.source.file, writing=True)
        seconds = done.seconds + time.perf_counter() - started
        return Written(Entry(done.source.relative, outputs, (width, height), seconds, None), results, objects)

    def skip(self, source: Source, skip: Skip) -> None:
        """Notes that an image is skipped, for the end of the run and in the journal; by the main thread alone."""
        self.skips.add(skip)
        self.journal.add(Entry(source.relative, (), None, 0.0, skip.reason))

    def objects(self, kind: str, source: Source, labels: np.ndarray) -> list[bytes]:
        """The objects of one image, with labels (H,W), for a file of all images."""
        given = source.relative, labels, self.style.classes
        with self.times.stage("encoding"):
            return rle_lines(*given, self.ids) if kind == "rle" else share_lines(*given)


def _input_sizes(got: Decoded | Labelled | Skip) -> tuple[tuple[int, ...], ...] | None:
    """What images of one batch have in common; None: nothing."""
    return tuple(each.shape for each in got.inputs) if isinstance(got, Decoded) else None


def free_gpu(device: torch.device) -> None:
    """Gives back the memory of a GPU that PyTorch keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def until(sources: Iterable[Source], stop: StopSignal) -> Iterator[Source]:
    """The sources, up to a request to stop."""
    for source in sources:
        if stop.requested:
            return
        yield source


def label_all(
    labeller: Labeller, sources: Sequence[Source] | Stream, stop: StopSignal, whole: Sequence[Source] | None = None
) -> int:
    """Labels all sources; reading, labelling and writing overlap. Returns the number of images done.

    whole: the images of all shards, and those that were done before; the arithmetic depends on them, not on `sources`.

    At the end, also after an error, it is printed what was skipped.
    """
    done = 0
    lanes, batch = labeller.plan(first_of(sources) if whole is None else whole)
    labeller = labeller.with_engine(labeller.times.engine(labeller.inference.engine))

    def write(labelled: Labelled) -> tuple[Source, Written | Skip]:
        return labelled.source, labeller.write(labelled)

    with (
        labeller.skips,
        closing(labeller.predict(sources, lanes, batch, stop)) as ready,
        closing(in_order(write, ready, THREADS, stop)) as all_written,
    ):
        for source, written in all_written:
            if isinstance(written, Skip):
                labeller.skip(source, written)
            else:
                with labeller.times.stage("writing"):
                    labeller.journal.add(*written)
                labeller.selection.count(written.results)
                done += 1
    return done
