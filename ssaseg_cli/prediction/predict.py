"""Labels images from files, folders and glob patterns: the command, around `labelling.py`."""

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import NamedTuple, ParamSpec

from ssaseg.cli.engine.opening import make_engine
from ssaseg.cli.places.addresses import without_secrets
from ssaseg.cli.prediction.inputs import Stream, first_of
from ssaseg.cli.prediction.journal import COMMON, Journal
from ssaseg.cli.prediction.labelling import Labeller, label_all
from ssaseg.cli.prediction.large import label_large, require_tileable, state_large
from ssaseg.cli.prediction.preparing import (
    Setup,
    left_to_do,
    look_at_inputs,
    pixels_of,
    prepare,
    target_of,
    warn_of_sizes,
)
from ssaseg.cli.prediction.ray_engine import Opening, label_on_ray
from ssaseg.cli.prediction.request import Request, require_together
from ssaseg.cli.prediction.selection import Selection, parse_choice
from ssaseg.cli.prediction.sources import Source
from ssaseg.cli.prediction.stores import Store
from ssaseg.cli.printing import echo
from ssaseg.cli.ranks.ranks import under_torchrun
from ssaseg.cli.results.classes import CLASSES
from ssaseg.cli.scoring.inference import Inference, state_views
from ssaseg.cli.scoring.lanes import leave_if_busy
from ssaseg.cli.scoring.limit import memory_limit
from ssaseg.cli.scoring.timings import Timings
from ssaseg.cli.signals import StopSignal
from ssaseg.files.text import printable

P = ParamSpec("P")


class Done(NamedTuple):
    """What was done: how many images; what computed, in words; whether the network gives scores, see `state_views`."""

    images: int
    what: str
    scores: bool


def label_images(request: Request) -> int:
    """Labels every image of the request, or of its shard. Returns 0, or 1 if an image was skipped.

    Inputs are looked at before the network is read. After Ctrl-C or SIGTERM, images in work are written; returns 130 or
    143; a second signal ends the process. Raises CommandError for inputs without images, results that would overwrite
    each other, an `out` that cannot be written, `coarse` with a classifier that does not adapt, and a precision in
    which the device does not compute; OSError if results cannot be written.
    """
    out, shard = request.out, request.shard
    require_together(request)
    require_tileable(request.tiles, request.save)
    choice = parse_choice(request.where, request.only)
    whole, images = look_at_inputs(request)
    found = whole if isinstance(whole, Stream) else [source for source in whole if shard.has(source.relative)]
    setup = prepare(request, choice, images)
    times = Timings(setup.device, request.timings)
    stop = StopSignal(hasty=True)
    target = target_of(request, setup, stop)
    try:
        with target as journal:
            sources = left_to_do(found, journal, request, setup)
            journal.begin(first_of(found), first_of(sources))
            started = time.perf_counter()
            with stop:
                done = label(request, setup, journal, whole, sources, times, stop)
    except (KeyboardInterrupt, SystemExit):
        leave_if_busy(stop)
        raise
    if stop.requested:
        echo(f"stopped: {done.images} of {len(sources)} images are done; --resume labels the rest", err=True)
        return stop.exit_code
    seconds = time.perf_counter() - started
    print_end(request, len(found), len(sources), done.images, seconds, setup.selection)
    if isinstance(found, Stream) and found.others.first:
        echo(f"{found.others}")
    if shard.total > 1 and isinstance(out, Path):
        echo(f"this was shard {shard}; after all of them: ssaseg merge {shlex.quote(printable(str(out)))}")
    echo(f"computed by {done.what}")
    whose = "protocol of the checkpoint, changed" if request.changes else "protocol of the checkpoint"
    tiles, protocol = request.tiles, setup.protocol
    how = state_views(protocol, done.scores) if tiles is None else state_large(protocol, tiles, done.scores)
    echo(f"{whose}: {how}")
    times.show(done.images, seconds)
    if shard.total > 1 and under_torchrun():
        return 0  # otherwise it ends the other shards; `merge` returns 1
    return int(done.images < len(sources))


def label(
    request: Request,
    setup: Setup,
    journal: Journal | Store,
    whole: Sequence[Source] | Stream,
    sources: Sequence[Source] | Stream,
    times: Timings,
    stop: StopSignal,
) -> Done:
    """Labels `sources`. whole: all images of the request, which decide how it is computed."""
    opened, metadata, exact = setup.opened, setup.opened.metadata, setup.exact
    local = request.engine is None
    backend = setup.backend if local or opened.model is None else "torch"  # with Ray, this process computes nothing
    pixels = pixels_of(first_of(whole), setup.protocol) if sources else 0
    make = partial(make_engine, opened, setup.device, backend=backend, exact=exact, pixels=pixels)
    engine = make(request.precision if local and request.precision != "auto" else "float32")
    inference = Inference(engine, setup.protocol, metadata["mean"], metadata["std"])
    if request.tiles is None:
        warn_of_sizes(metadata, inference, sources)
    levels = metadata["range"] and tuple(metadata["range"])
    limits = request.max_pixels, times, levels, exact, setup.ids, setup.selection
    labeller = Labeller(inference, request.save, setup.style, journal, setup.code, *limits)
    if request.engine is not None:
        opening = opening_of(request, setup.backend, pixels)
        done, what = label_on_ray(labeller, opened, opening, request.engine, first_of(sources), first_of(whole), stop)
        return Done(done, what, engine.gives_scores)
    with memory_limit() if setup.device.type == "cpu" else nullcontext():  # CUDA reserves addresses of its own
        if request.tiles is not None:
            done = label_large(labeller, request.tiles, metadata, first_of(sources), stop)
        else:
            if request.precision == "auto" and not exact and request.shard.total == 1:  # shards would differ
                labeller = labeller.faster(make, first_of(sources))
            done = label_all(labeller, sources, stop, first_of(whole))
    return Done(done, labeller.inference.engine.what, engine.gives_scores)


def opening_of(request: Request, backend: str, pixels: int) -> Opening:
    """What actors open. They compute in float32 where one process would try what is faster: labels would differ."""
    precision = "float32" if request.precision == "auto" else request.precision
    how = request.classes, request.recipe, request.device, backend, precision, pixels
    return Opening(request.checkpoint, *how, request.actors)


def taking(make: Callable[P, Request]) -> Callable[P, int]:
    """`label_images` with the fields of a request as its arguments."""

    @wraps(make)
    def run(*given: P.args, **named: P.kwargs) -> int:
        return label_images(make(*given, **named))

    return run


run_predict = taking(Request)


def print_end(request: Request, found: int, sources: int, done: int, seconds: float, selection: Selection) -> None:
    """Prints how many of the images are labelled, how many are not, and where the results are."""
    counts = f"labelled {done} of {found} images in {seconds:.1f} s ({done / max(seconds, 1e-9):.1f} images/s)"
    there = found - sources - selection.earlier
    existed = f"; {there} were there already" if there else ""
    left_out = sources - done
    why = f"; {left_out} skipped, for the reasons above" if left_out else ""
    echo(f"{counts}{existed}{selection.state()}{why}")
    kinds = [kind for kind in request.save if kind not in COMMON or request.shard.total == 1]  # others: after a merge
    files = [COMMON[kind].file if kind in COMMON else f"{kind}/" for kind in kinds]
    names = ": " + ", ".join([*files, CLASSES]) if isinstance(request.out, Path) else ""
    echo(f"results are in {without_secrets(str(request.out))}{names}")
