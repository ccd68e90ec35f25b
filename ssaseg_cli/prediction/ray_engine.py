"""`predict --engine ray`: actors of Ray Data read, label and write images; this process keeps the journal.

An actor opens the checkpoint once and does what `label_all` does, with a journal that only collects. What it collected
comes back as plain data and goes into the journal of this process, so that results, record and manifest are those of
the command without Ray. Ray Data gives blocks of images to actors as they become free, holds them back while results
wait, and replaces actors that die. Images whose block was lost with an actor are tried once more, each alone; one that
ends its actor then too gets an entry with an error.
"""

import errno
import json
import logging
import os
import platform
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import torch

from ssaseg.cli.cluster import Share, connected, nodes_of, share_out
from ssaseg.cli.console import progress_bar
from ssaseg.cli.engine.exports import choose_backend
from ssaseg.cli.engine.opening import Opened, device_for, make_engine, open_file
from ssaseg.cli.errors import USER_ERRORS, CommandError
from ssaseg.cli.prediction.journal import OF_A_COMMAND, Journal, Result, delete_results_in_work, exclusive, parse_result
from ssaseg.cli.prediction.labelling import Labeller, label_all
from ssaseg.cli.prediction.skipping import AGAIN, Skip, Skips
from ssaseg.cli.prediction.sources import Source
from ssaseg.cli.results.manifest import Entry
from ssaseg.cli.scoring.inference import Inference
from ssaseg.cli.scoring.limit import memory_limit
from ssaseg.cli.scoring.timings import Timings
from ssaseg.cli.signals import Interrupted, StopSignal
from ssaseg.files.text import printable

# Images that an actor gets at a time, at most; on a GPU more, as reading and computing overlap within a block only. A
# block that is in work is lost with the command.
MOST_IN_BLOCK, MOST_ON_GPU = 16, 64
BLOCKS = 8  # for each actor, at least, where there are so many images
SOME = 64  # images by which an actor plans its work, see `count_lanes`
RETRIES = 1  # of a block whose actor died
MOST_LOST = 16  # blocks in one round; then the images that were not tried are tried first
CPU = torch.device("cpu")
APART = ("inference", "journal", "times", "skips")  # what an actor has of its own, of the fields of a labeller


@dataclass(frozen=True)
class Opening:
    """What actors open, and how; see `open_file` and `make_engine`.

    pixels: of the run, by which the back end is chosen. actors: how many; None: all that there is room for.
    """

    checkpoint: Path
    classes: str | None
    recipe: str | None
    device: str
    backend: str
    precision: str
    pixels: int
    actors: int | None


@dataclass(frozen=True)
class Work:
    """What an actor is made with. common: the fields of its labeller that are not in `APART`. lock: a file in OUT that
    is there while the command runs. images: some of the run, see `whole` of `label_all`.
    """

    opening: Opening
    out: Path
    common: Mapping[str, Any]
    inference: Mapping[str, Any]  # protocol, mean and std
    lock: str
    threads: int
    images: Sequence[Source]
    version: str


# ---- in an actor -------------------------------------------------------------------------------------------------


class Collected(Journal):
    """A journal in memory, which is sent to the process that writes the real one."""

    def __init__(self, out: Path, lock: str) -> None:
        super().__init__(out)
        self.seen = lock
        self.lines: list[tuple[Entry, Sequence[Result], dict[str, list[str]]]] = []

    def add(
        self, entry: Entry, results: Sequence[Result] = (), objects: Mapping[str, Sequence[bytes]] | None = None
    ) -> None:
        """Keeps one image."""
        texts = {kind: [os.fsdecode(line) for line in lines] for kind, lines in (objects or {}).items()}
        self.lines.append((entry, results, texts))

    def check(self) -> None:
        """Raises CommandError if the command has ended, or this node has another folder in the place of `out`."""
        if not os.path.lexists(self.seen):
            what = f"{printable(str(self.out))}: {platform.node()} does not see the --out of the command"
            raise CommandError(f"{what}\nexpected a folder on a disk that all nodes of the cluster share")


@dataclass(frozen=True)
class ActorLabeller(Labeller):
    """A labeller that uses the cores of its actor, not those of the machine."""

    threads: int = 1

    def plan(self, sources: Sequence[Source]) -> tuple[int, int]:
        """As `Labeller.plan`."""
        lanes, batch = super().plan(sources)
        return min(lanes, self.threads), batch


class Actor:
    """Labels blocks of images. Ray Data makes it in a process of its own and calls it once for each block.

    It opens the checkpoint in its first call: if the process dies of that, Ray's bound on retries holds.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.labeller: ActorLabeller | None = None

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """The replies to blocks of images, both as JSON."""
        blocks = ([Source(*each) for each in json.loads(text)] for text in batch["block"])
        return {"reply": [json.dumps(self.reply(block)) for block in blocks]}

    def reply(self, sources: Sequence[Source]) -> dict[str, Any]:
        """The journal's lines of these images, or the error that ends the command."""
        try:
            if self.labeller is None:
                self.labeller = open_labeller(self.work)
            journal = Collected(self.work.out, self.work.lock)
            journal.check()
            labeller = replace(self.labeller, journal=journal, skips=Skips())
            with memory_limit() if labeller.inference.device.type == "cpu" else nullcontext():
                label_all(labeller, sources, StopSignal(), self.work.images)
            return {"lines": journal.lines, "what": labeller.inference.engine.what, "node": platform.node()}
        except Exception as error:
            return {"error": pack_error(error)}


def open_labeller(work: Work) -> ActorLabeller:
    """What labels images in this process. Raises CommandError if the node is another than the command expects."""
    if version("ssaseg") != work.version:
        what = f"{platform.node()} has ssaseg {version('ssaseg')}, the command {work.version}"
        raise CommandError(f"--engine ray: {what}\ninstall the same version on all nodes")
    journal = Collected(work.out, work.lock)
    journal.check()
    opening = work.opening
    torch.set_num_threads(work.threads)
    cv2.setNumThreads(work.threads)
    opened = open_file(opening.checkpoint, opening.classes, opening.recipe)
    device = device_for(opened, opening.device)
    engine = make_engine(opened, device, opening.precision, opening.backend, work.common["exact"])
    inference = Inference(engine, **work.inference)
    return ActorLabeller(inference, journal=journal, times=Timings(device, False), **work.common, threads=work.threads)


def pack_error(error: Exception) -> list[Any]:
    """An error as plain data, for `unpacked`."""
    if isinstance(error, CommandError):
        return ["CommandError", str(error), error.exit_code]
    if isinstance(error, OSError):
        return ["OSError", error.errno, error.strerror or str(error), error.filename and str(error.filename)]
    if isinstance(error, FloatingPointError):
        return ["FloatingPointError", str(error)]
    if isinstance(error, MemoryError) or any(kind.__name__ in USER_ERRORS for kind in type(error).__mro__):
        return ["CommandError", str(error) or "not enough memory for the network", 2]
    return ["RuntimeError", "".join(traceback.format_exception(error))]


def unpacked(packed: Sequence[Any]) -> Exception:
    """The error of an actor, for the command to raise; one that nobody expects has the actor's traceback."""
    kinds = {"CommandError": CommandError, "OSError": OSError, "FloatingPointError": FloatingPointError}
    return kinds.get(packed[0], RuntimeError)(*packed[1:])


# ---- in the command ----------------------------------------------------------------------------------------------


def label_on_ray(
    labeller: Labeller,
    opened: Opened,
    opening: Opening,
    address: str,
    sources: Sequence[Source],
    whole: Sequence[Source],
    stop: StopSignal,
) -> tuple[int, str]:
    """As `label_all`, in actors of Ray; returns also what computed. labeller: of this process; its engine is not used.

    Raises CommandError if Ray cannot be reached, has no room for so many actors, or no image could be labelled since
    all actors died; and what an actor raised.
    """
    if not sources:
        return 0, labeller.inference.engine.what
    try:
        with labeller.skips, connected(address) as ray:
            share, on_gpu = _share(ray, opened, opening)
            if opening.backend == "auto" and opened.model is not None:
                plain = on_gpu or labeller.exact
                backend = "torch" if plain else choose_backend(opened.model, CPU, opening.pixels, opening.precision)
                opening = replace(opening, backend=backend)
            opening = replace(opening, device="cuda" if on_gpu else "cpu", checkpoint=opening.checkpoint.absolute())
            run = Run(ray, labeller, _work(labeller, opening, share, whole), share, stop)
            run.label(sources)
            return run.done, run.what
    finally:
        _clean(labeller)


def _share(ray: Any, opened: Opened, opening: Opening) -> tuple[Share, bool]:
    """What each actor gets of the cluster, and whether it computes on a GPU."""
    nodes = nodes_of(ray)
    can = opened.kind in ("torch", "pt2") and any(node.gpus for node in nodes)
    on_gpu = opening.device == "cuda" or (opening.device == "auto" and can)
    return share_out(nodes, opening.actors, on_gpu), on_gpu


def _work(labeller: Labeller, opening: Opening, share: Share, whole: Sequence[Source]) -> Work:
    """What actors need of this process, with paths that mean the same in any folder."""
    out, journal = _local(labeller)
    common = {each.name: getattr(labeller, each.name) for each in fields(Labeller) if each.name not in APART}
    inference = {name: getattr(labeller.inference, name) for name in ("protocol", "mean", "std")}
    lock, threads = os.path.abspath(journal.lock.path), max(share.cpus, 1)
    return Work(opening, out.absolute(), common, inference, lock, threads, _absolute(whole[:SOME]), version("ssaseg"))


def _absolute(sources: Sequence[Source]) -> list[Source]:
    return [each._replace(file=os.path.abspath(each.file)) for each in sources]


def _clean(labeller: Labeller) -> None:
    """Deletes what actors that died were writing; not while another command writes to OUT."""
    out, journal = _local(labeller)
    with suppress(OSError), exclusive(out):
        running = {path.stem for path in out.iterdir() if OF_A_COMMAND.fullmatch(path.name)}
        if running == {journal.path.stem}:
            delete_results_in_work(out)


def _local(labeller: Labeller) -> tuple[Path, Journal]:
    """Where results go, and the journal: a folder, as `preparing.require_local` refuses other places."""
    assert isinstance(labeller.journal, Journal)
    return labeller.journal.out, labeller.journal


class Run:
    """Labels images in rounds, each with a pool of actors, and writes the journal."""

    def __init__(self, ray: Any, labeller: Labeller, work: Work, share: Share, stop: StopSignal) -> None:
        self.ray, self.labeller, self.work, self.share, self.stop = ray, labeller, work, share, stop
        self.handled: set[str] = set()  # images that are done or skipped
        self.done, self.engines = 0, set[str]()

    @property
    def what(self) -> str:
        """What computed, in words."""
        actors = f"{self.share.actors} actor{'s' * (self.share.actors > 1)} of Ray"
        threads = f"{self.work.threads} thread{'s' * (self.work.threads > 1)}"
        return f"{'; '.join(sorted(self.engines)) or 'nothing'}, in {actors}, {threads} each"

    def label(self, sources: Sequence[Source]) -> None:
        """Labels all of them, unless a stop is requested."""
        left, alone = list(sources), False
        with progress_bar(len(sources), "labelled") as advance:
            while left and not self.stop.requested:
                actors = min(self.share.actors, len(left))
                most = MOST_ON_GPU if self.share.gpus else MOST_IN_BLOCK
                size = 1 if alone else max(1, min(most, len(left) // (BLOCKS * actors)))
                failure = self.round(left, size, actors, alone, advance)
                tried = size * (MOST_LOST + 2 * actors)
                rest = [each for each in (*left[tried:], *left[:tried]) if each.relative not in self.handled]
                if self.stop.requested:
                    return
                if failure is not None and (alone or not self.handled):
                    raise self.lost(failure)
                if alone:
                    break
                alone = failure is None or len(rest) == len(left)
                left = rest
        for source in left if not self.stop.requested else ():
            if source.relative not in self.handled:
                reason = f"the process that labelled it died, {RETRIES + 1} times alone with it"
                self.labeller.skip(source, Skip(printable(source.file), reason))

    def round(
        self, left: Sequence[Source], size: int, actors: int, alone: bool, advance: Callable[[int], object]
    ) -> Exception | None:
        """Labels blocks of `size` images in a pool of actors. Returns the error of Ray that has ended it early: too
        many lost blocks. alone: no number of them is too many.
        """
        by_name = {source.relative: source for source in left}
        blocks = [_absolute(left[start : start + size]) for start in range(0, len(left), size)]
        replies = self.replies([json.dumps(block) for block in blocks], actors, alone)
        while True:
            try:
                with self.stop.ending_waits():
                    texts = next(replies, None)
            except Interrupted:
                return None
            except Exception as error:
                return error
            if texts is None or self.stop.requested:
                return None
            for text in texts:
                advance(self.take(json.loads(text), by_name))

    def replies(self, blocks: Sequence[str], actors: int, alone: bool) -> Iterator[Sequence[str]]:
        """What actors return, as it comes."""
        data = import_module("ray.data")
        context = data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.max_errored_blocks = -1 if alone else MOST_LOST
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        # A task that waits for an actor is lost with it, so that an image that is tried alone has it for itself.
        pool = data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1 if alone else 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the bound on retries: see `ray` in pyproject.toml
            made = data.from_items([{"block": block} for block in blocks], override_num_blocks=len(blocks)).map_batches(
                Actor,
                fn_constructor_args=(self.work,),
                compute=pool,
                batch_size=1,
                num_cpus=self.share.cpus,
                num_gpus=self.share.gpus,
                max_restarts=-1,
                max_task_retries=RETRIES,
            )
        for batch in made.iter_batches(batch_size=None, prefetch_batches=0):
            yield batch["reply"]

    def take(self, reply: Mapping[str, Any], by_name: Mapping[str, Source]) -> int:
        """Adds the images of a reply to the journal; returns their number. Raises the error that an actor sent."""
        if "error" in reply:
            raise unpacked(reply["error"])
        self.engines.add(reply["what"])
        for values, results, texts in reply["lines"]:
            file, outputs, size, seconds, error = values
            source = by_name[file]
            self.handled.add(file)
            if error is None:
                objects = {kind: [os.fsencode(text) for text in lines] for kind, lines in texts.items()}
                kept = [result for result in map(parse_result, results) if result is not None]
                self.labeller.journal.add(Entry(file, outputs, size and tuple(size), seconds, None), kept, objects)
                self.labeller.selection.count(kept)
                self.done += 1
                continue
            if error == os.strerror(errno.ENOENT) and os.path.exists(source.file):
                what = f"{printable(source.file)}: {reply['node']} does not see this image"
                raise CommandError(f"{what}\nexpected each INPUT on a disk that all nodes of the cluster share")
            self.labeller.skip(source, Skip(printable(source.file), error))
        return len(reply["lines"])

    def lost(self, failure: Exception) -> CommandError:
        """The error of a run that cannot go on."""
        if missing := re.search(r"No module named '([\w.]+)'", str(failure)):
            what = f"a node of the cluster cannot import {missing[1]}"
            fix = "install the same version of ssaseg on all nodes"
        else:
            reason = printable(" ".join(str(failure).split()))[-300:]
            what = f"{self.done} images are done, then actors only died: {reason}"
            fix = f"give each more memory with a smaller --actors, or {AGAIN}"
        return CommandError(f"--engine ray: {what}\n{fix}")
