"""Runs an application with uvicorn in a thread, so that the main thread is free for signals."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ssaseg.cli.errors import CommandError

CONNECTIONS = 256  # at the same time; requests of others get 503
GRACE = 10  # seconds that a request in work gets when the server ends


def require_uvicorn() -> None:
    """Raises CommandError, which says how to install it, if the package is missing."""
    if find_spec("uvicorn") is None:
        raise CommandError("ssaseg serve: needs uvicorn, not installed\npip install 'ssaseg[serve]'")


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket for a server; port 0: any that is free. Raises CommandError for an address that cannot be used."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise CommandError(f"--host {host}: {reason(error)}\ngive an address of this machine, or 127.0.0.1") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        fix = "use another --port, or leave it out for one that is free; --host is an address of this machine"
        raise CommandError(f"--host {host} --port {port}: {reason(error)}\n{fix}") from None
    return bound


def reason(error: Exception) -> str:
    """Why the system refuses."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@contextmanager
def listening(app: Any, bound: socket.socket, seconds: float) -> Iterator[threading.Thread]:
    """Inside this context the application answers at the socket; yields the thread, which ends early if it fails.

    seconds: in which a connection must send a request's head. At the end, requests in work are answered, for `GRACE`
    seconds at most, and the socket is closed.
    """
    uvicorn = import_module("uvicorn")
    config = uvicorn.Config(
        app,
        http=patient_protocol(seconds),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",  # invalid requests are no news, and what goes wrong in the application it says itself
        access_log=False,  # tokens are in addresses
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE,
    )
    server = uvicorn.Server(config)
    # A daemon: a second signal need not wait for it.
    thread = threading.Thread(target=server.run, args=([bound],), name="serve", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        server.should_exit = True
        thread.join()


def patient_protocol(seconds: float) -> Any:
    """uvicorn's protocol, which waits for the head of a request for ever, with a limit of time for it."""
    base: Any = import_module("uvicorn.protocols.http.h11_impl").H11Protocol

    class Patient(base):
        """One connection. It ends if it is without a request, and without a new one, for `seconds` or longer."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._seen = None
            self._timer = self.loop.call_later(seconds, self._look)

        def connection_lost(self, error: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(error)

        def _look(self) -> None:
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self.cycle is self._seen:
                with suppress(OSError):
                    self.transport.abort()
                return
            self._seen = self.cycle
            self._timer = self.loop.call_later(seconds, self._look)

    return Patient
