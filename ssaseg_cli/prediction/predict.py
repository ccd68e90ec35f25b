"""Labels images from files, folders and glob patterns. Reading, inference and writing overlap; memory stays constant.

Threads read and write, since OpenCV, Pillow and zlib release Python's lock; the main thread runs the network. The
number of images in work at the same time is limited.

Axes: K classes, H×W pixels of an image.
"""

import os
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ssaseg.cli.console import progress_bar
from ssaseg.cli.device import count_cores, select_device
from ssaseg.cli.engine.opening import make_engine, open_file
from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.journal import Existing, Journal, Result, checkpoint_sum, file_result, made_of, rle_result
from ssaseg.cli.prediction.kinds import KINDS, Style, is_needed, style_of
from ssaseg.cli.prediction.rle import LONGEST_LINE, rle_lines
from ssaseg.cli.prediction.skipping import lacks_memory, skip_reason
from ssaseg.cli.prediction.sources import Source, find_sources
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.inference import Inference, Prediction, state_views
from ssaseg.cli.scoring.lanes import count_lanes, in_order, leave_if_busy, shared_cores
from ssaseg.cli.scoring.limit import memory_limit
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets import default_palette
from ssaseg.datasets.bands.reading import read_bands, shown
from ssaseg.datasets.base import Levels
from ssaseg.datasets.checking.images import count_suffixes
from ssaseg.datasets.decoding.images import shown_size
from ssaseg.files.text import printable
from ssaseg.files.writing import make_temporary, write_atomic
from ssaseg.models.masks.base import MaskSegmenter
from ssaseg.recipes import parse_protocol

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
    """The results of one image, and its objects for `rle.json`."""

    results: list[Result]
    lines: list[bytes]


# ---- the command -------------------------------------------------------------------------------------------------
def run_predict(
    checkpoint: Path,
    inputs: Sequence[str],
    out: Path,
    save: Sequence[str],
    skip_existing: bool,
    device: str,
    max_pixels: int = 100_000_000,
    exact: bool = False,
) -> int:
    """Labels every image of `inputs` into `out`/<kind>/. Returns 0, or 1 if an image was skipped.

    save: kinds of results: index, color, overlay, probs, rle, coarse. skip_existing: skip images whose results of all
    these kinds exist, made from the same image by the same checkpoint. max_pixels: of an image; larger ones are
    skipped. exact: the arithmetic of training's evaluation, bit for bit. After Ctrl-C or SIGTERM, images in work are
    written; returns 130 or 143; a second signal ends the process. Raises CommandError for inputs without images,
    results that would overwrite each other, an `out` that cannot be written, and `coarse` with a classifier that does
    not adapt; OSError if results cannot be written.
    """
    chosen = select_device(device)
    before = checkpoint.stat()
    opened = open_file(checkpoint)
    code = checkpoint_sum(checkpoint)
    if not os.path.samestat(before, after := checkpoint.stat()) or before.st_mtime_ns != after.st_mtime_ns:
        raise CommandError(f"{checkpoint}: was replaced while it was read\nrun the command again")
    model, metadata = opened.model, opened.metadata
    assert model is not None
    protocol = parse_protocol(metadata["protocol"], f"{checkpoint}: protocol")
    if is_needed("coarse", save) and not model.classifier.has_coarse:
        raise CommandError(
            f"{checkpoint}: classifier {model.classifier_name} does not adapt labels, so there is no coarse result\n"
            "remove coarse from --save"
        )
    others: Counter[str] = Counter()
    found = find_sources(inputs, out, others)
    if others:
        echo(f"{count_suffixes(others)}; give a file by its name to label it", err=True)
    make_folders(out, [kind for kind in save if KINDS[kind].encode is not None])
    palette = metadata["palette"] or default_palette(len(metadata["classes"]))
    style = style_of(metadata["classes"], palette)
    stop = StopSignal(hasty=True)
    try:
        with Journal(out) as journal:
            sources = left_to_do(found, out, save, code, skip_existing)
            started = time.perf_counter()
            with stop:
                exact = exact or isinstance(model, MaskSegmenter)
                engine = make_engine(opened, chosen, exact=exact)
                inference = Inference(engine, protocol, metadata["mean"], metadata["std"])
                levels = metadata["range"] and tuple(metadata["range"])
                labeller = Labeller(inference, out, save, style, journal, code, max_pixels, levels, exact)
                with memory_limit() if chosen.type == "cpu" else nullcontext():  # CUDA reserves addresses of its own
                    done = label_all(labeller, sources, stop)
    except (KeyboardInterrupt, SystemExit):
        leave_if_busy(stop)
        raise
    if stop.requested:
        echo(f"stopped: {done} of {len(sources)} images are done; --skip-existing labels the rest", err=True)
        return stop.exit_code
    seconds = time.perf_counter() - started
    left_out = len(sources) - done
    counts = f"labelled {done} of {len(found)} images in {seconds:.1f} s ({done / max(seconds, 1e-9):.1f} images/s)"
    existed = f"; {len(found) - len(sources)} were there already" if len(found) > len(sources) else ""
    echo(f"{counts}{existed}{f'; {left_out} skipped' if left_out else ''}: {printable(str(out))}")
    echo(f"protocol of the checkpoint: {state_views(protocol, model.classifier.gives_scores)}")
    return 1 if left_out else 0


def left_to_do(found: Sequence[Source], out: Path, save: Sequence[str], code: str, skip_existing: bool) -> list[Source]:
    """The images whose results do not all exist, or were made of something else; all images without skip_existing."""
    keys = {source: [key_of(kind, source) for kind in save] for source in found} if skip_existing else {}
    # Read in any case: a record or rle.json that cannot be read is an error now, not after hours.
    existing = Existing(out, {key for each in keys.values() for key in each}, "rle" in save)
    if not skip_existing:
        return list(found)

    def is_done(source: Source) -> bool:
        try:
            origin = made_of(code, source.path)
        except OSError:  # reported when the image is read
            return False
        return all(existing.has(key, origin) for key in keys[source])

    left = [source for source in found if not is_done(source)]
    again = sum(all(os.path.isfile(out / key) for key in keys[source]) for source in left)
    if again:
        reason = "not known to be made from these images by this checkpoint"
        echo(f"existing results of {again} images are made again: {reason}", err=True)
    return left


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
    levels: Levels | None = None  # of 16-bit images, see `read_image`
    exact: bool = False

    def read(self, source: Source) -> Decoded | str:
        """The image and the network's inputs, or the reason to skip the image."""
        try:
            origin = made_of(self.code, source.path)  # before it is read: if it changes now, it is labelled again
            image = read_bands(source.path, self.inference.engine.channels, self.max_pixels, self.levels)
            return Decoded(image, self.inference.inputs(image, str(source.path)), origin)
        except Exception as error:
            return skip_reason(error, source.path)

    def count_lanes(self, sources: Sequence[Source]) -> int:
        """How many images to label side by side, see `lanes.count_lanes`."""
        if self.exact or self.inference.device.type != "cpu" or not sources:  # other threads, other rounding
            return 1
        size = shown_size(sources[0].path)
        pixels = 0 if size is None else self.inference.input_pixels(size)
        return count_lanes(len(sources), pixels)

    def predict(self, sources: Sequence[Source], lanes: int, stop: StopSignal) -> Generator[Labelled, None, None]:
        """Results of the images, until a request to stop. Images that are skipped are reported on stderr.

        lanes: 1: threads read ahead, and all cores label one image; more: as many threads read and label.
        """
        with (
            progress_bar(len(sources), "labelled") as advance,
            nullcontext() if lanes == 1 else shared_cores(lanes) as first,
            closing(
                in_order(self.read, sources, THREADS, stop)
                if lanes == 1
                else in_order(self.read_and_infer, until(sources, stop), lanes, stop, first)
            ) as made,
        ):
            for source, got in zip(sources, made, strict=False):
                labelled = self.infer(source, got) if isinstance(got, Decoded) else got
                if isinstance(labelled, str):
                    echo(f"skipped: {labelled}", err=True)
                else:
                    yield labelled
                advance(1)
                if stop.requested and lanes == 1:  # lanes finish what they have begun
                    return

    def read_and_infer(self, source: Source) -> Labelled | str:
        """Both steps in one thread of several."""
        decoded = self.read(source)
        return decoded if isinstance(decoded, str) else self.infer(source, decoded)

    def infer(self, source: Source, decoded: Decoded) -> Labelled | str:
        """One forward pass per view, whose logits give all requested kinds of results; or the reason to skip."""
        try:
            inputs = [torch.from_numpy(each) for each in decoded.inputs]
            coarse, probabilities = (is_needed(field, self.save) for field in ("coarse", "probabilities"))
            size, name = decoded.image.shape[:2], str(source.path)
            prediction = self.inference.apart().predict(inputs, size, coarse, probabilities, name)
            return Labelled(source, shown(decoded.image), prediction, decoded.origin)
        except FloatingPointError:  # of the network, not of this image
            raise
        except Exception as error:
            reason = skip_reason(error, source.path)
            if not lacks_memory(error) or self.inference.device.type != "cuda":
                return reason
        torch.cuda.empty_cache()  # after the error, whose frames hold tensors, is gone
        return reason

    def write(self, done: Labelled) -> Written | str:
        """Writes the files of one image; or the reason why they cannot be written, for this image alone."""
        written = Written([], [])
        for kind in self.save:
            key = key_of(kind, done.source)
            path = self.out / key
            try:
                encode = KINDS[kind].encode
                if encode is None:
                    written.lines.extend(rle_lines(done.source.relative, done.prediction.labels, self.style.classes))
                    if sum(map(len, written.lines)) > LONGEST_LINE // 2:
                        return f"{printable(str(done.source.path))}: its run lengths are too long for rle.json"
                    written.results.append(rle_result(done.source.relative, done.origin, written.lines))
                    continue
                content = encode(done.image, done.prediction, self.style)
                self.journal.check()
                root = self.out / kind
                require_folder(root)
                write_atomic(path, content, sync=False, root=root)
                written.results.append(file_result(key, done.origin, path, content))
            except Exception as error:
                return skip_reason(error, done.source.path, writing=True)
        return written


def until(sources: Sequence[Source], stop: StopSignal) -> Iterator[Source]:
    """The sources, up to a request to stop."""
    for source in sources:
        if stop.requested:
            return
        yield source


def label_all(labeller: Labeller, sources: Sequence[Source], stop: StopSignal) -> int:
    """Labels all sources; reading, labelling and writing overlap. Returns the number of images done."""
    done = 0
    with (
        closing(labeller.predict(sources, labeller.count_lanes(sources), stop)) as ready,
        closing(in_order(labeller.write, ready, THREADS, stop)) as all_written,
    ):
        for written in all_written:
            if isinstance(written, str):
                echo(f"skipped: {written}", err=True)
            else:
                labeller.journal.add(written.results, written.lines)
                done += 1
    return done


def key_of(kind: str, source: Source) -> str:
    """The file of one result below OUT; of its objects in `rle.json`, that file and the image's name in it."""
    suffix = KINDS[kind].suffix
    return f"{kind}{suffix}/{source.relative}" if KINDS[kind].encode is None else f"{kind}/{source.name}{suffix}"


def require_folder(folder: Path) -> None:
    """Raises CommandError for a link in the place of a folder of results: somebody else may have made it."""
    if folder.is_symlink():
        reason = "a link, but results are written to folders in --out"
        raise CommandError(f"{printable(str(folder))}: {reason}\nremove the link, or choose another --out")


def make_folders(out: Path, names: Sequence[str]) -> None:
    """Makes `out` and folders in it, before any work is done. Raises CommandError if they cannot be written to."""
    for folder in [out, *(out / name for name in names)]:
        if folder != out:
            require_folder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe, descriptor = make_temporary(folder)
            os.close(descriptor)
            probe.unlink()
        except OSError as error:
            where = f"{printable(str(folder))}: results cannot be written here ({error.strerror})"
            raise CommandError(f"{where}\nchoose another --out") from None
