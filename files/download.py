"""Downloads a file over HTTP: of limited size, continued where it was cut off, checked, complete or absent.

Only `http` and `https` are opened, after a redirect too, and never `http` after `https`. Proxies are those of the
environment: `http_proxy`, `https_proxy` and `no_proxy`.
"""

import contextlib
import hashlib
import http.client
import itertools
import os
import re
import stat
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

from ssaseg.files.reading import open_file
from ssaseg.files.text import cut, printable
from ssaseg.files.writing import NO_LINK, PARTIAL

TIMEOUT = 30.0  # seconds without a byte, after which a connection is given up
REDIRECTS = 8  # in a row
CHUNK = 2**16  # bytes
RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")  # of the header Content-Range
MOVED = (301, 302, 303, 307, 308)


class DownloadError(Exception):
    """Why a file could not be downloaded; the text is for the user."""


class WrongContent(DownloadError):
    """A complete file without the expected SHA-256. It is kept at `kept`."""

    def __init__(self, message: str, kept: Path) -> None:
        super().__init__(message)
        self.kept = kept


def download(
    address: str,
    path: Path,
    sha256: str = "",
    limit: int = 2**30,
    partial: Path | None = None,
    timeout: float = TIMEOUT,
    progress: Callable[[int, int | None], object] = lambda done, total: None,
) -> None:
    """Downloads `address` to `path`, which is complete or absent at any time.

    What arrives before an error stays in `partial` (None: `path` with `.partial` after its name), and the next call
    asks only for the rest. The folder must exist, and no other process may use the same `partial`.

    Args:
        address: an http or https address.
        path: the file to write.
        sha256: the beginning of its SHA-256 in hexadecimal digits, or the whole; "": it is not compared.
        limit: the most bytes that are accepted.
        timeout: seconds without a byte, after which the connection is given up.
        progress: called with the bytes so far, and those of the whole file, None if the server does not say.

    Raises:
        DownloadError: the server cannot be reached, has no such file, sends too much or too little.
        WrongContent: the SHA-256 is another. The file is kept under another name.
        OSError: the file cannot be written.
    """
    partial = partial or path.with_name(path.name + PARTIAL)
    with _open_partial(partial) as file:
        try:
            _receive(address, file, limit, timeout, progress)
            file.flush()
            os.fsync(file.fileno())
            if not file.tell():
                raise DownloadError("the answer is empty")
        except OSError as error:  # a full disk
            raise OSError(error.errno, error.strerror, str(partial)) from None
        finally:
            with contextlib.suppress(OSError):
                file.flush()
            if not os.fstat(file.fileno()).st_size:
                partial.unlink(missing_ok=True)
    found = hash_file(partial)
    if not found.startswith(sha256):
        kept = keep_aside(partial, path)
        raise WrongContent(f"its SHA-256 begins with {found[: max(len(sha256), 8)]}, expected {sha256}", kept)
    os.replace(partial, path)


def hash_file(path: Path) -> str:
    """The SHA-256 of a regular file, in hexadecimal digits. Raises OSError."""
    found = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()


def keep_aside(file: Path, path: Path) -> Path:
    """Renames `file` to a free name: that of `path` with `.wrong` and, if needed, a number after it. Returns it."""
    names = (path.with_name(f"{path.name}.wrong{number or ''}") for number in itertools.count())
    kept = next(name for name in names if not os.path.lexists(name))
    os.rename(file, kept)
    return kept


def _open_partial(path: Path) -> BinaryIO:
    """The file that is written, at its end. Raises OSError, also for a link and what is not a regular file."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
        os.close(descriptor)
        raise OSError(22, "a link or a special file in place of a partial download", str(path))
    file = os.fdopen(descriptor, "r+b")
    file.seek(0, os.SEEK_END)
    return file


def _receive(
    address: str, file: BinaryIO, limit: int, timeout: float, progress: Callable[[int, int | None], object]
) -> None:
    """Writes the rest of the file, or all of it where the server does not continue. Raises DownloadError."""
    have = file.tell()
    answer = _ask(address, timeout, have)
    place = str(answer.headers.get("Content-Range", "")).strip()
    if have and answer.status == 416 and place == f"bytes */{have}":
        answer.close()  # nothing is missing
        return
    found = RANGE.fullmatch(place)
    continued = answer.status == 206 and found is not None and int(found[1]) == have
    if have and answer.status != 200 and not continued:  # the partial file is not a beginning of this one
        answer.close()
        have, found, answer = 0, None, _ask(address, timeout)
    with contextlib.closing(answer):
        if answer.status != 200 and not (have and continued):
            raise DownloadError(f"the server answered {answer.status} {_line(answer.reason)}")
        if answer.status == 200:
            have, found = 0, None
        if answer.headers.get_content_type() == "text/html":
            raise DownloadError("the server answered with a web page, not with a file")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise DownloadError("the server sends it compressed, which was not requested")
        total = int(found[2]) if found else answer.length
        if max(total or 0, have + (answer.length or 0)) > limit:
            raise DownloadError(f"the server has {total:,} bytes, more than the {limit:,} that are accepted")
        file.seek(have)
        file.truncate()
        progress(have, total)
        while chunk := _read(answer, timeout):
            have += len(chunk)
            if have > limit:
                file.seek(0)
                file.truncate()
                raise DownloadError(f"the server sends more than the {limit:,} bytes that are accepted")
            file.write(chunk)
            progress(have, total)
    if total is not None and have != total:
        raise DownloadError(f"the connection ended after {have:,} of {total:,} bytes; the next try continues there")


def _ask(address: str, timeout: float, have: int = 0) -> Any:
    """The answer of the server, after redirects, to a request of all after the first `have` bytes."""
    headers = {"User-Agent": "ssaseg", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    # Of urllib's handlers only these: no file, FTP or data address is opened, and no redirect is followed unseen.
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
        opener.add_handler(handler())
    opener.add_handler(urllib.request.UnknownHandler())
    for _ in range(REDIRECTS):
        with _network_errors(timeout):
            answer: Any = opener.open(urllib.request.Request(address, headers=headers), timeout=timeout)
        target = answer.headers.get("Location") if answer.status in MOVED else None
        if target is None:
            return answer
        answer.close()
        address = _moved(address, target)
    raise DownloadError(f"the server redirects more than {REDIRECTS} times")


def _moved(address: str, target: str) -> str:
    """The address that a redirect leads to. Raises DownloadError if it is not to be opened."""
    try:
        new = urljoin(address, target)
        scheme = urlsplit(new).scheme
    except ValueError:
        new, scheme = target, ""
    if scheme not in ("http", "https") or (scheme == "http" and urlsplit(address).scheme == "https"):
        raise DownloadError(f"the server redirects to {_line(new)}, which is not opened")
    return new


def _read(answer: Any, timeout: float) -> bytes:
    with _network_errors(timeout):
        chunk: bytes = answer.read1(CHUNK)  # what has arrived: nothing is lost where the connection breaks
    return chunk


@contextlib.contextmanager
def _network_errors(timeout: float) -> Iterator[None]:
    """Inside, what urllib raises becomes a DownloadError."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an address that is not valid
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            raise DownloadError(f"no answer for {timeout:g} seconds") from None
        if isinstance(reason, http.client.IncompleteRead):
            raise DownloadError("the connection was cut off; the next try continues there") from None
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        raise DownloadError(_line(text) or type(reason).__name__) from None


def _line(text: object) -> str:
    """Text from outside as one short line."""
    return printable(cut(" ".join(str(text).split()), 120))
