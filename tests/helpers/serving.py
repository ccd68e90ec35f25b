"""An HTTP server on 127.0.0.1 for tests of downloads. It answers as a test says, and ends by itself."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Served:
    """A server that runs: its address, and what it was asked for."""

    address: str
    asked: list[tuple[str, str]] = field(default_factory=list)  # path, or whole address from a proxy; header Range


@contextmanager
def serving(answer: Answer) -> Iterator[Served]:
    """A server whose GET requests `answer` answers, in threads, while the context lasts."""
    served = Served("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append((self.path, self.headers.get("Range", "")))
            answer(self)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        served.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


def send(handler: BaseHTTPRequestHandler, content: bytes, status: int = 200, **headers: str) -> None:
    """An answer with its length and further headers, `_` for `-`; `Content_Length` replaces the true one."""
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(content)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def file_server(content: bytes, ranges: bool = True, cut: int | None = None) -> Answer:
    """Sends `content` for every path, or the part that is asked for. cut: the first answer ends after so many bytes."""
    left = [cut]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked, first, status, more = handler.headers.get("Range", ""), 0, 200, {}
        if asked and ranges:
            first, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
            more = {"Content_Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
            if first >= len(content):
                send(handler, b"", 416, Content_Range=f"bytes */{len(content)}")
                return
        part, end = content[first:], left[0]
        left[0] = None
        send(handler, part[:end], status, Content_Length=str(len(part)), **more)

    return answer
