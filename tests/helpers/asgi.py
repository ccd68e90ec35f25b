"""Asks an ASGI application as a server would, without a server; and an engine for it that needs no network."""

import asyncio
import io
import json
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssaseg.cli.results.kinds import style_of
from ssaseg.cli.scoring.engines import Logits
from ssaseg.cli.scoring.inference import Inference
from ssaseg.cli.serving.networks import Network
from ssaseg.recipes import parse_protocol

TOKEN = "t0ken"
NAMES = ("red", "green", "blue")
COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


@dataclass
class Answer:
    """What came back; status 0: nothing."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        assert self.headers["content-type"] == "application/json"
        return str(self.json["error"])


async def ask_now(
    app: Any,
    path: str,
    body: bytes | Iterable[bytes] = b"",
    *,
    method: str = "",
    token: str | None = TOKEN,
    headers: dict[str, str] | None = None,
    stalls: bool = False,
    gone: asyncio.Event | None = None,
) -> Answer:
    """One request. stalls: the body never ends; gone: set when the client closes the connection."""
    path, _, query = path.partition("?")
    pieces = [body] if isinstance(body, bytes) else list(body)
    sent = {"host": "127.0.0.1:1", **({} if token is None else {"authorization": f"Bearer {token}"}), **(headers or {})}
    scope = {
        "type": "http",
        "method": method or ("POST" if any(pieces) else "GET"),
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
    }
    answer = Answer()

    async def receive() -> dict[str, Any]:
        if pieces:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": stalls or bool(pieces)}
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answer.body += message["body"]

    await app(scope, receive, send)
    return answer


def ask(app: Any, path: str, body: bytes | Iterable[bytes] = b"", **more: Any) -> Answer:
    return asyncio.run(ask_now(app, path, body, **more))


def together(*asked: Coroutine[Any, Any, Answer]) -> list[Answer]:
    async def run() -> list[Answer]:
        return list(await asyncio.gather(*asked))

    return asyncio.run(run())


class Strongest:
    """An engine whose classes are the channels: the strongest wins. It can be made to wait, or to fail.

    adapts: it also has coarse labels, in which red and blue are mistaken for one another.
    """

    what, device, channels, num_classes, gives_scores = "strongest", torch.device("cpu"), 3, 3, False
    takes = "normalized"

    def __init__(self, adapts: bool = False) -> None:
        self.has_coarse = adapts
        self.may_run = threading.Event()
        self.may_run.set()
        self.started = threading.Event()
        self.runs = 0
        self.fails: Callable[[], Exception] | None = None

    def logits(self, pixels: Tensor, coarse: bool = False) -> Logits:
        self.runs += 1
        self.started.set()
        assert self.may_run.wait(20)
        if self.fails:
            raise self.fails()
        return Logits(pixels, pixels.flip(1) if self.has_coarse and coarse else None)


def network(engine: Any = None, names: Sequence[str] = NAMES, name: str = "strongest.safetensors") -> Network:
    rules = parse_protocol({"scale": None, "multiple": None}, "test")
    inference = Inference(engine or Strongest(), rules, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return Network(name, inference, style_of(names, COLOURS), None, "strongest, linear")


def png(colour: Sequence[int], size: tuple[int, int] = (40, 48)) -> bytes:
    """A picture of one colour; size: height and width."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), colour, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
