"""`ssaseg data prepare`: writes a published data set in the layout that is read, from what one downloads.

The processes that make masks write nothing. Files are written here, one after the other and each whole or not at all,
so that the command can be stopped at any moment, and goes on where it stopped when it is run again.
"""

import errno
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from ssaseg.cli.console import print_table, progress_bar
from ssaseg.cli.errors import CommandError
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets.loader import WorkerError
from ssaseg.datasets.pairs import read_names
from ssaseg.datasets.prepare import (
    DOWNLOADS,
    Count,
    Plan,
    count_pairs,
    find_layout,
    is_whole,
    make_masks,
    plan_preparation,
    usual_root,
)
from ssaseg.models.checkpoint import write_atomic

TOLD = 10  # masks that can be wrong before it is clear that all are


def run_prepare(name: str, source: Path, root: Path | None, workers: int | None) -> int:
    """Prepares data set `name`, prints a table of what is there, and returns 0 where it is complete, else 1.

    source: folder of the download, never changed. root: folder of the layout; without it `source`, or VOC2010 in it.
    workers: processes, as many as there are processor cores without it. Raises CommandError where files of the download
    are wrong or the disk refuses, DataError for another download; SystemExit after Ctrl-C (130) and SIGTERM (143).
    """
    layout = find_layout(name)
    root = usual_root(name, source) if root is None else root
    absent: list[Path] = []
    wrong = ""
    if name in DOWNLOADS:
        print(f"looking through {source}", file=sys.stderr)
        plan = plan_preparation(name, source, root)
        absent = plan.absent
        wrong = _carry_out(plan, (os.cpu_count() or 1) if workers is None else workers)
    elif not root.exists() or not root.samefile(source):
        raise CommandError(
            f"--root {root}: {name} is downloaded in the layout that is read; there is nothing to prepare\n"
            f"leave out --root to have {source} counted\nmove the folder, or set a recipe's data.root, to read it"
        )
    elif not (root / layout.images["train"]).is_dir():
        expected = " and ".join(f"{folders['train']}/" for folders in (layout.images, layout.masks))
        raise CommandError(f"{root}: not {name} as it is downloaded\nexpected {expected} in it\ncorrect --source")
    counts = count_pairs(layout, root)
    _report(f"{name} in {root}", counts, absent)
    if wrong:
        raise CommandError(wrong)
    complete = all(count.pairs == count.published and not count.lacking for count in counts.values())
    return 0 if complete and not absent else 1


def _carry_out(plan: Plan, workers: int) -> str:
    """Makes the files of `plan` that are not there yet. Returns what is wrong with the first mask, "" where none is."""
    done = 0
    wrong: list[str] = []
    with StopSignal() as stop:
        try:
            with progress_bar(len(plan), "prepared") as advance, closing(_steps(plan, workers)) as steps:
                for problem in steps:
                    advance(1)
                    done += not problem
                    if problem:
                        tqdm.write(f"left out: {problem.partition(chr(10))[0]}", file=sys.stderr)
                        wrong.append(problem)
                    if stop.requested or len(wrong) == TOLD:
                        break
        except (OSError, WorkerError) as error:
            text, mend = str(error).partition("\n")[0], "use --workers 1 if the memory ran out"
            if isinstance(error, OSError):
                # Without the size of the one file, which `write_atomic` adds.
                text = f"{error.filename}: {str(error.strerror).partition(' (')[0]}"
                mend = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
            raise CommandError(
                f"{text}\n"
                f"{done} of {len(plan)} files are done, and none is half-written\n"
                f"{mend}, and run the same command again: it goes on where it stopped"
            ) from None
        if stop.requested:
            print(f"stopped: {done} of {len(plan)} files are done; run the command again to go on", file=sys.stderr)
            sys.exit(stop.exit_code)
    if not wrong:
        return ""
    got, expected, *mends = wrong[0].splitlines()
    count = f"{len(wrong)} mask{'s' if len(wrong) > 1 else ''} cannot be made"
    if len(wrong) == TOLD:
        count += ", and no more were tried"
    return f"{got}\n{expected}\n{count}; {done} of {len(plan)} files are done{''.join(f'; {line}' for line in mends)}"


def _steps(plan: Plan, workers: int) -> Generator[str, None, None]:
    """Makes one file at a time: yields "" when it is there, or what is wrong with it. Raises OSError from the disk."""
    for file, names in plan.lists.items():
        if not file.is_file():
            write_atomic(file, "".join(f"{name}\n" for name in names).encode(), sync=False)
        elif differing := set(read_names(file)) ^ set(names):
            # Not ours, or of another download: nobody's file is overwritten.
            raise CommandError(
                f"{file}: another list of this name is there; it differs in {len(differing)} names\n"
                f"expected the download's names, {len(names)}, or no file; {sorted(differing)[0]} for one\n"
                "remove it and run this again, or give another --root"
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
    """The image at `target` too: a hard link, which takes no room, or a copy where the file system makes none."""
    real = source.resolve()
    if target.is_file():
        there, expected = target.stat().st_size, real.stat().st_size
        if there != expected:  # not ours, which are never half: nobody's file is overwritten
            got = f"{target}: another file of this name is there, of {there} bytes"
            raise CommandError(f"{got}\nexpected {source}, of {expected} bytes, or none\nremove it and run this again")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(real, target)
    except OSError:
        write_atomic(target, real.read_bytes(), sync=False)


def _report(title: str, counts: Mapping[str, Count], absent: list[Path]) -> None:
    """The table of counts on stdout, and what is missing below it."""
    rows = [
        (split, *(f"{number:,}" for number in count[:4]), f"{max(count.published - count.pairs, 0):,}")
        for split, count in counts.items()
    ]
    print_table(("split", "images", "masks", "pairs", "published", "missing"), rows, title)
    for split, count in counts.items():
        for line in count.lacking:
            print(f"{split}: {line}")
    if absent:
        several = f"{len(absent)} files, {absent[0]} first" if len(absent) > 1 else f"1 file, {absent[0]}"
        print(f"the download lacks {several}: fetch and unpack it again")
