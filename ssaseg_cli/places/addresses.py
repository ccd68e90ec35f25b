"""Addresses such as `s3://bucket/photos`: which texts are some, how they are shown, and how fsspec opens them.

Credentials and options are those of fsspec's configuration and of the environment. What is printed of an address has
neither the user and password nor the query in it, which may be secrets.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from ssaseg.datasets.base import DataError
from ssaseg.files.text import cut, printable

NAME = r"[A-Za-z][A-Za-z0-9+.\-]*"
ROOT = re.compile(rf"{NAME}://[^/]*/")
NAMED = re.compile(NAME)
ADDRESS = re.compile(rf"(?:{NAME}::)*{NAME}://")
IN_TEXT = re.compile(rf"{NAME}://[^\s'\"<>]*")
USER = re.compile(r"[^/@]*@|[^/@:]+:(?!\d+/)[^@]*@")  # a secret key may hold slashes; a port is no password
LOCAL = re.compile("(?:file|local)://")
WEB = ("http://", "https://")
PATIENCE = 60.0  # seconds until a place must have answered for the first time
# How libraries call the lack of credentials: in the type of their error, or in its text.
CREDENTIALS = re.compile(
    r"credential|forbidden|access.?denied|unauthori[sz]ed|permission|\b40[13]\b|token", re.IGNORECASE
)
ADVICE = "credentials are those of the environment and of fsspec's configuration: see docs/places.md"
LOOK = "look at the address, the network and the service"

Made = TypeVar("Made")


class Place(NamedTuple):
    """Where an address leads to: a file system of fsspec, and a path in it."""

    system: Any  # fsspec.AbstractFileSystem, which has no types
    path: str
    address: str  # as it was given: with its secrets

    @property
    def shown(self) -> str:
        """The address without secrets."""
        return without_secrets(self.address)

    @property
    def web(self) -> bool:
        """Whether paths are addresses of HTTP, in which `?` begins a query and letters may be written as `%20`."""
        return self.path.startswith(WEB)

    def below(self, path: str) -> str:
        """The address of another path in the same file system, without secrets."""
        first, chained, rest = self.address.partition("::")
        if chained and "://" in first:  # such as zip://a.jpg::s3://bucket/photos.zip
            return f"{first.partition('://')[0]}://{path}::{without_secrets(rest)}"
        return without_secrets(str(self.system.unstrip_protocol(path)))


def is_address(text: str) -> bool:
    """Whether a text is an address; `file://` is one too, see `local_path`."""
    return ADDRESS.match(text) is not None


def local_path(text: str) -> str:
    """The path in `file:///path`; any other text as it is."""
    return LOCAL.sub("", text, count=1) if LOCAL.match(text) else text


def without_secrets(address: str) -> str:
    """An address without user, password, query and fragment, safe to print; a path as it is, safe to print too."""
    return printable("::".join(map(_bare, address.split("::"))))


def _bare(address: str) -> str:
    scheme, mark, rest = address.partition("://")
    if not mark:
        return address
    rest = USER.sub("", rest, count=1) if USER.match(rest) else rest
    # Names of objects, and patterns, may hold a question mark.
    query = r"[?#].*" if f"{scheme}://".lower() in WEB else r"\?[^/?]*=.*"
    return f"{scheme}://{re.sub(query, '', rest, flags=re.DOTALL)}"


def secrets_of(address: str) -> list[str]:
    """What `without_secrets` leaves out, which the text of an error may hold by itself."""
    found = []
    for part in address.split("::"):
        rest = part.partition("://")[2]
        user = USER.match(rest)
        if user is not None:
            found += [user[0], *user[0].rstrip("@").split(":")]
        found += [value for piece in rest.partition("?")[2].split("&") for value in (piece, piece.partition("=")[2])]
    return sorted((secret for secret in found if len(secret) > 3), key=len, reverse=True)


@contextmanager
def plain_errors(address: str, shown: str | None = None) -> Iterator[None]:
    """Inside, what fsspec and the libraries below it raise becomes a DataError of two lines, without secrets.

    shown: the address as the message has it; None: `address` without its secrets.
    """
    where = without_secrets(address) if shown is None else shown
    try:
        yield
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        cause = error.__cause__  # of HTTP: also a server that cannot be reached, or that refuses
        if cause is not None and getattr(cause, "status", None) != 404:
            raise _plain(cause, where, address) from None
        raise DataError(f"{where}: there is nothing at this address\nexpected an object or a folder") from None
    except ImportError as error:
        text = _line(error, address)
        fix = "pip install 'ssaseg[cloud]' brings what s3://, http:// and https:// need"
        raise DataError(f"{where}: needs a package that is not installed: {text}\n{fix}") from None
    except Exception as error:  # each library has types of its own
        raise _plain(error, where, address) from None


def _plain(error: BaseException, where: str, address: str) -> DataError:
    text = _line(error, address)
    denied = isinstance(error, PermissionError) or CREDENTIALS.search(f"{type(error).__name__} {text}")
    return DataError(f"{where}: {text}\n{ADVICE if denied else LOOK}")


def _line(error: BaseException, address: str) -> str:
    """The text of an error on one line, without secrets."""
    text = " ".join(str(error).split())
    text = IN_TEXT.sub(lambda found: without_secrets(found[0]), text)
    for secret in secrets_of(address):
        text = text.replace(secret, "***")
    known = isinstance(error, OSError) and text
    return cut(printable(text if known else f"{type(error).__name__}: {text}" if text else type(error).__name__), 200)


def connect(address: str) -> Place:
    """The file system of an address. Nothing need be there. Raises DataError for one that fsspec cannot open."""
    with plain_errors(address):
        try:
            from fsspec.core import url_to_fs
            from fsspec.registry import get_filesystem_class
        except ImportError:
            raise ImportError("fsspec") from None
        schemes = [
            part.partition("://")[0] for part in address.split("::") if ADDRESS.match(part) or NAMED.fullmatch(part)
        ]
        for scheme in schemes:
            try:
                get_filesystem_class(scheme)
            except ValueError:
                what = f"{printable(cut(scheme))!r} is no kind of address that fsspec knows"
                expected = "expected s3://, gs://, az://, http://, https://, file:// or another of fsspec's"
                raise DataError(f"{without_secrets(address)}: {what}\n{expected}") from None
        # Some file systems look for credentials on the network when they are made.
        system, path = within(lambda: url_to_fs(address), address)
        return Place(system, path, address)


def connect_quickly(address: str) -> Place:
    """`connect`, for many addresses in the same bucket or on the same server."""
    root = ROOT.match(address)
    if root is None or "?" in address:  # which may be an option of the file system
        return connect(address)
    system = _connect_root(root[0]).system
    with plain_errors(address):
        return Place(system, str(system._strip_protocol(address)), address)


@lru_cache(maxsize=16)
def _connect_root(address: str) -> Place:
    return connect(address)


def within(call: Callable[[], Made], address: str, seconds: float = PATIENCE) -> Made:
    """What `call` returns or raises; DataError after `seconds` without either.

    Libraries try again for minutes where nobody answers, and not all of them have a limit.
    """
    made: list[Made] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            made.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)  # one that waits for ever does not keep the process
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not made:
        raise DataError(f"{without_secrets(address)}: no answer in {seconds:g} seconds\n{LOOK}")
    return made[0]
