"""HTTP requests and replies, by the interface ASGI, which uvicorn and other servers call."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Of the largest body that is taken: so much more is read and thrown away, so that a client that sends before it reads
# gets the reason for which it is refused.
THROWN_AWAY = 4
PIECE = 2**16  # bytes of a reply that are sent at a time
# In every reply. The page has its own Content-Security-Policy.
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


class Gone(Exception):
    """The client has closed the connection."""


class Refused(Exception):
    """A request that is answered with an error; the text is its reason."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class Reply:
    """What is sent."""

    body: bytes
    kind: str = "application/json"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Request:
    """One request."""

    def __init__(self, scope: Message, receive: Receive) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        # Of several values the first counts.
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=20)
        self.query = dict(reversed(pairs))
        self.receive = receive
        self.complete = False  # whether its body has been read

    async def body(self, limit: int, seconds: float) -> bytes:
        """The body. Raises Refused if it has more than `limit` bytes or takes longer; Gone."""
        too_large = Refused(413, f"larger than {limit / 2**20:g} MiB: send a smaller image")
        if self._announced() > limit:
            raise too_large
        pieces: list[bytes] = []

        async def read() -> None:
            length = 0
            async for piece in self._pieces():
                length += len(piece)
                if length > limit:
                    raise too_large
                pieces.append(piece)

        try:
            await asyncio.wait_for(read(), seconds)
        except asyncio.TimeoutError:
            raise Refused(408, f"not received within {seconds:g} seconds: send a smaller image") from None
        return b"".join(pieces)

    async def throw_away(self, limit: int, seconds: float) -> None:
        """Reads the rest of the body, unless it is far too large, takes too long, or waits for a permission."""

        async def read() -> None:
            length = 0
            async for piece in self._pieces():
                length += len(piece)
                if length > THROWN_AWAY * limit:
                    return

        if self.complete or "expect" in self.headers or self._announced() > THROWN_AWAY * limit:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), seconds)

    async def until_gone(self) -> None:
        """Waits until the client closes the connection; after the body."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def _pieces(self) -> Any:
        while not self.complete:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Gone
            self.complete = not message.get("more_body", False)
            yield message.get("body", b"")

    def _announced(self) -> int:
        length = self.headers.get("content-length", "")
        return int(length) if length.isdecimal() else 0


def refusal(refused: Refused, request: Request) -> Reply:
    """The reply to a refused request: JSON with its reason."""
    close = {} if request.complete or request.method in ("GET", "HEAD") else {"connection": "close"}
    reason = json.dumps({"error": str(refused)}).encode()
    return Reply(reason, status=refused.status, headers=refused.headers | close)


async def send_reply(reply: Reply, send: Send) -> None:
    """Sends a reply piece by piece, so that a client that does not read it does not fill the memory."""
    headers = {**HEADERS, "content-type": reply.kind, "content-length": str(len(reply.body)), **reply.headers}
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": encoded})
    body = memoryview(reply.body)
    for start in range(0, len(body), PIECE):
        piece = bytes(body[start : start + PIECE])
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
