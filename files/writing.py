"""Writes files so that each is complete or absent, and locks folders. Trusts no link in a given folder."""

import contextlib
import errno
import fcntl
import os
import platform
import re
import secrets
import stat
from pathlib import Path
from typing import TextIO

# Opens a name itself, never the target of a link with that name, and does not wait for the other end of a FIFO.
NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

PARTIAL = ".partial"  # suffix of temporary files
TEMPORARY = re.compile(r"\.[0-9a-f]{16}" + re.escape(PARTIAL))  # their names, see `make_temporary`


def write_atomic(path: Path, content: bytes, sync: bool = True, root: Path | None = None) -> None:
    """Writes a file atomically: after a crash or on a full disk, `path` is the complete old or the complete new file.

    `root`: a folder that `path` lies below and that may come from someone else: a link that leads out of it is an
    error, a link with the name of `path` is replaced, and `root` must exist. Without `root`, the user has named `path`:
    a link is followed, and a device or pipe, which cannot be replaced, is written directly. Missing folders are made.

    `sync=False` does not force the file to the disk: for files that can be made again. Raises OSError that names
    `path`; the old file is then unchanged, and no partial file is left.
    """
    temporary = None
    try:
        target = Path(os.path.realpath(path)) if root is None else below(path, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        if root is None and target.exists() and not (target.is_file() or target.is_dir()):
            target.write_bytes(content)
            return
        temporary, descriptor = make_temporary(target.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:  # Ctrl-C too
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            size = f"{len(content) / 2**20:.1f} MiB" if len(content) > 2**17 else f"{len(content)} bytes"
            amount = f"{size} to write; an existing file stays unchanged"
            raise OSError(error.errno, f"{error.strerror or error} ({amount})", str(path)) from None
        raise


def below(path: Path, root: Path) -> Path:
    """`path` without links in its folder. Raises OSError if `root` does not exist or the folder lies outside it."""
    real, folder = os.path.realpath(root, strict=True), Path(os.path.realpath(path.parent))
    if not folder.is_relative_to(real) or path.name in ("", ".."):
        raise OSError(errno.ELOOP, f"a link or '..' leads out of {root}", str(path))
    return folder / path.name


def make_temporary(folder: Path) -> tuple[Path, int]:
    """A new empty file in `folder`, with a short name that nobody can guess, and its descriptor. Raises OSError.

    The name does not depend on the name of the result, which may already be as long as the file system allows.
    """
    path = folder / f".{secrets.token_hex(8)}{PARTIAL}"
    return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)


def delete_temporaries(folder: Path) -> None:
    """Deletes what killed commands have left in `folder`. Only for a folder that this process has locked."""
    for path in folder.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):
            path.unlink()


def open_append(path: Path) -> TextIO:
    """Opens a text file to append to; makes it if necessary. Raises OSError for a link and for what is not a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "a", encoding="utf-8")


def open_to_others(folder: Path) -> Path | None:
    """The folder itself, or the one that it lies in, if every user of the machine can change what is read from
    `folder`; None if neither. A file system without rights may show this of every folder. Raises OSError.
    """
    folder = Path(os.path.realpath(folder))
    # In a folder with this bit, like /tmp, only its owner can rename `folder`.
    for place, kept in ((folder, 0), (folder.parent, stat.S_ISVTX)):
        mode = place.stat().st_mode
        if mode & stat.S_IWOTH and not mode & kept:
            return place
    return None


class FolderInUse(Exception):
    """Another process has locked the folder. The text describes that process, and may be empty."""


class FolderLock:
    """A lock on a folder: the locked file `name` in it. The system unlocks it when the process ends, for any reason.

    Raises FolderInUse if another process holds it, and OSError if the file cannot be made, or is a link, a hard link or
    not a regular file. The folder must exist. `supported`: whether the file system has locks; if not, nothing is
    locked.
    """

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self.folder, self.path, self.supported = folder, folder / name, True
        while True:
            self.file = self._open()
            # The process that held the lock before deletes the file when it ends: then the locked file has no name.
            if self._is_current():
                try:
                    os.truncate(self.file, 0)
                    os.write(self.file, f"process {os.getpid()} on {platform.node()}\n".encode())
                except OSError as error:  # a full disk
                    os.close(self.file)
                    raise OSError(error.errno, error.strerror, str(self.path)) from None
                return
            os.close(self.file)

    def check(self) -> None:
        """Raises OSError if the folder was deleted, moved or made anew since it was locked."""
        if not self._is_current():
            raise OSError(
                errno.ESTALE,
                "this folder was deleted or replaced while it was being written to; nothing more is written",
                str(self.folder),
            )

    def release(self, delete: bool = True) -> None:
        """Unlocks the folder. `delete`: also deletes the lock file, if it is still the one that was locked."""
        if delete and self._is_current():
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self.file)

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file), os.lstat(self.path))
        except OSError:
            return False

    def _open(self) -> int:
        """A descriptor of the lock file, locked. Do not open the file again in this process: to close it unlocks it."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o644)
        try:
            facts = os.fstat(file)
            # Whoever made the folder may have given another file of this user this second name.
            if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
                raise OSError(errno.EINVAL, "a link or a special file where a lock file should be", str(self.path))
            # This lock belongs to the process. Workers that live a moment longer than a killed run do not inherit it,
            # as they would inherit flock's.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                self.supported = False
                return file
            owner = os.read(file, 200).decode(errors="replace") if error.errno in (errno.EACCES, errno.EAGAIN) else None
            os.close(file)
            if owner is not None:
                raise FolderInUse(owner.strip()) from None
            raise
        return file
