"""`ssaseg video`: labels a video, frame by frame. Memory: about a dozen frames, however long the video is.

A thread each decodes, draws and encodes, in the order of the frames; between them, as many threads as `count_lanes`
says label a frame each. OpenCV, PyAV, PyTorch and ONNX Runtime release Python's lock.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from ssaseg.cli.console import progress_bar
from ssaseg.cli.drawing.panels import overlay
from ssaseg.cli.engine.opening import device_for, make_engine, open_file, own_inference
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.inference import Inference
from ssaseg.cli.scoring.lanes import count_lanes, in_order, shared_cores
from ssaseg.cli.scoring.timings import VIDEO_STAGES, Timings
from ssaseg.cli.signals import StopSignal
from ssaseg.cli.video.smoothing import Flicker, Smoother
from ssaseg.cli.video.streams import Frame, Reader, Sound, Writer
from ssaseg.cli.weights.export import require_packages
from ssaseg.datasets import default_palette
from ssaseg.files.text import printable
from ssaseg.models.labelling import label_map

AHEAD = 4  # frames that are decoded before they are needed
MANY = 10**6  # frames of a video of unknown length, for the choice of a back end

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Request:
    """What is made of a video. See the help of the command."""

    save: str = "overlay"
    every: int = 1
    side_by_side: bool = False
    smooth: float = 0.0
    motion: bool = False
    limit: int | None = None
    precision: str = "float32"
    backend: str = "auto"
    device_format: str | None = None
    timings: bool = False


class Seen(NamedTuple):
    """A frame with its logits; None: its labels are those of the frame before."""

    frame: Frame
    logits: Tensor | None
    middle: tuple[int, ...] = ()  # size of the network's input
    labels: np.ndarray | None = None  # uint8 (H,W), without smoothing


def run_video(checkpoint: Path, source: str, out: Path, request: Request, device: str) -> int:
    """Labels `source` and writes `out`. Returns 0; 1 if the rest of the video is damaged.

    After Ctrl-C or SIGTERM what was labelled is written; returns 0 for a camera or address, which has no end of its
    own, otherwise 130 or 143. Raises CommandError for a network of other than three channels, a protocol of several
    views, an `out` that exists or a video without frames; DataError for what cannot be read.
    """
    if out.exists():
        raise CommandError(f"{printable(str(out))}: exists\ngive another file, or remove it")
    if not out.parent.is_dir():
        raise CommandError(f"{printable(str(out))}: no folder {printable(str(out.parent))}\ncreate it first")
    require_packages(Path("video"), ("av",))
    with Reader(source, request.device_format) as reader:
        opened = open_file(checkpoint)
        metadata = opened.metadata
        if metadata.get("channels", 3) != 3:
            raise CommandError(f"{checkpoint}: for images of {metadata['channels']} channels; videos have 3")
        frames = min(reader.expected or MANY, request.limit or MANY)
        pixels = -(-frames // request.every) * reader.video.height * reader.video.width
        engine = make_engine(opened, device_for(opened, device), request.precision, request.backend, pixels=pixels)
        inference = own_inference(opened, engine)
        if inference.views > 1:
            raise CommandError(
                f"{checkpoint}: its protocol averages {inference.views} views of each image; a video takes one\n"
                "give a checkpoint with test.ratios of one number and without test.flip"
            )
        palette = metadata["palette"] or default_palette(metadata["classes"])
        work = Work(inference, palette, request)
        if inference.device.type == "cpu":  # the cores are for the network
            reader.in_one_thread()
        with StopSignal() as stop:
            started = time.perf_counter()
            done = work.go_through(reader, out, stop)
            seconds = time.perf_counter() - started
    if not done and stop.requested:
        return stop.exit_code
    if not done:
        raise CommandError(
            f"{printable(source)}: no frame could be decoded{f': {reader.damage}' if reader.damage else ''}"
        )
    work.report(out, done, seconds)
    if reader.damage:
        echo(f"{printable(source)}: damaged ({reader.damage}): {done} frames could be decoded and are kept", err=True)
    if stop.requested and reader.expected is not None:
        echo(f"stopped after {done} of about {reader.expected} frames", err=True)
        return stop.exit_code
    return 1 if reader.damage else 0


class Drawn(NamedTuple):
    """A frame as it is written: labels uint8 (H,W), or BGR uint8 (H,W,3)."""

    picture: np.ndarray
    time: int


def until_none(pieces: Iterable[Frame | Sound | None]) -> Iterator[Frame | Sound]:
    """The pieces before the first None."""
    for piece in pieces:
        if piece is None:
            return
        yield piece


class Work:
    """Labels frames side by side, and smooths, draws and writes them in order."""

    def __init__(self, inference: Inference, palette: Sequence[Sequence[int]], request: Request) -> None:
        self.palette, self.request = palette, request
        self.times = Timings(inference.device, request.timings, VIDEO_STAGES)
        self.inference = replace(inference, engine=self.times.engine(inference.engine))
        self.on_cpu = inference.device.type == "cpu"
        self.smoother = Smoother(request.smooth, request.motion) if request.smooth else None
        self.raw, self.smoothed = Flicker(), Flicker()
        self.labels: np.ndarray | None = None
        self.size = (0, 0)  # height and width of the first frame

    def go_through(self, reader: Reader, out: Path, stop: StopSignal) -> int:
        """All frames until a request to stop or the limit; the number of frames written."""
        pieces = self._wanted(reader, stop)
        head: list[Frame | Sound] = []
        for piece in pieces:  # sound may come before the first frame
            head.append(piece)
            if isinstance(piece, Frame):
                break
        if not head or not isinstance(first := head[-1], Frame):
            return 0
        lanes = 1
        if self.on_cpu:
            lanes = count_lanes(MANY, self.inference.input_pixels(first.image.shape[:2]))
        done = 0
        self.size = height, width = first.image.shape[:2]
        size = (height, width * 2 if self.request.side_by_side else width)
        labels = self.request.save == "labels"
        with ExitStack() as stack:
            threads = 1 if self.on_cpu else 0
            writer = stack.enter_context(
                Writer(out, size, reader.rate, reader.time_base, labels, reader.sound, threads)
            )
            if writer.without_sound:
                echo(f"the sound is left out: {writer.without_sound} ({out.suffix}); .mkv takes any", err=True)
            share = stack.enter_context(shared_cores(lanes))
            advance = stack.enter_context(progress_bar(reader.expected or None, "labelled", "frames"))

            def stage(
                function: Callable[[Item], Made], items: Iterable[Item], threads: int, ahead: int
            ) -> Iterator[Made]:
                return stack.enter_context(closing(in_order(function, items, threads, stop, share, ahead)))

            def write(drawn: Drawn | Sound) -> int:
                with self.times.stage("encoding"):
                    return writer.add_sound(drawn.packet) if isinstance(drawn, Sound) else writer.add(*drawn)

            read = stage(self._read, repeat(pieces), 1, AHEAD)
            seen = stage(self.look, chain(head, until_none(read)), lanes, 2 * lanes)
            for frames in stage(write, stage(self.draw, seen, 1, 1), 1, 1):
                done += frames
                advance(frames)
        return done

    def _wanted(self, reader: Reader, stop: StopSignal) -> Iterator[Frame | Sound]:
        """Pieces of the video up to the limit of frames, or a request to stop."""
        limit = self.request.limit
        for piece in reader:
            if stop.requested or (limit is not None and isinstance(piece, Frame) and piece.number >= limit):
                return
            yield piece

    def _read(self, pieces: Iterator[Frame | Sound]) -> Frame | Sound | None:
        """The next piece; None at the end."""
        with self.times.stage("decoding"):
            return next(pieces, None)

    def look(self, piece: Frame | Sound) -> Seen | Sound:
        """The logits of a frame, and its labels without smoothing. Sound passes through."""
        if isinstance(piece, Sound):
            return piece
        if piece.number % self.request.every:
            return Seen(piece, None)
        name = f"frame {piece.number}"
        with self.times.stage("labels"):
            (pixels,) = (torch.from_numpy(each) for each in self.inference.inputs(piece.image, name))
            logits, middle = self.inference.apart().logits(pixels, name), pixels.shape[:2]
            return Seen(piece, logits, middle, self._labels(logits, middle, piece.image.shape[:2]))

    @staticmethod
    def _labels(logits: Tensor, middle: Sequence[int], size: Sequence[int]) -> np.ndarray:
        return label_map(logits, tuple(middle), tuple(size)).cpu().numpy()

    def draw(self, seen: Seen | Sound) -> Drawn | Sound:
        """What is written for a frame. Sound passes through. Frames come in order."""
        if isinstance(seen, Sound):
            return seen
        with self.times.stage("drawing"):
            return Drawn(self.picture(seen, self.size), seen.frame.time)

    def picture(self, seen: Seen, size: tuple[int, int]) -> np.ndarray:
        """What is written for a frame: labels uint8 (H,W), or BGR uint8 (H,W,3), of the first frame's size."""
        image = seen.frame.image
        if seen.logits is not None:
            assert seen.labels is not None
            self.labels = seen.labels
            self.raw.add(image, seen.labels)
            if self.smoother is not None:
                smooth = self.smoother(seen.logits, image)
                self.labels = self._labels(smooth, seen.middle, image.shape[:2])
                self.smoothed.add(image, self.labels)
        assert self.labels is not None
        labels = self.labels
        if image.shape[:2] != size:  # the size of some streams changes on the way
            image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        if labels.shape != size:
            labels = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)
        if self.request.save == "labels":
            return labels
        drawn = overlay(image, labels, self.palette)
        return np.concatenate([image, drawn], axis=1) if self.request.side_by_side else drawn

    def report(self, out: Path, frames: int, seconds: float) -> None:
        """What was written, how fast, and how much the labels flicker."""
        echo(f"wrote {printable(str(out))}: {frames} frames, {frames / seconds:.1f} frames/s")
        self.times.show(frames, seconds)
        raw, smoothed = self.raw.share, self.smoothed.share
        if raw is None:
            return
        what = "of the pixels that do not change, the label changes"
        if smoothed is None:
            echo(f"flicker: {what} in {raw:.2%} from frame to frame")
        else:
            echo(f"flicker: {what} in {smoothed:.2%} from frame to frame (without --smooth {raw:.2%})")
