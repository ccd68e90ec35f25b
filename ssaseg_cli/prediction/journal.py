"""Remembers below OUT what each result was made of, and lets several commands write to one OUT.

Each command appends to a journal of its own, `.predict-TOKEN.jsonl`, one line an image. At its end it adds the journal
to `.predict.jsonl`, the record of all results, and to the files of all images in `COMMON`. If it was killed, the next
command does that. The locked file `.predict-TOKEN.lock` says that a command still runs: the system unlocks it when the
process ends.
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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.kinds import KINDS
from ssaseg.cli.prediction.objects import (
    Fits,
    from_line,
    naming,
    read_lines,
    read_objects,
    replacing,
    to_line,
    write_objects,
)
from ssaseg.cli.prediction.rle import is_rle, list_images
from ssaseg.cli.prediction.shares import is_shares, write_table
from ssaseg.cli.printing import echo
from ssaseg.files.reading import open_file, read_file
from ssaseg.files.text import printable
from ssaseg.files.writing import NO_LINK, TEMPORARY, FolderInUse, FolderLock

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


def checkpoint_sum(path: Path) -> str:
    """SHA-256 of a file, or of the files in a folder. Raises OSError."""
    digest = hashlib.sha256()
    for each in sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]:
        with open_file(each) as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


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


# ---- the record of all results -----------------------------------------------------------------------------------
class Existing:
    """The results in `out` that are in the record and unchanged, as far as they are among `keys`.

    `kinds`: of the results; files of `COMMON` are read only for these. Raises OSError if a file cannot be read,
    CommandError as `read_objects` does.
    """

    def __init__(self, out: Path, keys: set[str], kinds: Sequence[str]) -> None:
        self.out = out
        self.record = {result.key: result for result in read_record(out) if result.key in keys}
        self.objects: dict[str, tuple[int, int]] = {}  # size and CRC-32 of an image's objects, joined by line feeds
        for common in (COMMON[kind] for kind in kinds if kind in COMMON):
            for entry, line in read_objects(out / common.file, common.fits):
                key = f"{common.file}/{entry['image']}"
                if key in self.record:
                    size, code = self.objects.get(key, (-1, 0))
                    code = zlib.crc32(line if size < 0 else b"\n" + line, code)
                    self.objects[key] = (size + 1 + len(line), code)

    def has(self, key: str, origin: str) -> bool:
        """Whether this result exists, was made of this, and has not changed since."""
        result = self.record.get(key)
        if result is None or result.made_of != origin:
            return False
        if key.startswith(tuple(f"{common.file}/" for common in COMMON.values())):
            return self.objects.get(key) == (result.size, result.sum)
        path = self.out / key
        try:
            facts = path.lstat()
            if not stat.S_ISREG(facts.st_mode) or facts.st_size != result.size:
                return False
            # A copy of the folder has the same content at another time.
            return facts.st_mtime_ns == result.time or zlib.crc32(read_file(path, result.size)) == result.sum
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
class Journal:
    """The journal of this command. At its start it adds what killed commands have left, at its end its own results.

    After an error the results are added too. After a second Ctrl-C they stay in the journal, for the next command.
    Raises OSError for files that cannot be written, CommandError for an `rle.json` or `shares.json` that is not ours.
    """

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

    def add(self, results: Sequence[Result], objects: Mapping[str, Sequence[bytes]]) -> None:
        """Appends the results of one image, and its objects for files of `COMMON`: they outlive this process now."""
        with naming(self.out):
            head = json.dumps(results).encode()
            rest = [f', "{kind}": ['.encode() + b", ".join(lines) + b"]" for kind, lines in objects.items()]
            self.file.write(b'{"results": ' + head + b"".join(rest) + b"}\n")
            self.file.flush()

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
        with ExitStack() as stack:
            add_to_common(out, [stack.enter_context(open_file(path)) for path in left])
        for path in left:
            path.unlink()
        # Temporary files of a command that still runs must stay; without locks nobody knows whether one runs.
        if dead and len(dead) == len(journals) and all(lock.supported for lock in dead.values()):
            delete_results_in_work(out)
    finally:
        for lock in dead.values():
            lock.release()


def add_to_common(out: Path, journals: Sequence[BinaryIO]) -> None:
    """Adds journals to the files of all images and the record; of two results with one key the first. In `exclusive`.

    If it is interrupted, to do it again gives the same files.
    """
    results: dict[str, Result] = {}
    for journal in journals:
        for new, _ in read_journal(journal):
            for result in new:
                results.setdefault(result.key, result)
    for kind, common in COMMON.items():
        if any(key.startswith(f"{common.file}/") for key in results):
            images = (found[kind] for journal in journals for _, found in read_journal(journal) if kind in found)
            write_objects(out / common.file, images, common.fits)
            common.derive(out / common.file)
    if results:
        with replacing(out / RECORD) as file:
            for result in results.values():
                file.write(json.dumps(result).encode() + b"\n")
            for result in read_record(out):
                if result.key not in results:
                    file.write(json.dumps(result).encode() + b"\n")


def read_journal(file: BinaryIO) -> Iterator[tuple[list[Result], dict[str, tuple[str, list[bytes]]]]]:
    """For each image: its results, and by kind its name and objects for a file of `COMMON`.

    Lines that are damaged, or that a killed command has not finished, are left out.
    """
    file.seek(0)
    for line in read_lines(file):
        match from_line(line) if line.endswith(b"\n") else None:
            case {"results": [*values], **rest}:
                results = [result for result in map(parse_result, values) if result is not None]
                found: dict[str, tuple[str, list[bytes]]] = {}
                for kind, common in COMMON.items():
                    objects = rest.get(kind)
                    if isinstance(objects, list) and objects and all(map(common.fits, objects)):
                        name, *others = (entry["image"] for entry in objects)
                        if all(other == name for other in others):
                            found[kind] = name, [to_line(entry) for entry in objects]
                yield results, found


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
