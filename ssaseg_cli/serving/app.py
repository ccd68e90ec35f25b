"""The pages and end points of `ssaseg serve`: who may ask, how many wait, and what they get.

All but one network call runs in the server's only thread; networks run in a thread of their own, one image after the
other. So a number counts the requests, and a lock of asyncio is the queue.
"""

import asyncio
import contextlib
import ipaddress
import json
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.lanes import THREAD_NAME
from ssaseg.cli.serving.networks import KINDS, Network, Unusable, as_json, as_png, as_view
from ssaseg.cli.serving.page import Page
from ssaseg.cli.serving.requests import Gone, Message, Receive, Refused, Reply, Request, Send, refusal, send_reply

# Name in the query -> what makes the answer, its content type, and further headers.
FORMATS = {
    "json": (as_json, "application/json", {}),
    "png": (as_png, "image/png", {}),
    "view": (as_view, "application/octet-stream", {"content-encoding": "gzip"}),
}


class Limits(NamedTuple):
    """What a client may ask for."""

    bytes: int = 2**25  # of an image file
    pixels: int = 50_000_000  # of an image
    places: int = 16  # requests with images that are received, in the queue, in work, or being answered
    seconds: float = 30.0  # to send a request, to wait in the queue, and to read the answer


class App:
    """The application, as ASGI has it. `hosts`: names of this server in addition to localhost and all IP addresses."""

    def __init__(self, networks: Sequence[Network], token: str, limits: Limits, hosts: Sequence[str] = ()) -> None:
        self.networks = networks
        self.token = token.encode()
        self.limits = limits
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.page = Page()
        self.pool = ThreadPoolExecutor(1, THREAD_NAME)
        self.turn = asyncio.Lock()
        self.taken = 0
        self.recent = 0.1  # seconds that an image takes
        self.failed = ""  # why no image can be labelled any more

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        limits = self.limits
        with ExitStack() as held, contextlib.suppress(Gone):
            request: Request | None = None
            try:
                request = Request(scope, receive)
                reply = await self._answer(request, held)
            except Refused as refused:
                assert request is not None
                held.close()
                if refused.status in (413, 503):
                    await request.throw_away(limits.bytes, limits.seconds)
                reply = refusal(refused, request)
            except ValueError:  # too many parameters
                reply = Reply(b'{"error": "not a request that is understood"}', status=400)
            # One that does not read ends the connection.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(send_reply(reply, send), limits.seconds)

    async def _answer(self, request: Request, held: ExitStack) -> Reply:
        self._require_host(request)
        # Without the token, so that what watches the server need not know it. It says nothing of the networks.
        if request.path == "/healthz":
            require_method(request, "GET")
            return Reply(f"{self.failed or 'ok'}\n".encode(), "text/plain; charset=utf-8", 503 if self.failed else 200)
        self._require_token(request)
        if request.path == "/v1/predict":
            require_method(request, "POST")
            return await self._predict(request, held)
        if request.path not in ("/", "/v1/checkpoints"):
            raise Refused(404, "not found: there are /, /v1/checkpoints, /v1/predict and /healthz")
        require_method(request, "GET")
        return self.page.reply if request.path == "/" else self._checkpoints()

    # ---- who may ask ---------------------------------------------------------------------------------------------

    def _require_host(self, request: Request) -> None:
        """Refuses names that are not this server's: a page of such a name could read answers meant for others
        ("DNS rebinding"). An IP address is no name.
        """
        given = request.headers.get("host", "")
        try:
            host = urlsplit(f"//{given}").hostname or ""
        except ValueError:
            host = ""
        if host in self.hosts:
            return
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise Refused(403, "this server does not have the name in the header Host: use its IP address") from None

    def _require_token(self, request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        token = given if kind.lower() == "bearer" else request.query.get("token", "")
        if not secrets.compare_digest(token.encode("utf-8", "replace"), self.token):
            raise Refused(403, "the token is missing or wrong: use the address that `ssaseg serve` has printed")

    # ---- answers -------------------------------------------------------------------------------------------------

    def _checkpoints(self) -> Reply:
        limits = {"bytes": self.limits.bytes, "pixels": self.limits.pixels}
        found = [network.facts(number) for number, network in enumerate(self.networks, 1)]
        return Reply(json.dumps({"checkpoints": found, "limits": limits}).encode())

    async def _predict(self, request: Request, held: ExitStack) -> Reply:
        form = choice(request, "format", tuple(FORMATS))
        numbers = tuple(str(number) for number in range(1, len(self.networks) + 1))
        network = self.networks[int(choice(request, "checkpoint", numbers)) - 1]
        kind = choice(request, "labels", KINDS if network.adapts else KINDS[:1])
        held.enter_context(self._place())  # before the body is read: so much is in memory at most
        data = await request.body(self.limits.bytes, self.limits.seconds)
        make, content_type, headers = FORMATS[form]
        body = await self._unless_gone(request, self._in_turn(lambda: make(network, data, self.limits.pixels, kind)))
        return Reply(body, content_type, headers=headers)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.taken >= self.limits.places:
            raise self._busy(f"{self.taken} images are waiting: try again later")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    def _busy(self, reason: str) -> Refused:
        return Refused(503, reason, retry_after=str(max(1, math.ceil(self.taken * self.recent))))

    async def _in_turn(self, work: Callable[[], bytes]) -> bytes:
        """The result of `work`, which the other thread does when all that have come before are done."""
        seconds = self.limits.seconds
        try:
            await asyncio.wait_for(self.turn.acquire(), seconds)
        except asyncio.TimeoutError:
            raise self._busy(f"waited longer than {seconds:g} seconds for other images: try again later") from None
        loop = asyncio.get_running_loop()
        started = time.monotonic()

        def done(_: object) -> None:  # of the work itself, whose client may be gone
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(self.turn.release)

        future = self.pool.submit(work)
        future.add_done_callback(done)
        try:
            return await asyncio.wrap_future(future)
        except Unusable as error:
            hint = "" if error.known else "; send the file itself as the body, as curl --data-binary @FILE does"
            raise Refused(422 if error.known else 415, f"{error}{hint}") from None
        except Exception as error:
            reason = " ".join(f"{error}".split()) if str(error) else type(error).__name__
            echo(f"an image could not be labelled: {reason}", err=True)
            if not isinstance(error, FloatingPointError):
                self.failed = reason
            raise Refused(500, reason) from None
        finally:
            self.recent = time.monotonic() - started

    async def _unless_gone(self, request: Request, work: Awaitable[bytes]) -> bytes:
        """The result of `work`, which is given up if the client closes the connection."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.until_gone())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Gone
            return task.result()
        finally:
            task.cancel()
            gone.cancel()


def require_method(request: Request, method: str) -> None:
    """Raises Refused for another method; HEAD is as good as GET."""
    if request.method != method and (method, request.method) != ("GET", "HEAD"):
        raise Refused(405, f"expected {method}", allow=method)


def choice(request: Request, name: str, known: Sequence[str]) -> str:
    """The value of a parameter; the first one by default. Raises Refused for others."""
    value = request.query.get(name, known[0])
    if value not in known:
        raise Refused(400, f"unknown {name}: expected {' or '.join(known)}")
    return value
