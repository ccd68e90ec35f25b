"""`ssaseg data prepare`: writes masks of class ids in a layout that is read: of a published data set from its download,
of your own images from what an annotation tool wrote.

The processes that make masks write nothing. The main process writes the files, one after the other, and each of them
completely or not at all. So the command can be stopped at any time, and continues where it stopped when it is run
again.
"""

import errno
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path

from ssaseg.cli.console import print_table, progress_bar
from ssaseg.cli.device import count_cores
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.signals import Interrupted, StopSignal
from ssaseg.datasets.conventions import CONVENTIONS
from ssaseg.datasets.conventions.base import Convention, Options, Tree, beside
from ssaseg.datasets.conventions.colours import NoTable
from ssaseg.datasets.conventions.downloads import find_layout, is_to_prepare, plan_preparation, usual_root
from ssaseg.datasets.pairs import first_names, read_names
from ssaseg.datasets.prepare import Count, Plan, count_pairs, is_whole, make_masks, plan_source
from ssaseg.datasets.published import LAYOUTS
from ssaseg.datasets.workers import WorkerError
from ssaseg.files.reading import read_file
from ssaseg.files.writing import write_atomic

MOST_ERRORS = 10  # wrong masks after which the command stops: probably all masks are wrong


def run_prepare(name: str, source: Path, root: Path | None, workers: int | None, options: Options | None = None) -> int:
    """Prepares data set or convention `name`, prints a table of the files, and returns 0 where all are made, else 1.

    source: folder of the data, never changed. root: folder to write to (None: for a published data set `source`, or
    VOC2010 in it). workers: number of processes (None: one per processor core). Raises CommandError where files of the
    source are wrong or a file cannot be written, DataError where `source` does not hold the data; SystemExit after
    Ctrl-C (130) and SIGTERM (143).
    """
    workers = count_cores() if workers is None else workers
    options = options or Options()
    if convention := next((each for each in CONVENTIONS if each.kind == name), None):
        return _prepare_own(convention, source, root, workers, options)
    if name not in LAYOUTS:
        kinds = ", ".join([*(each.kind for each in CONVENTIONS), *LAYOUTS])
        raise CommandError(
            f"{name!r}: neither a data set nor a kind of labels that is known\nexpected one of: {kinds}\n"
            f"`ssaseg data init {shlex.quote(str(source))}` says which one a folder has"
        )
    if options != Options():
        raise CommandError(
            f"--table, --background: {name} is a published data set, whose classes are known\nremove them"
        )
    return _prepare_published(name, source, root, workers)


def _prepare_own(convention: Convention, source: Path, root: Path | None, workers: int, options: Options) -> int:
    """Makes linked images, masks and a file of class names below `root`. Nothing is written below `source`."""
    if root is None:
        raise CommandError(
            f"--root: not given\nexpected a new folder to write to: --root {shlex.quote(beside(source))}"
        )
    if Path(os.path.realpath(root)).is_relative_to(os.path.realpath(source)):
        fix = f"give a folder outside of it: --root {shlex.quote(beside(source))}"
        raise CommandError(f"--root {root}: would be written among the data, in {source}\n{fix}")
    echo(f"searching {source}", err=True)
    tree = Tree(source)
    try:
        convention.require(tree, options)
        found = convention.open_source(tree, options)
    except NoTable as error:
        echo(error.table)
        raise
    plan = plan_source(found, root)
    start, before = time.perf_counter(), sum(is_whole(target) for _, target, _ in plan.masks)
    if wrong := _carry_out(plan, workers):
        raise CommandError(wrong)
    seconds = max(time.perf_counter() - start, 1e-3)
    splits = Counter(item.split for item in found.items)
    rows = [(split, f"{count:,}") for split, count in splits.items()]
    print_table(("split", "pairs"), rows, f"{convention.kind}: {source} in {root}")
    for note in found.notes:
        echo(f"- {note}")
    made = len(plan.masks) - before
    echo(f"classes ({len(found.classes)}): {first_names(found.classes, 12)}")
    echo(
        f"{made} masks made in {seconds:.1f} s: {made / seconds:,.0f} images/s" if made else "all masks already existed"
    )
    echo(f"run `ssaseg data init {shlex.quote(str(root))}`")
    return 0


def _prepare_published(name: str, source: Path, root: Path | None, workers: int) -> int:
    layout = find_layout(name)
    root = usual_root(name, source) if root is None else root
    absent: list[Path] = []
    wrong = ""
    if is_to_prepare(name, source):
        echo(f"searching {source}", err=True)
        plan = plan_preparation(name, source, root)
        absent = plan.absent
        wrong = _carry_out(plan, workers)
    elif not root.exists() or not root.samefile(source):
        raise CommandError(
            f"--root {root}: the download of {name} already has the layout that is read: there is nothing to prepare\n"
            f"expected no --root: then the files in {source} are counted\n"
            "remove --root; to read the data from another folder, move it, or set data.root in the recipe"
        )
    elif not (root / layout.images["train"]).is_dir():
        expected = " and ".join(f"{folders['train']}/" for folders in (layout.images, layout.masks))
        raise CommandError(f"{root}: this is not the download of {name}\nexpected {expected} in it\ncorrect --source")
    counts = count_pairs(layout, root)
    _print_counts(f"{name} in {root}", counts, absent)
    if wrong:
        raise CommandError(wrong)
    complete = all(count.pairs == count.published and not count.missing for count in counts.values())
    return 0 if complete and not absent else 1


def _carry_out(plan: Plan, workers: int) -> str:
    """Makes the files of `plan` that do not exist yet. Returns the error of the first wrong mask, or "" without one."""
    done = 0
    wrong: list[str] = []
    with StopSignal() as stop:
        try:
            with (
                progress_bar(len(plan), "prepared") as advance,
                stop.ending_waits(),
                closing(_steps(plan, workers)) as steps,
            ):
                for problem in steps:
                    advance(1)
                    done += not problem
                    if problem:
                        echo(f"left out: {problem.partition(chr(10))[0]}", err=True)
                        wrong.append(problem)
                    if stop.requested or len(wrong) == MOST_ERRORS:
                        break
        except Interrupted:  # while a file was read or made
            pass
        except (OSError, WorkerError) as error:
            text, fix = str(error).partition("\n")[0], "use --workers 1 if the memory was used up"
            if isinstance(error, OSError):
                # Without the size of the file, which `write_atomic` adds to the text.
                text = f"{error.filename}: {str(error.strerror).partition(' (')[0]}"
                fix = "free space on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "fix this"
            raise CommandError(
                f"{text}\n"
                f"{done} of {len(plan)} files are done, and no incomplete file is left\n"
                f"{fix}, and run the same command again: it continues where it stopped"
            ) from None
        if stop.requested:
            echo(f"stopped: {done} of {len(plan)} files are done; run the command again to continue", err=True)
            sys.exit(stop.exit_code)
    if not wrong:
        return ""
    got, expected, *fixes = wrong[0].splitlines()
    count = f"{len(wrong)} mask{'s' if len(wrong) > 1 else ''} cannot be made"
    if len(wrong) == MOST_ERRORS:
        count += ", and the others were not tried"
    return f"{got}\n{expected}\n{count}; {done} of {len(plan)} files are done{''.join(f'; {line}' for line in fixes)}"


def _steps(plan: Plan, workers: int) -> Generator[str, None, None]:
    """Makes one file at a time: yields "" when it exists, or its error. Raises OSError where it cannot be written."""
    for file, names in plan.lists.items():
        if not file.is_file():
            write_atomic(file, "".join(f"{name}\n" for name in names).encode(), sync=False)
        elif differing := set(read_names(file)) ^ set(names):
            # A user's file, or a list of another download: it is not overwritten.
            raise CommandError(
                f"{file}: this list already exists and differs in {len(differing)} names: {sorted(differing)[0]}\n"
                f"expected the names of the download ({len(names)}), or no file\n"
                "remove the file and run the command again, or give another --root"
            )
        yield ""
    for file, content in plan.texts.items():
        if not file.is_file():
            write_atomic(file, content, sync=False)
        elif read_file(file) != content:
            raise CommandError(
                f"{file}: already exists, with other classes or colours than the source has now\n"
                "expected the same classes, as the masks beside it hold their ids\n"
                "give another --root, or remove the folder"
            )
        yield ""
    for source, target in plan.images:
        _place(source, target)
        yield ""
    todo = [index for index, (_, target, _) in enumerate(plan.masks) if not is_whole(target)]
    yield from [""] * (len(plan.masks) - len(todo))
    for index, mask in zip(todo, make_masks(plan, todo, min(workers, len(todo))), strict=True):
        if not mask.wrong:
            write_atomic(plan.masks[index][1], mask.content, sync=False)
        yield mask.wrong


def _place(source: Path, target: Path) -> None:
    """Puts the image at `target`: as a hard link, which takes no space, or as a copy where links are not possible."""
    real = Path(os.path.realpath(source))
    if target.is_file():
        size, expected = target.stat().st_size, real.stat().st_size
        if size != expected:  # this command leaves only complete files: a user's file, which is not overwritten
            got = f"{target}: a different file of {size} bytes already exists"
            fix = "remove the file and run the command again"
            raise CommandError(f"{got}\nexpected {source}, of {expected} bytes, or no file\n{fix}")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(real, target)
    except OSError:
        write_atomic(target, read_file(real), sync=False)


def _print_counts(title: str, counts: Mapping[str, Count], absent: list[Path]) -> None:
    """Prints the table of counts on stdout, and below it the missing files."""
    rows = [
        (split, *(f"{number:,}" for number in count[:4]), f"{max(count.published - count.pairs, 0):,}")
        for split, count in counts.items()
    ]
    print_table(("split", "images", "masks", "pairs", "published", "missing"), rows, title)
    for split, count in counts.items():
        for line in count.missing:
            echo(f"{split}: {line}")
    if absent:
        several = f"{len(absent)} files, {absent[0]} first" if len(absent) > 1 else f"1 file, {absent[0]}"
        echo(f"missing in the download: {several}: download and unpack it again")
