"""Objects at addresses: found below a prefix or by a pattern, read up to a limit, written whole."""

import hashlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from ssaseg.cli.places.addresses import Place, connect, connect_quickly, plain_errors, within
from ssaseg.cli.places.names import below_root, is_hidden
from ssaseg.datasets.base import DataError
from ssaseg.datasets.pairs import IMAGE_SUFFIXES
from ssaseg.files.reading import LARGEST, too_large

BLOCK = 2**20  # bytes that are asked for at once
AHEAD = 2**22  # bytes of one request to a store
MAGIC = "*["  # begin a wildcard; `?` would begin the query of an HTTP address
DEEPEST = 8  # folders of a web server, whose pages may link to one another for ever
# What a file system says about an object's content, beside its size; the first that it has is taken.
STAMPS = (
    "ETag",
    "etag",
    "md5Hash",
    "CRC",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "updated",
    "mtime",
    "created",
)


class Content(Protocol):
    """An image that is not a local file."""

    def read(self) -> bytes:
        """The content. Raises DataError, OSError."""

    def start(self, size: int) -> bytes:
        """The first bytes, at most `size`; empty where they cannot be read."""

    def identity(self) -> str:
        """What differs if the content does: stamps of the store, or a checksum. Raises as `read` does."""


class Held:
    """Content that is in memory already, as of a member of a tar."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self) -> bytes:
        return self.content

    def start(self, size: int) -> bytes:
        return self.content[:size]

    def identity(self) -> str:
        return sum_of(self.content)


class Failed:
    """What cannot be read, and why."""

    def __init__(self, error: DataError | OSError) -> None:
        self.error = error

    def read(self) -> bytes:
        raise self.error

    def start(self, size: int) -> bytes:
        return b""

    def identity(self) -> str:
        raise self.error


class Object:
    """An object at an address."""

    def __init__(self, place: Place, shown: str, facts: Mapping[str, Any] | None = None) -> None:
        self.place, self.shown, self._facts = place, shown, facts
        self._start = b""

    def facts(self) -> Mapping[str, Any]:
        """What the store says about it; asked where the listing has said too little."""
        if self._facts is None or not any(self._facts.get(stamp) for stamp in STAMPS):
            with plain_errors(self.place.address, self.shown):
                self._facts = dict(self.place.system.info(self.place.path))
        return self._facts

    def identity(self) -> str:
        facts = self.facts()
        stamp = next((stamp for stamp in STAMPS if facts.get(stamp)), None)
        if stamp is None:
            return sum_of(self.read())
        value = facts[stamp].timestamp() if isinstance(facts[stamp], datetime) else facts[stamp]
        return f"{self.shown} {facts.get('size')} {stamp} {value}"

    def read(self) -> bytes:
        """At most `LARGEST` bytes, as of a file: what a server says about the size is not believed."""
        with plain_errors(self.place.address, self.shown):
            size = self.facts().get("size")
            if size is not None and size > LARGEST:
                raise _large(self.shown)
            content = self._first(LARGEST + 1)
            if len(content) > LARGEST:
                raise _large(self.shown)
            if size is not None and len(content) != size:
                raise DataError(f"{self.shown}: {len(content)} of {size} bytes came\nrun the command again")
            return content

    def start(self, size: int) -> bytes:
        if not self._start:
            try:
                with plain_errors(self.place.address, self.shown):
                    self._start = self._first(size)
            except DataError:  # reported when it is read
                return b""
        return self._start

    def _first(self, size: int) -> bytes:
        """The first bytes, at most `size`."""
        parts, left = [], size
        with open_stream(self.place) as file:
            while left and (part := file.read(min(BLOCK, left))):
                parts.append(part)
                left -= len(part)
        return b"".join(parts)


def open_stream(place: Place) -> Any:
    """An object as a file that is read from its beginning to its end. Raises what fsspec raises."""
    # By one request; the size would be asked for once more, and is not needed.
    options = {"block_size": 0, "size": -1} if place.web else {"block_size": AHEAD}
    return place.system.open(place.path, "rb", **options)


def sum_of(content: bytes) -> str:
    """A checksum with the size, for content without any other stamp."""
    return hashlib.sha256(content).hexdigest()


class Found(NamedTuple):
    """An object, and its path below the address that it was found by; None: a path that would lead out of OUT."""

    thing: Object
    relative: str | None


def object_at(address: str) -> Object:
    """The object at an address of a list: nothing is asked yet. Raises as `connect`."""
    place = connect_quickly(address)
    return Object(place, place.below(place.path))


def find_objects(address: str) -> Iterator[Found]:
    """Objects at an address: one object, all below a prefix or folder, or those that match a pattern; sorted by path.

    Of a pattern, paths start at the first wildcard. Hidden ones are left out, as in folders. Raises DataError.
    """
    place = connect(address)
    with plain_errors(address):
        if any(mark in place.path for mark in MAGIC):
            yield from _below(place, _before_wildcard(place.path), place.system.glob(place.path, detail=True))
            return
        facts = within(lambda: place.system.info(place.path), address)
        if _is_folder(place, facts):
            limits = {"maxdepth": DEEPEST} if place.web else {}
            yield from _below(place, place.path, place.system.find(place.path, detail=True, **limits))
            return
    name = urlsplit(place.path).path if place.web else place.path
    yield Found(Object(place, place.below(place.path), facts), below_root(_spelt(place, name).rpartition("/")[2]))


def _before_wildcard(path: str) -> str:
    parts = path.split("/")
    first = next(index for index, part in enumerate(parts) if any(mark in part for mark in MAGIC))
    return "/".join(parts[:first])


def _is_folder(place: Place, facts: Mapping[str, Any]) -> bool:
    """Whether an address is that of many objects. A web server's folder is a page with links."""
    if facts.get("type") == "directory" or not place.web:
        return facts.get("type") == "directory"
    path = urlsplit(place.path).path
    page = str(facts.get("mimetype", "")).startswith("text/html")
    return path.endswith("/") or (page and not path.lower().endswith(IMAGE_SUFFIXES))


def _below(place: Place, base: str, listed: Mapping[str, Mapping[str, Any]]) -> Iterator[Found]:
    base = base.rstrip("/")
    for path, facts in sorted(listed.items()):
        if facts.get("type") == "directory" or (base and not path.startswith(f"{base}/")):
            continue
        relative = path[len(base) :].lstrip("/") if base else path.lstrip("/")
        if place.web:
            relative = _spelt(place, urlsplit(f"http://x/{relative}").path.lstrip("/"))
        if not is_hidden(relative):
            yield Found(Object(place._replace(path=path), place.below(path), facts), below_root(relative))


def _spelt(place: Place, path: str) -> str:
    return unquote(path) if place.web else path


def _large(shown: str) -> DataError:
    return DataError(f"{shown}: {too_large('', LARGEST).strerror}\nuse a smaller image, or cut it into tiles")


def read_object(place: Place, name: str) -> bytes:
    """The content of an object below `place`. Raises DataError."""
    path = f"{place.path.rstrip('/')}/{name}"
    return Object(place._replace(path=path), place.below(path)).read()


# ---- writing -----------------------------------------------------------------------------------------------------
def write_object(place: Place, name: str, content: bytes) -> None:
    """Writes an object below `place`, whole or not at all. Raises DataError."""
    path = f"{place.path.rstrip('/')}/{name}"
    with plain_errors(place.address, place.below(path)):
        place.system.pipe_file(path, content)
