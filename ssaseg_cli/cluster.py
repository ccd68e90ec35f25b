"""Ray: an instance on this machine, or a cluster that runs; and how many actors there is room for.

Ray is imported here alone, when it is used: it belongs to the extra `ray`.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ssaseg.cli.device import count_cores
from ssaseg.cli.errors import CommandError
from ssaseg.files.text import printable

LOCAL, AUTO = "local", "auto"
PORT = 6379  # of `ray start --head`
NEEDS = ("ray", "pyarrow", "pandas")  # what Ray Data imports
WAIT = 5.0  # for an answer from an address [s]
# A client's first bytes in HTTP/2, which gRPC speaks (RFC 9113, 3.4), with empty settings; and the type of the frame
# that a server then answers with.
PREFACE, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)), 4
# Threads of an actor on a CPU, at most: fewer actors take less memory, more need less waiting for one another.
MOST_THREADS = 4
STORE = 2**28  # memory of a local instance for what is sent [bytes]: only names and records are
LONGEST_FOLDER = 40  # name of its temporary folder, in which sockets have names of up to 107 bytes
FIX = "expected ray (this machine), ray://HOST:PORT of `ray start --head`, or ray://auto"


class Node(NamedTuple):
    """What a machine of the cluster has."""

    cpus: int
    gpus: int


class Share(NamedTuple):
    """Actors, and what each of them gets."""

    actors: int
    cpus: int  # threads that compute; 0: a node has more GPUs than cores
    gpus: int


def parse_engine(text: str) -> str:
    """The address in a value of `--engine`: HOST:PORT, `LOCAL` or `AUTO`. Raises ValueError that says what is wrong."""
    scheme, separator, rest = text.partition("://")
    if scheme != "ray" or (separator and not rest):
        raise ValueError(FIX)
    if not separator:
        return LOCAL
    return AUTO if rest == AUTO else parse_address(rest)


def parse_address(text: str) -> str:
    """HOST:PORT from HOST or HOST:PORT. Raises ValueError that says what is wrong."""
    try:
        parts = urlsplit(f"//{text}")
        port = PORT if parts.port is None else parts.port
    except ValueError as error:
        raise ValueError(f"{error}; {FIX}") from None
    if not parts.hostname or parts.netloc != text or "@" in text or len(text.split()) != 1 or not port:
        raise ValueError(FIX)
    return f"[{parts.hostname}]:{port}" if ":" in parts.hostname else f"{parts.hostname}:{port}"


def require_ray(address: str) -> str:
    """The address to connect to; that of the environment for `AUTO`.

    Raises CommandError if Ray is not installed, or nothing answers at the address within `WAIT` seconds.
    """
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        raise CommandError(f"--engine ray: needs {', '.join(missing)}, not installed\npip install 'ssaseg[ray]'")
    if address == AUTO and (given := os.environ.get("RAY_ADDRESS")):
        try:
            address = AUTO if given == AUTO else parse_address(given)
        except ValueError:
            expected = "expected HOST:PORT, as `ray start --head` prints it; ray:// there means Ray's client"
            raise CommandError(f"RAY_ADDRESS={printable(given)} in the environment\n{expected}") from None
    if address not in (LOCAL, AUTO):
        _require_answer(address)
    return address


def _require_answer(address: str) -> None:
    """Ray itself would try for more than a minute."""
    parts = urlsplit(f"//{address}")
    try:
        with socket.create_connection((parts.hostname, parts.port or PORT), timeout=WAIT) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return
            connection.sendall(PREFACE)
            answer = connection.recv(9)
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise _unreachable(address, f"cannot be reached ({printable(reason)})") from None
    if len(answer) < 4 or answer[3] != SETTINGS:
        raise _unreachable(address, "answers, but is not Ray")


def _unreachable(address: str, why: str) -> CommandError:
    fix = "expected a cluster's address, as `ray start --head` prints it, from a node of the cluster"
    return CommandError(f"--engine ray://{printable(address)}: {why}\n{fix}")


# ---- connecting --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Inside this context this process is connected to Ray; yields the module `ray`. address: as `require_ray` has it.

    An instance of this machine listens on 127.0.0.1 only, has its files in a temporary folder, and ends with the
    context. Raises CommandError if Ray cannot be started, or the cluster does not take this process.
    """
    local = address == LOCAL
    handlers = _handlers()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(_settings(local)))
        with _without_stderr():
            ray = import_module("ray")
        given: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
        if local:
            folder = _short_folder()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            given |= {"num_cpus": count_cores(), "include_dashboard": False, "_temp_dir": folder}
            given |= {"object_store_memory": STORE}
        stack.callback(ray.shutdown)
        try:
            with _without_stderr():
                ray.init(**given)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = printable(str(error).strip().partition("\n")[0])[:300]
            if local:
                raise CommandError(f"--engine ray: Ray could not be started: {reason}\nsee `ray status`") from None
            raise _unreachable(address, f"Ray does not connect: {reason}") from None
        for number, handler in handlers.items():  # Ray has replaced that of SIGTERM
            signal.signal(number, handler)
        yield ray


def _handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _settings(local: bool) -> dict[str, str]:
    """Variables of the environment that Ray reads, here and in the processes that it starts."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    settings["RAY_NUM_REDIS_GET_RETRIES"] = "3"  # to connect, one a second
    settings["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."  # what it prints when a process dies, on stdout
    if local:
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # its name on other systems too: only 127.0.0.1
        if "RAY_AUTH_MODE" not in os.environ:  # otherwise Ray would write a token into the user's home folder
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return settings


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Discards what libraries in C++ write there; errors are raised."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _short_folder() -> str:
    folder = tempfile.mkdtemp(prefix="ssaseg-ray-")
    if len(folder) <= LONGEST_FOLDER or not os.path.isdir("/tmp"):
        return folder
    os.rmdir(folder)
    return tempfile.mkdtemp(prefix="ssaseg-ray-", dir="/tmp")


# ---- room for actors ---------------------------------------------------------------------------------------------


def nodes_of(ray: Any) -> list[Node]:
    """The nodes of the cluster that are alive."""
    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [Node(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in alive]


def share_out(nodes: Sequence[Node], wanted: int | None, on_gpu: bool) -> Share:
    """How many actors, and how many cores and GPUs for each, so that all of them run at the same time.

    wanted: actors; None: one for each GPU, or on a CPU one for `MOST_THREADS` cores of a node. Raises CommandError if
    there is no room for so many.
    """
    what, total = ("GPUs", sum(node.gpus for node in nodes)) if on_gpu else ("cores", sum(node.cpus for node in nodes))
    if not total:
        raise CommandError(
            f"--engine ray: the cluster has no {what}\nexpected nodes with some; `ray status` lists them"
        )
    if wanted is not None and wanted > total:
        raise CommandError(f"--actors {wanted}: the cluster has {total} {what}\nuse at most --actors {total}")

    def room(cpus: int) -> int:
        if on_gpu:
            return sum(min(node.gpus, node.cpus // cpus) if cpus else node.gpus for node in nodes)
        return sum(node.cpus // cpus for node in nodes) if cpus else 0

    if on_gpu:
        actors = total if wanted is None else wanted
        return Share(actors, next(cpus for cpus in range(2 * MOST_THREADS, -1, -1) if room(cpus) >= actors), 1)
    if wanted is None:
        cpus = min(MOST_THREADS, *(node.cpus for node in nodes if node.cpus), total)
        return Share(room(cpus), cpus, 0)
    return Share(wanted, next(cpus for cpus in range(total // wanted, 0, -1) if room(cpus) >= wanted), 0)
