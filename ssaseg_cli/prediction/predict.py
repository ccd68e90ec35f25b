"""Labelling images from files, folders and globs: reading, inference and writing overlap, memory stays flat.

Threads read and write, since OpenCV, Pillow and zlib work outside Python's lock; the main thread runs the network. A
fixed number of images is on its way at any time.

Axes: K classes, H×W pixels of an image.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from ssaseg.cli.console import progress_bar
from ssaseg.cli.device import count_cores, select_device
from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.kinds import KINDS, Style, is_needed, style_of
from ssaseg.cli.prediction.rle import RleFile, labelled_images, rle_lines
from ssaseg.cli.prediction.sources import Source, find_sources
from ssaseg.cli.scoring.inference import Inference, Prediction, state_views
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets import DataError, default_palette
from ssaseg.datasets.decoding import read_image
from ssaseg.models import load_model
from ssaseg.models.checkpoint import write_atomic
from ssaseg.recipes import parse_protocol

# Threads that read, and as many that write. Each holds an image, hence fewer than a large machine could run.
THREADS = max(2, min(8, count_cores() // 2))

Item = TypeVar("Item")

Made = TypeVar("Made")


class Decoded(NamedTuple):
    """An image as read, and the network's inputs made of it; all BGR uint8 (·,·,3)."""

    image: np.ndarray
    inputs: list[np.ndarray]


class Labelled(NamedTuple):
    """An image with its results, to be written."""

    source: Source
    image: np.ndarray  # BGR uint8 (H,W,3)
    prediction: Prediction


# ---- the command -------------------------------------------------------------------------------------------------
def run_predict(
    checkpoint: Path, inputs: Sequence[str], out: Path, save: Sequence[str], skip_existing: bool, device: str
) -> int:
    """Labels every image of `inputs` into `out`/<kind>/; returns 0, or 1 where some image was skipped.

    save: kinds of results: index, color, overlay, probs, rle, coarse. skip_existing: leave out images whose results
    of every kind are there. After Ctrl-C or SIGTERM what is on its way is written, and 130 or 143 returned. Raises
    CommandError for inputs without images, results that would overwrite each other, an `out` that cannot be written,
    and `coarse` of a classifier that does not adapt; OSError where a result cannot be written.
    """
    chosen = select_device(device)
    model, metadata = load_model(checkpoint)
    protocol = parse_protocol(metadata["protocol"], f"{checkpoint}: protocol")
    if is_needed("coarse", save) and not model.classifier.has_coarse:
        raise CommandError(
            f"{checkpoint}: classifier {model.classifier_name} adapts nothing, so there is no coarse result\n"
            "leave coarse out of --save"
        )
    found = find_sources(inputs, out)
    make_folders(out, save)
    known = labelled_images(out / "rle.json") if "rle" in save else set()
    sources = [each for each in found if not (skip_existing and is_done(each, out, save, known))]
    palette = metadata["palette"] or default_palette(len(metadata["classes"]))
    style = style_of(metadata["classes"], palette)
    started = time.perf_counter()
    with StopSignal() as stop, ExitStack() as stack:
        rle = stack.enter_context(RleFile(out / "rle.json")) if "rle" in save and sources else None
        inference = Inference(model.to(chosen).eval(), protocol, metadata["mean"], metadata["std"], chosen)
        labeller = Labeller(inference, out, save, style)
        done = label_all(labeller, sources, rle, stop)
    if stop.requested:
        print(f"stopped: {done} of {len(sources)} images are done; --skip-existing does the others", file=sys.stderr)
        return stop.exit_code
    seconds = time.perf_counter() - started
    left_out = len(sources) - done
    counts = f"labelled {done} of {len(found)} images in {seconds:.1f} s ({done / max(seconds, 1e-9):.1f} images/s)"
    there = f"; {len(found) - len(sources)} were there" if len(found) > len(sources) else ""
    print(f"{counts}{there}{f'; {left_out} skipped' if left_out else ''}: {out}")
    print(f"protocol of the checkpoint: {state_views(protocol)}")
    return 1 if left_out else 0


@dataclass(frozen=True)
class Labeller:
    """What does not change from image to image, and the three things done to each."""

    inference: Inference
    out: Path
    save: Sequence[str]
    style: Style

    def read(self, source: Source) -> Decoded | Exception:
        """The image and the network's inputs, or why there are none."""
        try:
            image = read_image(source.path)
            return Decoded(image, self.inference.inputs(image, str(source.path)))
        except (DataError, OSError) as error:
            return error

    def predict(self, sources: Sequence[Source], stop: StopSignal) -> Generator[Labelled, None, None]:
        """Results of the images that can be read, up to a signal to stop; the others are named on stderr."""
        with (
            progress_bar(len(sources), "labelled") as advance,
            closing(in_order(self.read, sources, THREADS)) as decoded,
        ):
            for source, got in zip(sources, decoded, strict=True):
                if isinstance(got, Exception):
                    report_unread(source, got)
                else:
                    yield Labelled(source, got.image, self.infer(got))
                advance(1)
                if stop.requested:
                    return

    def infer(self, decoded: Decoded) -> Prediction:
        """One forward pass for each view, whatever kinds of results are wanted."""
        inputs = [torch.from_numpy(each) for each in decoded.inputs]
        coarse, probabilities = (is_needed(field, self.save) for field in ("coarse", "probabilities"))
        return self.inference.predict(inputs, decoded.image.shape[:2], coarse, probabilities)

    def write(self, done: Labelled) -> tuple[str, list[str]]:
        """Writes the files of one image; returns its name and lines in `rle.json`."""
        for kind in self.save:
            encode = KINDS[kind].encode
            if encode is not None:
                content = encode(done.image, done.prediction, self.style)
                write_atomic(target(self.out, kind, done.source), content, sync=False)
        if "rle" not in self.save:
            return done.source.relative, []
        lines = rle_lines(done.source.relative, done.prediction.labels, self.style.classes)
        return done.source.relative, lines


def label_all(labeller: Labeller, sources: Sequence[Source], rle: RleFile | None, stop: StopSignal) -> int:
    """Reads, labels and writes all at the same time; returns the number of images done."""
    done = 0
    with (
        closing(labeller.predict(sources, stop)) as ready,
        closing(in_order(labeller.write, ready, THREADS)) as written,
    ):
        for name, lines in written:
            done += 1
            if rle is not None:
                rle.add(name, lines)
    return done


def in_order(function: Callable[[Item], Made], items: Iterable[Item], threads: int) -> Generator[Made, None, None]:
    """`function` of each item, in the items' order, by `threads` threads that are at most `threads` items ahead.

    An exception of `function` is raised in its turn; whoever stops early closes the iterator, which waits for what has
    been begun.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Made]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def report_unread(source: Source, error: Exception) -> None:
    """One line on stderr: the name and the reason."""
    reason = str(error).partition("\n")[0]
    if isinstance(error, OSError) and error.strerror:
        reason = f"{source.path}: {error.strerror}"
    tqdm.write(f"skipped: {reason}", file=sys.stderr)  # above the bar, where there is one


def target(out: Path, kind: str, source: Source) -> Path:
    """The file of one result."""
    return out / kind / f"{source.name}{KINDS[kind].suffix}"


def is_done(source: Source, out: Path, save: Sequence[str], known: set[str]) -> bool:
    """Whether every result asked for is there; `known`: images in `rle.json`."""
    return all(source.relative in known if kind == "rle" else target(out, kind, source).is_file() for kind in save)


def make_folders(out: Path, save: Sequence[str]) -> None:
    """Makes `out` and a folder per kind, and tries to write there, before any work is done. Raises CommandError."""
    for folder in [out, *(out / kind for kind in save if kind != "rle")]:
        probe = folder / ".writable"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise CommandError(
                f"{folder}: results cannot be written here ({error.strerror})\nchoose another --out"
            ) from None
