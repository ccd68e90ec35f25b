"""Labels images from files, folders and glob patterns: the command, around `labelling.py`."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec

import torch

from ssaseg.cli.engine.opening import Opened, device_for, make_engine, open_file, require_precision
from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.classes import CLASSES, read_classes, write_classes
from ssaseg.cli.prediction.ids import Ids, categories_of, ids_of
from ssaseg.cli.prediction.journal import COMMON, Existing, Journal, checkpoint_sum, made_of
from ssaseg.cli.prediction.kinds import KINDS, is_needed, style_of
from ssaseg.cli.prediction.labelling import Labeller, key_of, label_all, require_folder
from ssaseg.cli.prediction.sources import LeftOut, Source, find_sources
from ssaseg.cli.prediction.timings import Timings
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.attention import LOOKED_AT, warn_of_attention
from ssaseg.cli.scoring.inference import Inference, state_views
from ssaseg.cli.scoring.lanes import leave_if_busy
from ssaseg.cli.scoring.limit import memory_limit
from ssaseg.cli.scoring.trained_size import warn_of_size
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets import default_palette
from ssaseg.datasets.decoding.images import shown_size
from ssaseg.datasets.transforms import input_sizes
from ssaseg.files.listing import FileList
from ssaseg.files.text import printable
from ssaseg.files.writing import make_temporary
from ssaseg.models.masks.base import MaskSegmenter
from ssaseg.recipes import Test, parse_protocol

WINDOWS = "smaller inputs (--scale) or sliding windows (--slide 1024 768) need less; labels then differ"
P = ParamSpec("P")


@dataclass(frozen=True)
class Request:
    """What is to be labelled, and how; see the help of the command.

    save: kinds of results, see `KINDS`. skip_existing: skip images whose results of all these kinds exist, made from
    the same image by the same checkpoint. max_pixels: of an image; larger ones are skipped. exact: the arithmetic of
    training's evaluation, bit for bit. precision: float32, bf16, fp16, or auto, see `precision.choose`. changes: keys
    of the test protocol to change. timings: print where the time went. backend, classes, recipe: as `make_engine` and
    `open_file` take them. legend: whether overlays have one. keep_suffix: see `find_sources`. annotations: a
    COCO-format file with the ids for `rle.json`.
    """

    checkpoint: Path
    inputs: Sequence[str]
    out: Path
    save: Sequence[str]
    skip_existing: bool
    device: str
    max_pixels: int = 100_000_000
    exact: bool = False
    precision: str = "auto"
    changes: Mapping[str, Any] = field(default_factory=dict)
    timings: bool = False
    backend: str = "auto"
    classes: str | None = None
    recipe: str | None = None
    legend: bool = True
    keep_suffix: bool = False
    annotations: Path | None = None


def label_images(request: Request) -> int:
    """Labels every image of the request. Returns 0, or 1 if an image was skipped.

    Inputs are looked at before the network is read. After Ctrl-C or SIGTERM, images in work are written; returns 130 or
    143; a second signal ends the process. Raises CommandError for inputs without images, results that would overwrite
    each other, an `out` that cannot be written, `coarse` with a classifier that does not adapt, and a precision in
    which the device does not compute; OSError if results cannot be written.
    """
    out, save = request.out, request.save
    found, images = look_at_inputs(request)
    opened, code = open_unchanged(request.checkpoint, request.classes, request.recipe)
    chosen = device_for(opened, request.device)
    metadata = opened.metadata
    protocol = parse_protocol(metadata["protocol"] | dict(request.changes), f"{request.checkpoint}: protocol")
    exact = request.exact or isinstance(opened.model, MaskSegmenter)
    backend = require_possible(opened, chosen, save, exact, request.precision, request.backend)
    ids = Ids()
    if request.annotations is not None:
        ids = Ids(images, categories_of(request.annotations, metadata["classes"]))
    times = Timings(chosen, request.timings)
    make_folders(out, [kind for kind in save if KINDS[kind].encode is not None])
    palette = metadata["palette"] or default_palette(metadata["classes"])
    style = style_of(metadata["classes"], palette, request.legend)
    write_classes(out, metadata, palette, request.checkpoint, code)
    code += what_else(request, metadata, protocol)
    stop = StopSignal(hasty=True)
    try:
        with Journal(out) as journal:
            sources = left_to_do(found, out, save, code, request.skip_existing)
            started = time.perf_counter()
            with stop:
                pixels = pixels_of(sources, protocol)
                make = partial(make_engine, opened, chosen, backend=backend, exact=exact, pixels=pixels)
                engine = make("float32" if request.precision == "auto" else request.precision)
                inference = Inference(engine, protocol, metadata["mean"], metadata["std"])
                some = [source.path for source in sources[:: max(len(sources) // LOOKED_AT, 1)]]
                warn_of_attention(metadata["model"], inference, some, WINDOWS)
                warn_of_size(metadata, protocol, FileList(source.file for source in sources))
                levels = metadata["range"] and tuple(metadata["range"])
                labeller = Labeller(
                    inference, out, save, style, journal, code, request.max_pixels, times, levels, exact, ids
                )
                with memory_limit() if chosen.type == "cpu" else nullcontext():  # CUDA reserves addresses of its own
                    if request.precision == "auto" and not exact:
                        labeller = labeller.faster(make, sources)
                    done = label_all(labeller, sources, stop)
    except (KeyboardInterrupt, SystemExit):
        leave_if_busy(stop)
        raise
    if stop.requested:
        echo(f"stopped: {done} of {len(sources)} images are done; --skip-existing labels the rest", err=True)
        return stop.exit_code
    seconds = time.perf_counter() - started
    print_end(request, len(found), len(sources), done, seconds)
    echo(f"computed by {labeller.inference.engine.what}")
    whose = "protocol of the checkpoint, changed" if request.changes else "protocol of the checkpoint"
    echo(f"{whose}: {state_views(protocol, engine.gives_scores)}")
    times.show(done, seconds)
    return int(done < len(sources))


def taking(make: Callable[P, Request]) -> Callable[P, int]:
    """`label_images` with the fields of a request as its arguments."""

    @wraps(make)
    def run(*given: P.args, **named: P.kwargs) -> int:
        return label_images(make(*given, **named))

    return run


run_predict = taking(Request)


def look_at_inputs(request: Request) -> tuple[list[Source], Mapping[str, int] | None]:
    """The images to label, and their ids if a COCO-format file has them. Files that are left out are reported.

    Raises CommandError for inputs without images, and for images without an id; as `read_classes` and `find_sources`.
    """
    others = LeftOut()
    found = find_sources(request.inputs, request.out, others, request.keep_suffix)
    if others.first:
        echo(f"{others}; give a file by its name to label it", err=True)
    read_classes(request.out)
    return found, None if request.annotations is None else ids_of(request.annotations, found)


def what_else(request: Request, metadata: Mapping[str, Any], protocol: Test) -> str:
    """What decides results besides checkpoint and image; empty for the options' defaults."""
    text = ""
    if request.changes or request.classes or request.recipe:
        text += str((protocol, metadata["mean"], metadata["std"], metadata["classes"]))
    if not request.legend:
        text += "no legend"
    return text if request.annotations is None else text + checkpoint_sum(request.annotations)


def print_end(request: Request, found: int, sources: int, done: int, seconds: float) -> None:
    """Prints how many of the images are labelled, how many are not, and where the results are."""
    counts = f"labelled {done} of {found} images in {seconds:.1f} s ({done / max(seconds, 1e-9):.1f} images/s)"
    existed = f"; {found - sources} were there already" if found > sources else ""
    left_out = sources - done
    why = f"; {left_out} skipped, for the reasons above" if left_out else ""
    echo(f"{counts}{existed}{why}")
    files = [COMMON[kind].file if kind in COMMON else f"{kind}/" for kind in request.save]
    echo(f"results are in {printable(str(request.out))}: {', '.join([*files, CLASSES])}")


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
    existing = Existing(out, {key for each in keys.values() for key in each}, save)
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
