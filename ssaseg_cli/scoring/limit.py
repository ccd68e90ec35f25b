"""A limit of memory for one image: the allocation fails, instead of the system that kills the whole command."""

import contextlib
import re
import resource
import sys
from collections.abc import Iterator

from ssaseg.files.reading import read_text

SHARE = 0.9  # of the free memory, which other programs need too
FREE = ("MemAvailable", "SwapFree")  # of /proc/meminfo
# Limits of containers: the limit, and what is used, in bytes.
GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@contextlib.contextmanager
def memory_limit(free: int | None = None) -> Iterator[None]:
    """Inside this context this process can take `SHARE` of `free` bytes more than it has now; more is a MemoryError.

    free: by default what the system has. Does nothing where that is not known.
    """
    free = free_memory() if free is None else free
    used = kilobytes("/proc/self/status", "VmData")
    if free is None or used is None or sys.platform != "linux":
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + int(SHARE * free)
    lower = [each for each in (limit, before, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(lower), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def free_memory() -> int | None:
    """Bytes that the system can give to this process, within the limits of its container; None: not known."""
    parts = [kilobytes("/proc/meminfo", name) for name in FREE]
    if parts[0] is None:
        return None
    free = sum(part or 0 for part in parts)
    for limit, usage in GROUPS:
        with contextlib.suppress(OSError, ValueError):  # "max", or not in a container
            free = min(free, int(read_text(limit)) - int(read_text(usage)))
    return max(free, 0)


def kilobytes(file: str, name: str) -> int | None:
    """The value of a line "NAME: 12 kB", in bytes."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB", read_text(file), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None
