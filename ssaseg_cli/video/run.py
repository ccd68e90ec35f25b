"""`ssaseg video`: labels a video, frame by frame. Memory: a few frames, however long the video is."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

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
from ssaseg.cli.signals import StopSignal
from ssaseg.cli.video.smoothing import Flicker, Smoother
from ssaseg.cli.video.streams import Frame, Reader, Sound, Writer
from ssaseg.cli.weights.export import require_packages
from ssaseg.datasets import default_palette
from ssaseg.files.text import printable
from ssaseg.models.labelling import label_map

MANY = 10**6  # frames of a video of unknown length, for the choice of a back end


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
        with StopSignal() as stop:
            started = time.perf_counter()
            done = work.go_through(reader, out, stop)
            seconds = time.perf_counter() - started
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


class Work:
    """Labels frames side by side, and smooths, draws and writes them in order."""

    def __init__(self, inference: Inference, palette: Sequence[Sequence[int]], request: Request) -> None:
        self.inference, self.palette, self.request = inference, palette, request
        self.smoother = Smoother(request.smooth, request.motion) if request.smooth else None
        self.raw, self.smoothed = Flicker(), Flicker()
        self.labels: np.ndarray | None = None

    def go_through(self, reader: Reader, out: Path, stop: StopSignal) -> int:
        """All frames until a request to stop or the limit; the number of frames written."""
        inference = self.inference
        wanted = self._wanted(reader)
        head: list[Frame | Sound] = []
        for piece in wanted:  # sound may come before the first frame
            head.append(piece)
            if isinstance(piece, Frame):
                break
        if not head or not isinstance(first := head[-1], Frame):
            return 0
        lanes = 1
        if inference.device.type == "cpu":
            lanes = count_lanes(MANY, inference.input_pixels(first.image.shape[:2]))
        done = 0
        height, width = first.image.shape[:2]
        size = (height, width * 2 if self.request.side_by_side else width)
        labels = self.request.save == "labels"
        with (
            Writer(out, size, reader.rate, reader.time_base, labels, reader.sound) as writer,
            shared_cores(lanes) as share,
            progress_bar(reader.expected or 0, "frames") as advance,
        ):
            if writer.without_sound:
                echo(f"the sound is left out: {writer.without_sound} ({out.suffix}); .mkv takes any", err=True)
            for seen in in_order(self.look, chain(head, wanted), lanes, stop, share):
                if isinstance(seen, Sound):
                    writer.add_sound(seen.packet)
                    continue
                writer.add(self.picture(seen, (height, width)), seen.frame.time)
                done += 1
                advance(1)
                if stop.requested:
                    break
        return done

    def _wanted(self, reader: Reader) -> Iterator[Frame | Sound]:
        """Pieces of the video up to the limit of frames."""
        limit = self.request.limit
        for piece in reader:
            if limit is not None and isinstance(piece, Frame) and piece.number >= limit:
                return
            yield piece

    def look(self, piece: Frame | Sound) -> Seen | Sound:
        """The logits of a frame, and its labels without smoothing. Sound passes through."""
        if isinstance(piece, Sound):
            return piece
        if piece.number % self.request.every:
            return Seen(piece, None)
        name = f"frame {piece.number}"
        (pixels,) = (torch.from_numpy(each) for each in self.inference.inputs(piece.image, name))
        logits, middle = self.inference.apart().logits(pixels, name), pixels.shape[:2]
        return Seen(piece, logits, middle, self._labels(logits, middle, piece.image.shape[:2]))

    @staticmethod
    def _labels(logits: Tensor, middle: Sequence[int], size: Sequence[int]) -> np.ndarray:
        return label_map(logits, tuple(middle), tuple(size)).cpu().numpy()

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
        raw, smoothed = self.raw.share, self.smoothed.share
        if raw is None:
            return
        what = "of the pixels that do not change, the label changes"
        if smoothed is None:
            echo(f"flicker: {what} in {raw:.2%} from frame to frame")
        else:
            echo(f"flicker: {what} in {smoothed:.2%} from frame to frame (without --smooth {raw:.2%})")
