"""Labels images from files, folders and glob patterns: the command, around `labelling.py`."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from ssaseg.cli.engine.opening import Opened, device_for, make_engine, open_file, require_precision
from ssaseg.cli.errors import CommandError
from ssaseg.cli.options import in_windows
from ssaseg.cli.prediction.journal import Existing, Journal, checkpoint_sum, made_of
from ssaseg.cli.prediction.kinds import KINDS, is_needed, style_of
from ssaseg.cli.prediction.labelling import Labeller, key_of, label_all, require_folder
from ssaseg.cli.prediction.sources import Source, find_sources
from ssaseg.cli.prediction.timings import Timings
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.attention import LOOKED_AT, warn_of_attention
from ssaseg.cli.scoring.inference import Inference, state_views
from ssaseg.cli.scoring.lanes import leave_if_busy
from ssaseg.cli.scoring.limit import memory_limit
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets import default_palette
from ssaseg.datasets.checking.images import count_suffixes
from ssaseg.datasets.decoding.images import shown_size
from ssaseg.datasets.transforms import input_sizes
from ssaseg.files.text import printable
from ssaseg.files.writing import make_temporary
from ssaseg.models.masks.base import MaskSegmenter
from ssaseg.recipes import Test, parse_protocol

WINDOWS = "sliding windows need less: --slide 1024 768; labels then differ"


def run_predict(
    checkpoint: Path,
    inputs: Sequence[str],
    out: Path,
    save: Sequence[str],
    skip_existing: bool,
    device: str,
    max_pixels: int = 100_000_000,
    exact: bool = False,
    precision: str = "auto",
    slide: tuple[int, int] | None = None,
    timings: bool = False,
    backend: str = "auto",
    classes: str | None = None,
    recipe: str | None = None,
) -> int:
    """Labels every image of `inputs` into `out`/<kind>/. Returns 0, or 1 if an image was skipped.

    save: kinds of results: index, color, overlay, probs, rle, coarse. skip_existing: skip images whose results of all
    these kinds exist, made from the same image by the same checkpoint. max_pixels: of an image; larger ones are
    skipped. exact: the arithmetic of training's evaluation, bit for bit. precision: float32, bf16, fp16, or auto, see
    `precision.choose`. slide: side and step of square windows, in place of the protocol's. timings: print where the
    time went. backend, classes, recipe: as `make_engine` and `open_file` take them. After Ctrl-C or SIGTERM, images in
    work are written; returns 130 or 143; a second signal ends the process. Raises CommandError for inputs without
    images, results that would overwrite each other, an `out` that cannot be written, `coarse` with a classifier that
    does not adapt, and a precision in which the device does not compute; OSError if results cannot be written.
    """
    opened, code = open_unchanged(checkpoint, classes, recipe)
    chosen = device_for(opened, device)
    metadata = opened.metadata
    protocol = parse_protocol(metadata["protocol"] | (in_windows(slide) if slide else {}), f"{checkpoint}: protocol")
    if slide or classes or recipe:
        code += str((protocol, metadata["mean"], metadata["std"], metadata["classes"]))
    exact = exact or isinstance(opened.model, MaskSegmenter)
    backend = require_possible(opened, chosen, save, exact, precision, backend)
    times = Timings(chosen, timings)
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
                pixels = pixels_of(sources, protocol)
                make = partial(make_engine, opened, chosen, backend=backend, exact=exact, pixels=pixels)
                engine = make("float32" if precision == "auto" else precision)
                inference = Inference(engine, protocol, metadata["mean"], metadata["std"])
                some = [source.path for source in sources[:: max(len(sources) // LOOKED_AT, 1)]]
                warn_of_attention(metadata["model"], inference, some, WINDOWS)
                levels = metadata["range"] and tuple(metadata["range"])
                labeller = Labeller(inference, out, save, style, journal, code, max_pixels, times, levels, exact)
                with memory_limit() if chosen.type == "cpu" else nullcontext():  # CUDA reserves addresses of its own
                    if precision == "auto" and not exact:
                        labeller = labeller.faster(make, sources)
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
    echo(f"computed by {labeller.inference.engine.what}")
    whose = "protocol of the checkpoint" if slide is None else "protocol of the checkpoint, in windows"
    echo(f"{whose}: {state_views(protocol, engine.gives_scores)}")
    times.show(done, seconds)
    return 1 if left_out else 0


def open_unchanged(path: Path, classes: str | None, recipe: str | None) -> tuple[Opened, str]:
    """A file that holds a network, and its sum. Raises CommandError if it was replaced in the meantime."""
    before = path.stat()
    opened = open_file(path, classes, recipe)
    code = checkpoint_sum(path)
    if not os.path.samestat(before, after := path.stat()) or before.st_mtime_ns != after.st_mtime_ns:
        raise CommandError(f"{path}: was replaced while it was read\nrun the command again")
    return opened, code


def require_possible(
    opened: Opened, device: torch.device, save: Sequence[str], exact: bool, precision: str, backend: str
) -> str:
    """The back end: PyTorch where the results need it. Raises CommandError for options that cannot be fulfilled."""
    if is_needed("coarse", save):
        if opened.model is None or backend not in ("auto", "torch"):
            why = "only checkpoints in PyTorch give labels from before SSA adapts them"
            raise CommandError(f"{opened.path}: {why}\nremove coarse from --save, or leave out --backend")
        if not opened.model.classifier.has_coarse:
            why = f"classifier {opened.metadata['classifier']} does not adapt labels, so there is no coarse result"
            raise CommandError(f"{opened.path}: {why}\nremove coarse from --save")
        backend = "torch"
    if exact and precision not in ("auto", "float32"):
        raise CommandError(f"--precision {precision}: --exact and mask methods compute in float32\nleave it out")
    if precision != "auto" and opened.model is not None and backend in ("auto", "torch"):
        require_precision(precision, device)
    return backend


def pixels_of(sources: Sequence[Source], protocol: Test) -> int:
    """About how many pixels the network gets in the whole run: all images are taken to be as large as the first."""
    size = shown_size(sources[0].path) if sources else None
    if size is None:
        return 0
    ratios = input_sizes(size, protocol.scale, protocol.multiple, protocol.ratios)
    return len(sources) * sum(height * width for height, width in ratios) * (2 if protocol.flip else 1)


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
