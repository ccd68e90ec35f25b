"""Addresses, their objects, names below OUT, and lists."""

import io
import os
import sys
import time
from http.server import BaseHTTPRequestHandler
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from serving import send, serving

from ssaseg.cli.places import addresses, names, objects
from ssaseg.cli.places.addresses import is_address, local_path, within, without_secrets
from ssaseg.cli.places.lists import read_list
from ssaseg.cli.places.objects import find_objects, object_at
from ssaseg.datasets import DataError


def found(address: str) -> dict[str | None, bytes]:
    return {relative: thing.read() for thing, relative in find_objects(address)}


# ---- texts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://bucket/a@2x.jpg", "s3://bucket/a@2x.jpg"),
        ("s3://KEY:sec/ret@bucket/a.jpg", "s3://bucket/a.jpg"),
        ("https://user:word@host:8080/a@b.jpg?X-Amz-Signature=1#x", "https://host:8080/a@b.jpg"),
        ("http://host:8080/a@b.jpg", "http://host:8080/a@b.jpg"),
        ("http://host/a.jpg?token", "http://host/a.jpg"),
        ("s3://bucket/img?.jpg", "s3://bucket/img?.jpg"),
        ("az://box/a.jpg?sv=1&sig=2", "az://box/a.jpg"),
        ("zip://a.jpg::https://u:p@host/x.zip?s=1", "zip://a.jpg::https://host/x.zip"),
        ("memory://a\x1b[31m", "memory://a\\x1b[31m"),
    ],
)
def test_what_is_shown_of_an_address_has_no_secrets(address: str, shown: str) -> None:
    assert is_address(address)
    assert without_secrets(address) == shown


def test_which_texts_are_addresses() -> None:
    assert [is_address(text) for text in ("a/b.jpg", "x::y.jpg", "C:/x", "simplecache::s3://a", "./s3:/a", "")] == [
        *(False, False, False, True, False, False)
    ]
    assert [local_path(text) for text in ("file:///tmp/a", "local://b", "s3://c", "d")] == [
        "/tmp/a",
        "b",
        "s3://c",
        "d",
    ]


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [*names.expand_braces("p-{008..011}{a,b}.tar")][::3] == ["p-008a.tar", "p-009b.tar", "p-011a.tar"]
    assert [*names.expand_braces("{2..0}{x}")] == ["2{x}", "1{x}", "0{x}"]
    with pytest.raises(DataError, match="more than 100,000 names"):
        list(names.expand_braces("{0..99999999}"))
    assert [names.stem_of(name) for name in ("a/p-1.tar", "s3://b/x.TAR.gz", "http://h/a%20b.tgz?x=1")] == [
        *("p-1", "x", "a b")
    ]
    assert names.is_tar("http://h/a.tar?sig=1.jpg")
    assert not names.is_tar("http://h/a.jpg?x=1.tar")
    assert [names.key_of_sample(name) for name in ("a/b.c/d.e.jpg", "x.jpg", "n")] == ["a/b.c/d", "x", "n"]
    assert [names.below_root(name) for name in ("a//./b", "/a", "a/..", "", ".", "a\0b")] == ["a/b", *[None] * 5]
    monkeypatch.chdir(tmp_path)
    up = str(tmp_path.parent).lstrip("/")
    given = ["./a//b.jpg", "../x.jpg", f"{tmp_path}/c.jpg", "/etc/x.jpg", "s3://k:s@b/d/e.jpg", "http://h/a%20b?c", "/"]
    assert [names.name_as_given(line) for line in given] == [
        *("a/b.jpg", f"{up}/x.jpg", "c.jpg", "etc/x.jpg", "b/d/e.jpg", "h/a b", None)
    ]
    assert names.name_as_given("http://h/%2e%2e/%2e%2e/x.jpg") is None


# ---- lists -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "content",
    [
        b"a.jpg\nb c.jpg\n",
        b"\xef\xbb\xbfa.jpg\r\n\r\n  \r\nb c.jpg\r\n",
        b"\n\na.jpg\n\nb c.jpg",
        b"a.jpg\0b c.jpg\0",
        "\ufeffa.jpg\r\nb c.jpg\r\n".encode("utf-16-le"),
    ],
)
def test_a_list_in_any_common_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    assert read_list(str(tmp_path / "list.txt")) == ["a.jpg", "b c.jpg"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert read_list("-") == ["a.jpg", "b c.jpg"]


def test_lists_of_odd_names(tmp_path: Path) -> None:
    file = tmp_path / "list"
    file.write_bytes(b"a\xff.jpg\n b.jpg \n")
    assert [os.fsencode(name) for name in read_list(str(file))] == [b"a\xff.jpg", b" b.jpg "]
    file.write_bytes(b"a\nb.jpg\0c.jpg")  # as find -print0 writes a name with a line feed
    assert read_list(str(file)) == ["a\nb.jpg", "c.jpg"]
    file.write_bytes(b"\r\n \n")
    with pytest.raises(DataError, match="no name in it"):
        read_list(str(file))
    with pytest.raises(OSError, match="No such file"):
        read_list(str(tmp_path / "none"))


# ---- objects -----------------------------------------------------------------------------------------------------
def test_objects_below_a_prefix_by_a_pattern_and_by_name(memory: MemoryFileSystem) -> None:
    for path in ("b/p/a.jpg", "b/p/c/d.jpg", "b/p/.e.jpg", "b/p/.f/g.jpg", "b/q/a.jpg"):
        memory.pipe_file(f"/{path}", path.encode())
    assert found("memory://b/p") == found("memory://b/p/") == {"a.jpg": b"b/p/a.jpg", "c/d.jpg": b"b/p/c/d.jpg"}
    assert found("memory://b/p/c/d.jpg") == {"d.jpg": b"b/p/c/d.jpg"}
    assert found("memory://b/*/a.jpg") == {"p/a.jpg": b"b/p/a.jpg", "q/a.jpg": b"b/q/a.jpg"}
    assert [*found("memory://b/**/*.jpg")] == ["p/a.jpg", "p/c/d.jpg", "q/a.jpg"]
    (one, _), *_ = find_objects("memory://b/p")
    other = object_at("memory://b/p/a.jpg")
    assert one.identity() == other.identity()
    assert other.start(3) == b"b/p"
    memory.pipe_file("/b/p/a.jpg", b"B/p/a.jpg")
    assert object_at("memory://b/p/a.jpg").identity() != one.identity()
    for address in ("memory://b/none", "memory://b/p/none.jpg"):
        with pytest.raises(DataError, match="there is nothing at this address"):
            found(address)
    assert found("memory://b/*.png") == {}


def test_names_in_archives_that_lead_out(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("../a.jpg", "a")
        archive.writestr("b/c.jpg", "c")
    assert found(f"zip://::{tmp_path}/x.zip") == {None: b"a", "b/c.jpg": b"c"}


def test_an_object_that_is_too_large(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "LARGEST", 1000)
    memory.pipe_file("/a.jpg", bytes(1001))
    memory.pipe_file("/b.jpg", bytes(1000))
    with pytest.raises(DataError, match=r"^memory:///a.jpg: larger than"):
        object_at("memory://a.jpg").read()
    assert len(object_at("memory://b.jpg").read()) == 1000
    thing = object_at("memory://a.jpg")
    thing._facts = {"size": 10, "mtime": 1}  # a store that says less than it sends
    with pytest.raises(DataError, match="larger than"):
        thing.read()
    thing._facts = {"size": 2000, "mtime": 1}
    monkeypatch.setattr(objects, "LARGEST", 3000)
    with pytest.raises(DataError, match="1001 of 2000 bytes came"):
        thing.read()


def test_an_object_without_stamps_is_known_by_its_content(memory: MemoryFileSystem, monkeypatch: Any) -> None:
    memory.pipe_file("/a.jpg", b"1")
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: {"name": path, "size": 1, "type": "file"})
    first = object_at("memory://a.jpg").identity()
    memory.pipe_file("/a.jpg", b"2")
    assert object_at("memory://a.jpg").identity() != first
    memory.pipe_file("/a.jpg", b"1")
    assert object_at("memory://a.jpg").identity() == first


# ---- HTTP --------------------------------------------------------------------------------------------------------
PAGE = (
    b'<a href="../">up</a><a href="a.jpg">a</a><a href="b%20c.jpg">b</a><a href="../../../etc/x.jpg">x</a>'
    b'<a href="http://127.0.0.1:1/y.jpg">y</a><a href=".z.jpg">z</a>'
)


def web(handler: BaseHTTPRequestHandler) -> None:
    path = handler.path.partition("?")[0]
    if path == "/photos/":
        send(handler, PAGE, Content_Type="text/html")
    elif path == "/short.jpg":
        send(handler, b"half", Content_Length="9")
    elif path.startswith("/status"):
        send(handler, b"", int(path[7:10]))
    else:
        send(handler, path.encode(), ETag='"1"')


def test_a_web_server() -> None:
    with serving(web) as server:
        assert found(f"{server.address}/a%20b.jpg?sig=SECRET") == {"a b.jpg": b"/a%20b.jpg"}
        below = found(f"{server.address}/photos/")
        assert below.pop("a.jpg") == b"/photos/a.jpg"
        assert below.pop("b c.jpg") == b"/photos/b%20c.jpg"
        assert [*below] in ([], [None])  # what leads out has no name
        thing = object_at(f"{server.address}/a.jpg?sig=SECRET")
        assert (thing.identity(), thing.start(4)) == (f'{server.address}/a.jpg 6 ETag "1"', b"/a.j")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/status404.jpg", "there is nothing at this address"),
        ("/status403.jpg", "403.*\ncredentials are those of"),
        ("/status500.jpg", "500"),
        ("/short.jpg", "of 9 bytes came|payload|bytes"),
    ],
)
def test_errors_of_a_web_server_have_no_secrets(path: str, why: str) -> None:
    with serving(web) as server:
        with pytest.raises(DataError, match=f"^{server.address}{path}: .*{why}") as caught:
            found(f"{server.address}{path}?sig=SECRET1&x=SECRET2")
        assert "SECRET" not in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 3


def test_an_address_that_cannot_be_reached() -> None:
    with serving(web) as server:
        closed = server.address
    for address in (f"{closed}/a.jpg?sig=SECRET1", "http://nowhere.invalid/a.jpg?sig=SECRET1"):
        with pytest.raises(DataError, match=r"annot connect[^\n]*\nlook at the address, the network") as caught:
            found(address)
        assert "SECRET" not in str(caught.value)


def test_an_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: time.sleep(5))
    monkeypatch.setattr(objects, "within", lambda call, address: within(call, address, 0.05))
    started = time.monotonic()
    with pytest.raises(DataError, match=r"^memory://a: no answer in 0.05 seconds\n"):
        list(find_objects("memory://a"))
    assert time.monotonic() - started < 4


# ---- what fsspec cannot open -------------------------------------------------------------------------------------
def test_an_unknown_scheme_and_an_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("s4://bucket/a.jpg", "nonsense::memory://a"):
        with pytest.raises(DataError, match="is no kind of address that fsspec knows\nexpected s3://"):
            list(find_objects(address))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(
        DataError, match=r"(?s)^s3://bucket/a.jpg: needs a package.*s3fs.*pip install 'ssaseg\[cloud\]'"
    ):
        list(find_objects("s3://key:SECRET@bucket/a.jpg"))


class Locked(MemoryFileSystem):
    """A store that asks for credentials."""

    protocol = "locked"
    error: Exception = PermissionError("Access Denied for memory://k:SECRET1@b/a.jpg?sig=SECRET2")

    def info(self, path: str, **_: Any) -> Any:
        raise self.error


class NoCredentialsError(Exception):
    """As botocore calls it."""


@pytest.mark.parametrize("error", [Locked.error, NoCredentialsError("Unable to locate credentials")])
def test_credentials_that_are_missing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(Locked, "error", error)
    fsspec.register_implementation("locked", Locked, clobber=True)
    with pytest.raises(DataError, match=r"\ncredentials are those of the environment and of fsspec") as caught:
        list(find_objects("locked://k:SECRET1@b/a.jpg?sig=SECRET2"))
    assert str(caught.value).startswith("locked://b/a.jpg: ")
    assert "SECRET" not in str(caught.value)


def test_a_secret_in_the_text_of_an_error_by_itself() -> None:
    with pytest.raises(DataError) as caught, addresses.plain_errors("s3://KEYID:SECRET1@b/a?sig=SECRET2"):
        raise ValueError("bad key KEYID with SECRET1, SECRET2")
    assert str(caught.value).partition("\n")[0] == "s3://b/a: ValueError: bad key *** with ***, ***"
    assert caught.value.__suppress_context__


def test_only_errors_of_credentials_speak_of_them() -> None:
    for text, denied in (("Connect call failed ('127.0.0.1', 40111)", False), ("403, message='Forbidden'", True)):
        with pytest.raises(DataError) as caught, addresses.plain_errors("s3://b/a"):
            raise RuntimeError(text)
        assert ("credentials" in str(caught.value)) is denied
