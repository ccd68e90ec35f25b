"""How a rank finds out that another one has ended or is late, and prints the error that ends it itself."""

import os
import traceback

from ssaseg.cli.errors import print_error

# Parts of the errors of gloo, NCCL and the store when the other process has ended. NCCL has more such messages.
LOST = (
    "closed by peer", "reset by peer", "closed by remote peer", "Remote peer closed", "Broken pipe",
    "Connection refused", "Connection was likely closed", "remote process exit", "communicator was aborted",
)  # fmt: skip


LATE = ("Timed out", "timed out", "wait timeout")  # the same, when it has not answered for PATIENCE


def is_loss(error: BaseException) -> bool:
    """Whether an error means that another rank has ended."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def is_late(error: BaseException) -> bool:
    """Whether an error means that another rank has not answered in time."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LATE)


def first_line(error: BaseException) -> str:
    """The first line of an error, cut to 200 characters."""
    return str(error).strip().partition("\n")[0][:200]


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is running, or has ended without its parent having noticed it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def print_any_error(error: BaseException) -> int:
    """Prints an error as the command does; a bug is printed with its traceback. Returns the exit code."""
    try:
        if not isinstance(error, Exception) or os.environ.get("SSASEG_DEBUG") == "1":
            raise error
        return print_error(error)
    except BaseException:
        traceback.print_exception(error)
        return 1
