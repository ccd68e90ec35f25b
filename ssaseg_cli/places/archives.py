"""Tars as a stream: members in their order, none of which is ever written to disk, in memory that stays bounded.

WebDataset's tars may be read to the end only, as from a pipe. Several that were put one behind the other are read like
one. What is not a regular file with a name below the tar is refused, and so is a tar that is cut off or damaged.
"""

import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Literal, NamedTuple, cast

from ssaseg.cli.places.names import below_root
from ssaseg.datasets.base import DataError
from ssaseg.files.reading import LARGEST
from ssaseg.files.text import cut, printable

BLOCK = tarfile.BLOCKSIZE
AT_ONCE = 2**18  # bytes that are read at once: a multiple of BLOCK
END = b"\0" * (2 * BLOCK)
LONGEST = 2**20  # bytes of the names and attributes of a member, which stand before it as if they were one
NAMES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
KINDS = {tarfile.SYMTYPE: "a link", tarfile.LNKTYPE: "a link", tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device",
         tarfile.FIFOTYPE: "a FIFO", tarfile.GNUTYPE_SPARSE: "a sparse file"}  # fmt: skip
DAMAGE = (tarfile.TarError, EOFError, zlib.error, ValueError, RecursionError)


class Member(NamedTuple):
    """A member that was asked for."""

    name: str  # its path in the tar, without empty parts; of one that is refused, as it is written there
    content: bytes
    refused: str  # why it has no content; empty for one that has


def read_members(file: BinaryIO, shown: str, is_wanted: Callable[[str], bool]) -> Iterator[Member]:
    """The members of a tar, plain or compressed, whose names are wanted; the content of others is passed over.

    shown: the tar, for messages. Raises DataError at the place where the tar is damaged or ends too early.
    """
    state = _State()
    count = 0
    # All zero blocks are passed over: they also end each of several tars one behind the other.
    header = _checked(state)
    start = _Start(file)
    # No other compression: the memory that bzip2's and xz's need is decided by the file.
    mode: Literal["r|", "r|gz"] = "r|gz" if start.head == b"\x1f\x8b" else "r|"
    try:
        with tarfile.open(
            fileobj=cast(BinaryIO, start), mode=mode, bufsize=AT_ONCE, tarinfo=header, ignore_zeros=True
        ) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
                count += 1
                if not member.isdir() and is_wanted(member.name):
                    yield _read(archive, member)
    except DAMAGE as error:
        text = cut(printable(" ".join(str(error).split())), 100)
        raise _damaged(shown, count, text or type(error).__name__) from None
    if not state.ended:
        raise _damaged(shown, count, "its end is missing")


class _Start:
    """A file whose first two bytes have been looked at."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.head = file, b""
        while len(self.head) < 2 and (more := file.read(2 - len(self.head))):
            self.head += more
        self.left = self.head

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`."""
        if not self.left:
            return self.file.read(size)
        part, self.left = self.left[:size], self.left[size:]
        return part


def _damaged(shown: str, count: int, why: str) -> DataError:
    what = f"not a tar: {why}" if count == 0 else f"a tar that is cut off or damaged after {count} members: {why}"
    return DataError(f"{shown}: {what}\nexpected a complete tar\ncopy it again")


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Member:
    name = below_root(member.name)
    if name is None:
        return Member(member.name, b"", "its name leads out of the tar")
    if not member.isreg() or member.issparse():
        kind = KINDS.get(member.type, "a sparse file" if member.issparse() else "something else")
        return Member(name, b"", f"not a regular file, but {kind}")
    if member.size > LARGEST:
        return Member(name, b"", f"larger than {LARGEST / 2**20:,.0f} MiB")
    content = archive.extractfile(member)
    assert content is not None  # of a regular file
    return Member(name, content.read(), "")


class _State:
    """Whether the last block that was read ends a tar; tarfile takes a cut between members for the end, too."""

    ended = False


def _checked(state: _State) -> type[tarfile.TarInfo]:
    """Headers of members that are not passed over if they are damaged, and whose names are limited."""

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
            if buf:
                state.ended = not any(buf)
            if len(buf) not in (0, BLOCK):
                raise DamagedHeader("cut off in a header")
            try:
                made = super().frombuf(buf, encoding, errors)
            except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
                raise DamagedHeader(str(error)) from None
            if made.type in NAMES and made.size > LONGEST:
                raise DamagedHeader(f"a name of {made.size:,} bytes")
            return made

    return Header


class DamagedHeader(ValueError):
    """A header that ends the reading; tarfile would pass over its own errors."""


# ---- writing -----------------------------------------------------------------------------------------------------
def append(file: io.BytesIO, name: str, content: bytes, time: int) -> None:
    """Appends a member, as GNU tar writes it: name, content, mode and time [s], and nothing of this machine's users."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(content), time, 0o644
    file.write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
    file.write(content)
    file.write(b"\0" * (-len(content) % BLOCK))
