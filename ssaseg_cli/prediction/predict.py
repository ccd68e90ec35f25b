"""Labels images from files, folders and glob patterns. Reading, inference and writing overlap; memory stays constant.

Threads read and write, since OpenCV, Pillow and zlib release Python's lock; the main thread runs the network. The
number of images in work at the same time is limited.

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
from ssaseg.files.writing import write_atomic
from ssaseg.models import load_model
from ssaseg.recipes import parse_protocol

# Number of threads that read; as many write. Each holds an image in memory, so the number is limited.
THREADS = max(2, min(8, count_cores() // 2))

Item = TypeVar("Item")

Made = TypeVar("Made")


class Decoded(NamedTuple):
    """The original image, and the network's inputs made from it; all BGR uint8 (·,·,3)."""

    image: np.ndarray
    inputs: list[np.ndarray]


class Labelled(NamedTuple):
    """An image with its results, ready to be written."""

    source: Source
    image: np.ndarray  # BGR uint8 (H,W,3)
    prediction: Prediction


# ---- the command -------------------------------------------------------------------------------------------------
def run_predict(
    checkpoint: Path, inputs: Sequence[str], out: Path, save: Sequence[str], skip_existing: bool, device: str
) -> int:
    """Labels every image of `inputs` into `out`/<kind>/. Returns 0, or 1 if an image was skipped.

    save: kinds of results: index, color, overlay, probs, rle, coarse. skip_existing: skip images whose results of all
    these kinds exist. After Ctrl-C or SIGTERM, images in work are written; returns 130 or 143. Raises CommandError for
    inputs without images, results that would overwrite each other, an `out` that cannot be written, and `coarse` with
    a classifier that does not adapt; OSError if a result cannot be written.
    """
    chosen = select_device(device)
    model, metadata = load_model(checkpoint)
    protocol = parse_protocol(metadata["protocol"], f"{checkpoint}: protocol")
    if is_needed("coarse", save) and not model.classifier.has_coarse:
        raise CommandError(
            f"{checkpoint}: classifier {model.classifier_name} does not adapt labels, so there is no coarse result\n"
            "remove coarse from --save"
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
        print(f"stopped: {done} of {len(sources)} images are done; --skip-existing labels the rest", file=sys.stderr)
        return stop.exit_code
    seconds = time.perf_counter() - started
    left_out = len(sources) - done
    counts = f"labelled {done} of {len(found)} images in {seconds:.1f} s ({done / max(seconds, 1e-9):.1f} images/s)"
    existed = f"; {len(found) - len(sources)} existed already" if len(found) > len(sources) else ""
    print(f"{counts}{existed}{f'; {left_out} skipped' if left_out else ''}: {out}")
    print(f"protocol of the checkpoint: {state_views(protocol)}")
    return 1 if left_out else 0


@dataclass(frozen=True)
class Labeller:
    """Reads, labels and writes images; holds what is the same for all of them."""

    inference: Inference
    out: Path
    save: Sequence[str]
    style: Style

    def read(self, source: Source) -> Decoded | Exception:
        """The image and the network's inputs, or the error if the image cannot be read."""
        try:
            image = read_image(source.path)
            return Decoded(image, self.inference.inputs(image, str(source.path)))
        except (DataError, OSError) as error:
            return error

    def predict(self, sources: Sequence[Source], stop: StopSignal) -> Generator[Labelled, None, None]:
        """Results of the images, until a request to stop. Images that cannot be read are reported on stderr."""
        with (
            progress_bar(len(sources), "labelled") as advance,
            closing(in_order(self.read, sources, THREADS)) as decoded,
        ):
            for source, got in zip(sources, decoded, strict=True):
                if isinstance(got, Exception):
                    report_unread(source, got)
                else:
                    yield Labelled(source, got.image, self.infer(source, got))
                advance(1)
                if stop.requested:
                    return

    def infer(self, source: Source, decoded: Decoded) -> Prediction:
        """One forward pass per view; its logits give all requested kinds of results."""
        inputs = [torch.from_numpy(each) for each in decoded.inputs]
        coarse, probabilities = (is_needed(field, self.save) for field in ("coarse", "probabilities"))
        size = decoded.image.shape[:2]
        return self.inference.predict(inputs, size, coarse, probabilities, str(source.path))

    def write(self, done: Labelled) -> tuple[str, list[str]]:
        """Writes the files of one image; returns its name and its lines for `rle.json`."""
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
    """Labels all sources; reading, labelling and writing overlap. Returns the number of images done."""
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
    """`function` of each item, in the items' order. `threads` threads compute at most `threads` items ahead.

    An exception of `function` is raised when its item is due. To stop early, close the generator: it waits for the
    items that are being computed.
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
    """Prints one line on stderr: the image and the reason."""
    reason = str(error).partition("\n")[0]
    if isinstance(error, OSError) and error.strerror:
        reason = f"{source.path}: {error.strerror}"
    tqdm.write(f"skipped: {reason}", file=sys.stderr)  # above the progress bar, if there is one


def target(out: Path, kind: str, source: Source) -> Path:
    """The file of one result."""
    return out / kind / f"{source.name}{KINDS[kind].suffix}"


def is_done(source: Source, out: Path, save: Sequence[str], known: set[str]) -> bool:
    """Whether all requested results of an image exist; `known`: images in `rle.json`."""
    return all(source.relative in known if kind == "rle" else target(out, kind, source).is_file() for kind in save)


def make_folders(out: Path, save: Sequence[str]) -> None:
    """Makes `out` and a folder per kind, before any work is done. Raises CommandError if they cannot be written to."""
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
