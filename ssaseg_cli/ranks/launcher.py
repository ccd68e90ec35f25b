"""`--gpus N`: runs this command in N processes of this machine that work together, and handles how they end.

PyTorch's own launcher, torchrun, kills a process 30 seconds after Ctrl-C, reports a failure in twenty lines, and loses
the exit code of the process that failed. This launcher has no restarts and no network: it only starts processes,
which meet in a folder that no other user can enter.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssaseg.cli.device import LAUNCHED, count_cores
from ssaseg.cli.errors import CommandError
from ssaseg.files.text import printable

# The command, as `python -m ssaseg` would run it, but without the current directory in Python's search path: a file
# there may have the name of one of our modules.
COMMAND = (
    "import sys; sys.path[:1] = filter(None, sys.path[:1]); from ssaseg.cli.main import cli; cli(prog_name='ssaseg')"
)

# Seconds that the other ranks get to end by themselves after a rank has failed.
GRACE = 15.0

SECRET, STORE = "secret", "store"  # files in the folder where the ranks meet

POLL = 0.05  # seconds between two looks at the processes


class Killed(Exception):
    """A signal from outside ended a rank."""


def needs_ranks(gpus: int | None) -> bool:
    """Whether `--gpus` requests processes, and neither `--gpus` nor torchrun has started them yet.

    Raises CommandError if torchrun or a job system has started another number of processes.
    """
    if "RANK" not in os.environ:
        return (gpus or 1) > 1
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    if gpus is not None and LAUNCHED not in os.environ and here != str(gpus):
        raise CommandError(
            f"--gpus {gpus}: RANK is set, by torchrun or a job system; processes that it started here: {here}\n"
            "expected the same number; if torchrun starts the processes, leave out --gpus and use --nproc-per-node\n"
            "if --gpus should start them, run `env -u RANK ssaseg ...`"
        )
    return False


def require_environment() -> None:
    """Raises CommandError if RANK is set, but its companions are not as torchrun or `--gpus` set them."""
    fix = "start several processes with --gpus or torchrun, or one with `env -u RANK ssaseg ...`"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name, "0")
        if not (text.isascii() and text.isdecimal() and len(text) < 7):
            raise CommandError(f"{name}={printable(text)[:100]}: set in the environment\nexpected a number\n{fix}")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise CommandError(f"RANK={rank}, WORLD_SIZE={size}: set in the environment\nexpected a smaller rank\n{fix}")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if LAUNCHED not in os.environ:
        if missing:
            raise CommandError(f"RANK={rank} is set in the environment, but not {missing[0]}\nexpected both\n{fix}")
        return
    folder = Path(os.environ[LAUNCHED])
    try:
        facts = folder.stat()
        own = facts.st_uid == os.getuid() and not facts.st_mode & 0o77 and (folder / SECRET).is_file()
    except (OSError, ValueError):
        own = False
    if not own:
        raise CommandError(
            f"{LAUNCHED}={printable(str(folder))[:100]}: set in the environment, but not by --gpus\n"
            f"expected a folder that only you can enter, where the ranks meet\n"
            f"unset it; {fix}"
        )


def run_launch(count: int) -> int:
    """Runs the command line of this process in `count` processes; returns the exit code.

    Passes Ctrl-C and SIGTERM on to the ranks; each rank then saves and ends, without a time limit. Raises CommandError
    if a rank was killed.
    """
    # Each process has a session of its own: Ctrl-C on a terminal reaches only this process, which passes it on.
    processes: list[subprocess.Popen[bytes]] = []
    requests: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        requests.append(number)
        for process in processes:
            process.send_signal(number)

    meeting = make_meeting_folder()
    before = {each: signal.signal(each, pass_on) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        common = environment(count, meeting)
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(own_command(), env={**common, **place}, start_new_session=True))
        code = wait_for(processes)
        # A rank that did not handle signals yet is ended by them: with a negative code, or an error about the others.
        # If a rank found an error of its own at the same time, its exit code stays.
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
        shutil.rmtree(meeting, ignore_errors=True)
        for each, handler in before.items():
            signal.signal(each, handler)


def own_command() -> list[str]:
    """The command line of this process, to run it in another Python process."""
    return [sys.executable, "-c", COMMAND, *sys.argv[1:]]


def make_meeting_folder() -> Path:
    """A folder that only this user can enter, with a secret: the ranks of this machine meet there, not at a port.

    Raises OSError.
    """
    folder = Path(tempfile.mkdtemp(prefix="ssaseg-ranks-"))  # mode 0700
    try:
        (folder / SECRET).write_bytes(secrets.token_bytes(32))
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def environment(count: int, meeting: Path) -> dict[str, str]:
    """The environment of `count` ranks on this machine, which meet in the folder `meeting`: torchrun's variables except
    an address, and the number of threads per rank.
    """
    added = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), LAUNCHED: str(meeting)}
    cores = count_cores()
    # PyTorch prints pages about broken connections. The rank that failed, or this process, reports it in three lines.
    defaults = {"OMP_NUM_THREADS": str(max(cores // count, 1)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    # Connections between ranks stay inside this machine. Also, in some containers the address of the host's name is not
    # reachable.
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback is not None:
        defaults |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    return {**defaults, **os.environ, **added}


def wait_for(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all ranks. Returns the exit code of the first rank that failed; after a signal, that of all; else 0.

    `GRACE` seconds after a failure the other ranks are killed. Raises Killed if the first that failed was killed.
    """
    failed: dict[int, int] = {}  # rank -> exit code, of the ranks that failed first
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
    """Exit codes of the ranks that ended, except those that finished or that stopped at the request of a signal."""
    fine = (None, 0, 128 + signal.SIGINT, 128 + signal.SIGTERM)
    codes = {rank: process.poll() for rank, process in enumerate(processes)}
    return {rank: code for rank, code in codes.items() if code is not None and code not in fine}


def describe_killed(killed: dict[int, int], ranks: int) -> str:
    """Which of `ranks` ranks were killed, and how."""
    names = {-number: number.name for number in signal.Signals}
    who = ", ".join(f"rank {rank} by {names.get(code, f'signal {-code}')}" for rank, code in killed.items())
    return (
        f"killed from outside: {who}, of {ranks} ranks; the others ended with it\n"
        "the most common cause is that the system ran out of memory\n"
        "if training had started, --resume continues from the last saved state"
    )
