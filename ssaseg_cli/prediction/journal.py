"""Remembers below OUT what each result was made of, and lets several commands write to one OUT.

Each command appends to a journal of its own, `.predict-TOKEN.jsonl`, one line an image. At its end it adds the journal
to `.predict.jsonl`, the record of all results, to `manifest.jsonl`, and to the files of all images in `COMMON`. If it
was killed, the next command does that. The journals of shards, see `shards.py`, are added by `ssaseg merge`. The locked
file `.predict-TOKEN.lock` says that a command still runs: the system unlocks it when the process ends.
"""

import hashlib
import json
import os
import re
import secrets
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.rle import is_rle, list_images
from ssaseg.cli.prediction.sources import Source, key_of
from ssaseg.cli.printing import echo
from ssaseg.cli.results.kinds import KINDS
from ssaseg.cli.results.manifest import Entry, parse_entry, read_manifest, write_manifest
from ssaseg.cli.results.objects import (
    Fits,
    from_line,
    naming,
    read_lines,
    read_objects,
    replacing,
    to_line,
    write_objects,
)
from ssaseg.cli.results.shares import is_shares, write_table
from ssaseg.files.reading import content_sum, open_file
from ssaseg.files.text import printable
from ssaseg.files.writing import NO_LINK, TEMPORARY, FolderInUse, FolderLock, write_atomic

RECORD, COMMON_LOCK = ".predict.jsonl", ".predict.lock"
OF_A_COMMAND = re.compile(r"\.predict-[0-9a-f]{16}\.(jsonl|lock)")
LONGEST_WAIT = 600  # for a command that adds its results to the common files [s]


class Common(NamedTuple):
    """A file of all images, with objects of each."""

    file: str
    fits: Fits
    derive: Callable[[Path], None]  # writes what is made from the file


# Key: the kind of result.
COMMON: Mapping[str, Common] = {
    "rle": Common("rle.json", is_rle, list_images),
    "shares": Common("shares.json", is_shares, write_table),
}


class Result(NamedTuple):
    """A result of one image, and what it was made of."""

    key: str  # its path below OUT; of objects in a file of all images: that file/ and the image's name in it
    made_of: str  # see `made_of`
    size: int  # [bytes]
    time: int  # when it was written [ns]; 0 for objects in a file of all images
    sum: int  # CRC-32 of its content


def made_of(checkpoint: str, image: Path) -> str:
    """Digest of all that decides a result: the checkpoint's sum; the image's path, size and time. Raises OSError."""
    facts = image.stat()
    text = b"\0".join([os.fsencode(os.path.abspath(image)), b"%d %d" % (facts.st_size, facts.st_mtime_ns)])
    return hashlib.sha256(checkpoint.encode() + b"\0" + text).hexdigest()[:32]


def file_result(key: str, origin: str, path: Path, content: bytes) -> Result:
    """The result that was just written to `path`."""
    return Result(key, origin, len(content), os.lstat(path).st_mtime_ns, zlib.crc32(content))


def objects_result(kind: str, name: str, origin: str, lines: Sequence[bytes]) -> Result:
    """The objects of one image in a file of `COMMON`."""
    content = b"\n".join(lines)
    return Result(f"{COMMON[kind].file}/{name}", origin, len(content), 0, zlib.crc32(content))


def require_folder(folder: Path) -> None:
    """Raises CommandError for a link in the place of a folder of results: somebody else may have made it."""
    if folder.is_symlink():
        reason = "a link, but results are written to folders in --out"
        raise CommandError(f"{printable(str(folder))}: {reason}\nremove the link, or choose another --out")


# ---- the record of all results -----------------------------------------------------------------------------------
class Existing:
    """The results in `out` that are in the record and unchanged, as far as they are among `keys` (None: all).

    `kinds`: of the results; files of `COMMON` are read only for these. journal: whose results are there too. Raises
    OSError if a file cannot be read, CommandError as `read_objects` does.
    """

    def __init__(self, out: Path, keys: set[str] | None, kinds: Sequence[str], journal: BinaryIO | None = None) -> None:
        self.out = out
        self.record = {result.key: result for result in read_record(out) if keys is None or result.key in keys}
        self.objects: dict[str, tuple[int, int]] = {}  # size and CRC-32 of an image's objects, joined by line feeds
        for common in (COMMON[kind] for kind in kinds if kind in COMMON):
            for entry, line in read_objects(out / common.file, common.fits):
                key = f"{common.file}/{entry['image']}"
                if key in self.record:
                    size, code = self.objects.get(key, (-1, 0))
                    code = zlib.crc32(line if size < 0 else b"\n" + line, code)
                    self.objects[key] = (size + 1 + len(line), code)
        for _ in read_manifest(out):  # raises, if it is another's
            pass
        for image in [] if journal is None else read_journal(journal):  # what is not in the common files yet
            self.record.update({result.key: result for result in image.results if keys is None or result.key in keys})
            for kind, (name, lines) in image.objects.items():
                content = b"\n".join(lines)
                self.objects[f"{COMMON[kind].file}/{name}"] = len(content), zlib.crc32(content)

    def mentions(self, key: str, origin: str) -> bool:
        """Whether the record has this entry, made of this; for entries that are no files."""
        return key in self.record and self.record[key].made_of == origin

    def has(self, key: str, origin: str) -> bool:
        """Whether this result exists, was made of this, and has not changed since."""
        result = self.record.get(key)
        if result is None or result.made_of != origin:
            return False
        if key.startswith(tuple(f"{common.file}/" for common in COMMON.values())):
            return self.objects.get(key, (0, 0)) == (result.size, result.sum)
        path = self.out / key
        try:
            facts = path.lstat()
            if not stat.S_ISREG(facts.st_mode) or facts.st_size != result.size:
                return False
            # A copy of the folder has the same content at another time.
            return facts.st_mtime_ns == result.time or content_sum(path) == (result.size, result.sum)
        except OSError:
            return False


def read_record(out: Path) -> Iterator[Result]:
    """All results in the record; lines that are damaged are left out. Raises OSError if it cannot be read."""
    if not os.path.lexists(out / RECORD):
        return
    with open_file(out / RECORD) as file:
        for line in read_lines(file):
            result = parse_result(from_line(line))
            if result is not None:
                yield result


def parse_result(value: object) -> Result | None:
    """A result from its JSON list; None for any other value."""
    match value:
        case [str(key), str(origin), int(size), int(written), int(code)]:
            return Result(key, origin, size, written, code)
    return None


# ---- journals ----------------------------------------------------------------------------------------------------
class Line(NamedTuple):
    """A line of a journal: one image."""

    entry: Entry
    results: list[Result]
    objects: dict[str, tuple[str, list[bytes]]]  # by kind: the image's name and objects for a file of `COMMON`
    content: bytes


class Journal:
    """The journal of this command. At its start it adds what killed commands have left, at its end its own results.

    After an error the results are added too. After a second Ctrl-C they stay in the journal, for the next command.
    Raises OSError for files that cannot be written, CommandError for an `rle.json` or `shares.json` that is not ours.
    """

    earlier: BinaryIO | None = None  # of an earlier command, whose results are not in the common files yet
    tiled = False  # whether results are those of --tile

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> "Journal":
        with exclusive(self.out):
            take_over(self.out)
            self.path = self.out / f".predict-{secrets.token_hex(8)}.jsonl"
            with naming(self.path):
                flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | NO_LINK
                self.file = os.fdopen(os.open(self.path, flags, 0o666), "a+b")
            self.lock = FolderLock(self.out, lock_name(self.path))
        if not self.lock.supported:
            echo(
                f"{printable(str(self.out))}: no locks on this file system: run one `ssaseg predict` at a time",
                err=True,
            )
        return self

    def begin(self, found: Sequence[Source], left: Sequence[Source]) -> None:
        """Says which images there are, and which of them this command is to label."""

    def add(
        self, entry: Entry, results: Sequence[Result] = (), objects: Mapping[str, Sequence[bytes]] | None = None
    ) -> None:
        """Appends one image: its entry, results, and objects for files of `COMMON`. They outlive this process now."""
        with naming(self.out):
            self.check()
            head = to_line({**entry.json(), "results": results})
            rest = [f', "{kind}": ['.encode() + b", ".join(lines) + b"]" for kind, lines in (objects or {}).items()]
            self.file.write(head[:-1] + b"".join(rest) + b"}\n")
            self.file.flush()

    def look(self, keys: set[str] | None, kinds: Sequence[str]) -> None:
        """Reads which results exist, see `Existing`."""
        self.existing = Existing(self.out, keys, kinds, self.earlier)

    def key_of(self, kind: str, source: Source) -> str:
        """See `sources.key_of`."""
        return key_of(kind, source, self.tiled)

    def is_done(self, source: Source, kinds: Sequence[str], origin: str) -> bool:
        """Whether all these results of an image exist, made of this. After `look`."""
        return all(self.existing.has(self.key_of(kind, source), origin) for kind in kinds)

    def output_of(self, kind: str, source: Source) -> str:
        """The file below `out` with a result of one image."""
        return COMMON[kind].file if kind in COMMON else self.key_of(kind, source)

    def write(self, kind: str, source: Source, content: bytes, origin: str) -> Result:
        """Writes the file with a result of one image. Raises OSError, CommandError."""
        key, root = self.key_of(kind, source), self.out / kind
        path = self.out / key
        self.check()
        require_folder(root)
        write_atomic(path, content, sync=False, root=root)
        return file_result(key, origin, path, content)

    def write_objects(self, kind: str, source: Source, lines: Sequence[bytes], origin: str) -> Result:
        """The result that `add` writes of the objects of one image for a file of `COMMON`."""
        return objects_result(kind, source.relative, origin, lines)

    def check(self) -> None:
        """Raises OSError if `out` was deleted, moved or made anew."""
        self.lock.check()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None or issubclass(kind, Exception):
                self.check()
                with exclusive(self.out):
                    add_to_common(self.out, [self.file])
                    self.path.unlink(missing_ok=True)
        except (OSError, CommandError):
            if kind is None:
                raise
        finally:
            with suppress(OSError):  # a full disk once more
                self.file.close()
            self.lock.release()


def lock_name(journal: Path) -> str:
    """Name of the file that a command has locked while it writes to this journal."""
    return journal.with_suffix(".lock").name


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Inside this context no other command changes the common files of `out`, or starts. Waits for one that does.

    Raises CommandError after `LONGEST_WAIT` seconds, OSError if the lock cannot be made.
    """
    start, reported = time.monotonic(), False
    while True:
        try:
            lock = FolderLock(out, COMMON_LOCK)
            break
        except FolderInUse as owner:
            waited, holder = time.monotonic() - start, printable(str(owner))
            if waited > LONGEST_WAIT:
                where = f"{printable(str(out))}: still locked by another `ssaseg predict` ({holder})"
                raise CommandError(f"{where}\nwait until it has ended, then run the command again") from None
            if waited > 2 and not reported:
                echo(f"waiting for another `ssaseg predict` in this --out ({holder})", err=True)
                reported = True
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.release()


def take_over(out: Path) -> None:
    """Adds the journals of killed commands to the common files, and deletes their other files. In `exclusive`."""
    journals = {path.with_suffix(".jsonl") for path in out.iterdir() if OF_A_COMMAND.fullmatch(path.name)}
    dead: dict[Path, FolderLock] = {}
    for path in journals:
        with suppress(FolderInUse):
            dead[path] = FolderLock(out, lock_name(path))
    try:
        left = [path for path in dead if os.path.lexists(path)]
        left.sort(key=lambda path: path.lstat().st_mtime_ns, reverse=True)  # of two results with one name, the newer
        add_to_common(out, left)
        for path in left:
            path.unlink()
        # Temporary files of a command that still runs must stay; without locks nobody knows whether one runs.
        if dead and len(dead) == len(journals) and all(lock.supported for lock in dead.values()):
            delete_results_in_work(out)
    finally:
        for lock in dead.values():
            lock.release()


def add_to_common(out: Path, journals: Sequence[BinaryIO | Path]) -> None:
    """Adds journals to the files of all images and the record; of two results with one key the first. In `exclusive`.

    If it is interrupted, to do it again gives the same files.
    """
    results: dict[str, Result] = {}
    entries: dict[str, Entry] = {}
    for line in chain.from_iterable(map(read_journal, journals)):
        entries.setdefault(line.entry.file, line.entry)
        for result in line.results:
            results.setdefault(result.key, result)
    for kind, common in COMMON.items():
        if any(key.startswith(f"{common.file}/") for key in results):
            lines = chain.from_iterable(map(read_journal, journals))
            images = (line.objects[kind] for line in lines if kind in line.objects)
            write_objects(out / common.file, images, common.fits)
            common.derive(out / common.file)
    if entries:
        write_manifest(out, entries.values())
    if results:
        with replacing(out / RECORD) as file:
            for result in results.values():
                file.write(json.dumps(result).encode() + b"\n")
            for result in read_record(out):
                if result.key not in results:
                    file.write(json.dumps(result).encode() + b"\n")


def read_journal(file: BinaryIO | Path) -> Iterator[Line]:
    """The lines of a journal. Those that are damaged, or that a killed command has not finished, are left out."""
    if isinstance(file, Path):  # open only as long as it is read: there may be thousands
        with open_file(file) as opened:
            yield from read_journal(opened)
        return
    file.seek(0)
    for content in read_lines(file):
        value: Any = from_line(content) if content.endswith(b"\n") else None
        entry = parse_entry(value)
        if entry is not None and isinstance(value.get("results"), list):
            results = [result for result in map(parse_result, value["results"]) if result is not None]
            found: dict[str, tuple[str, list[bytes]]] = {}
            for kind, common in COMMON.items():
                objects = value.get(kind)
                if objects == []:  # the line says only by its entry which image has none
                    found[kind] = entry.file, []
                elif isinstance(objects, list) and all(map(common.fits, objects)):
                    name, *others = (each["image"] for each in objects)
                    if all(other == name for other in others):
                        found[kind] = name, [to_line(each) for each in objects]
            yield Line(entry, results, found, content)


def delete_results_in_work(out: Path) -> None:
    """Deletes temporary files in `out` and its folders of results. Only while no other command writes there."""
    for top in [out, *(out / kind for kind in KINDS if not (out / kind).is_symlink())]:
        for folder, subfolders, names in os.walk(top):  # without following links
            if top == out:
                subfolders.clear()
            for name in names:
                if TEMPORARY.fullmatch(name):
                    with suppress(OSError):
                        os.unlink(os.path.join(folder, name))
