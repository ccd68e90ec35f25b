"""What the machine offers to this process."""

import os


def count_cores() -> int:
    """Number of cores that this process may use; the machine may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
