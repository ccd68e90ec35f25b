"""Downloads from a server on 127.0.0.1 that answers well, badly, or not at all."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from serving import Answer, file_server, send, serving

from ssaseg.files import download as downloading
from ssaseg.files.download import DownloadError, WrongContent, download, hash_file

CONTENT = bytes(range(256)) * 800  # more than one piece
SHA = hashlib.sha256(CONTENT).hexdigest()
Handler = BaseHTTPRequestHandler


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_file(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    with serving(file_server(CONTENT)) as server:
        download(f"{server.address}/a.pth", tmp_path / "a", SHA[:8], progress=lambda *at: seen.append(at))
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert (names(tmp_path), server.asked) == (["a"], [("/a.pth", "")])
    assert (seen[0], seen[-1]) == ((0, len(CONTENT)), (len(CONTENT), len(CONTENT)))
    assert len(seen) > 2
    assert hash_file(tmp_path / "a") == SHA


@pytest.mark.parametrize("status", [204, 206, 304, 404, 500])
def test_a_server_without_the_file(tmp_path: Path, status: int) -> None:
    with serving(lambda handler: send(handler, b"", status)) as server:
        with pytest.raises(DownloadError, match=f"^the server answered {status} "):
            download(server.address, tmp_path / "a")
        (tmp_path / "a.partial").write_bytes(CONTENT[:9])
        with pytest.raises(DownloadError, match=f"^the server answered {status} "):
            download(server.address, tmp_path / "a")
    assert (tmp_path / "a.partial").read_bytes() == CONTENT[:9]  # the server may have it again tomorrow
    assert names(tmp_path) == ["a.partial"]


def test_wrong_content_is_kept_beside_the_place_of_the_right_one(tmp_path: Path) -> None:
    with serving(file_server(CONTENT)) as server:
        for number in ("", "1"):
            with pytest.raises(WrongContent, match=f"begins with {SHA[:10]}, expected 0123456789$") as caught:
                download(server.address, tmp_path / "a", "0123456789")
            assert caught.value.kept == tmp_path / f"a.wrong{number}"
            assert caught.value.kept.read_bytes() == CONTENT
    assert names(tmp_path) == ["a.wrong", "a.wrong1"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_was_cut_off_continues(tmp_path: Path, ranges: bool) -> None:
    with serving(file_server(CONTENT, ranges, cut=70_000)) as server:
        with pytest.raises(DownloadError, match=r"ended after 70,000 of 204,800 bytes; the next try continues"):
            download(server.address, tmp_path / "a", SHA)
        assert names(tmp_path) == ["a.partial"]
        seen: list[tuple[int, int | None]] = []
        download(server.address, tmp_path / "a", SHA, progress=lambda *at: seen.append(at))
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == ["", "bytes=70000-"]
    assert seen[0] == ((70_000 if ranges else 0), len(CONTENT))


@pytest.mark.parametrize(
    ("partial", "asked"),
    [
        (CONTENT, 1),  # killed before it was renamed
        (CONTENT + b"more", 2),
        (b"of another file", 1),
    ],
)
def test_other_partial_files(tmp_path: Path, partial: bytes, asked: int) -> None:
    (tmp_path / "a.partial").write_bytes(partial)
    with serving(file_server(CONTENT)) as server:
        try:
            download(server.address, tmp_path / "a", SHA)
        except WrongContent:  # the next one is right
            download(server.address, tmp_path / "a", SHA)
            assert partial == b"of another file"
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert len(server.asked) == asked + (partial == b"of another file")


def test_a_server_that_continues_elsewhere_is_asked_for_all(tmp_path: Path) -> None:
    def answer(handler: Handler) -> None:
        if handler.headers.get("Range"):
            send(handler, CONTENT[5:], 206, Content_Range=f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            send(handler, CONTENT)

    (tmp_path / "a.partial").write_bytes(CONTENT[:3])
    with serving(answer) as server:
        download(server.address, tmp_path / "a", SHA)
    assert [asked for _, asked in server.asked] == ["bytes=3-", ""]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:,a", "//[", "gopher://\x1b"])
def test_redirects_to_what_is_not_http(tmp_path: Path, target: str) -> None:
    reason = pytest.raises(DownloadError, match=r"redirects to .*, which is not opened")
    with serving(lambda handler: send(handler, b"", 302, Location=target)) as server, reason as caught:
        download(server.address, tmp_path / "a")
    assert "\x1b" not in str(caught.value)
    assert names(tmp_path) == []


def test_redirects(tmp_path: Path) -> None:
    def answer(handler: Handler) -> None:
        if handler.path == "/there/a":
            send(handler, CONTENT)
        else:
            send(handler, b"", 302, Location="../there/a" if handler.path == "/here/a" else "/round")

    with serving(answer) as server:
        download(f"{server.address}/here/a", tmp_path / "a", SHA)
        with pytest.raises(DownloadError, match="more than 8 times"):
            download(f"{server.address}/round", tmp_path / "b")
    assert names(tmp_path) == ["a"]
    with pytest.raises(DownloadError, match="redirects to http://b, which is not opened"):
        downloading._moved("https://a", "http://b")
    assert downloading._moved("http://a/x", "https://b/y") == "https://b/y"


def chunks(endless: bool) -> Answer:
    def answer(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            for _ in range(10_000 if endless else 3):
                handler.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")
        except OSError:  # the client has seen enough
            pass

    return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda handler: send(handler, b"x", Content_Length="9999999"), "9,999,999 bytes, more than the 300,000 that"),
        (chunks(True), "sends more than the 300,000 bytes"),
        (chunks(False), "cut off; the next try continues"),
        (lambda handler: send(handler, b"log in", Content_Type="text/html; charset=x"), "a web page, not with a file"),
        (lambda handler: send(handler, CONTENT, Content_Encoding="gzip"), "compressed"),
        (lambda handler: send(handler, b""), "the answer is empty"),
        (lambda handler: handler.wfile.write(b"SSH-2.0\r\n"), "SSH-2.0"),
        (lambda handler: None, "closed connection"),
    ],
)
def test_answers_that_are_not_the_file(tmp_path: Path, answer: Answer, reason: str) -> None:
    with serving(answer) as server, pytest.raises(DownloadError, match=reason) as caught:
        download(server.address, tmp_path / "a", limit=300_000)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == (["a.partial"] if "cut off" in reason else [])


def test_no_more_than_the_stated_length_is_taken(tmp_path: Path) -> None:
    with serving(lambda handler: send(handler, CONTENT, Content_Length="9")) as server:
        download(server.address, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT[:9]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:1/a", "Connection refused"),
        ("file:///etc/passwd", "unknown url type"),
        ("ftp://127.0.0.1/a", "unknown url type"),
        ("a.pth", "unknown url type"),
        ("http://a b/", "."),
    ],
)
def test_addresses_that_cannot_be_opened(tmp_path: Path, address: str, reason: str) -> None:
    with pytest.raises(DownloadError, match=reason):
        download(address, tmp_path / "a")
    assert names(tmp_path) == []


def test_a_server_that_never_answers(tmp_path: Path) -> None:
    done = threading.Event()
    with serving(lambda handler: bool(done.wait(5)) or None) as server:
        with pytest.raises(DownloadError, match=r"no answer for 0\.05 seconds"):
            download(server.address, tmp_path / "a", timeout=0.05)
        done.set()


@pytest.mark.parametrize("excepted", [False, True])
def test_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excepted: bool) -> None:
    with serving(file_server(CONTENT)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)
        if excepted:
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            with serving(file_server(CONTENT)) as server:
                download(server.address, tmp_path / "a", SHA)
        else:
            download("http://weights.invalid/a.pth", tmp_path / "a", SHA)
    assert proxy.asked == ([] if excepted else [("http://weights.invalid/a.pth", "")])


def test_links_and_pipes_are_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"keep")
    makers: list[Callable[[Path], object]] = [
        lambda path: path.symlink_to(tmp_path / "secret"),
        lambda path: path.hardlink_to(tmp_path / "secret"),
        os.mkfifo,
    ]
    with serving(file_server(CONTENT)) as server:
        for number, make in enumerate(makers):
            make(tmp_path / f"{number}.partial")
            with pytest.raises(OSError, match=f"{number}.partial"):
                download(server.address, tmp_path / str(number))
    assert (tmp_path / "secret").read_bytes() == b"keep"
    assert server.asked == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with serving(file_server(CONTENT)) as server, pytest.raises(OSError, match="No space left") as caught:
        download(server.address, tmp_path / "a", SHA)
    assert caught.value.filename == str(tmp_path / "a.partial")
    assert names(tmp_path) == ["a.partial"]
