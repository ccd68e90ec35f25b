"""`ssaseg serve` as a server on 127.0.0.1: many clients, slow ones, its end, and its page in a browser."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import webbrowser
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from asgi import Strongest, network, png
from calling import call
from places import PROJECT
from predicting import save_checkpoint

from ssaseg.cli.serving import server
from ssaseg.cli.serving.app import App, Limits
from ssaseg.cli.serving.server import bound_socket, listening

pytestmark = pytest.mark.usefixtures("one_thread")
needs_uvicorn = pytest.mark.skipif(server.find_spec("uvicorn") is None, reason="needs the extra serve: uvicorn")


@contextmanager
def running(app: App, seconds: float = 30) -> Iterator[int]:
    """A server of the application; yields its port."""
    with bound_socket("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with listening(app, bound, seconds):
            end = time.monotonic() + 20
            while ask(port, "/healthz")[0] != 200:
                assert time.monotonic() < end
            yield port
        app.pool.shutdown()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


def ask(port: int, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one request; status 0 if there is no server yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        method = "GET" if body is None else "POST"
        connection.request(method, path, body, {"Authorization": "Bearer t0ken"})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    except ConnectionRefusedError:
        return 0, {}, b""
    finally:
        connection.close()


@needs_uvicorn
def test_many_clients_at_once() -> None:
    """32 clients with a picture each: all get their own labels, or 503 and when to come back."""
    engine = Strongest()
    app = App([network(engine)], "t0ken", Limits(places=8))
    refused: list[int] = []

    def client(number: int) -> list[float]:
        colour = [9 if channel == number % 3 else 0 for channel in range(3)]
        while True:
            status, headers, body = ask(port, "/v1/predict", png(colour, (40, 40 + number)))
            if status == 200:
                answer = json.loads(body)
                assert answer["width"] == 40 + number
                return [each["share"] for each in answer["classes"]]
            assert (status, json.loads(body)["error"].partition(": ")[2]) == (503, "try again later")
            refused.append(int(headers["retry-after"]))
            time.sleep(0.1)

    with running(app) as port, ThreadPoolExecutor(32) as clients:
        engine.may_run.clear()
        waiting = [clients.submit(client, number) for number in range(32)]
        while not refused:
            time.sleep(0.01)
        assert app.taken == 8
        engine.may_run.set()
        shares = [each.result(60) for each in waiting]
        assert shares == [[float(channel == number % 3) for channel in range(3)] for number in range(32)]
        assert ask(port, "/healthz")[2] == b"ok\n"
    assert (app.taken, engine.runs) == (0, 32)


@needs_uvicorn
def test_the_documented_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    page = (PROJECT / "docs/serve.md").read_text(encoding="utf-8")
    (program,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    lines = re.findall("^curl .*", page, re.MULTILINE)
    assert len(lines) == 2
    (tmp_path / "photo.jpg").write_bytes(png((0, 9, 0)))
    monkeypatch.chdir(tmp_path)
    with running(App([network()], "t0ken", Limits())) as port:
        program, *lines = (each.replace("8000", str(port)).replace("TOKEN", "t0ken") for each in (program, *lines))
        exec(program, {})
        assert capfd.readouterr().out == "green: 100.0%\n"
        if shutil.which("curl"):
            for line in lines:
                subprocess.run(["sh", "-c", line.replace("curl", "curl --silent --noproxy '*'")], check=True)
            assert json.loads(capfd.readouterr().out)["classes"][1]["share"] == 1
            assert (tmp_path / "labels.png").read_bytes().startswith(b"\x89PNG")


@needs_uvicorn
def test_what_is_sent_too_slowly_or_too_large_is_closed() -> None:
    app = App([network()], "t0ken", Limits(bytes=100_000, seconds=0.2))
    with running(app, seconds=0.1) as port:
        for beginning in (b"", b"GET / HTTP/1.1\r\nHost: 127"):
            with socket.create_connection(("127.0.0.1", port), 20) as connection, suppress(ConnectionResetError):
                connection.sendall(beginning)
                assert connection.recv(100) == b""
        with socket.create_connection(("127.0.0.1", port), 20) as connection:
            connection.sendall(
                b"POST /v1/predict?token=t0ken HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n"
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        # A client that sends all before it reads gets the reason.
        status, _, body = ask(port, "/v1/predict", bytes(300_000))
        assert (status, json.loads(body)["error"][:11]) == (413, "larger than")
        assert ask(port, "/v1/predict", png((9, 0, 0)))[0] == 200


@needs_uvicorn
def test_the_image_in_work_is_answered_at_the_end() -> None:
    engine = Strongest()
    app = App([network(engine)], "t0ken", Limits())
    with ThreadPoolExecutor(1) as client:
        with running(app) as port:
            engine.may_run.clear()
            waiting = client.submit(ask, port, "/v1/predict", png((0, 9, 0)))
            assert engine.started.wait(20)
            threading.Timer(0.3, engine.may_run.set).start()
        assert waiting.result(20)[0] == 200


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@needs_uvicorn
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, number: int, code: int) -> None:
    """--open opens the address; here, a client that asks there, and then stops the command."""
    answers: list[tuple[int, bytes]] = []

    def visit(address: str) -> None:
        port, path = address.removeprefix("http://127.0.0.1:").split("/", 1)
        try:
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=20)
            for query in (path, "?token=wrong", f"v1/checkpoints{path}"):
                connection.request("GET", f"/{query}")
                answer = connection.getresponse()
                answers.append((answer.status, answer.read()))
        finally:
            os.kill(os.getpid(), number)

    def opened(address: str) -> None:
        threading.Thread(target=visit, args=(address,)).start()

    monkeypatch.setattr(webbrowser, "open_new_tab", opened)
    result = call("serve", checkpoint, "--device", "cpu", "--open", "--max-megapixels", "2.5", "--max-megabytes", "0.5")
    assert result.exit_code == code, result.output
    assert [status for status, _ in answers] == [200, 403, 200]
    assert answers[0][1].startswith(b"<!doctype html>")
    assert json.loads(answers[2][1])["limits"] == {"bytes": 2**19, "pixels": 2_500_000}
    assert result.stdout.count("\n") == 1
    assert result.stdout.startswith("http://127.0.0.1:")
    assert len(result.stdout.partition("token=")[2].strip()) == 32
    assert result.stderr.startswith("tiny.safetensors: seaformer_t, ssa; computed by torch, folded, float32 on cpu\n")
    assert result.stderr.endswith("\nstopped\n")


@needs_uvicorn
def test_addresses_that_cannot_be_used(checkpoint: Path) -> None:
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        result = call("serve", checkpoint, "--port", port)
    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"error: --host 127.0.0.1 --port {port}: Address already in use\nuse another --port"
    )
    for host in ("256.1.1.1", "192.0.2.1", "not a host", ""):
        result = call("serve", checkpoint, "--host", host)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: --host {host}")
        assert result.stderr.count("\n") <= 3


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    result = call("serve", checkpoint)
    assert result.exit_code == 2
    assert result.stderr == "error: ssaseg serve: needs uvicorn, not installed\npip install 'ssaseg[serve]'\n"
