"""Reads regular files of limited size. A FIFO would wait for ever, a device or a sparse file would fill the memory."""

import codecs
import errno
import os
import stat
import zlib
from typing import BinaryIO

LARGEST = 2**30  # bytes of a file, unless a caller expects larger ones
LARGEST_TEXT = 2**24  # bytes of a text that people write, such as a recipe

KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_file(path: str | os.PathLike[str], limit: int | None = None) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading. Does not wait for what is not a regular file.

    Raises OSError that names the file: what cannot be opened, is not a regular file, or is larger than `limit` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.EINVAL, "not a regular file, but a socket or a device", str(path)) from None
        raise
    except ValueError:  # a NUL byte in the name
        raise OSError(errno.EINVAL, "not a file name", str(path)) from None
    try:
        facts = os.fstat(descriptor)
        if stat.S_ISDIR(facts.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(facts.st_mode):
            kind = KINDS.get(stat.S_IFMT(facts.st_mode), "something else")
            raise OSError(errno.EINVAL, f"not a regular file, but {kind}", str(path))
        if limit is not None and facts.st_size > limit:
            raise too_large(path, limit)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_file(path: str | os.PathLike[str], limit: int = LARGEST) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError as `open_file` does."""
    with open_file(path, limit) as file:
        # Not read(limit + 1), which first takes as much memory.
        content = file.read(os.fstat(file.fileno()).st_size)
        while more := file.read(2**16):  # files of /proc claim 0 bytes, and others may grow
            content += more
            if len(content) > limit:
                raise too_large(path, limit)
    return content


def content_sum(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Size [bytes] and CRC-32 of a file of any size, read piece by piece. Raises OSError as `open_file` does."""
    size = code = 0
    with open_file(path) as file:
        while piece := file.read(2**20):
            size, code = size + len(piece), zlib.crc32(piece, code)
    return size, code


def read_text(path: str | os.PathLike[str], limit: int = LARGEST_TEXT) -> str:
    """The text of a file, see `decode_text`. Raises OSError as `open_file` does, and UnicodeDecodeError."""
    return decode_text(read_file(path, limit))


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Text in UTF-8, or with the mark of UTF-16, as Windows tools write it; without the mark. Raises
    UnicodeDecodeError for other encodings, unless `errors` is "replace".
    """
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig", errors)


def too_large(path: str | os.PathLike[str], limit: int) -> OSError:
    """The error for a file of more than `limit` bytes."""
    return OSError(errno.EFBIG, f"larger than {limit / 2**20:,.0f} MiB", str(path))
