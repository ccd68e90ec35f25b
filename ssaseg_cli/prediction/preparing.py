"""What a run of `ssaseg predict` needs before the first image: inputs, the network, where results go, what is done."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssaseg.cli.engine.opening import Opened, checkpoint_sum, device_for, open_file, require_precision
from ssaseg.cli.errors import CommandError
from ssaseg.cli.places.addresses import without_secrets
from ssaseg.cli.prediction.ids import Ids, categories_of, ids_of
from ssaseg.cli.prediction.inputs import Stream, find_inputs, headers_of, origin_of
from ssaseg.cli.prediction.journal import Journal, require_folder
from ssaseg.cli.prediction.large import state_tiles
from ssaseg.cli.prediction.request import Request, what_else
from ssaseg.cli.prediction.selection import Choice, Selection, selection_of
from ssaseg.cli.prediction.shards import ShardJournal, require_one_run, run_of
from ssaseg.cli.prediction.sources import LeftOut, Source
from ssaseg.cli.prediction.stores import Store, store_of
from ssaseg.cli.printing import echo
from ssaseg.cli.ranks.launcher import require_environment
from ssaseg.cli.ranks.ranks import own_gpu
from ssaseg.cli.results.classes import classes_of, read_classes, write_classes
from ssaseg.cli.results.kinds import KINDS, Style, is_needed, style_of
from ssaseg.cli.scoring.attention import LOOKED_AT, warn_of_attention
from ssaseg.cli.scoring.inference import Inference
from ssaseg.cli.scoring.trained_size import warn_of_size
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets import DataError, default_palette
from ssaseg.datasets.decoding.images import shown_size
from ssaseg.datasets.transforms import input_sizes
from ssaseg.files.text import printable
from ssaseg.files.writing import make_temporary
from ssaseg.models.masks.base import MaskSegmenter
from ssaseg.recipes import Test, parse_protocol

WINDOWS = "smaller inputs (--scale) or sliding windows (--slide 1024 768) need less; labels then differ"


class Setup(NamedTuple):
    """What a request means for this network. device: of this process. code: all that decides results besides the image.
    run: what shards have in common, see `run_of`. what: `classes.json`.
    """

    opened: Opened
    device: torch.device
    protocol: Test
    exact: bool
    backend: str
    style: Style
    ids: Ids
    selection: Selection
    code: str
    run: Mapping[str, Any]
    what: Mapping[str, Any]


def prepare(request: Request, choice: Choice, images: Mapping[str, int] | None) -> Setup:
    """Opens the network. images: their ids, if a file has them. Raises CommandError for what it cannot do."""
    opened, code = open_unchanged(request.checkpoint, request.classes, request.recipe)
    metadata = opened.metadata
    selection = selection_of(choice, metadata["classes"])
    protocol = parse_protocol(metadata["protocol"] | dict(request.changes), f"{request.checkpoint}: protocol")
    if request.tiles is not None:
        state_tiles(metadata["protocol"], protocol, request.tiles)
    device = device_of(opened, request)
    exact = request.exact or isinstance(opened.model, MaskSegmenter)
    here = device if request.engine is None else None
    backend = require_possible(opened, here, request.save, exact, request.precision, request.backend)
    ids = Ids()
    if request.annotations is not None:
        ids = Ids(images, categories_of(request.annotations, metadata["classes"]))
    palette = metadata["palette"] or default_palette(metadata["classes"])
    style = style_of(metadata["classes"], palette, request.legend)
    what = classes_of(metadata, palette, request.checkpoint, code)
    options = what_else(request, metadata, protocol) + selection.code
    decides = (options, selection.asks, exact, request.precision, backend, request.keep_suffix)
    run = run_of(code, decides, request.save, request.places)
    return Setup(opened, device, protocol, exact, backend, style, ids, selection, code + options, run, what)


def look_at_inputs(request: Request) -> tuple[list[Source] | Stream, Mapping[str, int] | None]:
    """The images to label, and their ids if a COCO-format file has them. Files that are left out are reported.

    Raises CommandError for inputs without images, for images without an id, and for options that need all names at the
    start where tars tell them one by one; as `read_classes` and `find_inputs`.
    """
    out, others = request.out, LeftOut()
    found = find_inputs(request.inputs, request.listing, out, others, request.keep_suffix)
    if isinstance(found, Stream):
        if request.shard.total > 1:
            fix = "give each command its own tars: photos-{000..004}.tar"
            raise CommandError(f"--shard {request.shard}: images in tars have no shards\n{fix}")
        if request.annotations is not None:
            raise CommandError("--annotations: images in tars have no ids\nunpack them, or leave it out")
    elif others.first:
        echo(f"{others}; give a file by its name to label it", err=True)
    if request.engine is not None or request.tiles is not None:
        require_local(request, found)
    if isinstance(out, Path):
        read_classes(out)
    return found, None if request.annotations is None else ids_of(request.annotations, [*found])


def require_local(request: Request, found: Sequence[Source] | Stream) -> None:
    """Raises CommandError for images or an `out` that are not local files, which actors and tiles need."""
    option = "--tile" if request.engine is None else "--engine ray"
    away = None if isinstance(request.out, Path) else f"--out {without_secrets(str(request.out))}"
    if isinstance(found, Stream):
        away = "images in a tar"
    else:
        away = next((printable(source.file) for source in found if source.content is not None), away)
    if away is not None:
        fix = "copy images to a local folder, or one that all nodes share; or leave the option out"
        raise CommandError(f"{option}: works on local files; got {away}\n{fix}")


def target_of(request: Request, setup: Setup, stop: StopSignal) -> Journal | Store:
    """What writes results, and remembers them, after `classes.json` is written. Raises CommandError, DataError if
    nothing can be written there.
    """
    out, shard = request.out, request.shard
    if not isinstance(out, Path):
        store = store_of(out, request.resume, stop)
        store.write_classes(setup.what)
        return store
    require_one_run(out, shard, setup.run)
    make_folders(out, [kind for kind in request.save if KINDS[kind].encode is not None])
    write_classes(out, setup.what)
    journal = Journal(out) if shard.total == 1 else ShardJournal(out, shard, setup.run, request.resume)
    journal.tiled = request.tiles is not None
    return journal


def open_unchanged(path: Path, classes: str | None, recipe: str | None) -> tuple[Opened, str]:
    """A file that holds a network, and its sum. Raises CommandError if it was replaced in the meantime."""
    before = path.stat()
    opened = open_file(path, classes, recipe)
    code = checkpoint_sum(path)
    if not os.path.samestat(before, after := path.stat()) or before.st_mtime_ns != after.st_mtime_ns:
        raise CommandError(f"{path}: was replaced while it was read\nrun the command again")
    return opened, code


def require_possible(
    opened: Opened, device: torch.device | None, save: Sequence[str], exact: bool, precision: str, backend: str
) -> str:
    """The back end: PyTorch where the results need it. Raises CommandError for options that cannot be fulfilled.

    device: None: that of another process.
    """
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
    if device is not None and precision != "auto" and opened.model is not None and backend in ("auto", "torch"):
        require_precision(precision, device)
    return backend


def device_of(opened: Opened, request: Request) -> torch.device:
    """The device to compute on; of a shard that torchrun has started, its own GPU."""
    device = device_for(opened, request.device if request.engine is None else "cpu")
    if request.shard.total > 1 and device.type == "cuda" and "LOCAL_RANK" in os.environ:
        require_environment()
        device, _ = own_gpu(int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.cuda.set_device(device)
    return device


def warn_of_sizes(metadata: Mapping[str, Any], inference: Inference, sources: Sequence[Source] | Stream) -> None:
    """Says on stderr what images are too large for."""
    headers = headers_of(sources)
    some = [*headers[:: max(len(headers) // LOOKED_AT, 1)]]
    warn_of_attention(metadata["model"], inference, some, WINDOWS)
    warn_of_size(metadata, inference.protocol, headers)


def pixels_of(sources: Sequence[Source], protocol: Test) -> int:
    """About how many pixels the network gets of `sources`: all images are taken to be as large as the first."""
    size = shown_size(sources[0].header()) if sources else None
    if size is None:
        return 0
    ratios = input_sizes(size, protocol.scale, protocol.multiple, protocol.ratios)
    return len(sources) * sum(height * width for height, width in ratios) * (2 if protocol.flip else 1)


def left_to_do(
    found: Sequence[Source] | Stream, journal: Journal | Store, request: Request, setup: Setup
) -> Sequence[Source] | Stream:
    """The images whose results do not all exist, or were made of something else; all images without `resume`. Not those
    that an earlier command with the same `selection` has left out.
    """
    save, selection = request.save, setup.selection
    look_at_results(found, journal, request, selection)
    if not request.resume:
        return found

    def is_done(source: Source) -> bool:
        try:
            origin = origin_of(setup.code, source)
            if isinstance(journal, Journal) and selection.left_out_earlier(journal.existing, source, origin):
                return True
            return journal.is_done(source, save, origin)
        except (OSError, DataError):  # reported when the image is read
            return False

    if isinstance(found, Stream):
        return found.without(is_done)
    left = [source for source in found if not is_done(source)]
    again = 0
    if isinstance(journal, Journal):
        out = journal.out
        again = sum(all(os.path.isfile(out / journal.key_of(kind, source)) for kind in save) for source in left)
    if again:
        reason = "not known to be made from these images by this checkpoint"
        echo(f"existing results of {again} images are made again: {reason}", err=True)
    return left


def look_at_results(
    found: Sequence[Source] | Stream, journal: Journal | Store, request: Request, selection: Selection
) -> None:
    """Reads which results exist. Those of a folder in any case: a record or rle.json that cannot be read is an error
    now, not after hours.
    """
    if isinstance(journal, Store):
        if request.resume:
            journal.look()
        return
    if isinstance(found, Stream) and request.resume:
        journal.look(None, request.save)
        return
    names = found if request.resume else ()
    keys = {journal.key_of(kind, each) for each in names for kind in request.save}
    journal.look(keys | {selection.key(each) for each in names}, request.save)


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
