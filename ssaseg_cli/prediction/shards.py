"""Shards of one OUT: the manifest of each, `OUT/manifest/shard-I-of-N.jsonl`, which is its journal too.

A shard writes results, which no other shard writes, and its own manifest: it needs no lock for what shards have in
common, which may not work on the disk of a cluster. `ssaseg merge` writes the files of all images. The first line of
a manifest is its header; each other line is an image, whole or not at all.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.journal import Journal, read_journal
from ssaseg.cli.prediction.sources import Source
from ssaseg.cli.printing import echo
from ssaseg.cli.results.objects import from_line, naming, read_lines, to_line
from ssaseg.cli.sharding import Shard, shard_name, shards_in
from ssaseg.files.reading import open_file
from ssaseg.files.text import printable
from ssaseg.files.writing import FolderInUse, FolderLock, make_temporary

FOLDER, SUFFIX = "manifest", ".jsonl"
# What makes the shards of one run, by the keys of a header's `run`, in words.
PARTS = {"checkpoint": "another CHECKPOINT", "options": "other options", "save": "--save", "inputs": "INPUT"}


class Header(NamedTuple):
    """The first line of a shard's manifest."""

    shard: Shard
    images: int  # that the manifest must have when the shard is done
    run: dict[str, Any]  # see `run_of`
    command: list[str]  # as it was typed

    def line(self) -> bytes:
        """The line in the file."""
        return to_line(self._asdict()) + b"\n"


def run_of(checkpoint: str, options: object, save: Sequence[str], inputs: Sequence[str]) -> dict[str, Any]:
    """What all shards of a run have in common: the checkpoint's sum, a sum of the options that decide results, the
    kinds of results, and the inputs.
    """
    places = [each if "://" in each or each == "-" else os.path.abspath(each) for each in inputs]
    digest = hashlib.sha256(repr(options).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return {"checkpoint": checkpoint, "options": digest, "save": list(save), "inputs": places}


def shard_file(out: Path, shard: Shard) -> Path:
    """The manifest of a shard."""
    return out / FOLDER / shard_name(shard, SUFFIX)


def shard_files(out: Path) -> list[tuple[Shard, Path]]:
    """The manifests of shards that are there, in the order of shards. Raises OSError."""
    return shards_in(out / FOLDER, SUFFIX)


def read_header(path: Path) -> Header:
    """The header of a shard's manifest. Raises CommandError for another file, and for the manifest of another shard;
    OSError if it cannot be read.
    """
    with open_file(path) as file:
        value = from_line(next(read_lines(file), b""))
    match value:
        case {"shard": [int(index), int(count)], "images": int(images), "run": dict(run), "command": [*command]}:
            header = Header(Shard(index, count), images, run, [str(word) for word in command])
        case _:
            fix = f"move it away; then run that shard again with --resume, or delete {FOLDER}/ to begin anew"
            raise CommandError(f"{printable(str(path))}: not the manifest of a shard, its first line is damaged\n{fix}")
    if path.name != shard_file(path, header.shard).name:
        wrong = f"its first line says shard {header.shard}: two shards with the same number"
        fix = f"delete it, and run the shard of its name again: each has its own --shard i/{header.shard.total}"
        raise CommandError(f"{printable(str(path))}: {wrong}\n{fix}")
    return header


def require_one_run(out: Path, shard: Shard, run: Mapping[str, Any], whose: str = "this command") -> None:
    """Raises CommandError if there are shards of another number or of another run in `out` than that of `whose`, and as
    `read_header`.

    Without another number, a command reads only the first header and its own: a thousand commands begin at once.
    """
    fix = f"choose another --out; or `ssaseg merge`, then delete {printable(str(out / FOLDER))}"
    files = shard_files(out)
    for other, path in files:
        if other.total != shard.total:
            here = f"shard {shard}" if shard.total > 1 else "no --shard"
            got = f"{printable(str(path))}: a shard of {other.total}, but {printable(whose)} has {here}"
            raise CommandError(f"{got}\nexpected one number of shards in one --out: --shard i/{other.total}\n{fix}")
    for path in {path for at, (other, path) in enumerate(files) if at == 0 or other == shard}:
        require_same(out, path, read_header(path).run, run)


def require_same(out: Path, path: Path, theirs: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raises CommandError if `theirs`, the run of the shard `path`, is not `run`."""
    if theirs != run:
        what = "; ".join(_difference(key, theirs.get(key), run[key]) for key in run if theirs.get(key) != run[key])
        where = f"{printable(str(path))}: a shard of another run: {what}"
        fix = f"choose another --out, or delete {printable(str(out / FOLDER))} to begin anew"
        raise CommandError(f"{where}\nexpected shards of one run in one --out\n{fix}")


def _difference(key: str, theirs: object, ours: object) -> str:
    """What differs between two runs, in words."""
    if isinstance(theirs, list) and isinstance(ours, list):
        there, here = (printable(" ".join(map(str, each))) for each in (theirs, ours))
        return f"{PARTS[key]} {there} there, {here} here"
    return PARTS[key]


class ShardJournal(Journal):
    """The manifest of this shard, which stays when the command ends.

    Raises CommandError if another command works on this shard, and as `require_one_run`.
    """

    def __init__(self, out: Path, shard: Shard, run: Mapping[str, Any], resume: bool) -> None:
        super().__init__(out)
        self.shard, self.run, self.resume = shard, dict(run), resume
        self.path = shard_file(out, shard)

    def __enter__(self) -> "ShardJournal":
        self.path.parent.mkdir(exist_ok=True)
        try:
            self.lock = FolderLock(self.path.parent, self.path.with_suffix(".lock").name)
        except FolderInUse as owner:
            who = f"another command works on shard {self.shard} ({printable(str(owner))})"
            fix = f"expected one command for each shard: 0/{self.shard.total}, 1/{self.shard.total}, ..."
            raise CommandError(f"{printable(str(self.path))}: {who}\n{fix}") from None
        try:
            require_one_run(self.out, self.shard, self.run)
            if self.resume and os.path.lexists(self.path):
                self.earlier = open_file(self.path)
        except BaseException:
            self.lock.release()
            raise
        if not self.lock.supported:
            echo(f"{printable(str(self.out))}: no locks on this file system: start each shard once", err=True)
        return self

    def begin(self, found: Sequence[Source], left: Sequence[Source]) -> None:
        """Writes the manifest: its header, and the lines that an earlier command wrote of images of `found` that are
        not `left`. Then the file is this command's, which another one can only replace.
        """
        done = {source.relative for source in found} - {source.relative for source in left}
        with naming(self.path):
            lines = (line for line in self._earlier() if line.entry.error is None)
            kept = {line.entry.file: line.content for line in lines if line.entry.file in done}
            temporary, descriptor = make_temporary(self.path.parent)
            self.file = os.fdopen(descriptor, "r+b")
            try:
                header = Header(self.shard, len(kept) + len(left), self.run, ["ssaseg", *sys.argv[1:]])
                self.file.writelines([header.line(), *kept.values()])
                self.file.flush()
                os.fsync(descriptor)
                os.replace(temporary, self.path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        try:
            require_one_run(self.out, self.shard, self.run)  # of shards that begin at the same time, too
        except CommandError:
            if self.earlier is None:
                self.path.unlink(missing_ok=True)
            raise

    def check(self) -> None:
        """Raises OSError as `Journal.check`; CommandError if another command has the same shard."""
        super().check()
        try:
            own = os.path.samestat(os.fstat(self.file.fileno()), self.path.lstat())
        except FileNotFoundError:
            own = False
        if not own:
            what = f"another command has begun shard {self.shard} anew, so this one ends"
            raise CommandError(f"{printable(str(self.path))}: {what}\nstart each shard once; --resume does the rest")

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                with naming(self.path):
                    self.check()
                    os.fsync(self.file.fileno())
        finally:
            for file in (self.earlier, getattr(self, "file", None)):
                with suppress(OSError):  # a full disk once more
                    if file is not None:
                        file.close()
            self.lock.release()

    def _earlier(self) -> Iterator[Any]:
        return iter(()) if self.earlier is None else read_journal(self.earlier)
