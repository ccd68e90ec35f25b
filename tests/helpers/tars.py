"""Tars for tests, good and bad ones."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Content = bytes | dict[str, Any]  # of a member; or fields of its header, without content


def tar_of(members: Iterable[tuple[str, Content]], **options: Any) -> bytes:
    """A tar of these members, in their order. options: of `tarfile.open`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, **{"mode": "w", **options}) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, dict):
                for field, value in content.items():
                    setattr(info, field, value)
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, Content]]) -> Path:
    path.write_bytes(tar_of(members))
    return path


def members_of(content: bytes) -> dict[str, bytes]:
    """Names and contents of the members of a tar, in their order, as Python's reader finds them."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        found = [(member.name, archive.extractfile(member)) for member in archive]
        return {name: file.read() for name, file in found if file is not None}


class Pipe:
    """Bytes that can only be read once, a few at a time, as from a socket."""

    def __init__(self, content: bytes, most: int = 777) -> None:
        self.file, self.most = io.BytesIO(content), most

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, self.most))
