"""`--gpus N`: this command once more, in N processes of this machine that work together, and how they end.

torch's own launcher is for torchrun: it gives a process 30 seconds to save after Ctrl-C and kills it then, tells a
failure in twenty lines, and has the exit code of none of them. Here are no restarts and no network, only processes.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from ssaseg.cli.device import LAUNCHED, count_cores
from ssaseg.cli.errors import CommandError

# The command, as `python -m ssaseg.cli` would run it, but for the current directory among the modules: a file there
# that is called as one of ours is none of ours.
COMMAND = (
    "import sys; sys.path[:1] = filter(None, sys.path[:1]); from ssaseg.cli.main import cli; cli(prog_name='ssaseg')"
)

# Seconds that the others get to end by themselves once a rank has failed.
GRACE = 15.0

POLL = 0.05  # seconds


class Killed(Exception):
    """A rank was ended by a signal from outside."""


def needs_ranks(gpus: int | None) -> bool:
    """Whether `--gpus` asks for processes that neither it nor torchrun has started yet.

    Raises CommandError where something else than it has started another number of them.
    """
    if "RANK" not in os.environ:
        return (gpus or 1) > 1
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    if gpus is not None and LAUNCHED not in os.environ and here != str(gpus):
        raise CommandError(
            f"--gpus {gpus}: RANK is set, as torchrun or a job system does, and for processes on this machine: {here}\n"
            "expected the same number; where torchrun starts them, leave out --gpus and use its --nproc-per-node\n"
            "where --gpus shall start them, call it as `env -u RANK ssaseg ...`"
        )
    return False


def run_launch(count: int) -> int:
    """Runs this process's command line in `count` processes; returns its exit code.

    Ctrl-C and SIGTERM are passed on once; each rank then saves and ends, however long that takes. Raises CommandError
    where a rank was killed.
    """
    # Sessions of their own: Ctrl-C on a terminal reaches this process alone, which passes it on.
    processes: list[subprocess.Popen[bytes]] = []
    requests: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        requests.append(number)
        for process in processes:
            process.send_signal(number)

    before = {each: signal.signal(each, pass_on) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        common = environment(count)
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(own_command(), env={**common, **place}, start_new_session=True))
        code = wait_for(processes)
        # One that had not yet begun to heed signals ends of them: with a negative code, or an error about the others.
        # What a rank itself found wrong in the same moment stays.
        return 128 + requests[0] if requests and code not in (0, 2, 3) else code
    except Killed as error:
        if requests:
            return 128 + requests[0]
        raise CommandError(str(error)) from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for each, handler in before.items():
            signal.signal(each, handler)


def own_command() -> list[str]:
    """What this process was called with, for another Python."""
    return [sys.executable, "-c", COMMAND, *sys.argv[1:]]


def environment(count: int) -> dict[str, str]:
    """What `count` ranks of this machine find in their environment: torchrun's names, and their share of the cores."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    added = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHED: "1",
    }
    cores = count_cores()
    # PyTorch tells of broken connections in pages; the rank that broke them, or this process, tells it in three lines.
    defaults = {"OMP_NUM_THREADS": str(max(cores // count, 1)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # the address of the host's name leads nowhere in some containers
    return {**defaults, **os.environ, **added}


def wait_for(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all ranks. Returns the exit code of the first that failed, or that of all after a signal, or 0.

    After a failure the others are killed in `GRACE` seconds. Raises Killed where the first was killed itself.
    """
    failed: dict[int, int] = {}  # rank -> exit code, of those that were the first to fail
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        if not failed:
            failed = failures(processes)
            if failed:
                deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(POLL)
    failed = failed or failures(processes)
    killed = {rank: code for rank, code in failed.items() if code < 0}
    if killed:
        raise Killed(describe_killed(killed, len(processes)))
    return max(failed.values(), default=max(process.returncode for process in processes))


def failures(processes: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Ranks that have ended otherwise than done or after a signal that they heeded, and their exit codes."""
    fine = (None, 0, 128 + signal.SIGINT, 128 + signal.SIGTERM)
    codes = {rank: process.poll() for rank, process in enumerate(processes)}
    return {rank: code for rank, code in codes.items() if code is not None and code not in fine}


def describe_killed(killed: dict[int, int], ranks: int) -> str:
    """Which of `ranks` ranks were killed, and how."""
    names = {-number: number.name for number in signal.Signals}
    who = ", ".join(f"rank {rank} by {names.get(code, f'signal {-code}')}" for rank, code in killed.items())
    return (
        f"killed from outside: {who}, of {ranks} ranks; the others ended with it\n"
        "most often the system does so, because the memory was used up\n"
        "where training had begun, --resume goes on from the last state"
    )
