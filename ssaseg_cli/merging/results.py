"""Joins the manifests of the shards of `ssaseg predict`, and writes the files of all images."""

import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ssaseg.cli.errors import CommandError
from ssaseg.cli.merging.rest import EXAMPLES, report_rest, some
from ssaseg.cli.prediction.journal import (
    COMMON,
    OF_A_COMMAND,
    RECORD,
    Line,
    add_to_common,
    delete_results_in_work,
    exclusive,
    read_journal,
    take_over,
)
from ssaseg.cli.prediction.shards import (
    FOLDER,
    Header,
    read_header,
    require_one_run,
    require_same,
    shard_file,
    shard_files,
)
from ssaseg.cli.prediction.sources import find_sources
from ssaseg.cli.printing import echo
from ssaseg.cli.results.manifest import MANIFEST, read_manifest
from ssaseg.cli.sharding import Shard
from ssaseg.files.text import printable
from ssaseg.files.writing import FolderInUse, FolderLock, delete_temporaries

MOST_LOCKS = 500  # files that are open at the same time; a process may have 1024


@dataclass
class Looked:
    """What the manifest of a shard says."""

    path: Path
    header: Header
    images: set[str] = field(default_factory=set)  # that have an entry
    gone: list[str] = field(default_factory=list)  # whose results are not what the manifest says


def has_results(out: Path) -> bool:
    """Whether `ssaseg predict` has written to this folder."""
    names = os.listdir(out)
    return {RECORD, MANIFEST, FOLDER} & set(names) != set() or any(map(OF_A_COMMAND.fullmatch, names))


def merge_results(out: Path) -> int:
    """Merges the shards below `out`, if they are complete; without shards, what killed commands have left.

    Returns 1 if images are missing or failed, else 0. Raises as `run_merge`.
    """
    files = shard_files(out)
    running: dict[Shard, str] = {}
    with ExitStack() as locks:  # no shard begins while it is read
        safe = True  # whether it is known which commands run
        for shard, path in files[:MOST_LOCKS]:
            try:
                lock = FolderLock(path.parent, path.with_suffix(".lock").name)
                locks.callback(lock.release)
                safe = safe and lock.supported
            except FolderInUse as owner:
                running[shard] = printable(str(owner))
        safe = safe and len(files) <= MOST_LOCKS
        looked = look(out, files)
        if looked and not is_complete(out, looked, running):
            return 1
        with exclusive(out):
            take_over(out)
            add_to_common(out, [each.path for each in looked])
            if looked and safe and not any(map(OF_A_COMMAND.fullmatch, os.listdir(out))):
                delete_results_in_work(out)
                delete_temporaries(out / FOLDER)
        if looked:
            note_unseen(out, looked)
    return report(out, len(looked))


def look(out: Path, files: Sequence[tuple[Shard, Path]]) -> list[Looked]:
    """Reads the manifests. Raises CommandError for shards of several runs, and for an image of another shard."""
    found: list[Looked] = []
    for shard, path in files:
        header = read_header(path)
        if not found:
            require_one_run(out, shard, header.run, whose=str(path))
        require_same(out, path, header.run, found[0].header.run if found else header.run)
        looked = Looked(path, header)
        for line in read_journal(path):
            name = line.entry.file
            if not shard.has(name):
                what = f"{printable(name)} is not an image of shard {shard}"
                fix = "delete this manifest, and run its shard again"
                raise CommandError(f"{printable(str(path))}: {what}\n{fix}")
            looked.images.add(name)
            if not is_there(out, line):
                looked.gone.append(name)
        found.append(looked)
    return found


def is_there(out: Path, line: Line) -> bool:
    """Whether the results of one image are there, with their sizes."""
    objects = {
        f"{COMMON[kind].file}/{name}": sum(map(len, lines)) + len(lines) - 1
        for kind, (name, lines) in line.objects.items()
    }
    for result in line.results:
        if result.time == 0:  # objects, which are in the line itself
            if objects.get(result.key, 0) != result.size:
                return False
            continue
        try:
            facts = (out / result.key).lstat()
        except OSError:
            return False
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != result.size:
            return False
    return True


def is_complete(out: Path, every: Sequence[Looked], running: dict[Shard, str]) -> bool:
    """Whether all shards are there with all their images; if not, it is printed what is missing."""
    known = {each.header.shard: each for each in every}
    total = every[0].header.shard.total
    lacking = any(each.header.images > len(each.images) for each in every)
    inputs = listed(out, every[0].header)[0] if lacking else []
    seen = {entry.file for entry in read_manifest(out)}.union(*(each.images for each in every)) if lacking else set()
    left: dict[Shard, str] = {}
    for shard in (Shard(number, total) for number in range(total)):
        if shard not in known:
            left[shard] = f"not begun: no {FOLDER}/{shard_file(out, shard).name}"
            continue
        looked = known[shard]
        missing = looked.header.images - len(looked.images)
        if missing > 0:
            names = [name for name in inputs if shard.has(name) and name not in seen]
            left[shard] = f"{missing} of {looked.header.images} images are missing{': ' * bool(names)}{some(names)}"
        elif looked.gone:
            left[shard] = f"results of {len(looked.gone)} images were changed or deleted: {some(looked.gone)}"
        elif shard in running:
            left[shard] = "all images are done, but its command has not ended"
        if shard in running:
            left[shard] += f"; still running ({running[shard]})"
    if left:
        report_rest(out, left, every[0].header.command)
    return not left


def listed(out: Path, header: Header) -> tuple[list[str], str]:
    """The images that the inputs of a run have now, or why that is not known."""
    inputs = [str(each) for each in header.run.get("inputs", [])]
    if "--list" in inputs:
        return [], "the inputs are a list"
    try:
        return [source.relative for source in find_sources(inputs, out, keep_suffix=True)], ""
    except (CommandError, OSError) as error:
        return [], printable(str(error).partition("\n")[0])


def note_unseen(out: Path, every: Sequence[Looked]) -> None:
    """Prints which images of the inputs no shard has seen, as files that were added later."""
    inputs, why = listed(out, every[0].header)
    if why:
        echo(f"note: whether images were added is not known: {why}", err=True)
    seen = {entry.file for entry in read_manifest(out)}
    if unseen := [name for name in inputs if name not in seen]:
        rest = "--resume labels them"
        echo(f"note: {len(unseen)} images were not there when the shards began: {some(unseen)}; {rest}", err=True)


def report(out: Path, shards: int) -> int:
    """Prints how many images there are in the manifest; returns 1 if some of them could not be labelled, else 0."""
    images, failed = 0, 0
    for entry in read_manifest(out):
        images += 1
        if entry.error is not None:
            failed += 1
            if failed <= EXAMPLES:
                echo(f"failed: {printable(entry.file)}: {printable(entry.error)}", err=True)
    if failed > EXAMPLES:
        echo(f"failed: {failed - EXAMPLES} more images, see {MANIFEST}", err=True)
    what = f"merged {shards} shards" if shards else "no shards to merge"
    fails = f", {failed} of them failed; --resume tries them again" if failed else ""
    echo(f"{what}: {images} images{fails}")
    files = [MANIFEST, *(common.file for common in COMMON.values() if (out / common.file).is_file())]
    echo(f"results are in {printable(str(out))}: {', '.join(files)}")
    return int(failed > 0)
