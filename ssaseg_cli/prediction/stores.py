"""Where results go besides a local folder: objects at an address, and tars of WebDataset's samples.

Both take the place of the journal. They have no lock, and no record that survives a kill line by line: objects are
written whole, so the manifest of a command becomes visible in parts, and a tar at its end.
"""

import io
import json
import os
import re
import secrets
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from ssaseg.cli.errors import CommandError
from ssaseg.cli.places.addresses import Place, connect, is_address, plain_errors, within, without_secrets
from ssaseg.cli.places.archives import END, append, read_members
from ssaseg.cli.places.names import key_of_sample
from ssaseg.cli.places.objects import open_stream, read_object, write_object
from ssaseg.cli.prediction.journal import Result
from ssaseg.cli.prediction.sources import Source
from ssaseg.cli.printing import echo
from ssaseg.cli.results.classes import CLASSES, parse_classes, warn_of_others
from ssaseg.cli.results.kinds import KINDS
from ssaseg.cli.results.manifest import Entry, parse_entry
from ssaseg.cli.results.objects import from_line, to_line
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets import DataError
from ssaseg.files.reading import open_file
from ssaseg.files.text import printable
from ssaseg.files.writing import make_temporary, write_atomic

FOLDER = "manifest"  # of objects with the lines of a command
PART_LINES, PART_SECONDS = 10_000, 60.0  # of such an object, at most
FAILURES = 10  # writes in a row after which a store is taken to be out of reach
# Samples and bytes of a tar after which the next one is begun, where the name has a number.
SAMPLES, BYTES = 10_000, 2**30
NUMBER = re.compile(r"%0?\d*d")


class Store:
    """What all places of results have in common, as a `Journal` has it."""

    shown = ""  # where results are, safe to print

    def __init__(self, resume: bool, stop: StopSignal) -> None:
        self.resume, self.stop = resume, stop
        self.known: dict[str, Known] = {}  # by the name of a result, those of earlier commands

    def output_of(self, kind: str, source: Source) -> str:
        """The name of one result."""
        raise NotImplementedError

    def write(self, kind: str, source: Source, content: bytes, origin: str) -> Result:
        """Writes one result; any thread. Raises DataError."""
        raise NotImplementedError

    def write_objects(self, kind: str, source: Source, lines: Sequence[bytes], origin: str) -> Result:
        """Writes what a local folder has in a file of all images, as a JSON list of this image alone."""
        return self.write(kind, source, b"[\n" + b",\n".join(lines) + b"\n]\n", origin)

    def add(self, entry: Entry, results: Sequence[Result] = (), objects: object = None) -> None:
        """Notes an image; the main thread. objects: are written already."""
        raise NotImplementedError

    def write_classes(self, value: Mapping[str, Any]) -> None:
        """Writes `classes.json`, before any work is done: whether results can be written is known then."""
        raise NotImplementedError

    def look(self) -> None:
        """Looks which results exist. Raises DataError, CommandError."""
        raise NotImplementedError

    def is_done(self, source: Source, kinds: Sequence[str], origin: str) -> bool:
        """Whether all results of an image exist, made of this. After `look`."""
        found = [self.known.get(self.output_of(kind, source)) for kind in kinds]
        return all(each is not None and each.made_of == origin for each in found)

    def remember(self, line: bytes) -> None:
        """Takes the results in a line of `line_of` as known; of two with one name, the later."""
        value = from_line(line)
        entry = parse_entry(value)
        match value:
            case {"made_of": str(made_of), "bytes": [*sizes], "time": int(when) | float(when)} if entry is not None:
                for name, size in zip(entry.outputs, sizes, strict=False):
                    if name not in self.known or self.known[name].when <= when:
                        self.known[name] = Known(when, made_of, size)

    def begin(self, found: Any, left: Any) -> None:
        """As of `Journal`."""

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        pass


class Known(NamedTuple):
    """A result of an earlier command."""

    when: float  # seconds since 1970
    made_of: str
    size: int  # [bytes]


def store_of(out: str, resume: bool, stop: StopSignal) -> "Store":
    """The place of results that is not a local folder. Raises CommandError for a name that cannot be one; DataError for
    an address that fsspec cannot open.
    """
    name = without_secrets(out)
    if name.lower().endswith((".tar.gz", ".tgz")):
        raise CommandError(f"--out {name}: tars are written without compression\ngive a name that ends with .tar")
    return Tars(out, resume, stop) if name.lower().endswith(".tar") else Objects(connect(out), resume, stop)


def line_of(entry: Entry, results: Sequence[Result]) -> bytes:
    """The line of an image: that of the manifest; and what its results were made of, when, and their sizes [bytes]."""
    made: dict[str, Any] = {}
    if results:
        sizes = [result.size for result in results]
        made = {"made_of": results[0].made_of, "bytes": sizes, "time": round(time.time(), 3)}
    return to_line({**entry.json(), **made})


def result_of(name: str, origin: str, content: bytes) -> Result:
    """A result without a time of change."""
    return Result(name, origin, len(content), 0, zlib.crc32(content))


# ---- objects at an address ---------------------------------------------------------------------------------------
class Objects(Store):
    """Results as objects, with the names that they have in a local folder; the objects of `rle.json` and `shares.json`
    in an object for each image.
    """

    def __init__(self, place: Place, resume: bool, stop: StopSignal) -> None:
        super().__init__(resume, stop)
        self.place, self.shown = place, place.shown
        self.token, self.parts, self.failures = secrets.token_hex(8), 0, 0
        self.lines: list[bytes] = []
        self.written = time.monotonic()

    def output_of(self, kind: str, source: Source) -> str:
        return f"{kind}/{source.name}{KINDS[kind].suffix}"

    def write(self, kind: str, source: Source, content: bytes, origin: str) -> Result:
        name = self.output_of(kind, source)
        self._put(name, content)
        return result_of(name, origin, content)

    def _put(self, name: str, content: bytes) -> None:
        try:
            write_object(self.place, name, content)
        except DataError as error:
            self.failures += 1
            if self.failures >= FAILURES:
                raise CommandError(f"{error}\nthat was the {self.failures}th write in a row that failed") from None
            raise
        self.failures = 0

    def add(self, entry: Entry, results: Sequence[Result] = (), objects: object = None) -> None:
        self.lines.append(line_of(entry, results))
        if len(self.lines) % PART_LINES == 0 or time.monotonic() - self.written > PART_SECONDS:
            with suppress(DataError):  # tried again later
                self._write_part()

    def _write_part(self) -> None:
        self.written = time.monotonic()
        if self.lines:
            self._put(f"{FOLDER}/{self.token}-{self.parts:04d}.jsonl", b"\n".join([*self.lines, b""]))
            self.parts, self.lines = self.parts + 1, []

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        try:
            self._write_part()
        except (DataError, CommandError):
            if kind is None:
                raise

    def write_classes(self, value: Mapping[str, Any]) -> None:
        path = f"{self.place.path.rstrip('/')}/{CLASSES}"
        with plain_errors(self.place.address):
            there = within(lambda: self.place.system.exists(path), self.place.address)
        before = read_object(self.place, CLASSES) if there else None
        found = None if before is None else parse_classes(before, f"{self.shown}/{CLASSES}")
        warn_of_others(found, value, self.shown)
        if found != value:
            within(lambda: self._put(CLASSES, json.dumps(value, indent=1).encode() + b"\n"), self.place.address)

    def look(self) -> None:
        system, root = self.place.system, self.place.path.rstrip("/")
        with plain_errors(self.place.address):
            there = system.find(root, detail=True)
            sizes = {path.lstrip("/").removeprefix(root.lstrip("/")).lstrip("/"): facts.get("size")
                     for path, facts in there.items()}  # fmt: skip
            for name in sorted(name for name in sizes if name.startswith(f"{FOLDER}/")):
                for line in read_object(self.place, name).split(b"\n"):
                    self.remember(line)
        self.known = {name: each for name, each in self.known.items() if sizes.get(name) == each.size}


# ---- tars of samples ---------------------------------------------------------------------------------------------
class Tars(Store):
    """Results as the samples of WebDataset: KEY.KIND.SUFFIX of each result, and KEY.json with the line of the manifest.

    A tar gets its name when it is complete. If the name has a number, as in `results-%06d.tar`, a new one is begun
    after `SAMPLES` images or `BYTES` bytes, and what is done when the command is stopped stays. Without a number there
    is one tar with everything, or none.
    """

    def __init__(self, out: str, resume: bool, stop: StopSignal) -> None:
        super().__init__(resume, stop)
        self.out, self.shown = out, without_secrets(out)
        if not out.lower().endswith(".tar"):
            raise CommandError(f"--out {self.shown}: a tar cannot be written to an address with a query\nleave it out")
        self.numbers = NUMBER.findall(out)
        if len(self.numbers) != out.count("%") or len(self.numbers) > 1:
            raise CommandError(f"--out {self.shown}: expected at most one number such as %06d, and no other '%'")
        self.place = connect(out) if is_address(out) else None
        self.next, self.samples, self.bytes = 0, 0, 0
        self.file: FileIO | None = None
        self.temporary = Path()
        self.pending: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.keys: dict[str, str] = {}  # of samples, with the images that have them

    # -- names
    def name(self, number: int) -> str:
        """The name of a tar."""
        return self.out % number if self.numbers else self.out

    def exists(self, number: int) -> bool:
        """Whether there is a tar of this number."""
        if self.place is None:
            return os.path.lexists(self.name(number))
        place = connect(self.name(number))
        with plain_errors(place.address):
            return bool(within(lambda: place.system.exists(place.path), place.address))

    def key(self, source: Source) -> str:
        """The key of a sample: a dot in the name of a file would end it."""
        folder, slash, base = source.name.rpartition("/")
        return f"{folder}{slash}{base.replace('.', '_')}"

    def output_of(self, kind: str, source: Source) -> str:
        return f"{self.key(source)}.{kind}{KINDS[kind].suffix}"

    # -- writing
    def write_classes(self, value: Mapping[str, Any]) -> None:
        if not self.resume and self.exists(0):
            fix = "--resume goes on behind it" if self.numbers else "remove it, or choose another --out"
            raise CommandError(f"--out {without_secrets(self.name(0))}: exists already\n{fix}")
        name = f"{NUMBER.sub('', self.out[: -len('.tar')]).rstrip('-_.')}.{CLASSES}"
        content = json.dumps(value, indent=1).encode() + b"\n"
        if self.place is None:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(name), content, sync=False)
        else:
            place = connect(name)
            folder, _, base = place.path.rpartition("/")
            within(lambda: write_object(place._replace(path=folder), base, content), self.out)

    def write(self, kind: str, source: Source, content: bytes, origin: str) -> Result:
        key, name = self.key(source), self.output_of(kind, source)
        other = self.keys.setdefault(key, source.relative)
        if other != source.relative:
            raise DataError(f"{printable(source.file)}: {printable(other)} has the same key, {printable(key)}")
        self.pending[source.relative][name] = content
        return result_of(name, origin, content)

    def add(self, entry: Entry, results: Sequence[Result] = (), objects: object = None) -> None:
        made = self.pending.pop(entry.file, {})
        if entry.error is not None or not entry.outputs:
            return
        key = key_of_sample(entry.outputs[0])
        if self.file is None:
            self._open()
        assert self.file is not None
        made[f"{key}.json"] = line_of(entry, results) + b"\n"
        whole = io.BytesIO()
        for name, content in made.items():
            append(whole, name, content, int(time.time()))
        whole.write(END)
        self._append(whole.getbuffer())
        self.samples += 1
        if self.numbers and (self.samples >= SAMPLES or self.bytes >= BYTES):
            self._publish()

    def _append(self, content: memoryview) -> None:
        """Writes a sample and a tar's end behind it, over the last end: on a full disk the tar before it stays."""
        assert self.file is not None
        try:
            self._write(content)
            self.bytes += len(content) - len(END)
        except OSError as error:
            with suppress(OSError):
                self._write(memoryview(END))
                os.ftruncate(self.file.fileno(), self.bytes + len(END))
            raise OSError(error.errno, error.strerror, str(self.temporary)) from None

    def _write(self, content: memoryview) -> None:
        assert self.file is not None
        self.file.seek(self.bytes)
        while content:
            content = content[self.file.write(content) :]

    def _open(self) -> None:
        if self.place is None:
            folder = Path(self.name(self.next)).parent
            folder.mkdir(parents=True, exist_ok=True)
            self.temporary, descriptor = make_temporary(folder)
        else:
            descriptor, path = tempfile.mkstemp(".tar", "ssaseg-")
            self.temporary = Path(path)
        self.file = os.fdopen(descriptor, "wb", buffering=0)

    def _publish(self) -> None:
        """Gives the tar its name."""
        if self.file is None:
            return
        os.fsync(self.file.fileno())
        self.file.close()
        name = self.name(self.next)
        if self.exists(self.next):
            where = f"{without_secrets(name)}: another command has written it"
            raise CommandError(f"{where}\nthe results are kept in {printable(str(self.temporary))}")
        if self.place is None:
            os.replace(self.temporary, name)
        else:
            place = connect(name)
            try:
                with plain_errors(name):
                    place.system.put_file(str(self.temporary), place.path)
            except DataError as error:
                raise CommandError(f"{error}\nthe results are kept in {self.temporary}") from None
            self.temporary.unlink()
        self.file, self.samples, self.bytes, self.next = None, 0, 0, self.next + 1

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        keep = (kind is None and not self.stop.requested) or (
            self.numbers and (kind is None or issubclass(kind, Exception))
        )
        if self.file is None or self.file.closed:
            return
        if keep:
            try:
                self._publish()
                return
            except OSError:
                if kind is None:
                    raise
            finally:
                if self.file is not None:
                    self.file.close()
        self.file.close()
        with suppress(OSError):
            self.temporary.unlink()
        if kind is None:
            text = f"{self.shown}: not written, as it would not have all images; --out NAME-%06d.tar keeps what is done"
            echo(text, err=True)

    # -- what is there
    def look(self) -> None:
        if not self.numbers:
            if self.exists(0):
                fix = "give a name with a number, such as results-%06d.tar"
                raise CommandError(f"--resume --out {self.shown}: nothing can be added to a tar\n{fix}")
            return
        while self.exists(self.next):
            for content in self._lines(self.name(self.next)):
                self.remember(content)
            self.next += 1

    def _lines(self, name: str) -> Iterator[bytes]:
        def is_entry(member: str) -> bool:
            base = member.rpartition("/")[2]
            return base.count(".") == 1 and base.endswith(".json")

        file = open_file(name) if self.place is None else open_stream(connect(name))
        with file, plain_errors(name):
            yield from (each.content for each in read_members(file, without_secrets(name), is_entry))
