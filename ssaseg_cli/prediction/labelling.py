"""Reads, labels and writes images. These steps overlap; memory stays constant.

Threads read and write, since OpenCV, Pillow and zlib release Python's lock. On a CPU, as many threads as there are
cores run the network, each on an image of its own, or the main thread with all cores; for a GPU, the main thread
gathers batches. The number of images in work at the same time is limited.

Axes: K classes, H×W pixels of an image.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ssaseg.cli.console import progress_bar
from ssaseg.cli.device import count_cores
from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.batches import count_batch, gathered
from ssaseg.cli.prediction.ids import Ids
from ssaseg.cli.prediction.journal import Journal, Result, file_result, made_of, objects_result
from ssaseg.cli.prediction.kinds import KINDS, Style, is_needed
from ssaseg.cli.prediction.objects import LONGEST_LINE
from ssaseg.cli.prediction.precision import FEWEST, TRIED, choose
from ssaseg.cli.prediction.rle import rle_lines
from ssaseg.cli.prediction.shares import share_lines
from ssaseg.cli.prediction.skipping import Skip, Skips, lacks_memory, skip_reason
from ssaseg.cli.prediction.sources import Source
from ssaseg.cli.prediction.timings import Timings
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.engines import Engine
from ssaseg.cli.scoring.inference import Inference, Prediction
from ssaseg.cli.scoring.lanes import Room, count_lanes, in_order, shared_cores
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets.bands.reading import read_bands, shown
from ssaseg.datasets.base import Levels
from ssaseg.datasets.decoding.images import shown_size
from ssaseg.files.text import printable
from ssaseg.files.writing import write_atomic

# Number of threads that read; as many write. Each holds an image in memory, so the number is limited.
THREADS = max(2, min(8, count_cores() // 2))


class Decoded(NamedTuple):
    """The original image, and the network's inputs made from it; all BGR uint8 (·,·,3), or of other channels."""

    image: np.ndarray
    inputs: list[np.ndarray]
    origin: str  # see `made_of`


class Labelled(NamedTuple):
    """An image with its results, ready to be written."""

    source: Source
    image: np.ndarray  # BGR uint8 (H,W,3)
    prediction: Prediction
    origin: str


class Written(NamedTuple):
    """The results of one image, and by kind its objects for files of all images."""

    results: list[Result]
    objects: dict[str, list[bytes]]


@dataclass(frozen=True)
class Labeller:
    """Reads, labels and writes images; holds what is the same for all of them."""

    inference: Inference
    out: Path
    save: Sequence[str]
    style: Style
    journal: Journal
    code: str  # the checkpoint's sum
    max_pixels: int
    times: Timings
    levels: Levels | None = None  # of 16-bit images, see `read_image`
    exact: bool = False
    ids: Ids = field(default_factory=Ids)
    skips: Skips = field(default_factory=Skips)  # filled by the thread that takes the results

    def read(self, source: Source) -> Decoded | Skip:
        """The image and the network's inputs, or the reason to skip the image."""
        try:
            with self.times.stage("reading"):
                origin = made_of(self.code, source.path)  # before it is read: if it changes now, it is labelled again
                image = read_bands(source.path, self.inference.engine.channels, self.max_pixels, self.levels)
                return Decoded(image, self.inference.inputs(image, str(source.path)), origin)
        except Exception as error:
            return skip_reason(error, source.path)

    def plan(self, sources: Sequence[Source]) -> tuple[int, int]:
        """How many images to label side by side, see `count_lanes`, and how many in one pass, see `count_batch`."""
        if self.exact or not sources:  # other threads and other batches round otherwise
            return 1, 1
        size = shown_size(sources[0].path)
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
            skip_reason(error, sources[0].path)  # raises what does not concern these images alone
            return self
        if line:
            echo(line, err=True)
        return self.with_engine(engine)

    def predict(
        self, sources: Sequence[Source], lanes: int, batch: int, stop: StopSignal
    ) -> Generator[Labelled, None, None]:
        """Results of the images, until a request to stop. Images that are skipped are added to `skips`.

        lanes: 1: threads read ahead, and all cores label one image, or a GPU `batch` images; more: as many threads read
        and label.
        """
        with (
            progress_bar(len(sources), "labelled") as advance,
            nullcontext() if lanes == 1 else shared_cores(lanes) as first,
            closing(
                in_order(self.read, sources, max(THREADS, batch), stop)
                if lanes == 1
                else in_order(partial(self.read_and_infer, Room(lanes)), until(sources, stop), lanes, stop, first)
            ) as made,
        ):
            pairs = ((_input_sizes(got), (source, got)) for source, got in zip(sources, made, strict=False))
            for group in gathered(pairs, batch):
                for labelled in self.infer_all(group):
                    if isinstance(labelled, Skip):
                        self.skips.add(labelled)
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
            reason = skip_reason(error, source.path)
            if not lacks_memory(error):
                return reason
        free_gpu(self.inference.device)  # after the error, whose frames hold tensors, is gone
        return reason

    def _labelled(self, images: Sequence[tuple[Source, Decoded]]) -> list[Labelled]:
        wanted = (is_needed(field, self.save) for field in ("coarse", "probabilities", "confidence"))
        inputs = [[torch.from_numpy(each) for each in decoded.inputs] for _, decoded in images]
        sizes = [decoded.image.shape[:2] for _, decoded in images]
        names = [str(source.path) for source, _ in images]
        with self.times.stage("labels"):
            made = self.inference.apart().predict_batch(inputs, sizes, names, *wanted)
        return [
            Labelled(source, shown(decoded.image), prediction, decoded.origin)
            for (source, decoded), prediction in zip(images, made, strict=True)
        ]

    def write(self, done: Labelled) -> Written | Skip:
        """Writes the files of one image; or the reason why they cannot be written, for this image alone."""
        written = Written([], {})
        for kind in self.save:
            key = key_of(kind, done.source)
            path = self.out / key
            try:
                encode = KINDS[kind].encode
                if encode is None:
                    lines = written.objects[kind] = self.objects(kind, done)
                    if sum(map(len, lines)) > LONGEST_LINE // 2:
                        return Skip(printable(str(done.source.path)), "its run lengths are too long for rle.json")
                    written.results.append(objects_result(kind, done.source.relative, done.origin, lines))
                    continue
                with self.times.stage("encoding"):
                    content = encode(done.image, done.prediction, self.style)
                with self.times.stage("writing"):
                    self.journal.check()
                    root = self.out / kind
                    require_folder(root)
                    write_atomic(path, content, sync=False, root=root)
                    written.results.append(file_result(key, done.origin, path, content))
            except Exception as error:
                return skip_reason(error, done.source.path, writing=True)
        return written

    def objects(self, kind: str, done: Labelled) -> list[bytes]:
        """The objects of one image for a file of all images."""
        given = done.source.relative, done.prediction.labels, self.style.classes
        with self.times.stage("encoding"):
            return rle_lines(*given, self.ids) if kind == "rle" else share_lines(*given)


def _input_sizes(got: Decoded | Labelled | Skip) -> tuple[tuple[int, ...], ...] | None:
    """What images of one batch have in common; None: nothing."""
    return tuple(each.shape for each in got.inputs) if isinstance(got, Decoded) else None


def free_gpu(device: torch.device) -> None:
    """Gives back the memory of a GPU that PyTorch keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def until(sources: Sequence[Source], stop: StopSignal) -> Iterator[Source]:
    """The sources, up to a request to stop."""
    for source in sources:
        if stop.requested:
            return
        yield source


def label_all(labeller: Labeller, sources: Sequence[Source], stop: StopSignal) -> int:
    """Labels all sources; reading, labelling and writing overlap. Returns the number of images done.

    At the end, also after an error, it is printed what was skipped.
    """
    done = 0
    lanes, batch = labeller.plan(sources)
    labeller = labeller.with_engine(labeller.times.engine(labeller.inference.engine))
    with (
        labeller.skips,
        closing(labeller.predict(sources, lanes, batch, stop)) as ready,
        closing(in_order(labeller.write, ready, THREADS, stop)) as all_written,
    ):
        for written in all_written:
            if isinstance(written, Skip):
                labeller.skips.add(written)
            else:
                with labeller.times.stage("writing"):
                    labeller.journal.add(written.results, written.objects)
                done += 1
    return done


def key_of(kind: str, source: Source) -> str:
    """The file of one result below OUT; of objects in a file of all images, that file and the image's name in it."""
    suffix = KINDS[kind].suffix
    return f"{kind}{suffix}/{source.relative}" if KINDS[kind].encode is None else f"{kind}/{source.name}{suffix}"


def require_folder(folder: Path) -> None:
    """Raises CommandError for a link in the place of a folder of results: somebody else may have made it."""
    if folder.is_symlink():
        reason = "a link, but results are written to folders in --out"
        raise CommandError(f"{printable(str(folder))}: {reason}\nremove the link, or choose another --out")
