"""Tars as a stream: what is read, what is refused, and tars that are cut off or damaged."""

import gzip
import io
import tarfile
from typing import Any

import pytest
from tars import Content, Pipe, members_of, tar_of

from ssaseg.cli.places import archives
from ssaseg.cli.places.archives import END, append, read_members
from ssaseg.datasets import DataError

LONG = f"{'folder/' * 30}{'x' * 120}.jpg"
GOOD: list[tuple[str, Content]] = [
    ("./a.jpg", b"a" * 700),
    ("a.json", b"{}"),
    ("b//c.jpg", b"c" * 1024),
    ("é ü.jpg", b""),
    (LONG, b"long"),
]
WANTED = [("a.jpg", b"a" * 700), ("b/c.jpg", b"c" * 1024), ("é ü.jpg", b""), (LONG, b"long")]


def read(content: Any) -> list[tuple[str, bytes]]:
    file = Pipe(content) if isinstance(content, bytes) else content
    found = list(read_members(file, "x.tar", lambda name: name.endswith(".jpg")))
    assert not any(member.refused for member in found)
    return [(member.name, member.content) for member in found]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_come_in_their_order_from_what_can_only_be_read_once(form: int) -> None:
    content = tar_of(GOOD, format=form)
    assert read(content) == WANTED
    assert read(gzip.compress(content)) == WANTED
    assert read(content + tar_of([("z.jpg", b"z")])) == [*WANTED, ("z.jpg", b"z")]  # two in one file


def test_what_is_appended_is_what_others_read() -> None:
    buffer = io.BytesIO()
    parts = {"a/é.index.png": b"1" * 513, f"{'y' * 200}.json": b"{}", "name \udcff.json": b""}
    for name, content in parts.items():
        append(buffer, name, content, 5)
    buffer.write(END)
    assert members_of(buffer.getvalue()) == parts
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as archive:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in archive} == {(5, 0, "", 0o644)}


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("a.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "not a regular file, but a link"),
        ("a.jpg", {"type": tarfile.SYMTYPE, "linkname": "b.jpg"}, "not a regular file, but a link"),
        ("a.jpg", {"type": tarfile.LNKTYPE, "linkname": "../../x"}, "not a regular file, but a link"),
        ("a.jpg", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, "not a regular file, but a device"),
        ("a.jpg", {"type": tarfile.BLKTYPE}, "not a regular file, but a device"),
        ("a.jpg", {"type": tarfile.FIFOTYPE}, "not a regular file, but a FIFO"),
        ("/etc/a.jpg", {}, "its name leads out of the tar"),
        ("../a.jpg", {}, "its name leads out of the tar"),
        ("b/../../a.jpg", {}, "its name leads out of the tar"),
        ("..", {"type": tarfile.SYMTYPE}, "its name leads out of the tar"),
    ],
)
def test_what_is_no_file_below_the_tar_is_refused_and_the_rest_is_read(
    name: str, fields: dict[str, Any], why: str
) -> None:
    content = tar_of([("1.jpg", b"1"), (name, fields), ("2.jpg", b"2")])
    first, second, third = read_members(Pipe(content), "x.tar", lambda name: True)
    assert (first.content, third.content) == (b"1", b"2")
    assert (second.refused, second.content) == (why, b"")


def test_a_member_that_is_too_large_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "LARGEST", 2**20)
    content = tar_of([("1.jpg", bytes(2**20 + 1)), ("2.jpg", bytes(2**20))])
    first, second = read_members(Pipe(content), "x.tar", lambda name: True)
    assert (first.refused, first.content) == ("larger than 1 MiB", b"")
    assert (second.refused, len(second.content)) == ("", 2**20)


def test_a_sparse_file_of_terabytes_is_refused() -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"\x80" + (2**45).to_bytes(11, "big")  # its size when it is read
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (member,) = read_members(Pipe(bytes(header) + bytes(1024)), "x.tar", lambda name: True)
    assert member.refused == "not a regular file, but a sparse file"


def test_a_cut_is_seen_wherever_it_is() -> None:
    content = tar_of([("1.jpg", b"1" * 600), ("2.jpg", b"2" * 512)])
    first, second = 512 + 600, 1536 + 512 + 512  # bytes up to the ends of their contents
    for cut in [0, 1, 511, 512, 700, first - 1, first, 1535, 1536, 1537, 2047, 2048, second - 1, second]:
        names: list[str] = []
        members = read_members(Pipe(content[:cut]), "x.tar", lambda name: True)
        with pytest.raises(
            DataError, match=r"^x.tar: (not a tar|a tar that is cut off or damaged).*\nexpected"
        ) as caught:
            names.extend(member.name for member in members)
        assert names == ["1.jpg", "2.jpg"][: (cut >= first) + (cut >= second)], cut
        assert str(caught.value).endswith("copy it again")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a tar"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 2000, "not a tar"),
        (gzip.compress(tar_of([("a.jpg", bytes(range(256)) * 9), *GOOD]))[:-60], "cut off or damaged|not a tar"),
        (tar_of(GOOD)[:1536] + b"\1" * 5000, "after 1 members: "),
        (tar_of([("p.jpg", b"")], pax_headers={"comment": "x" * 2**21}), "a name of 2,097,[0-9]+ bytes"),
    ],
)
def test_damage_is_one_error(content: bytes, why: str) -> None:
    with pytest.raises(DataError, match=why):
        read(content)


def test_names_that_stand_for_names_without_end() -> None:
    """Each header says that the next block has attributes of the next member, which is one more such header."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 0
    with pytest.raises(DataError, match="not a tar"):
        read(header.tobuf() * 3000)


def test_memory_does_not_grow_with_the_members(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = tarfile.TarFile.next

    def next_member(self: tarfile.TarFile) -> tarfile.TarInfo | None:
        seen.append(len(self.members))  # type: ignore[attr-defined]
        return real(self)

    monkeypatch.setattr(tarfile.TarFile, "next", next_member)
    assert len(read(tar_of([(f"{number}.jpg", b"x") for number in range(300)]))) == 300
    assert len(seen) > 300
    assert max(seen) <= 1
